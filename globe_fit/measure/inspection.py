"""Inspect a GloBE checkpoint: sizes, errors, use of the atoms, spectra of sampled experts."""

import torch

from globe_fit.measure.diagnostics import dense_codes, effective_rank, sparsity, spectrum
from globe_fit.plan.footprint import footprint_of, running_item_size
from globe_fit.result import reconstruct, slice_experts
from globe_fit.run.reports import read_healing, read_report
from globe_kernels.format.checkpoint import GlobeCheckpoint, LayerFactors
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.patching import PEAK_TOKENS
from globe_kernels.strategies import DENSE
from globe_kernels.strategies.budget import palettes_of, resident, strategies_of, workspace

_SAMPLED_LAYERS = 4
_SPREAD = ("min", "median", "max")


def inspect_checkpoint(checkpoint: GlobeCheckpoint) -> dict:
    """Return figures of an opened checkpoint, from its tensors and its fit report; JSON types only."""
    sizes, report = checkpoint.config, read_report(checkpoint)
    return {
        "base": sizes.base.name,
        "model_type": sizes.base.model_type,
        "layers": len(sizes.base.num_experts),
        "experts": sizes.base.total_experts,
        "shape": [sizes.base.intermediate_size, sizes.base.hidden_size],
        "left_dense": {str(layer): list(shape) for layer, shape in sizes.base.left_dense.items()},
        "rank": sizes.rank,
        "atoms": sizes.num_atoms,
        "support": sizes.support,
        "phi": sizes.phi,
        "scope": sizes.scope,
        "dtype": sizes.dtype,
        "bytes": {"dense_experts": sizes.base.dense_bytes, "globe_on_disk": checkpoint.bytes_on_disk}
        | _bytes_of_running(checkpoint, report.get("base")),
        "sizes": footprint_of(checkpoint),
        "families": {
            family: _inspect_family(checkpoint, family, report.get("families", {}).get(family, {}))
            for family in FAMILIES
        },
        "healing": read_healing(checkpoint),
        "provenance": sizes.provenance,
    }


def _bytes_of_running(checkpoint: GlobeCheckpoint, facts: dict | None) -> dict:
    """Return the bytes of gate and up by strategy, resident and at the peak of a call; cached without its pool."""
    sizes, palettes = checkpoint.config, palettes_of(checkpoint)
    # a checkpoint of before its report had the facts about its base does not know top_k
    item_size, top_k = running_item_size(sizes, facts), (facts or {}).get("top_k") or 1
    held, peak = {}, {}
    for strategy in (DENSE.name, *strategies_of(sizes)):
        of_experts = resident(sizes, (strategy,), item_size=item_size, palettes=palettes)
        held[strategy] = of_experts.total - of_experts.down
        temporary = workspace(sizes, lambda _, name=strategy: name, PEAK_TOKENS, top_k, item_size, palettes)
        peak[strategy] = held[strategy] + temporary
    return {"resident": held, "peak": peak, "peak_rows": PEAK_TOKENS * top_k}


def _inspect_family(checkpoint: GlobeCheckpoint, family: str, report: dict) -> dict:
    sizes, bank = checkpoint.config, checkpoint.bank(family)
    layers = sorted(sizes.base.num_experts)
    found = sparsity(stored_codes(checkpoint, family), sizes.base)
    sampled = layers[:: max(1, len(layers) // _SAMPLED_LAYERS)]
    spectra = {str(layer): _effective_rank(checkpoint.layer(layer, family), bank, sizes.phi) for layer in sampled}
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
    """Count the singular values that hold 95 % of the energy of the first expert of a layer, reconstructed."""
    return effective_rank(spectrum(reconstruct(slice_experts(factors, slice(1)), bank, phi)[0]))


def stored_codes(checkpoint: GlobeCheckpoint, family: str) -> torch.Tensor:
    """Return the dense codes (n, M) of a family."""
    codes = [checkpoint.code(layer, family) for layer in checkpoint.config.base.num_experts]
    return torch.cat([dense_codes(code, checkpoint.config.num_atoms) for code in codes])
