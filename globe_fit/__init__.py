"""Fit a GloBE checkpoint to the experts of a Hugging Face Mixture-of-Experts model."""

from typing import TYPE_CHECKING

from globe_kernels.lazy import lazy_names

if TYPE_CHECKING:
    from globe_fit.compression import compress
    from globe_fit.config import FitConfig, VarProConfig
    from globe_fit.data.source import ExpertSource
    from globe_fit.export import export_dense, export_globe, save_fit
    from globe_fit.fitting import fit
    from globe_fit.healing.checkpoint import heal
    from globe_fit.result import FitResult

__all__ = [
    "ExpertSource",
    "FitConfig",
    "FitResult",
    "VarProConfig",
    "compress",
    "export_dense",
    "export_globe",
    "fit",
    "heal",
    "save_fit",
]

# No module has the name of a function here: to import the module would put it in the place of the function.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ExpertSource": "data.source",
        "FitConfig": "config",
        "FitResult": "result",
        "VarProConfig": "config",
        "compress": "compression",
        "export_dense": "export",
        "export_globe": "export",
        "fit": "fitting",
        "heal": "healing.checkpoint",
        "save_fit": "export",
    },
)
