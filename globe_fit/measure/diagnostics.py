"""Measure a state of a fit: sparsity, atoms, conditioning, sampled experts, run time. Nothing here changes the state.

globe_fit.run.metrics has the names and units. With n experts, M atoms B_j (R, D) and codes alpha (n, M):

    support C_i = |{j: alpha_ij != 0}|, use U_j = |{i: alpha_ij != 0}|
    entropy of i = -sum_j p_ij log p_ij / log C_i, with p_ij = |alpha_ij| / sum_k |alpha_ik|; 0 for a single atom
    coherence of i and j = |<B_i, B_j>| / (||B_i|| ||B_j||)
"""

import math
import resource
import sys

import numpy as np
import torch
from torch.nn import functional

from globe_fit.data.stream import FamilyWeights, share
from globe_fit.linalg import truncated_svd
from globe_fit.result import FamilyFactors, reconstruct
from globe_fit.solvers.base import BankState
from globe_kernels.format.checkpoint import BaseModel, Code

SMALL_CODE = 0.01
SAMPLED_EXPERTS = 3
_CHUNK_BYTES = 8 * 2**20
_ANGLES = 8
_POINTS = 128  # kept of a spectrum


@torch.no_grad()
def measure(weights: FamilyWeights, state: BankState, *, expensive: bool) -> dict:
    """Return the metrics of `state`; None for a value that is not finite.

    `expensive` adds the coherence of the bank, the condition numbers and the sampled experts.
    """
    norms = state.atom_norms(weights.ranks)
    found = sparsity(state.codes, weights.source.base) | _spread("atom_norm", norms)
    if expensive:
        gram = atom_gram(state.bank)
        weights.ranks.all_sum(gram)
        if torch.isfinite(gram).all():  # a state on its way to divergence cannot be decomposed
            used = state.codes[:, (state.codes != 0).any(0)].double()
            found |= coherence(gram) | {"codes_condition": condition(used.T @ used)} | measure_sample(weights, state)
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in found.items()}


def sparsity(codes: torch.Tensor, base: BaseModel) -> dict:
    """Return the metrics of how codes (n, M) use the atoms."""
    size = codes.detach().abs()
    used = size > 0
    supports, use = used.sum(1), used.sum(0)
    part = size / size.sum(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    entropy = torch.special.entr(part).sum(1) / supports.clamp_min(2).log()
    small = used & (size < SMALL_CODE * size.amax(1, keepdim=True))
    return {
        **_spread("support", supports),
        "support_mean": supports.double().mean().item(),
        "support_histogram": histogram(supports),
        "code_entropy": entropy.mean().item(),
        "small_codes": share(int(small.sum()), int(used.sum())),
        **_spread("atom_use", use),
        "atom_use_histogram": histogram(use),
        "dead_atoms": int((use == 0).sum()),
        "largest_palette": max(palette_sizes(codes, base).values()),
    }


def palette_sizes(codes: torch.Tensor, base: BaseModel) -> dict[str, int]:
    """Return {layer id: number of atoms that the experts of the layer use}."""
    by_layer = (codes != 0).split(list(base.num_experts.values()))
    return {str(layer): int(used.any(0).sum()) for layer, used in zip(base.num_experts, by_layer, strict=True)}


def support_overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the mean over the experts of |S and T| / |S or T| for the supports S, T in two codes (n, M) (Jaccard)."""
    s, t = first != 0, second != 0
    return ((s & t).sum(1) / (s | t).sum(1).clamp_min(1)).double().mean().item()


def dense_codes(code: Code, num_atoms: int) -> torch.Tensor:
    """Return dense codes (n, M) for the sparse storage."""
    return torch.zeros(len(code.value), num_atoms).scatter_add_(1, code.index.long(), code.value)


def atom_gram(bank: torch.Tensor) -> torch.Tensor:
    """Return <B_i, B_j> (M, M) float64, without a temporary of the size of the bank."""
    flat = bank.detach().flatten(1)
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for part in flat.split(max(1, _CHUNK_BYTES // (4 * len(flat))), dim=1):
        gram += part.float() @ part.float().T
    return gram


def coherence(gram: torch.Tensor) -> dict:
    """Return the coherence over all pairs of atoms of a Gram matrix (M, M)."""
    norm = gram.diagonal().sqrt().clamp_min(torch.finfo(gram.dtype).tiny)
    rows, columns = torch.triu_indices(*gram.shape, offset=1, device=gram.device)
    pairs = (gram / norm / norm[:, None])[rows, columns].abs()
    if not pairs.numel():
        return {}
    return {
        "coherence_max": pairs.max().item(),
        "coherence_mean": pairs.mean().item(),
        "coherence_histogram": histogram(pairs.clamp_max(1), (0.0, 1.0), 100),
    }


def condition(gram: torch.Tensor) -> float:
    """Return the largest over the smallest eigenvalue of a symmetric float64 matrix; at most 1 / machine epsilon.

    NaN for a matrix without values, or of zeros.
    """
    if not gram.numel():
        return math.nan
    values = torch.linalg.eigvalsh(gram)
    return (values[-1] / values[0].clamp_min(torch.finfo(values.dtype).eps * values[-1])).item()


def spectrum(matrix: torch.Tensor) -> torch.Tensor:
    """Return the singular values of a matrix, float64, descending."""
    narrow = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT).double()
    return torch.linalg.eigvalsh(narrow @ narrow.mT).clamp_min(0).sqrt().flip(0)


def effective_rank(values: torch.Tensor, energy: float = 0.95) -> int:
    """Count the largest of the descending singular values that hold the share `energy` of the energy together."""
    held = values.square().cumsum(0)
    return int((held < energy * held[-1]).sum()) + 1


def sampled_experts(total: int, count: int = SAMPLED_EXPERTS) -> list[int]:
    """Draw a few of `total` experts, by number among all n, the same in every fit of a model."""
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].tolist())


def measure_sample(weights: FamilyWeights, state: BankState) -> dict:
    """Return metrics of the sampled experts, normalised: the energy that rank R and the composed bases can hold."""
    rows = [_measure_expert(weights, state, expert) for expert in sampled_experts(weights.source.base.total_experts)]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return means | {"gram_condition": max(row["gram_condition"] for row in rows)}


def _measure_expert(weights: FamilyWeights, state: BankState, number: int) -> dict[str, float]:
    (block,) = weights.normalised(slice(number, number + 1))
    expert = block.weights[0]
    basis = weights.ranks.whole(state.basis(block.span)[0], expert.shape[1]).double()
    values = spectrum(expert)
    # W Q Q^T is the best that adapters can do with a basis whose rows span Q
    held = spectrum(expert.double() @ torch.linalg.qr(basis.mT).Q)
    energy = values.square().sum().item()
    return {
        "energy_at_rank": share(values[: len(basis)].square().sum().item(), energy),
        "energy_captured": share(held.square().sum().item(), energy),
        "effective_rank_dense": effective_rank(values),
        "effective_rank_fit": effective_rank(held),
        "gram_condition": condition(basis @ basis.mT),
    }


def spot_checks(weights: FamilyWeights, factors: FamilyFactors, phi: str) -> list[dict]:
    """Compare the sampled experts as they are stored with the raw experts."""
    experts = sampled_experts(weights.source.base.total_experts)
    return [_spot_check(weights, factors, phi, number) for number in experts]


def _spot_check(weights: FamilyWeights, factors: FamilyFactors, phi: str, number: int) -> dict:
    (block,) = weights.raw(slice(number, number + 1))
    stored = reconstruct(factors.at(block.span), factors.bank, phi)[0].to(weights.device)
    return {"layer": block.layer.layer, "expert": block.experts.start, **compare(block.weights[0], stored)}


def compare(dense: torch.Tensor, stored: torch.Tensor) -> dict:
    """Compare a dense matrix (P, D) with the stored matrix: relative squared error, spectra, principal angles.

    The angles, in degrees, are between the spaces of the top right singular vectors. Spectra are thinned; `number` says
    which values are kept.
    """
    dense, stored = dense.double(), stored.double()
    before, after = spectrum(dense), spectrum(stored)
    kept = torch.linspace(0, len(before) - 1, min(len(before), _POINTS)).round().long()
    count = min(_ANGLES, len(before))
    top, other_top = (functional.normalize(truncated_svd(matrix[None], count)[1][0]) for matrix in (dense, stored))
    cosines = torch.linalg.svdvals(top @ other_top.mT).clamp_max(1)
    return {
        "relative_error": share((dense - stored).square().sum().item(), dense.square().sum().item()),
        "number": (kept + 1).tolist(),
        "spectrum_dense": before.cpu()[kept].tolist(),
        "spectrum_stored": after.cpu()[kept].tolist(),
        "angles_degrees": torch.rad2deg(cosines.arccos()).tolist(),
    }


def run_time(weights: FamilyWeights, seconds: float) -> dict:
    """Return the speed of a pass over all experts that took `seconds`, and the peak memory of the process so far."""
    base = weights.source.base
    read = base.total_experts * base.intermediate_size * base.hidden_size * 4
    unit = 1 if sys.platform == "darwin" else 1024
    found = {
        "step_seconds": seconds,
        "experts_per_second": share(base.total_experts, seconds),
        "read_gb_per_second": share(read / 1e9, seconds),
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    if torch.device(weights.device).type == "cuda":
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated(weights.device)
    return found


def histogram(values: torch.Tensor, limits: tuple[float, float] | None = None, bins: int = 32) -> dict[str, list]:
    """Return {"counts", "edges"} of at most `bins` bins of equal width; a bin of integers is a whole number wide."""
    found = values.detach().cpu().numpy()
    edges: np.ndarray | int = bins
    if not values.is_floating_point():
        low, high = int(found.min()), int(found.max())
        width = -(-(high - low + 1) // bins)
        edges = np.arange(low, high + width + 1, width) - 0.5
    counts, edges = np.histogram(found, edges, limits)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _spread(name: str, values: torch.Tensor) -> dict[str, float]:
    return {f"{name}_min": values.min().item(), f"{name}_median": values.median().item()} | {
        f"{name}_max": values.max().item()
    }
