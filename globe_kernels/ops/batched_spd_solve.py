"""Solve many small symmetric positive definite systems by Cholesky.

    gram[n] @ solution[n] = rhs[n]

Shapes: N systems of order k with q right-hand sides each: gram (N, k, k), of which the lower triangles are read, and
rhs, solution (N, k, q); float32 or float64. A system whose factorisation meets a pivot that is not positive has failed;
the caller decides how much ridge it gets (globe_fit.linalg).
"""

import importlib
import importlib.util
from functools import lru_cache
from typing import NamedTuple

import torch

# The largest order that the CUDA extension solves on every card from sm_80 on. Some cards have the shared memory for
# 128 in float64 too.
LARGEST = {torch.float32: 128, torch.float64: 110}


class Faster(NamedTuple):
    """Sizes at which the CUDA extension was measured to be faster than torch."""

    dtype: torch.dtype
    k: int  # up to
    q: int  # up to
    systems: int  # from


# Empty: no GPU has timed the extension. Rows of benchmarks/spd.py decide which sizes belong here.
FASTER: tuple[Faster, ...] = ()


class Solved(NamedTuple):
    """The outcome for N systems."""

    solution: torch.Tensor  # (N, k, q); undefined for a system that failed
    info: torch.Tensor  # (N,) int32; 0 unless the system failed


@lru_cache
def load_extension() -> bool:
    """Load the CUDA extension; return whether it is built. Raises ImportError when it is built for another torch."""
    if importlib.util.find_spec("globe_kernels._csrc") is None:
        return False
    importlib.import_module("globe_kernels._csrc")
    return True


def uses_extension(k: int, q: int, systems: int, dtype: torch.dtype) -> bool:
    """Tell whether the CUDA extension, where it is built, was measured to be faster than torch at these sizes."""
    if k > LARGEST.get(dtype, 0):
        return False
    return any(dtype == row.dtype and k <= row.k and q <= row.q and systems >= row.systems for row in FASTER)


def batched_spd_solve(gram: torch.Tensor, rhs: torch.Tensor) -> Solved:
    """Solve by the CUDA extension where it is built and faster, else by torch."""
    systems, k, q = rhs.shape
    if gram.is_cuda and uses_extension(k, q, systems, gram.dtype) and load_extension():
        return launch_batched_spd_solve(gram, rhs)
    return batched_spd_solve_ref(gram, rhs)


def launch_batched_spd_solve(gram: torch.Tensor, rhs: torch.Tensor) -> Solved:
    """Solve by the CUDA extension, which `load_extension` has loaded; nobody waits for the device."""
    return Solved(*torch.ops.globe_csrc.batched_spd_solve(gram.contiguous(), rhs.contiguous()))


def batched_spd_solve_ref(gram: torch.Tensor, rhs: torch.Tensor) -> Solved:
    """Solve by torch, for any k."""
    factor, info = torch.linalg.cholesky_ex(gram)
    return Solved(torch.cholesky_solve(rhs, factor), info)
