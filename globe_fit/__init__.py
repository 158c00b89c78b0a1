"""Fit a GloBE checkpoint to the experts of a Hugging Face Mixture-of-Experts model."""

from globe_fit.config import FitConfig, VarProConfig
from globe_fit.export import export_dense, export_globe, save_fit
from globe_fit.factors import FitResult
from globe_fit.solver import fit
from globe_fit.source import ExpertSource

__all__ = [
    "ExpertSource",
    "FitConfig",
    "FitResult",
    "VarProConfig",
    "export_dense",
    "export_globe",
    "fit",
    "save_fit",
]
