"""GloBE: run a Mixture-of-Experts model from one global bank of basis matrices."""

import importlib.util

from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.checkpoint import BaseModel, GlobeCheckpoint, GlobeConfig
from globe_kernels.model.control import cache_stats, explain, set_strategy, warm_cache
from globe_kernels.model.experts import GlobeMoEFFN
from globe_kernels.model.patching import PatchReport, patch, unpatch
from globe_kernels.ops.counters import call_counts
from globe_kernels.version import __version__

if importlib.util.find_spec("transformers") is not None:
    # registers the quantization method, so that from_pretrained loads an exported directory
    from globe_kernels.model import quantizer as _quantizer  # noqa: F401

__all__ = [
    "BaseModel",
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
