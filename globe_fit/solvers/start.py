"""Start a fit by grouped SVD.

The n experts are split, in order, into m groups. The start of atom g is the row space that the experts of group g
share: the top R eigenvectors of sum_{i in g} W_i^T W_i. Experts of one layer read the same features, so neighbours
share a space. A common space needs no alignment between experts, which separate SVDs would need.
"""

import torch

from globe_fit.data.stream import FamilyWeights
from globe_fit.linalg import truncated_svd
from globe_fit.solvers.base import BankState
from globe_kernels.format.checkpoint import BaseModel, GlobeConfig

_CODE_NOISE = 0.02


def group_of_experts(base: BaseModel, num_atoms: int, scope: str) -> torch.Tensor:
    """Return the group (n,) of each expert, by number of its atom; with scope "layer" no group spans two layers."""
    total = base.total_experts
    if scope == "global":
        return torch.arange(total) * num_atoms // total
    groups, first_atom, first_expert = [], 0, 0
    for count in base.num_experts.values():
        # atoms in proportion to experts, rounded so that the layers add up to num_atoms
        last_atom = num_atoms * (first_expert + count) // total
        groups.append(first_atom + torch.arange(count) * (last_atom - first_atom) // count)
        first_atom, first_expert = last_atom, first_expert + count
    return torch.cat(groups)


def allowed_atoms(base: BaseModel, num_atoms: int, scope: str) -> torch.Tensor:
    """Return the atoms that each expert may use, (n, M) bool."""
    if scope == "global":
        return torch.ones(base.total_experts, num_atoms, dtype=torch.bool)
    groups = group_of_experts(base, num_atoms, scope)
    allowed = torch.zeros(base.total_experts, num_atoms, dtype=torch.bool)
    start = 0
    for count in base.num_experts.values():
        of_layer = groups[start : start + count]
        allowed[start : start + count, int(of_layer.min()) : int(of_layer.max()) + 1] = True
        start += count
    return allowed


def grouped_svd(weights: FamilyWeights, sizes: GlobeConfig) -> torch.Tensor:
    """Return atoms (M, R, D) float32 with orthogonal rows and entries of RMS 1.

    Each of several ranks decomposes some of the groups, from whole experts, and gets its columns of all atoms.
    """
    groups = group_of_experts(sizes.base, sizes.num_atoms, sizes.scope)
    last_member = {int(group): expert for expert, group in enumerate(groups)}
    part = weights.ranks.part(sizes.num_atoms)  # the atoms of this rank
    atoms = torch.zeros(part.stop - part.start, *sizes.bank_shape()[1:], device=weights.device)
    first, stop = torch.searchsorted(groups, torch.tensor([part.start, part.stop])).tolist()
    grams: dict[int, torch.Tensor] = {}  # of groups that still miss experts: the groups of a layer and a carry at most
    for block in weights.normalised(slice(first, stop)):
        for offset, expert in enumerate(range(block.span.start, block.span.stop)):
            group = int(groups[expert])
            gram = block.weights[offset].mT @ block.weights[offset]
            grams[group] = grams[group].add_(gram) if group in grams else gram
            if expert == last_member[group]:
                _, vectors = torch.linalg.eigh(grams.pop(group))  # ascending
                atoms[group - part.start] = vectors[:, -sizes.rank :].flip(-1).mT
        del block  # before the next block is read
    return _columns_of_rank(weights, atoms.mul_(sizes.base.hidden_size**0.5), sizes)


def _columns_of_rank(weights: FamilyWeights, atoms: torch.Tensor, sizes: GlobeConfig) -> torch.Tensor:
    """Exchange whole atoms for the columns (M, R, columns) of this rank, an atom in a message."""
    if weights.ranks.world == 1:
        return atoms
    part, columns = weights.ranks.part(sizes.num_atoms), weights.columns
    bank = torch.empty(*sizes.bank_shape()[:2], columns.stop - columns.start, device=weights.device)
    for number in range(sizes.num_atoms):
        atom = atoms.new_zeros(sizes.bank_shape()[1:])
        if part.start <= number < part.stop:
            atom.copy_(atoms[number - part.start])
        weights.ranks.all_sum(atom)
        bank[number] = atom[:, columns]
    return bank


def initial_codes(sizes: GlobeConfig, generator: torch.Generator) -> torch.Tensor:
    """Return codes (n, M) float32: 1 on the atom of the group of each expert, and noise on every allowed atom."""
    allowed = allowed_atoms(sizes.base, sizes.num_atoms, sizes.scope)
    codes = _CODE_NOISE * torch.randn(allowed.shape, generator=generator)
    groups = group_of_experts(sizes.base, sizes.num_atoms, sizes.scope)
    codes[torch.arange(len(groups)), groups] += 1.0
    return codes * allowed


def separate_factors(weights: FamilyWeights, matrices: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the right factors (E, rank, D) of the truncated SVD of each of the `matrices` (E, P, D).

    Of several ranks each gives its columns and gets its columns: whole experts are decomposed, on every rank.
    """
    whole = weights.ranks.whole(matrices, weights.source.base.hidden_size)
    return truncated_svd(whole, rank)[1][..., weights.columns]


def separate_svd(weights: FamilyWeights, sizes: GlobeConfig) -> BankState:
    """Start from the SVD factors of the first expert of each group as atoms, and each expert on the atom of its group.

    The coordinates of these factors have nothing in common; the alternating solver with targets "svd" begins here.
    """
    groups = group_of_experts(sizes.base, sizes.num_atoms, sizes.scope)
    columns = weights.columns
    bank = torch.zeros(*sizes.bank_shape()[:2], columns.stop - columns.start, device=weights.device)
    started: set[int] = set()
    for block in weights.normalised():
        for offset, expert in enumerate(range(block.span.start, block.span.stop)):
            group = int(groups[expert])
            if group not in started:
                started.add(group)
                bank[group] = separate_factors(weights, block.weights[offset : offset + 1], sizes.rank)[0]
        del block  # before the next block is read
    codes = torch.nn.functional.one_hot(groups, sizes.num_atoms).float()
    return BankState(bank, codes.to(weights.device), sizes.phi)
