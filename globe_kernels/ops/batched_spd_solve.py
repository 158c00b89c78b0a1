"""Solves of many small symmetric positive semidefinite systems, each with the least ridge that it needs.

    (gram[n] + ridge[n] * scale[n] * I) solution[n] = rhs[n]        scale[n] = mean(diag(gram[n])), 1 unless positive

Shapes: N systems of order k with q right-hand sides each: gram (N, k, k), of which the lower triangles are read, and
rhs, solution (N, k, q); float32 or float64. By Cholesky: where a pivot is not above its own rounding error,
k * eps * scale, the ridge of that system alone is raised, from no less than eps, up to three times by a factor of 100.
"""

import importlib
import importlib.util
from functools import lru_cache
from typing import NamedTuple

import torch

_RAISES, _RAISE = 3, 100.0  # csrc/batched_spd_solve.cuh has the same
# Orders that the CUDA extension takes on every card from sm_80 on; some have the shared memory for 128 in float64 too.
LARGEST = {torch.float32: 128, torch.float64: 110}


class Faster(NamedTuple):
    """Sizes at which the CUDA extension was measured to be faster than torch."""

    dtype: torch.dtype
    k: int  # up to
    q: int  # up to
    systems: int  # from


# Empty: the extension has not been timed on a GPU. What benchmarks/spd.py records there decides what belongs here.
FASTER: tuple[Faster, ...] = ()


class Solved(NamedTuple):
    """Of N systems. The condition is the ratio of the largest to the smallest squared value on the diagonal of the
    Cholesky factor: a lower bound of the condition number of the system as it was solved, ridge included."""

    solution: torch.Tensor  # (N, k, q); NaN for a system that failed
    condition: torch.Tensor  # (N,); NaN for a system that failed
    ridge_raised: torch.Tensor  # (N,) int32: how often, -1 for a system that failed


@lru_cache
def load_extension() -> bool:
    """Whether the CUDA extension is built; it is loaded then. Raises ImportError when it is built for another torch."""
    if importlib.util.find_spec("globe_kernels._csrc") is None:
        return False
    importlib.import_module("globe_kernels._csrc")
    return True


def uses_extension(k: int, q: int, systems: int, dtype: torch.dtype) -> bool:
    """Whether the op prefers the CUDA extension, where it is built, at these sizes."""
    if k > LARGEST[dtype]:
        return False
    return any(dtype == row.dtype and k <= row.k and q <= row.q and systems >= row.systems for row in FASTER)


def launch_batched_spd_solve(gram: torch.Tensor, rhs: torch.Tensor, ridge: float = 1e-6) -> Solved:
    """As `batched_spd_solve`, by the CUDA extension, which `load_extension` has loaded."""
    return Solved(*torch.ops.globe_csrc.batched_spd_solve(gram.contiguous(), rhs.contiguous(), ridge))


@torch.library.custom_op("globe::batched_spd_solve", mutates_args=())
def batched_spd_solve(
    gram: torch.Tensor, rhs: torch.Tensor, ridge: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of Solved, from gram (N, k, k) and rhs (N, k, q); nobody waits for the device.

    A NaN or an infinity in the lower triangle of a gram fails that system; in a right-hand side it stays in its column.
    Raises ValueError when shapes or dtypes do not fit or the ridge, which is relative to `scale`, is negative.
    """
    if gram.ndim != 3 or rhs.ndim != 3 or not gram.shape[1] or gram.shape != (*rhs.shape[:2], rhs.shape[1]):
        raise ValueError(
            f"batched_spd_solve: gram is {tuple(gram.shape)} and rhs {tuple(rhs.shape)}; expected (N, k, k) and "
            "(N, k, q) with k of at least 1."
        )
    if gram.dtype not in LARGEST or rhs.dtype != gram.dtype:
        raise ValueError(
            f"batched_spd_solve: gram is {gram.dtype} and rhs {rhs.dtype}; convert both to float32 or both to float64."
        )
    if not ridge >= 0:
        raise ValueError(f"batched_spd_solve: ridge is {ridge}; expected 0 or more.")
    systems, k, q = rhs.shape
    if gram.is_cuda and uses_extension(k, q, systems, gram.dtype) and load_extension():
        return launch_batched_spd_solve(gram, rhs, ridge)
    return batched_spd_solve_ref(gram, rhs, ridge)


@batched_spd_solve.register_fake
def _(gram, rhs, ridge=1e-6):
    systems = gram.shape[0]
    return rhs.new_empty(rhs.shape), gram.new_empty(systems), gram.new_empty(systems, dtype=torch.int32)


def batched_spd_solve_ref(gram: torch.Tensor, rhs: torch.Tensor, ridge: float = 1e-6) -> Solved:
    """As `batched_spd_solve`, for any k. On a GPU every system is factorised four times, so that nobody waits."""
    systems, k, _ = rhs.shape
    eps = torch.finfo(gram.dtype).eps
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    scale = torch.where(mean > 0, mean, 1.0)
    factor = torch.full_like(gram, torch.nan, memory_format=torch.contiguous_format)
    raised = torch.full((systems,), -1, dtype=torch.int32, device=gram.device)
    for attempt in range(_RAISES + 1):
        shifted = gram.clone()
        shifted.diagonal(dim1=1, dim2=2).add_(ridge * scale[:, None])
        found, info = torch.linalg.cholesky_ex(shifted)
        pivots = found.diagonal(dim1=1, dim2=2).square()
        sound = (info == 0) & (pivots > (k * eps * scale)[:, None]).all(1)
        taken = sound & (raised < 0)
        factor = torch.where(taken[:, None, None], found, factor)
        raised = torch.where(taken, attempt, raised)
        if gram.device.type == "cpu" and (raised >= 0).all():
            break
        ridge = _RAISE * max(ridge, eps)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    forward = torch.linalg.solve_triangular(factor, rhs, upper=False)
    solution = torch.linalg.solve_triangular(factor.mT, forward, upper=True)
    return Solved(solution.contiguous(), pivots.amax(1) / pivots.amin(1), raised)
