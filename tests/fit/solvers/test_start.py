import torch

from globe_fit.data.stream import FamilyWeights
from globe_fit.solvers.start import allowed_atoms, group_of_experts, grouped_svd, initial_codes
from globe_kernels.format.checkpoint import BaseModel, GlobeConfig
from globe_kernels.testing import assert_close

UNEVEN = BaseModel("uneven", "qwen3_moe", 12, 5, {0: 6, 3: 4})


def sizes(base: BaseModel, atoms: int, rank: int, scope: str = "global") -> GlobeConfig:
    return GlobeConfig(base, rank=rank, num_atoms=atoms, support=2, scope=scope)


def test_groups_are_even_and_use_every_atom():
    groups = group_of_experts(UNEVEN, 4, "global")
    counts = torch.bincount(groups, minlength=4)
    assert groups.tolist() == sorted(groups.tolist())
    assert int(counts.min()) >= 2 and int(counts.max()) <= 3


def test_with_scope_layer_no_group_spans_two_layers():
    groups = group_of_experts(UNEVEN, 5, "layer")
    assert not set(groups[:6].tolist()) & set(groups[6:].tolist())
    assert set(groups.tolist()) == set(range(5))
    allowed = allowed_atoms(UNEVEN, 5, "layer")
    assert not (allowed[:6].any(0) & allowed[6:].any(0)).any()
    assert allowed.any(0).all()


def test_an_atom_spans_the_best_row_space_of_its_group(noise):
    weights = FamilyWeights.measure(noise, "gate", "cpu")
    bank = grouped_svd(weights, sizes(noise.base, atoms=3, rank=4))
    experts = torch.cat([block.weights for block in weights.normalised()])
    groups = group_of_experts(noise.base, 3, "global")  # the middle group spans both layers
    for atom in range(3):
        stacked = experts[groups == atom].flatten(0, 1)
        best = torch.linalg.svd(stacked.double()).Vh[:4]
        rows = bank[atom].double() / bank.shape[2] ** 0.5
        assert_close(rows @ rows.mT, torch.eye(4), rms=1e-5, peak=1e-5)
        assert_close(rows.mT @ rows, best.mT @ best, rms=1e-4, peak=1e-4)


def test_entries_have_unit_rms(noise):
    bank = grouped_svd(FamilyWeights.measure(noise, "gate", "cpu"), sizes(noise.base, 3, 4))
    assert abs(bank.square().mean().sqrt().item() - 1) < 1e-5


def test_codes_start_at_the_own_group_and_stay_inside_the_scope(noise):
    codes = initial_codes(sizes(noise.base, 5, 4, "layer"), torch.Generator().manual_seed(0))
    assert torch.equal(codes.argmax(1), group_of_experts(noise.base, 5, "layer"))
    assert torch.equal(codes != 0, allowed_atoms(noise.base, 5, "layer"))
