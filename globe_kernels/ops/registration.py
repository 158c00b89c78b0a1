"""Register the ops of the product with torch, so that compilers and captures see one opaque call with a fake.

An op is defined through torch.library.Library itself. The decorator torch.library.custom_op does the same and then
looks every default and every written tensor of a call up in Python: for `moe_ffn_cached` a quarter of a millisecond,
which is more than a step of decoding takes on a card.
"""

from collections.abc import Callable
from typing import Any

import torch

from globe_kernels.ops.triton_import import on_its_device

_LIBRARY = torch.library.Library("globe", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def register_op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define `torch.ops.globe.<schema>`, which calls `run` on the device of its tensors, and return the op.

    `schema` is that of a torch operator, such as "scale(Tensor x, float by) -> Tensor"; `fake` returns empty results of
    the right shape, dtype and device. The op has no gradient: a backward through its result raises RuntimeError.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, on_its_device(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"globe::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.globe, name).default

    def below(keyset: Any, arguments: tuple) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, arguments: tuple, *tensors: torch.Tensor) -> Any:
            return below(keyset, arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise RuntimeError(f"globe::{name} has no gradient; train the dense model, or run under torch.no_grad().")

    def autograd(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            # in lists too: autograd sees only the tensors that it is given one by one
            lists = (argument if isinstance(argument, (list, tuple)) else [argument] for argument in arguments)
            flat = (item for items in lists for item in items if isinstance(item, torch.Tensor))
            tensors = [tensor for tensor in flat if tensor.requires_grad]
            if tensors:
                return NoGradient.apply(keyset, arguments, *tensors)
        return below(keyset, arguments)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    return op
