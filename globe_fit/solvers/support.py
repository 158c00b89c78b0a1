"""Signed sparse codes: which atoms an expert keeps, and their storage."""

import torch

from globe_fit.run.distributed import ALONE, Ranks
from globe_fit.solvers.base import BankState
from globe_kernels.format.checkpoint import BaseModel, Code, GlobeConfig


def largest_support(weight: torch.Tensor, support: int) -> torch.Tensor:
    """(n, M) bool: for each expert its `support` atoms of largest weight (n, M), such as |alpha_ij| ||B_j||."""
    keep = torch.zeros_like(weight, dtype=torch.bool)
    return keep.scatter_(1, weight.topk(min(support, weight.shape[1]), dim=1).indices, True)


def layer_palettes(weight: torch.Tensor, base: BaseModel, palette: int) -> torch.Tensor:
    """(n, M) bool: for the experts of each layer the `palette` atoms of largest squared weight over that layer."""
    counts = list(base.num_experts.values())
    by_layer = torch.stack([part.square().sum(0) for part in weight.split(counts)])
    kept = largest_support(by_layer, palette)
    return kept.repeat_interleave(torch.tensor(counts, device=weight.device), dim=0)


def candidate_atoms(state: BankState, allowed: torch.Tensor, sizes: GlobeConfig, count: int) -> torch.Tensor:
    """(n, M) bool: of the allowed atoms those that an expert sees before its support is fixed, `count` by its codes.

    The codes at the start of a fit are one on the atom of the own group and noise elsewhere: these are that atom and
    others at random. With a palette the experts of a layer see the same, so that they can agree on one.
    """
    weight = state.codes.detach().abs() * allowed
    if sizes.palette is not None:
        return allowed & layer_palettes(weight, sizes.base, max(count, sizes.palette))
    return allowed & largest_support(weight, max(count, sizes.support))


@torch.no_grad()
def fix_support(state: BankState, allowed: torch.Tensor, sizes: GlobeConfig, ranks: Ranks = ALONE) -> torch.Tensor:
    """(n, M) bool: of the allowed atoms those of largest |alpha_ij| ||B_j||, as many as an expert may keep and within
    its layer's palette. The codes of the others become zero."""
    weight = state.codes.abs() * state.atom_norms(ranks)
    if sizes.palette is not None:
        allowed = allowed & layer_palettes(weight, sizes.base, sizes.palette)
    allowed = allowed & largest_support(weight * allowed, sizes.support)
    state.codes.mul_(allowed)
    return allowed


def pack_codes(codes: torch.Tensor, support: int) -> Code:
    """Sparse storage of codes (n, M): atom ids ascending; unused places hold index 0 and value 0."""
    used = codes != 0
    assert int(used.sum(1).max()) <= support, "codes were not pruned to their support"
    order = torch.argsort(~used, dim=1, stable=True)[:, :support]
    value = codes.gather(1, order).float()
    index = torch.where(value != 0, order, 0).to(torch.int32)
    return Code(index, value)
