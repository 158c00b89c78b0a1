"""The start of a fit: grouped SVD.

The n experts are split, in order, into m groups; the start of atom g is the row space that its experts
share, the top R eigenvectors of sum_{i in g} W_i^T W_i. Experts of one layer read the same features, so
neighbours share a space; and a common space needs no alignment between experts, which separate SVDs would.
"""

import torch

from globe_fit.data.stream import FamilyWeights
from globe_fit.measure.baselines import truncated_svd
from globe_fit.solvers.base import BankState
from globe_kernels.format.checkpoint import BaseModel, GlobeConfig

_CODE_NOISE = 0.02


def group_of_experts(base: BaseModel, num_atoms: int, scope: str) -> torch.Tensor:
    """(n,) the atom whose group each expert belongs to; with scope "layer" no group spans two layers."""
    total = base.total_experts
    everywhere = torch.arange(total)
    if scope == "global":
        return everywhere * num_atoms // total
    groups, first_atom, first_expert = [], 0, 0
    for count in base.num_experts.values():
        # atoms in proportion to experts, rounded so that the layers add up to num_atoms
        last_atom = num_atoms * (first_expert + count) // total
        groups.append(first_atom + torch.arange(count) * (last_atom - first_atom) // count)
        first_atom, first_expert = last_atom, first_expert + count
    return torch.cat(groups)


def allowed_atoms(base: BaseModel, num_atoms: int, scope: str) -> torch.Tensor:
    """(n, M) bool: the atoms that each expert may use."""
    if scope == "global":
        return torch.ones(base.total_experts, num_atoms, dtype=torch.bool)
    groups = group_of_experts(base, num_atoms, scope)
    allowed = torch.zeros(base.total_experts, num_atoms, dtype=torch.bool)
    start = 0
    for count in base.num_experts.values():
        own = groups[start : start + count]
        allowed[start : start + count, int(own.min()) : int(own.max()) + 1] = True
        start += count
    return allowed


def grouped_svd(weights: FamilyWeights, config: GlobeConfig) -> torch.Tensor:
    """(M, R, D) float32 atoms with orthogonal rows and entries of RMS 1.

    Of several ranks each decomposes some of the groups, from whole experts, and gets its own columns of all atoms.
    """
    groups = group_of_experts(config.base, config.num_atoms, config.scope)
    last_member = {int(group): place for place, group in enumerate(groups)}
    own = weights.ranks.part(config.num_atoms)
    atoms = torch.zeros(own.stop - own.start, *config.bank_shape()[1:], device=weights.device)
    first, stop = torch.searchsorted(groups, torch.tensor([own.start, own.stop])).tolist()
    grams: dict[int, torch.Tensor] = {}  # groups that still miss experts: at most one layer's and a carry
    for block in weights.normalised(slice(first, stop)):
        for offset, place in enumerate(range(block.places.start, block.places.stop)):
            group = int(groups[place])
            gram = block.weights[offset].mT @ block.weights[offset]
            grams[group] = grams[group].add_(gram) if group in grams else gram
            if place == last_member[group]:
                _, vectors = torch.linalg.eigh(grams.pop(group))  # ascending
                atoms[group - own.start] = vectors[:, -config.rank :].flip(-1).mT
        del block  # before the next block is read
    return _own_columns(weights, atoms.mul_(config.base.hidden_size**0.5), config)


def _own_columns(weights: FamilyWeights, atoms: torch.Tensor, config: GlobeConfig) -> torch.Tensor:
    """(M, R, own) from the whole atoms that each rank has, one atom in a message."""
    if weights.ranks.world == 1:
        return atoms
    own, columns = weights.ranks.part(config.num_atoms), weights.columns
    bank = torch.empty(*config.bank_shape()[:2], columns.stop - columns.start, device=weights.device)
    for number in range(config.num_atoms):
        atom = atoms.new_zeros(config.bank_shape()[1:])
        if own.start <= number < own.stop:
            atom.copy_(atoms[number - own.start])
        weights.ranks.all_sum(atom)
        bank[number] = atom[:, columns]
    return bank


def initial_codes(config: GlobeConfig, generator: torch.Generator) -> torch.Tensor:
    """(n, M) float32: each expert on its own group's atom, and a little of every atom it may use."""
    allowed = allowed_atoms(config.base, config.num_atoms, config.scope)
    codes = _CODE_NOISE * torch.randn(allowed.shape, generator=generator)
    groups = group_of_experts(config.base, config.num_atoms, config.scope)
    codes[torch.arange(len(groups)), groups] += 1.0
    return codes * allowed


def separate_svd(weights: FamilyWeights, config: GlobeConfig) -> BankState:
    """The SVD factors of the first expert of each group as atoms, and each expert on the atom of its own group.

    The coordinates of these factors have nothing in common; the alternating solver with targets "svd" begins here.
    """
    groups = group_of_experts(config.base, config.num_atoms, config.scope)
    bank = torch.zeros(config.bank_shape(), device=weights.device)
    started: set[int] = set()
    for block in weights.normalised():
        for offset, place in enumerate(range(block.places.start, block.places.stop)):
            group = int(groups[place])
            if group not in started:
                started.add(group)
                bank[group] = truncated_svd(block.weights[offset : offset + 1], config.rank)[1][0]
        del block  # before the next block is read
    codes = torch.nn.functional.one_hot(groups, config.num_atoms).float()
    return BankState(bank, codes.to(weights.device), config.phi)
