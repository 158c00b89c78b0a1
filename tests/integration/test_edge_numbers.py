"""Numbers at the edge, from the fit through checkpoint and patch to the logits of every strategy."""

import json
import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import globe_kernels
from globe_fit import ExpertSource, FitConfig, VarProConfig, export_globe, fit, save_fit
from globe_fit.calibration.metric import Calibration
from globe_fit.calibration.moments import collect
from globe_fit.config import AlternatingConfig
from globe_kernels import GlobeCheckpoint, GlobeError, RequestError
from globe_kernels.model.discovery import routed_experts
from globe_kernels.model.targets import globe_modules
from globe_kernels.strategies import STRATEGIES
from globe_kernels.testing import relative_errors, tiny_model
from tests.conftest import MODEL_TYPES
from tests.kernels.cases import token_by_token

quick = partial(FitConfig, varpro=VarProConfig(steps=2, warmup_steps=1))
QUICK = quick(ratio=0.8, support=4)
TOKENS = torch.randint(1, 128, (1, 6), generator=torch.Generator().manual_seed(0))


def experts(model) -> list:
    return [dense.module for dense in routed_experts(model).values()]


def times(factor: float, layers=slice(None), numbers=slice(None), rows=slice(None)):
    """Multiply gate and up of some layers, of some experts, in some rows."""

    def change(model) -> None:
        for each in experts(model)[layers]:
            each.gate_up_proj.data[numbers, rows] *= factor

    return change


def filled(value: float, numbers=slice(None)):
    def change(model) -> None:
        for each in experts(model):
            each.gate_up_proj.data[numbers] = value

    return change


def all_alike(model) -> None:
    for each in experts(model):
        each.gate_up_proj.data[:] = experts(model)[0].gate_up_proj.data[0].clone()


GATE, UP = slice(0, 48), slice(48, None)


@pytest.fixture
def made(tmp_path):
    """Saves a changed tiny model and fits it: (directory of the model, directory of the fit, report)."""

    def make(change=None, config=QUICK, dtype=torch.float32, model_type="qwen3_moe", calibrated=False, **sizes):
        model = tiny_model(model_type, **({"num_hidden_layers": 2} if model_type == "qwen3_moe" else {}) | sizes)
        if change is not None:
            change(model)
        model.to(dtype).save_pretrained(tmp_path / "model")
        source = ExpertSource(tmp_path / "model")
        calibration = None
        if calibrated:
            windows = torch.randint(1, 127, (8, 32), generator=torch.Generator().manual_seed(1))
            calibration = Calibration("text", None, 256, collect(model.float(), source, [windows], "cpu"))
        result = fit(source, config, calibration=calibration)
        save_fit(result, source, tmp_path / "fit")
        for path in (tmp_path / "fit").rglob("*.json*"):
            text = path.read_text()
            assert not {"NaN", "Infinity"} & {*text.replace(",", " ").replace(":", " ").split()}, path
        return tmp_path / "model", tmp_path / "fit", json.loads((tmp_path / "fit" / "fit_report.json").read_text())

    return make


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits.float()


def measured_error(model_dir, fit_dir) -> dict[str, float]:
    """The relative squared error of each family in fp64, from the tensors on disk and in no code of the fit."""
    checkpoint, source = GlobeCheckpoint(fit_dir), ExpertSource(model_dir)
    phi = {"identity": lambda x: x, "tanh": torch.tanh, "silu": torch.nn.functional.silu}[checkpoint.config.phi]
    errors = {}
    for family in ("gate", "up"):
        lost = energy = 0.0
        bank = checkpoint.bank(family).double()
        for layer in source.layers:
            dense = source.read(layer, family, range(layer.num_experts)).double()
            factors = checkpoint.layer(layer.layer, family)
            atoms = bank[factors.code.index.long()]
            basis = phi((factors.code.value.double()[..., None, None] * atoms).sum(1))
            # the basis as the runtime rounds it
            fitted = factors.adapter.double() @ basis.to(checkpoint.config.torch_dtype).double()
            lost, energy = lost + (dense - fitted).square().sum().item(), energy + dense.square().sum().item()
        errors[family] = lost / energy if energy else lost
    return errors


def agrees(model_dir, fit_dir, report) -> torch.Tensor:
    """The report says the error that the files have, and all strategies give finite, equal logits; return them."""
    for family, expected in measured_error(model_dir, fit_dir).items():
        found = report["families"][family]
        assert found["relative_error"] == pytest.approx(expected, rel=1e-2, abs=1e-9)
        assert all(math.isfinite(value) for value in found.values() if isinstance(value, float))
    outs, model = {}, load(model_dir)
    globe_kernels.patch(model, fit_dir)
    for name, strategy in STRATEGIES.items():
        if strategy.refuses(GlobeCheckpoint(fit_dir).config) is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "A layer of this checkpoint uses")
                globe_kernels.set_strategy(model, name)
            outs[name] = logits(model)
            assert torch.isfinite(outs[name]).all(), name
    for name, out in outs.items():
        assert relative_errors(out, outs["composed"])[0] < 2e-3, name
    return outs["composed"]


ZEROS = {
    "a layer": times(0, slice(1, 2)),
    "the first layer, by which patch knows a model": times(0, slice(0, 1)),
    "an expert": times(0, slice(1, 2), 3),
    "all experts but one": times(0, slice(None), slice(0, 7)),
    "gate": times(0, rows=GATE),
    "up": times(0, rows=UP),
    "everything": times(0),
}
SOLVERS = {
    "varpro": QUICK,
    "tanh": replace(QUICK, phi="tanh"),
    "alternating": replace(QUICK, solver="alternating", alternating=AlternatingConfig(steps=2)),
}


@pytest.mark.parametrize("zeros", list(ZEROS))
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_zeros(zeros, solver, made):
    model, fitted, report = made(ZEROS[zeros], SOLVERS[solver])
    out = agrees(model, fitted, report)
    assert report["relative_error"] < 0.5
    if zeros in ("gate", "up", "everything"):
        zero = [family for family in ("gate", "up") if zeros in (family, "everything")]
        assert all(report["families"][family]["relative_error"] == 0 for family in zero)
        # silu(0) up = 0 and silu(gate) 0 = 0: the experts give nothing
        assert torch.equal(out, logits(load(model)))


@pytest.mark.parametrize("zeros", ["an expert", "a layer", "gate", "up", "everything"])
def test_zeros_in_a_calibrated_fit(zeros, made):
    model, fitted, report = made(ZEROS[zeros], calibrated=True)
    agrees(model, fitted, report)
    assert all(0 <= report["families"][family]["calibrated_error"] < 0.3 for family in ("gate", "up"))


@pytest.mark.parametrize(
    "change",
    [
        times(1e-22),
        times(1e-36),
        times(1e-22, slice(0, 1)),
        times(1e-22, slice(1, 2), 3),
        times(1e-22, rows=UP),
        times(1e-22, rows=GATE),
    ],
    ids=["all", "all, 1e-36", "the first layer", "an expert", "up", "gate"],
)
def test_small_weights(change, made):
    model, fitted, report = made(change)
    agrees(model, fitted, report)
    assert 0.05 < report["relative_error"] < 0.5


@pytest.mark.parametrize(
    ("factor", "dtype"), [(1e17, torch.float32), (1e20, torch.bfloat16), (1e36, torch.float32), (1e38, torch.float32)]
)
def test_large_weights_are_fitted_as_well_as_others(factor, dtype, made):
    """Their squares overflow in fp32; what the experts give overflows in the dense model too."""
    model, fitted, report = made(times(factor), dtype=dtype)
    for family, expected in measured_error(model, fitted).items():
        assert report["families"][family]["relative_error"] == pytest.approx(expected, rel=1e-2)
    plain = made(dtype=dtype)[2]
    for family in ("gate", "up"):
        for name in ("relative_error", "svd_equal_bytes", "rank_bound", "energy_captured"):
            found = report["families"][family][name]
            assert found == pytest.approx(plain["families"][family][name], rel=1e-2) and found > 0


@pytest.mark.parametrize("rows", [GATE, UP], ids=["gate", "up"])
def test_one_large_family_runs(rows, made):
    """The other is as small, so that the dense model is finite and its experts matter."""

    def change(model) -> None:
        for factor, scaled in ((1e20, rows), (1e-20, UP if rows == GATE else GATE)):
            times(factor, rows=scaled)(model)

    model, fitted, report = made(change)
    out, dense = agrees(model, fitted, report), logits(load(model))
    assert torch.isfinite(dense).all() and relative_errors(out, dense)[0] < 0.2


@pytest.mark.parametrize("change", [filled(0.3), filled(0.3, 2), filled(1e-22), filled(-1e20, 2), all_alike])
def test_weights_without_variance(change, made):
    model, fitted, report = made(change)
    for family, expected in measured_error(model, fitted).items():
        assert report["families"][family]["relative_error"] == pytest.approx(expected, rel=1e-2, abs=1e-9)
    assert report["relative_error"] < 0.1, "a constant matrix has rank 1"


@pytest.mark.parametrize("factor", [1e-39, 1e-43])
def test_weights_below_the_range_of_fp32(factor, made):
    with pytest.raises(GlobeError, match=r"gate experts of .* have weights of about 2e-\d\d, too small for float32;"):
        made(times(factor))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("row", "family"), [(5, "gate"), (60, "up")])
def test_a_value_that_is_not_finite(value, row, family, made):
    def change(model) -> None:
        experts(model)[1].gate_up_proj.data[3, row, 7] = value

    with pytest.raises(GlobeError, match=f"Expert 3 of layer 1 has NaN or infinity in its {family} matrix"):
        made(change)


def test_a_value_that_is_not_finite_in_the_model_that_is_patched(fit_tiny):
    model = tiny_model("qwen3_moe")
    experts(model)[0].gate_up_proj.data[3, 5, 7] = float("nan")
    with pytest.raises(GlobeError, match=r"layers.0.mlp.experts.gate_up_proj holds NaN or infinity; load the model"):
        globe_kernels.patch(model, fit_tiny()[0])


@pytest.mark.parametrize("change", [times(0), times(1e-22), times(1e20)], ids=["zeros", "small", "large"])
def test_a_fit_of_other_weights_is_still_refused(change, made, fit_tiny):
    model, fitted, _ = made(change, num_hidden_layers=3)
    with pytest.raises(RequestError, match="was fitted on other weights"):
        globe_kernels.patch(load(model), fit_tiny()[0])
    with pytest.raises(RequestError, match="was fitted on other weights"):
        globe_kernels.patch(tiny_model("qwen3_moe", seed=1), fitted)


SIZES = {
    "one expert": (quick(ratio=0.8, support=1), {"num_experts": 1, "num_experts_per_tok": 1}),
    "one expert, one layer": (
        quick(rank=16, atoms=1, support=1),
        {"num_experts": 1, "num_experts_per_tok": 1, "num_hidden_layers": 1},
    ),
    "one choice": (quick(ratio=0.8, support=4), {"num_experts_per_tok": 1}),
    "every expert": (quick(ratio=0.8, support=4), {"num_experts_per_tok": 8}),
    "one atom": (quick(rank=16, atoms=1, support=1), {}),
    "rank 1": (quick(rank=1, atoms=4, support=2), {}),
    "rank 1, one atom": (quick(rank=1, atoms=1, support=1), {}),
    "as many atoms as experts, all of them in use": (quick(rank=48, atoms=16, support=16), {}),
    "a palette of one": (quick(rank=16, atoms=4, support=1, palette=1), {}),
    "an atom per layer": (quick(rank=16, atoms=2, support=1, scope="layer"), {}),
    "no step": (quick(ratio=0.8, support=4, varpro=VarProConfig(steps=0)), {}),
    "no ridge": (quick(ratio=0.8, support=4, varpro=VarProConfig(steps=2, ridge=0.0)), {}),
}


@pytest.mark.parametrize("sizes", list(SIZES))
@pytest.mark.parametrize("solver", ["varpro", "alternating"])
def test_sizes_at_their_bounds(sizes, solver, made):
    config, overrides = SIZES[sizes]
    settings = AlternatingConfig(steps=min(config.varpro.steps, 2), cg_steps=1)
    model, fitted, report = made(None, replace(config, solver=solver, alternating=settings), **overrides)
    agrees(model, fitted, report)
    assert 0 < report["relative_error"] < 1


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name != "qwen3_moe"])
def test_a_layer_of_zeros_in_every_architecture(model_type, made):
    model, fitted, report = made(times(0, slice(0, 1)), model_type=model_type)
    agrees(model, fitted, report)
    export_globe(GlobeCheckpoint(fitted), ExpertSource(model), fitted.parent / "export")
    assert torch.isfinite(logits(load(fitted.parent / "export"))).all()


ROUTINGS = {
    "no token": torch.zeros(0, 2, dtype=torch.long),
    "one token": torch.tensor([[3, 1]]),
    "all to one expert": torch.full((21, 2), 2),
    "no expert": torch.tensor([[-1, 8], [9, -5]]),
    "an id past int32": torch.tensor([[2**32 + 1, 1], [-(2**32) + 2, 2**31]]),
    "an expert twice": torch.tensor([[4, 4], [0, 4]]),
}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_routing_at_its_edges(routing, strategy, fit_tiny):
    path = fit_tiny()[0]
    model = tiny_model("qwen3_moe")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A layer of this checkpoint uses")
        globe_kernels.patch(model, path, strategy=strategy)
    layer, index = next(iter(globe_modules(model).values())), ROUTINGS[routing]
    generator = torch.Generator().manual_seed(2)
    hidden, scale = torch.randn(len(index), 64, generator=generator), torch.rand(index.shape, generator=generator)
    checkpoint = GlobeCheckpoint(path)
    bases = []
    for family in ("gate", "up"):
        code, bank = layer.code(family), checkpoint.bank(family).float()
        bases.append((code.value[..., None, None] * bank[code.index.long()]).sum(1))
    known = (index >= 0) & (index < 8)
    dtypes = [torch.int64, torch.int32] + [torch.int16, torch.int8] * bool((index.abs() < 99).all())
    for weights in (scale, torch.zeros_like(scale), scale.double(), scale.bfloat16()):
        expected = token_by_token(
            hidden, torch.where(known, index, -1), weights, bases, layer.from_rank, experts=layer.num_experts
        )
        for dtype in dtypes if routing != "an id past int32" else dtypes[:1]:
            out = layer(hidden, index.to(dtype), weights)
            assert out.shape == hidden.shape and torch.isfinite(out).all()
            assert (out - expected).abs().max() <= 1e-5 if len(out) else True
            if not weights.any() or not known.any():
                assert not out.any()
    with pytest.raises(ValueError, match="top_k_index is torch.float32 and ids of experts are integers"):
        layer(hidden, index.float(), scale)
