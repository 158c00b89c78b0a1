"""What is in a GloBE checkpoint: sizes, errors, use of the atoms, spectra of sampled experts."""

import torch

from globe_fit.measure.diagnostics import dense_codes, effective_rank, sparsity, spectrum
from globe_fit.result import reconstruct
from globe_kernels.format.architectures import FAMILIES
from globe_kernels.format.checkpoint import Code, GlobeCheckpoint, LayerFactors
from globe_kernels.strategies.budget import palettes_of, resident, strategies_of, workspace

_PEAK_ROWS = 4096  # routed rows, tokens times choices: a checkpoint does not know how many experts a token takes
_SAMPLED_LAYERS = 4
_SPREAD = ("min", "median", "max")


def inspect_checkpoint(checkpoint: GlobeCheckpoint) -> dict:
    """Figures of an opened checkpoint, computed from its tensors and its fit report; JSON types only."""
    config = checkpoint.config
    return {
        "base": config.base.name,
        "model_type": config.base.model_type,
        "layers": len(config.base.num_experts),
        "experts": config.base.total_experts,
        "shape": [config.base.intermediate_size, config.base.hidden_size],
        "left_dense": {str(layer): list(shape) for layer, shape in config.base.left_dense.items()},
        "rank": config.rank,
        "atoms": config.num_atoms,
        "support": config.support,
        "phi": config.phi,
        "scope": config.scope,
        "dtype": config.dtype,
        "bytes": {"dense_experts": config.base.dense_bytes, "globe_on_disk": checkpoint.bytes_on_disk}
        | _bytes_of_running(checkpoint),
        "families": {family: _inspect_family(checkpoint, family) for family in FAMILIES},
        "provenance": config.provenance,
    }


def _bytes_of_running(checkpoint: GlobeCheckpoint) -> dict:
    """By path, of gate and up: what is resident, of the cache without its pool, and that at the peak of a call."""
    config, palettes = checkpoint.config, palettes_of(checkpoint)
    item_size = config.torch_dtype.itemsize
    held, peak = {}, {}
    for name in strategies_of(config):
        all_of_it = resident(config, (name,), item_size=item_size, palettes=palettes)
        held[name] = all_of_it.total - all_of_it.down
        peak[name] = held[name] + workspace(config, (name,), _PEAK_ROWS, 1, item_size, palettes)
    return {"resident": held, "peak": peak, "peak_rows": _PEAK_ROWS}


def _inspect_family(checkpoint: GlobeCheckpoint, family: str) -> dict:
    config, bank = checkpoint.config, checkpoint.bank(family)
    layers = sorted(config.base.num_experts)
    found = sparsity(stored_codes(checkpoint, family), config.base)
    sampled = layers[:: max(1, len(layers) // _SAMPLED_LAYERS)]
    spectra = {str(layer): _effective_rank(checkpoint.layer(layer, family), bank, config.phi) for layer in sampled}
    report = checkpoint.report().get("families", {}).get(family, {})
    return {
        "relative_error": report.get("relative_error"),
        "svd_equal_bytes": report.get("svd_equal_bytes"),
        "rank_bound": report.get("rank_bound"),
        "relative_error_by_layer": report.get("relative_error_by_layer", {}),
        "support": {key: int(found[f"support_{key}"]) for key in _SPREAD},
        "atom_use": {key: int(found[f"atom_use_{key}"]) for key in _SPREAD},
        "dead_atoms": found["dead_atoms"],
        "largest_palette": found["largest_palette"],
        "effective_rank_95": spectra,
    }


def _effective_rank(factors: LayerFactors, bank: torch.Tensor, phi: str) -> int:
    """Singular values that hold 95 % of the energy of the layer's first expert, as reconstructed."""
    first = LayerFactors(factors.adapter[:1], Code(factors.code.index[:1], factors.code.value[:1]))
    return effective_rank(spectrum(reconstruct(first, bank, phi)[0]))


def stored_codes(checkpoint: GlobeCheckpoint, family: str) -> torch.Tensor:
    """(n, M) dense codes of a family."""
    codes = [checkpoint.code(layer, family) for layer in checkpoint.config.base.num_experts]
    return torch.cat([dense_codes(code, checkpoint.config.num_atoms) for code in codes])
