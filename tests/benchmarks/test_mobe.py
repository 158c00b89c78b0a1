"""The baseline is MoBE at its best: it starts as described, keeps its best state, and is as large as GloBE."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mobe import MobeConfig, fit_mobe

from globe_fit import ExpertSource, FitConfig
from globe_fit.data.stream import FamilyWeights
from globe_fit.linalg import solve_adapters
from globe_fit.sizes import resolve_sizes
from globe_fit.solvers.start import group_of_experts, grouped_svd
from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.ops.compose_basis import PHI_FUNCTIONS
from tests.conftest import TINY_FIT
from tests.fit.conftest import MemorySource

ROOT = Path(__file__).resolve().parent.parent.parent


def measured(source) -> FamilyWeights:
    return FamilyWeights.measure(source, "gate", "cpu")


def planted(phi: str, codes: torch.Tensor) -> MemorySource:
    """Two layers of experts of 10 x 24 with mean zero; bases of rank 4 mix the atoms of the layer by `codes` (E, m)."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for layer in (1, 2):
        atoms = torch.randn(codes.shape[1], 4, 24, generator=generator)
        basis = PHI_FUNCTIONS[phi](torch.einsum("em,mrd->erd", codes, atoms))
        half = torch.randn(len(codes), 5, 4, generator=generator) @ basis
        layers[layer] = torch.cat([half, -half], dim=1)
    return MemorySource(layers)


def relative_error(source, fitted) -> float:
    """Of the reconstruction, read in two parts per layer."""
    lost = energy = 0.0
    for layer in source.layers:
        weights, half = source.read(layer, "gate"), layer.num_experts // 2
        parts = [fitted.reconstruct(layer, range(half)), fitted.reconstruct(layer, range(half, layer.num_experts))]
        lost += (weights - torch.cat(parts)).square().sum().item()
        energy += weights.square().sum().item()
    return lost / energy


def test_a_planted_structure_is_a_fixed_point():
    source = planted("identity", torch.eye(3).repeat_interleave(2, dim=0))  # groups of two share one atom
    weights, sizes = measured(source), GlobeConfig(source.base, rank=4, num_atoms=6, support=2)
    for steps in (0, 30):
        fitted = fit_mobe(weights, sizes, MobeConfig(steps, phi="identity", warm_start=True))
        assert fitted.completed and fitted.relative_error < 1e-4


@pytest.mark.parametrize("warm", [False, True])
def test_a_planted_structure_is_recovered(warm):
    source = planted("silu", torch.randn(8, 2, generator=torch.Generator().manual_seed(1)).softmax(1))
    sizes = GlobeConfig(source.base, rank=4, num_atoms=4, support=2)
    fitted = fit_mobe(measured(source), sizes, MobeConfig(2000, warm_start=warm))
    assert fitted.relative_error < 0.02 < 0.05 < fitted.history[0][2]
    assert relative_error(source, fitted) == pytest.approx(fitted.relative_error, rel=1e-3)


@pytest.mark.parametrize("phi", ["identity", "silu", "tanh"])
def test_no_steps_are_exactly_the_warm_start(noise, phi):
    weights, sizes = measured(noise), GlobeConfig(noise.base, rank=3, num_atoms=5, support=2, scope="layer")
    basis = PHI_FUNCTIONS[phi](0.3 * grouped_svd(weights, sizes))[group_of_experts(noise.base, 5, "layer")]
    normalised = torch.cat([block.weights for block in weights.normalised()])
    residual = normalised - solve_adapters(normalised, basis, 1e-6) @ basis
    expected = (residual.square().sum() / normalised.square().sum()).item()
    fitted = fit_mobe(weights, sizes, MobeConfig(0, phi=phi, warm_start=True))
    ((step, seconds, error),) = fitted.history
    assert step == 0 and seconds > 0 and error == pytest.approx(expected, rel=1e-5)
    raw = torch.cat(list(noise.weights.values()))
    residual = raw - solve_adapters(raw, basis, 1e-12) @ basis
    # the atoms are stored in bf16
    assert fitted.relative_error == pytest.approx((residual.square().sum() / raw.square().sum()).item(), rel=2e-2)


def test_the_history_never_rises_and_a_seed_decides(noise):
    sizes = GlobeConfig(noise.base, rank=3, num_atoms=4, support=2)
    first, second, other = (fit_mobe(measured(noise), sizes, MobeConfig(20, seed=seed)) for seed in (0, 0, 1))
    steps, seconds, errors = zip(*first.history, strict=True)
    assert list(steps) == list(range(21)) and sorted(seconds) == list(seconds)
    assert sorted(errors, reverse=True) == list(errors) and errors[-1] < errors[0]
    assert errors == tuple(error for _, _, error in second.history)
    for layer, factors in first.layers.items():
        for name in ("bank", "codes", "adapter"):
            assert torch.equal(getattr(factors, name), getattr(second.layers[layer], name))
            assert not torch.equal(getattr(factors, name), getattr(other.layers[layer], name))
        assert torch.allclose(factors.codes.sum(1), torch.ones(len(factors.codes)))


def test_a_fit_that_diverges_keeps_what_it_had(noise):
    fitted = fit_mobe(measured(noise), GlobeConfig(noise.base, rank=3, num_atoms=4, support=2), MobeConfig(10, lr=1e30))
    assert not fitted.completed and len(fitted.history) == 11
    assert 0 < fitted.relative_error < 1


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_as_large_as_globe_within_one_atom_per_layer(save_tiny, architecture):
    source = ExpertSource(save_tiny(architecture))
    sizes = resolve_sizes(source.base, FitConfig(ratio=0.7, support=4))
    fitted = fit_mobe(measured(source), sizes, MobeConfig(1))
    atom = sizes.rank * source.base.hidden_size * 2
    assert abs(fitted.num_bytes - sizes.tensor_bytes / 2) <= atom * len(source.layers)
    assert sum(len(layer.bank) for layer in fitted.layers.values()) == sizes.num_atoms


def test_what_cannot_be_is_said(noise):
    sizes = GlobeConfig(noise.base, rank=3, num_atoms=2, support=2)
    with pytest.raises(RequestError, match="2 atoms leave a layer of planted without atoms"):
        fit_mobe(measured(noise), sizes, MobeConfig(1))
    for changes in ({"phi": "relu"}, {"steps": -1}, {"lr": 0.0}):
        with pytest.raises(RequestError, match=next(iter(changes))):
            replace(MobeConfig(), **changes)


@pytest.mark.slow
def test_the_benchmark_of_fits(save_tiny, warm_python, tmp_path):
    command = [ROOT / "benchmarks" / "fit.py", "--device", "cpu"]
    options = [
        "--ratio",
        str(TINY_FIT.ratio),
        "--support",
        "4",
        "--steps",
        "6",
        "--rounds",
        "4",
        "--mobe-steps",
        "5",
        "--json",
    ]
    options += ["--curves", str(tmp_path / "curves.png")]
    done = warm_python.run(*command, save_tiny("qwen3_moe"), *options)
    assert done.returncode == 0, done.stderr
    rows = {row["provider"]: row for row in json.loads(done.stdout)}
    ours = ["globe", "globe_tanh", "globe_tanh_quick", "globe_palette", "alternating", "literal"]
    rounded = ["int8", "int4_g128", "int4_g32", "int3_g64", "int2_g32"]
    assert list(rows) == [*ours, "svd", "mobe", "mobe_warm", *rounded]
    for name, row in rows.items():
        assert row["op"] == "fit" and row["seconds"] > 0
        if name in rounded:
            assert row["bytes"] < rows["globe"]["bytes"]
        else:
            assert row["bytes"] == pytest.approx(rows["globe"]["bytes"], rel=0.1)
        assert row["shape"]["experts"] == 24 and row["shape"]["support"] == 4
        for family in ("gate", "up"):
            assert 0 < row[f"{family}_error"] < 1
            reached = row[f"{family}_seconds_to_mobe"]
            assert reached is None or 0 < reached <= row["seconds"]
            assert reached is not None or not name.startswith("mobe")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    wrong = warm_python.run(*command, tmp_path)
    assert wrong.returncode == 2 and "holds no config.json" in wrong.stderr
