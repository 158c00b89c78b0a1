"""Import Triton, or a stand-in that lets files with kernels be imported without it; decide where kernels run."""

import warnings
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable)


class _Missing:
    """Stand in for `triton` and `triton.language`: every attribute and every call is another stand-in."""

    def __getattr__(self, name: str) -> "_Missing":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Missing":
        return self


triton: Any
tl: Any
try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = tl = _Missing()
    HAS_TRITON = False


@lru_cache
def _warn_once(device_type: str) -> None:
    warnings.warn(
        f"GloBE has kernels for CUDA and ROCm devices and none for {device_type!r}; the experts run on the torch "
        "reference there.",
        stacklevel=3,
    )


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` runs its kernel: on a GPU always, elsewhere never.

    Raises RuntimeError on a GPU without Triton, so that nobody runs the slow reference there unawares, and warns once
    about accelerators that have no kernels.
    """
    if tensor.device.type != "cuda":
        if tensor.device.type != "cpu":
            _warn_once(tensor.device.type)
        return False
    if not HAS_TRITON:
        raise RuntimeError(
            "The model is on a GPU and Triton is not installed; run pip install triton, or move the model to the CPU "
            "to run the torch reference."
        )
    return True


def on_its_device(function: _Function) -> _Function:
    """Return `function`, run on the device of its first argument, which is a tensor or a list of tensors.

    Triton launches on the current device. In a model that is spread over several GPUs the current device need not hold
    the tensors: a kernel that is launched elsewhere fails, or reads other memory.
    """

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if not first.is_cuda:
            return function(*args, **kwargs)
        with torch.cuda.device(first.device):
            return function(*args, **kwargs)

    return guarded  # pyright: ignore[reportReturnType]
