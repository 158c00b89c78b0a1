"""GloBE: run a Mixture-of-Experts model from one global bank of basis matrices."""

from importlib import import_module
from typing import TYPE_CHECKING

from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.lazy import after_import, lazy_names
from globe_kernels.version import __version__

if TYPE_CHECKING:
    from globe_kernels.format.checkpoint import BaseModel, GlobeCheckpoint, GlobeConfig
    from globe_kernels.model.control import Explanation, cache_stats, explain, set_strategy, warm_cache
    from globe_kernels.model.experts import GlobeMoEFFN
    from globe_kernels.model.patching import PatchReport, patch, unpatch
    from globe_kernels.ops.counters import call_counts

__all__ = [
    "BaseModel",
    "Explanation",
    "GlobeCheckpoint",
    "GlobeConfig",
    "GlobeError",
    "GlobeMoEFFN",
    "PatchReport",
    "RequestError",
    "__version__",
    "cache_stats",
    "call_counts",
    "explain",
    "patch",
    "set_strategy",
    "unpatch",
    "warm_cache",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BaseModel": "format.checkpoint",
        "Explanation": "model.control",
        "GlobeCheckpoint": "format.checkpoint",
        "GlobeConfig": "format.checkpoint",
        "GlobeMoEFFN": "model.experts",
        "PatchReport": "model.patching",
        "cache_stats": "model.control",
        "call_counts": "ops.counters",
        "explain": "model.control",
        "patch": "model.patching",
        "set_strategy": "model.control",
        "unpatch": "model.patching",
        "warm_cache": "model.control",
    },
)

# registers the quantization method, so that from_pretrained loads an exported directory
after_import("transformers.quantizers.auto", lambda: import_module("globe_kernels.model.quantizer"))
