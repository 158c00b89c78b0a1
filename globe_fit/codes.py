"""Signed sparse codes: which atoms an expert keeps, and their storage."""

import torch

from globe_kernels.checkpoint import Code


def largest_support(codes: torch.Tensor, atom_norms: torch.Tensor, support: int) -> torch.Tensor:
    """(n, M) bool: for each expert its `support` atoms of largest |alpha_ij| * ||B_j||."""
    weight = codes.abs() * atom_norms
    keep = torch.zeros_like(codes, dtype=torch.bool)
    return keep.scatter_(1, weight.topk(min(support, codes.shape[1]), dim=1).indices, True)


def pack_codes(codes: torch.Tensor, support: int) -> Code:
    """Sparse storage of codes (n, M): atom ids ascending; unused places hold index 0 and value 0."""
    used = codes != 0
    assert int(used.sum(1).max()) <= support, "codes were not pruned to their support"
    order = torch.argsort(~used, dim=1, stable=True)[:, :support]
    value = codes.gather(1, order).float()
    index = torch.where(value != 0, order, 0).to(torch.int32)
    return Code(index, value)
