"""Healing: the targets are the dense outputs, errors fall on tokens held out and never rise, a kill changes nothing."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from globe_fit import ExpertSource, FitConfig, VarProConfig, compress, heal
from globe_fit.calibration.metric import run_over
from globe_fit.calibration.self_text import sample_windows
from globe_fit.config import SELF
from globe_fit.data.model import load_model
from globe_fit.data.stream import FamilyWeights
from globe_fit.healing import healing, layer
from globe_fit.healing.healing import healing_bytes, healing_disk_bytes
from globe_fit.healing.inputs import RoutedInputs, inputs_bytes, read_inputs, record_inputs
from globe_fit.healing.layer import LayerExperts, heal_layer
from globe_fit.measure.errors import stored_errors
from globe_fit.result import stored_fit
from globe_fit.run.progress import Progress
from globe_kernels import GlobeCheckpoint
from globe_kernels.errors import GlobeError, GlobeWarning, RequestError
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.discovery import activation_of, routed_experts
from globe_kernels.testing import assert_close, tiny_model

CONFIG = FitConfig(rank=8, atoms=4, support=2, device="cpu", varpro=VarProConfig(steps=4, warmup_steps=1))


@pytest.fixture(autouse=True)
def few_windows(monkeypatch):
    windows = torch.randint(64, (4, 256), generator=torch.Generator().manual_seed(0))  # no seconds for the writing
    monkeypatch.setattr("globe_fit.calibration.metric.sample_windows", lambda *_, **__: windows)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny models, of several layouts."""
    written = {}

    def model(model_type: str):
        if model_type not in written:
            written[model_type] = tmp_path_factory.mktemp(model_type)
            tiny_model(model_type).save_pretrained(written[model_type])
        return written[model_type]

    return model


@pytest.fixture
def fitted(models, tmp_path):
    """(model directory, directory of a checkpoint that is not healed)."""
    compress(models("qwen3_moe"), tmp_path / "fit", CONFIG, calibrate=None)
    return models("qwen3_moe"), tmp_path / "fit"


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_the_targets_are_the_outputs_of_the_live_experts(models, tmp_path, model_type):
    source, model = ExpertSource(models(model_type)), load_model(models(model_type), dtype=torch.float32)
    windows = sample_windows(model, 16, "cpu", count=2)
    live, first = routed_experts(model), source.layers[0]
    outputs = []
    hook = live[first.layer].module.register_forward_hook(lambda _, inputs, output: outputs.append(output.detach()))
    facts = record_inputs(model, source, [windows], "cpu", tmp_path)
    hook.remove()
    inputs = read_inputs(source, tmp_path, first.layer, json.loads(json.dumps(facts))[str(first.layer)])
    assert len(inputs) == windows.numel()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == inputs_bytes(source, windows.numel())

    def dense(family: str, expert: int) -> torch.Tensor:
        return source.read(first, family, range(expert, expert + 1))[0]

    spec = activation_of(source.outline.experts[first.layer])
    experts = LayerExperts({}, source.read_kept(first), spec, dense)
    assert_close(experts.outputs(inputs, experts.as_dense), outputs[0], rms=1e-2, peak=5e-2)  # inputs in bf16


def test_inputs_that_changed_are_refused(models, tmp_path):
    source = ExpertSource(models("qwen3_moe"))
    model = load_model(source.model_dir)
    facts = record_inputs(model, source, [torch.zeros(1, 8, dtype=torch.int64)], "cpu", tmp_path)
    number = source.layers[0].layer
    path = next(tmp_path.glob(f"*.{number}.bin"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(GlobeError, match="not the file that healing wrote; begin the healing again with --restart"):
        read_inputs(source, tmp_path, number, facts[str(number)])


def planted(tokens: int = 600, experts: int = 4, noise: float = 0.3) -> tuple[LayerExperts, RoutedInputs, dict]:
    """A layer whose dense experts are exact in some adapters, with other adapters as stored."""
    generator = torch.Generator().manual_seed(0)
    width, inner, rank = 12, 6, 5
    draw = partial(torch.randn, generator=generator)
    bases = {family: draw(experts, rank, width) for family in FAMILIES}
    best = {family: draw(experts, inner, rank) / 4 for family in FAMILIES}
    stored = {family: (a + noise * draw(a.shape) / 4).bfloat16() for family, a in best.items()}
    dense = {family: best[family] @ bases[family] for family in FAMILIES}
    kept = {"down_proj": draw(experts, width, inner)}
    inputs = RoutedInputs(
        draw(tokens, width).bfloat16(),
        torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)]),
        torch.rand(tokens, 2, generator=generator),
    )
    return LayerExperts(bases, kept, "silu", lambda family, expert: dense[family][expert]), inputs, stored


def test_a_layer_finds_the_adapters_that_lose_nothing():
    experts, inputs, stored = planted()
    healed = heal_layer(experts, inputs, stored, seed=0)
    assert healed.before > 1e-2 and healed.after < 1e-4 * healed.before + 1e-5
    assert all(healed.adapters[family].dtype == torch.bfloat16 for family in FAMILIES)


def test_adam_alone_lowers_the_error_too(monkeypatch):
    monkeypatch.setattr(layer, "_refit", lambda experts, inputs, stored: stored)
    experts, inputs, stored = planted(2000, noise=0.01)
    healed = heal_layer(experts, inputs, stored, seed=0)
    assert 0 < healed.after < 0.7 * healed.before
    again = heal_layer(experts, inputs, stored, seed=0)
    assert all(torch.equal(healed.adapters[family], again.adapters[family]) for family in FAMILIES)


def test_a_layer_that_does_not_improve_keeps_its_adapters(monkeypatch):
    monkeypatch.setattr(layer, "_refit", lambda experts, inputs, stored: {f: -a.float() for f, a in stored.items()})
    monkeypatch.setattr(layer, "_RATE", 10.0)
    experts, inputs, stored = planted()
    healed = heal_layer(experts, inputs, stored, seed=0)
    assert healed.after == healed.before and not healed.diverged
    assert all(torch.equal(healed.adapters[family], stored[family]) for family in FAMILIES)


def test_a_layer_that_diverges_keeps_its_adapters(monkeypatch):
    monkeypatch.setattr(layer, "_refit", lambda experts, inputs, stored: stored)
    monkeypatch.setattr(layer, "_RATE", 1e38)
    experts, inputs, stored = planted()
    healed = heal_layer(experts, inputs, stored, seed=0)
    assert healed.diverged and math.isfinite(healed.after)
    assert all(torch.equal(healed.adapters[family], stored[family]) for family in FAMILIES)


@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens_and_tokens_of_no_expert(tokens):
    experts, inputs, stored = planted(tokens)
    healed = heal_layer(experts, inputs, stored, seed=0)
    assert healed.after <= healed.before
    nowhere = replace(inputs, index=torch.full_like(inputs.index, 99))
    healed = heal_layer(experts, nowhere, stored, seed=0)
    assert healed.facts == {"before": 0.0, "after": 0.0, "steps": 0}


def test_a_checkpoint_is_healed_in_place(fitted):
    model_dir, out = fitted
    before = GlobeCheckpoint(out)
    size, old = before.bytes_on_disk, {family: before.layer(0, family).adapter.clone() for family in FAMILIES}
    said = []
    result = heal(out, model_dir, text=SELF, device="cpu")
    after = GlobeCheckpoint(out)
    after.verify()
    assert abs(after.bytes_on_disk - size) < 512 and not (out / ".snapshot").exists()
    healed = after.config.provenance["healing"]
    assert healed["text"] == SELF and healed["tokens"] == 4 * 256 and healed == after.report()["healing"]
    assert all(0 < found["after"] < found["before"] for found in healed["layers"].values())
    assert not torch.equal(after.layer(0, "gate").adapter, old["gate"])
    # the errors in the report are of the new adapters
    for family in FAMILIES:
        weights = FamilyWeights.measure(ExpertSource(model_dir), family, "cpu")
        found = stored_errors(weights, stored_fit(after).families[family], after.config.phi)
        reported = after.report()["families"][family]
        assert reported["relative_error"] == pytest.approx(found["relative_error"], rel=1e-6)
        assert reported["relative_error"] != pytest.approx(before.report()["families"][family]["relative_error"])
    bytes_before = (out / "globe_config.json").read_bytes()
    again = heal(out, model_dir, device="cpu", progress=Progress(say=said.append))
    assert said == [f"{out} is healed already: nothing is done."] and again.report["healing"] == healed
    assert (out / "globe_config.json").read_bytes() == bytes_before
    assert result.report["healing"] == healed


def test_an_interrupted_healing_goes_on_with_the_same_result(fitted, tmp_path, monkeypatch):
    model_dir, out = fitted
    whole = shutil.copytree(out, tmp_path / "whole")
    heal(whole, model_dir, text=SELF, device="cpu")
    usual, calls = heal_layer, []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return usual(*arguments, **options)

    monkeypatch.setattr(healing, "heal_layer", stopping)
    with pytest.raises(KeyboardInterrupt, match=r"holds the checkpoint as it was, .* \(1 layers are healed\)"):
        heal(out, model_dir, text=SELF, device="cpu")
    assert GlobeCheckpoint(out).config.provenance.get("healing") is None
    with pytest.raises(RequestError, match=r"holds an unfinished fit with other settings \(healing was self"):
        text = tmp_path / "text.txt"
        text.write_text("a")
        heal(out, model_dir, text=text, device="cpu")
    heal(out, model_dir, text=SELF, device="cpu")
    layers = len(ExpertSource(model_dir).layers)
    assert len(calls) == 1 + layers, "the first layer was not healed again"
    (found,), (expected,) = ([path.read_bytes() for path in each.glob("*.safetensors")] for each in (out, whole))
    assert found == expected


def test_a_calibrated_fit_is_healed(models, tmp_path):
    model_dir = models("qwen3_moe")
    plain = compress(model_dir, tmp_path / "plain", CONFIG, calibrate=SELF, heal=False)
    assert "healing" not in plain.config.provenance
    healed = compress(model_dir, tmp_path / "healed", CONFIG, calibrate=SELF)
    layers = healed.report["healing"]["layers"]
    assert all(found["after"] < found["before"] for found in layers.values())
    assert healed.report["families"]["gate"]["calibrated_error"] > 0
    assert not (tmp_path / "healed" / ".snapshot").exists()
    again = compress(model_dir, tmp_path / "healed", CONFIG, calibrate=SELF)  # finished
    assert again.report["healing"] == healed.report["healing"]
    with pytest.raises(RequestError, match=r"other settings \(healed was True and is False\)"):
        compress(model_dir, tmp_path / "healed", CONFIG, calibrate=SELF, heal=False)
    # the same as the verb does afterwards
    heal(tmp_path / "plain", model_dir, device="cpu")
    first, second = (GlobeCheckpoint(tmp_path / name) for name in ("plain", "healed"))
    for family in FAMILIES:
        assert torch.equal(first.layer(0, family).adapter, second.layer(0, family).adapter)


def test_requests_that_cannot_be_met(fitted, models, tmp_path, monkeypatch):
    model_dir, out = fitted
    with pytest.raises(RequestError, match="is not a file; give a text file"):
        heal(out, model_dir, text="none.txt")
    with pytest.raises(RequestError, match="Healing needs .* at its peak and the memory limit is 100 kB"):
        heal(out, model_dir, memory_limit="100kB", device="cpu")
    with pytest.raises(RequestError, match="The checkpoint was fitted on"):
        heal(out, models("mixtral"))
    monkeypatch.setattr("globe_fit.calibration.offload.AT_ONCE", 64)  # the model writes in less than healing needs
    with pytest.raises(RequestError, match="Healing needs .* fit without it"):
        compress(model_dir, tmp_path / "new", CONFIG, calibrate=SELF, memory_limit="25MB")
    checkpoint = GlobeCheckpoint(out)
    assert not (out / ".snapshot").exists() and healing_bytes(ExpertSource(model_dir), checkpoint.config) > 1e6
    assert healing_disk_bytes(ExpertSource(model_dir), checkpoint.config) > 1e6


def test_a_full_disk_is_refused_before_the_run(fitted, monkeypatch):
    model_dir, out = fitted
    monkeypatch.setattr("globe_kernels.format.writing._free", lambda target: 1000)
    with pytest.raises(GlobeError, match="needs .* and 1.00 kB are free"):
        heal(out, model_dir, device="cpu")


@pytest.mark.filterwarnings("ignore::globe_kernels.errors.GlobeWarning")
def test_a_divergence_is_a_warning(fitted, monkeypatch):
    model_dir, out = fitted
    monkeypatch.setattr(layer, "_RATE", 1e38)
    with pytest.warns(GlobeWarning, match="The healing of layer 0 diverged, so the layer keeps the best adapters"):
        heal(out, model_dir, device="cpu")
    assert GlobeCheckpoint(out).config.provenance["healing"] is not None


def test_a_long_text_is_read_in_part(models, tmp_path, monkeypatch):
    source = ExpertSource(models("qwen3_moe"))
    every = torch.arange(10)[:, None] * torch.ones(1, 256, dtype=torch.int64)
    monkeypatch.setattr("globe_fit.calibration.metric.token_windows", lambda *_: every)
    seen, tokens = run_over(
        source, "text", "cpu", lambda model, source, batches, *_: torch.cat(batches)[:, 0].tolist(), most_windows=4
    )
    assert seen == [0, 3, 6, 9] and tokens == 4 * 256
