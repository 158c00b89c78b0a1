"""Which path an op takes, and what a user is told about it."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from globe_kernels.ops import triton_import
from globe_kernels.ops.triton_import import use_triton


def on(device_type: str) -> Any:
    """All that `use_triton` asks of a tensor."""
    return SimpleNamespace(device=SimpleNamespace(type=device_type))


def test_a_gpu_without_triton_is_an_error_and_never_a_slow_path(monkeypatch):
    monkeypatch.setattr(triton_import, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="pip install triton, or move the model to the CPU"):
        use_triton(on("cuda"))
    monkeypatch.setattr(triton_import, "HAS_TRITON", True)
    assert use_triton(on("cuda"))


def test_a_cpu_runs_the_reference_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not use_triton(torch.zeros(1))


def test_another_accelerator_runs_the_reference_with_one_warning():
    triton_import._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="none for 'mps'; the experts run on the torch reference"):
        assert not use_triton(on("mps"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not use_triton(on("mps"))
