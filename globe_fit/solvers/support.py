"""Choose the atoms that an expert keeps, and pack its codes for storage."""

import torch

from globe_fit.run.distributed import ALONE, Ranks
from globe_fit.solvers.base import BankState, support_index
from globe_kernels.format.checkpoint import BaseModel, Code, GlobeConfig


def largest_support(weight: torch.Tensor, support: int) -> torch.Tensor:
    """Mark for each expert its `support` atoms of largest weight (n, M), such as |alpha_ij| ||B_j||: (n, M) bool."""
    keep = torch.zeros_like(weight, dtype=torch.bool)
    return keep.scatter_(1, weight.topk(min(support, weight.shape[1]), dim=1).indices, True)


def layer_palettes(weight: torch.Tensor, base: BaseModel, palette: int) -> torch.Tensor:
    """Mark for the experts of each layer the `palette` atoms of largest squared weight over the layer: (n, M) bool."""
    counts = list(base.num_experts.values())
    by_layer = torch.stack([part.square().sum(0) for part in weight.split(counts)])
    kept = largest_support(by_layer, palette)
    return kept.repeat_interleave(torch.tensor(counts, device=weight.device), dim=0)


def candidate_atoms(state: BankState, allowed: torch.Tensor, sizes: GlobeConfig, count: int) -> torch.Tensor:
    """Mark the `count` allowed atoms that an expert sees before its support is fixed, by the size of its codes.

    Returns (n, M) bool. The codes at the start of a fit are 1 on the atom of the group and noise elsewhere, so the
    candidates are this atom and random others. With a palette the experts of a layer have the same candidates, so that
    they can agree.
    """
    weight = state.codes.detach().abs() * allowed
    if sizes.palette is not None:
        return allowed & layer_palettes(weight, sizes.base, max(count, sizes.palette))
    return allowed & largest_support(weight, max(count, sizes.support))


@torch.no_grad()
def fix_support(state: BankState, allowed: torch.Tensor, sizes: GlobeConfig, ranks: Ranks = ALONE) -> torch.Tensor:
    """Mark the allowed atoms of largest |alpha_ij| ||B_j||, (n, M) bool; set the codes of all others to zero.

    The marked atoms are as many as an expert may keep, and within the palette of its layer.
    """
    weight = state.codes.abs() * state.atom_norms(ranks)
    if sizes.palette is not None:
        allowed = allowed & layer_palettes(weight, sizes.base, sizes.palette)
    allowed = allowed & largest_support(weight * allowed, sizes.support)
    state.codes.mul_(allowed)
    return allowed


def pack_codes(codes: torch.Tensor, support: int) -> Code:
    """Pack codes (n, M) into sparse storage: atom ids ascending; unused entries hold index 0 and value 0."""
    used = codes != 0
    assert int(used.sum(1).max()) <= support, "codes were not pruned to their support"
    index, valid = support_index(used, support)
    return Code(torch.where(valid, index, 0).to(torch.int32), codes.gather(1, index).float())
