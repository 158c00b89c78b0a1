"""The inputs that GloBE reads, and the calls that read them: a kind is a valid input, its files, and its reader."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub.constants as hub_constants
import matplotlib.font_manager
import torch
from huggingface_hub.utils import set_client_factory
from huggingface_hub.utils._http import default_client_factory
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from globe_fit import ExpertSource, FitConfig, VarProConfig, export_globe
from globe_fit.cli.report.facts import collect
from globe_fit.cli.report.page import write_report
from globe_fit.cli.sweep import ROWS_NAME, Sweep, plan_points
from globe_fit.cli.tables import print_inspection, print_plan, print_sweep
from globe_fit.compression import compress
from globe_fit.data import source as source_file
from globe_fit.data.model import load_model, load_tokenizer, token_windows
from globe_fit.data.outline import Outline
from globe_fit.export import export_dense
from globe_fit.fitting import open_snapshots
from globe_fit.measure.evaluate import evaluate, read_evaluation, record_evaluation
from globe_fit.measure.inspection import inspect_checkpoint
from globe_fit.model_card import model_card
from globe_fit.plan.serving import plan_all
from globe_fit.result import stored_fit
from globe_fit.run.loggers import MetricStream
from globe_fit.run.progress import SILENT
from globe_fit.run.snapshots import Snapshots
from globe_kernels import GlobeCheckpoint, GlobeError, patch, unpatch
from globe_kernels.format.exported import Export
from globe_kernels.format.hub import local_directory
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.quantizer import GlobeQuantizationConfig
from globe_kernels.strategies.cost import machine_named
from globe_kernels.testing import tiny_model
from tests.fake_hub import FakeHub
from tests.fit.data.quantizers import CASES, stored_names

_FIT = FitConfig(ratio=1.2, support=2, device="cpu", varpro=VarProConfig(steps=3, warmup_steps=1))
_SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 32, "num_attention_heads": 2}
_QWEN = _SIZES | {"num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 32, "num_experts": 3}
_GPT_OSS = _SIZES | {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 64, "num_local_experts": 3}
_TOKENS = torch.arange(12)[None]
_FOLDERS = matplotlib.get_configdir(), matplotlib.get_cachedir()  # makes them now


@dataclass(frozen=True)
class Kind:
    """`make` writes the valid input into a directory, `read` reads it; `files` are patterns of the files to damage."""

    make: Callable[[Path], object]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    writes: bool = False
    is_given: bool = False  # a person names the file itself
    keeps_config: bool = True  # no case changes the model of config.json, which is slow to build


# --- valid inputs ---


@cache
def _model(model_type: str) -> Any:
    return tiny_model(model_type, **{"qwen3_moe": _QWEN, "gpt_oss": _GPT_OSS}.get(model_type, {})).bfloat16()


def _save_base(directory: Path, model_type: str = "qwen3_moe", fused: bool = False) -> None:
    _model(model_type).save_pretrained(directory, max_shard_size="40KB", save_original_format=not fused)


def _save_config(directory: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)


def _save_quantized(directory: Path, name: str) -> None:
    """Write a model whose experts are quantised, gate and up in one file and the rest in another."""
    case = CASES[name]
    _save_base(directory, "qwen3_moe" if 2 in case.ndims else "gpt_oss")
    tensors: dict[str, dict] = {"experts.safetensors": {}, "rest.safetensors": {}}
    for file in sorted(directory.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            is_expert = ".experts." in key and tensor.ndim >= 2 and "bias" not in key
            parts = stored_names(key, case.quantize(tensor.float())) if is_expert else {key: tensor}
            tensors["experts.safetensors" if is_expert else "rest.safetensors"] |= parts
        file.unlink()
    weight_map = {key: file for file, found in tensors.items() for key in found}
    for file, found in tensors.items():
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, directory / file, {"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((directory / "config.json").read_text()) | {"quantization_config": case.config}
    (directory / "config.json").write_text(json.dumps(config))


@cache
def _made() -> TemporaryDirectory:
    """Make the folder of the inputs that others are made of; it goes when the process ends."""
    return TemporaryDirectory(prefix="globe-fuzz-")


def _home() -> Path:
    return Path(_made().name)


@cache
def _base() -> Path:
    _save_base(_home() / "base")
    return _home() / "base"


def _save_checkpoint(directory: Path) -> None:
    result = compress(_base(), directory, _FIT, calibrate=None)
    report = json.loads((directory / "fit_report.json").read_text())
    for family in report["families"].values():
        family["spot_checks"] = family["spot_checks"][:1]  # figures are slow to draw
    (directory / "fit_report.json").write_text(json.dumps(report))
    quality = {"perplexity": 3.0, "kl": 0.01, "top1": 0.9, "tokens_per_s": 100.0, "timed_batches": 4}
    machine = {"device": "cpu", "threads": 1, "strategies": ["composed"]}
    facts = {"text": "text.txt", "tokens": 2560, "command": "globe eval", **machine}
    assert result.status
    record_evaluation(GlobeCheckpoint(directory), facts | {"dense": quality, "globe": quality})


@cache
def _checkpoint() -> Path:
    _save_checkpoint(_home() / "checkpoint")
    return _home() / "checkpoint"


def _save_export(directory: Path) -> None:
    export_globe(GlobeCheckpoint(_checkpoint()), _source(), directory)


@cache
def _source() -> ExpertSource:
    return ExpertSource(_base())


def _save_snapshot(directory: Path) -> None:
    """Interrupt a fit in its second family, so that one family is done and the other is not."""

    class Enough(Exception):
        pass

    def stop(record: dict) -> None:
        if record["family"] == "up" and record["step"] == 1:
            raise Enough

    try:
        compress(_base(), directory, _FIT, snapshot_minutes=0, on_step=stop, calibrate=None)
    except Enough:
        return
    raise AssertionError("the fit was not interrupted")


def _save_tokenizer(directory: Path) -> None:
    vocabulary = {chr(97 + letter): letter for letter in range(26)} | {" ": 26, "?": 27}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(directory)
    (directory / "config.json").write_text((_base() / "config.json").read_text())
    (directory / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 12)


def _save_settings(directory: Path) -> None:
    (directory / "fit.toml").write_text(
        'ratio = 0.5\nsupport = 4\npalette = 8\nphi = "silu"\nscope = "layer"\nseed = 3\ndevice = "cpu"\n'
        'solver = "varpro"\n[varpro]\nsteps = 10\nlr = 0.5\nfirst_cycle = 4\nridge = 1e-5\n'
        '[alternating]\nsteps = 5\ndictionary = "mod"\n[alternating.coding]\nmethod = "omp"\nprune = 0.1\n'
        "[alternating.entmax]\nalpha = 1.5\n"
    )


def _points() -> list:
    return plan_points(_source(), _FIT, {"support": [1, 2]})


def _save_sweep(directory: Path) -> None:
    runs = Sweep(_source(), _points(), directory, restart=False, minutes=1)
    rows = runs.run(SILENT)
    (directory / ROWS_NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))


_HUB_ID = "Org/name"


def _save_repository(directory: Path) -> None:
    """Write the files of a model on the Hub, and the answers of the Hub about them."""
    (directory / "model").mkdir()
    _save_base(directory / "model")
    served = FakeHub()
    served.models[_HUB_ID] = directory / "model"
    (directory / "cache").mkdir()
    for kind, path in _asked(served).items():
        (directory / f"{kind}.json").write_bytes(served.answer(path)[2])


def _asked(served: FakeHub) -> dict[str, str]:
    commit = served.commit(_HUB_ID)
    about = f"/api/models/{_HUB_ID}"
    return {"revision": f"{about}/revision/main", "tree": f"{about}/tree/{commit}"}


# --- readers: each returns the numbers that must be finite ---


def _read_base(directory: Path) -> Any:
    source = ExpertSource(directory)
    found = []
    for layer in source.layers:
        for family in FAMILIES:
            found.append(source.read(layer, family))
            source.require_finite(layer, family, range(layer.num_experts), found[-1])
    return found, source.facts, source.weights_sha256


def _plan(path: Path) -> Any:
    figures = plan_all(path, None, machine_named("h100"), {}, {})
    print_plan(figures)
    return figures


def _read_checkpoint(directory: Path) -> Any:
    checkpoint = GlobeCheckpoint(directory)
    layers = list(checkpoint.config.base.num_experts)
    found = [checkpoint.layer(layer, family) for layer in layers for family in FAMILIES]
    figures = inspect_checkpoint(checkpoint)
    print_inspection(figures, all_layers=True)
    result = stored_fit(checkpoint)
    return found, figures, dict(result.families), checkpoint.bytes_on_disk


def _verify(directory: Path) -> Any:
    return GlobeCheckpoint(directory, verify=True).config.tensor_bytes


def _read_report(directory: Path) -> Any:
    checkpoint = GlobeCheckpoint(directory)
    figures = inspect_checkpoint(checkpoint)
    print_inspection(figures, all_layers=True)
    measured = read_evaluation(checkpoint)
    facts = collect(directory, None)
    card = model_card(checkpoint, _source(), dense=False)
    result = stored_fit(checkpoint)
    print(result, result._repr_html_(), card)
    return figures, measured, facts.families, facts.history, facts.sizes, result.report, result.history, result.status


def _write_page(directory: Path) -> Any:
    figures = write_report(directory, directory / "report.html")
    page = (directory / "report.html").read_text()
    assert "</html>" in page
    return figures


def _open_snapshots(directory: Path) -> Any:
    snapshots: Snapshots = open_snapshots(directory, _source(), _FIT)
    reached = {name: step for name, step in snapshots.reached().items() if step != math.inf}
    for family in FAMILIES:
        snapshots.load(family)
    return reached, MetricStream(snapshots)._kept


def _resume(directory: Path) -> Any:
    result = compress(_base(), directory, _FIT, snapshot_minutes=0, calibrate=None)
    return dict(result.families), result.report, result.status


def _read_quantization_config(directory: Path) -> Any:
    path = directory / "config.json"
    try:
        found = json.loads(path.read_bytes()) if path.is_file() and not path.is_symlink() else None
    except (ValueError, RecursionError):
        return None
    given = found.get("quantization_config") if isinstance(found, dict) else None
    if not isinstance(given, dict):
        return None
    config: Any = GlobeQuantizationConfig(**given)
    return config.globe.tensor_bytes


def _load_export(directory: Path) -> Any:
    return evaluate({"globe": load_model(directory)}, _TOKENS)


@cache
def _live() -> Any:
    return AutoModelForCausalLM.from_pretrained(_base())


def _patch(directory: Path) -> Any:
    model = _live()
    patch(model, directory, keep_dense=True)
    try:
        return evaluate({"patched": model}, _TOKENS)
    finally:
        unpatch(model)


def _read_export(directory: Path) -> Any:
    """As an engine does, on the first of two processes."""
    export = Export(directory)
    rows = range(export.config.base.intermediate_size // 2)
    tensors = [export.experts(layer, range(count), rows) for layer, count in export.config.base.num_experts.items()]
    banks = [export.bank(family) for family in FAMILIES]
    export.verify()
    return tensors, banks


def _export(checkpoint: Path, base: ExpertSource, out: Path) -> Any:
    """Export in both ways; the weights are those of the checkpoint and of the base."""
    sizes = {}
    for write in (export_globe, export_dense):
        write(GlobeCheckpoint(checkpoint), base, out / write.__name__)
        sizes[write.__name__] = sum(path.stat().st_size for path in (out / write.__name__).iterdir())
    return sizes


def _save_base_of_checkpoint(directory: Path) -> None:
    _checkpoint()
    _save_base(directory)


def _export_base(directory: Path) -> Any:
    return _export(_checkpoint(), ExpertSource(directory), directory / "out")


def _export_checkpoint(directory: Path) -> Any:
    return _export(directory, _source(), directory / "out")


def _sweep(directory: Path) -> Any:
    runs = Sweep(_source(), _points(), directory, restart=False, minutes=1)
    estimated, rows = runs.estimate(), runs.run(SILENT)
    print_sweep("2 points", rows, directory / ROWS_NAME, None)
    return estimated, rows


def _from_pretrained(directory: Path) -> Any:
    with _documented_refusals():
        model = AutoModelForCausalLM.from_pretrained(directory)
    return evaluate({"globe": model}, _TOKENS)


@contextmanager
def _documented_refusals() -> Iterator[None]:
    """Turn the error by which transformers refuses a tensor that GloBE does not add into a GlobeError."""
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise GlobeError("A tensor has another shape.") from error


def _download(directory: Path) -> Any:
    """Download a model of a Hub that answers with the files of `directory`, without a socket."""
    served = FakeHub()
    served.models[_HUB_ID] = directory / "model"
    commit = json.loads((directory / "revision.json").read_bytes())["sha"]
    served.commit = lambda name: commit  # whatever the files hold
    kept = {name: getattr(hub_constants, name) for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE")}
    client: Any = type(default_client_factory())
    library = sys.modules[client.__module__.partition(".")[0]]

    def answer(request: Any) -> Any:
        path = request.url.raw_path.decode()
        status, headers, body = served.answer(path)
        for kind in ("revision", "tree"):
            if f"/{kind}/" in path and status == 200:
                body = (directory / f"{kind}.json").read_bytes()
        if request.method == "HEAD":
            headers, body = headers | {"Content-Length": str(len(body))}, b""
        return library.Response(status, headers=headers, content=body)

    hub_constants.HF_HUB_CACHE, hub_constants.HF_HUB_OFFLINE = str(directory / "cache"), False
    set_client_factory(lambda: client(transport=library.MockTransport(answer)))
    try:
        return _read_base(local_directory(_HUB_ID))
    finally:
        set_client_factory(default_client_factory)
        for name, value in kept.items():
            setattr(hub_constants, name, value)


def _read_settings(directory: Path) -> Any:
    return FitConfig.from_options(directory / "fit.toml", {})


def _read_tokenizer(directory: Path) -> Any:
    load_tokenizer(directory)
    return token_windows(directory, directory / "text.txt")


# --- all kinds ---

_BASE_FILES = ("*.index.json", "*.safetensors", "*.safetensors")
_PLANNED = ("qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "qwen3_vl_moe", "granitemoehybrid", "gemma4", "glm4_moe")
_CHECKPOINT_FILES = ("globe_config.json", "globe.safetensors")
_REPORT_FILES = ("fit_report.json", "fit_report.json", "metrics.jsonl", "evaluation.json")
_SWEPT_FILES = (*_CHECKPOINT_FILES, "fit_report.json", "metrics.jsonl")
_SNAPSHOT_FILES = (".snapshot/*.safetensors", ".snapshot/*.safetensors", ".snapshot/metrics.jsonl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

KINDS: dict[str, Kind] = {
    "base": Kind(_save_base, _read_base, _BASE_FILES),
    "base, fused": Kind(lambda path: _save_base(path, fused=True), _read_base, _BASE_FILES),
    "base, gpt_oss": Kind(lambda path: _save_base(path, "gpt_oss"), _read_base, _BASE_FILES),
    **{
        f"quantised, {name}": Kind(lambda path, name=name: _save_quantized(path, name), _read_base, _BASE_FILES)
        for name in CASES
    },
    "base, config": Kind(_save_base, _read_base, ("config.json",), keeps_config=False),
    "quantised, config": Kind(
        lambda path: _save_quantized(path, "int4 packed"), _read_base, ("config.json",), keeps_config=False
    ),
    **{
        f"plan, {name}": Kind(
            lambda path, name=name: _save_config(path, name),
            _plan if number % 2 else lambda path: _plan(path / "config.json"),
            ("config.json",),
            is_given=number % 2 == 0,
            keeps_config=False,
        )
        for number, name in enumerate(_PLANNED)
    },
    "checkpoint": Kind(_save_checkpoint, _read_checkpoint, _CHECKPOINT_FILES),
    "verify": Kind(_save_checkpoint, _verify, _CHECKPOINT_FILES),
    "report": Kind(_save_checkpoint, _read_report, _REPORT_FILES),
    "page": Kind(_save_checkpoint, _write_page, _REPORT_FILES, writes=True),
    "page of an unfinished fit": Kind(_save_snapshot, _write_page, (".snapshot/metrics.jsonl",), writes=True),
    "snapshot": Kind(_save_snapshot, _open_snapshots, _SNAPSHOT_FILES, writes=True),
    "resume": Kind(_save_snapshot, _resume, _SNAPSHOT_FILES, writes=True),
    "finished fit": Kind(_save_checkpoint, _resume, (*_CHECKPOINT_FILES, *_REPORT_FILES), writes=True),
    "quantization_config": Kind(_save_export, _read_quantization_config, ("config.json",)),
    "export": Kind(_save_export, _load_export, ("config.json", "globe-model.safetensors"), keeps_config=False),
    # transformers follows any link
    "engine": Kind(_save_export, _read_export, ("config.json", "globe-model.safetensors")),
    "from_pretrained": Kind(_save_export, _from_pretrained, ("globe-model.safetensors",), is_given=True),
    "patch": Kind(_save_checkpoint, _patch, _CHECKPOINT_FILES),
    "eval": Kind(_save_base, lambda path: evaluate({"dense": load_model(path)}, _TOKENS), _BASE_FILES),
    "eval, config": Kind(
        _save_base, lambda path: evaluate({"dense": load_model(path)}, _TOKENS), ("config.json",), keeps_config=False
    ),
    "export of a base": Kind(
        _save_base_of_checkpoint, _export_base, ("config.json", *_BASE_FILES), writes=True, keeps_config=False
    ),
    "export of a checkpoint": Kind(
        _save_checkpoint, _export_checkpoint, (*_CHECKPOINT_FILES, "fit_report.json", "evaluation.json"), writes=True
    ),
    "sweep": Kind(_save_sweep, _sweep, ("sweep.jsonl", *(f"r*/{name}" for name in _SWEPT_FILES)), writes=True),
    "download": Kind(
        _save_repository,
        _download,
        # not the answer with the commit: huggingface_hub makes a path of any commit that a Hub names
        ("tree.json", "tree.json", "model/config.json", "model/*.safetensors", "model/*.index.json"),
        writes=True,
        is_given=True,  # a Hub has neither links nor pipes
        keeps_config=False,
    ),
    "settings": Kind(_save_settings, _read_settings, ("fit.toml",), is_given=True),
    "tokenizer": Kind(_save_tokenizer, _read_tokenizer, _TOKENIZER_FILES),
    "text": Kind(_save_tokenizer, _read_tokenizer, ("text.txt",), is_given=True),
}


@contextmanager
def remembered_outlines() -> Iterator[None]:
    """Build the model of one config.json once, whatever its quantization_config says."""
    known: dict[tuple, Outline] = {}

    def read(where: Path) -> Outline:
        config = json.loads((where / "config.json").read_text())
        config.pop("quantization_config", None)
        key = where, json.dumps(config)
        if key not in known:
            known[key] = Outline.read(where)
        return replace(known[key])

    class Remembered:
        pass

    Remembered.read = staticmethod(read)  # type: ignore[attr-defined]
    usual = source_file.Outline
    source_file.Outline = Remembered  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        source_file.Outline = usual
