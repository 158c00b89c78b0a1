"""Helpers for tests and benchmarks: tolerances that a wrong answer cannot meet, and tiny random models."""

from globe_kernels.testing.models import (
    auto_class,
    moe_model_types,
    save_layouts,
    text_inputs,
    text_logits,
    tiny_model,
)
from globe_kernels.testing.tolerances import assert_close, relative_errors

__all__ = [
    "assert_close",
    "auto_class",
    "moe_model_types",
    "relative_errors",
    "save_layouts",
    "text_inputs",
    "text_logits",
    "tiny_model",
]
