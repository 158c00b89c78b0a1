"""Measure the baseline of a fit: truncated SVD of every expert, at the same bytes and at the rank of the fit."""

import torch

from globe_fit.data.stream import FamilyWeights, share
from globe_fit.linalg import truncated_svd
from globe_kernels.format.checkpoint import BaseModel


def equal_byte_rank(base: BaseModel, num_bytes: float) -> int:
    """Return the largest rank at which separate bf16 SVD factors of every gate and up expert fit in `num_bytes`."""
    inner, width = base.intermediate_size, base.hidden_size
    per_rank = 2 * base.total_experts * (inner + width) * 2
    return min(int(num_bytes // per_rank), inner, width)


def stored_svd(weights: torch.Tensor, rank: int) -> torch.Tensor:
    """Return (E, P, D) float32: the product of the truncated SVD factors of weights (E, P, D), rounded to bf16."""
    left, right = truncated_svd(weights, rank)
    return left.bfloat16().float() @ right.bfloat16().float()


def svd_errors(weights: FamilyWeights, ranks: tuple[int, ...]) -> list[float]:
    """Return the relative squared error of truncated SVD at each rank of `ranks` (Eckart and Young, 1936).

    Each process of `weights.ranks` decomposes its share of the experts, in all columns.
    """
    lost, unit = [0.0] * len(ranks), weights.statistics.unit
    for block in weights.raw(weights.ranks.part(weights.source.base.total_experts)):
        block.weights.div_(unit)
        narrow = block.weights if block.weights.shape[1] <= block.weights.shape[2] else block.weights.mT
        spectrum = torch.linalg.eigvalsh((narrow @ narrow.mT).double()).clamp_min(0)  # ascending
        for number, rank in enumerate(ranks):
            lost[number] += spectrum[:, : max(spectrum.shape[1] - rank, 0)].sum().item()
        del block, narrow  # before the next block is read
    return [share(value * unit**2, weights.statistics.total_energy) for value in weights.ranks.sums(*lost)]
