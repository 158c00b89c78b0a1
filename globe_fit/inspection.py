"""What is in a GloBE checkpoint: sizes, errors, use of the atoms, spectra of sampled experts."""

import torch

from globe_fit.factors import reconstruct
from globe_kernels.checkpoint import Code, GlobeCheckpoint, LayerFactors
from globe_kernels.families import FAMILIES

_SAMPLED_LAYERS = 4


def inspect_checkpoint(checkpoint: GlobeCheckpoint) -> dict:
    """Figures of an opened checkpoint, computed from its tensors and its fit report; JSON types only."""
    config = checkpoint.config
    return {
        "base": config.base.name,
        "model_type": config.base.model_type,
        "layers": len(config.base.num_experts),
        "experts": config.base.total_experts,
        "shape": [config.base.intermediate_size, config.base.hidden_size],
        "rank": config.rank,
        "atoms": config.num_atoms,
        "support": config.support,
        "phi": config.phi,
        "scope": config.scope,
        "dtype": config.dtype,
        "bytes": {"dense_experts": config.base.dense_bytes, "globe_on_disk": checkpoint.bytes_on_disk},
        "families": {family: _inspect_family(checkpoint, family) for family in FAMILIES},
        "provenance": config.provenance,
    }


def _inspect_family(checkpoint: GlobeCheckpoint, family: str) -> dict:
    config, bank = checkpoint.config, checkpoint.bank(family)
    layers = sorted(config.base.num_experts)
    use = torch.zeros(config.num_atoms, dtype=torch.long)
    supports, palettes = [], []
    for layer in layers:
        code = checkpoint.layer(layer, family).code
        used = code.value != 0
        supports.append(used.sum(1))
        atoms = code.index[used].long()
        palettes.append(atoms.unique().numel())
        use += torch.bincount(atoms, minlength=config.num_atoms)
    support = torch.cat(supports)
    sampled = layers[:: max(1, len(layers) // _SAMPLED_LAYERS)]
    spectra = {str(layer): _effective_rank(checkpoint.layer(layer, family), bank, config.phi) for layer in sampled}
    report = checkpoint.report().get("families", {}).get(family, {})
    return {
        "relative_error": report.get("relative_error"),
        "svd_equal_bytes": report.get("svd_equal_bytes"),
        "rank_bound": report.get("rank_bound"),
        "relative_error_by_layer": report.get("relative_error_by_layer", {}),
        "support": {"min": int(support.min()), "median": int(support.median()), "max": int(support.max())},
        "atom_use": {"min": int(use.min()), "median": int(use.median()), "max": int(use.max())},
        "dead_atoms": int((use == 0).sum()),
        "largest_palette": max(palettes),
        "effective_rank_95": spectra,
    }


def _effective_rank(factors: LayerFactors, bank: torch.Tensor, phi: str) -> int:
    """Singular values that hold 95 % of the energy of the layer's first expert, as reconstructed."""
    first = LayerFactors(factors.adapter[:1], Code(factors.code.index[:1], factors.code.value[:1]))
    energy = torch.linalg.svdvals(reconstruct(first, bank, phi)[0]).square()
    return int((energy.cumsum(0) < 0.95 * energy.sum()).sum()) + 1
