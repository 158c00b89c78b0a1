import errno
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format import files
from globe_kernels.format.checkpoint import (
    BaseModel,
    Code,
    GlobeCheckpoint,
    GlobeConfig,
    LayerFactors,
    writing_checkpoint,
)
from globe_kernels.format.names import CONFIG_NAME

FAMILIES = ("gate", "up")
CONFIG = GlobeConfig(
    base=BaseModel("planted", "qwen3_moe", hidden_size=6, intermediate_size=4, num_experts={1: 3, 3: 2}),
    rank=2,
    num_atoms=5,
    support=2,
    provenance={"seed": 0},
)


def draw(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    tensors = {}
    for name, (shape, dtype) in CONFIG.tensor_shapes().items():
        tensors[name] = torch.randint(5, shape).int() if dtype == torch.int32 else torch.randn(shape).to(dtype)
    return tensors


def write(path: Path, tensors: dict[str, torch.Tensor], config: GlobeConfig = CONFIG) -> None:
    banks = {family: tensors[f"bank.{family}"] for family in FAMILIES}
    with writing_checkpoint(path, config, banks) as writer:
        for family in FAMILIES:
            for layer in config.base.num_experts:
                prefix = f"layers.{layer}.{family}"
                code = Code(tensors[f"{prefix}_code_index"], tensors[f"{prefix}_code_value"])
                writer.add_layer(layer, family, LayerFactors(tensors[f"{prefix}_adapter"], code))
        writer.finish({"families": {}}, [{"step": 0}])


def read(path: Path) -> dict[str, torch.Tensor]:
    checkpoint, tensors = GlobeCheckpoint(path, verify=True), {}
    for family in FAMILIES:
        tensors[f"bank.{family}"] = checkpoint.bank(family)
        for layer in checkpoint.config.base.num_experts:
            factors = checkpoint.layer(layer, family)
            prefix = f"layers.{layer}.{family}"
            tensors[f"{prefix}_adapter"] = factors.adapter
            tensors[f"{prefix}_code_index"], tensors[f"{prefix}_code_value"] = factors.code.index, factors.code.value
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def saved(tmp_path) -> Path:
    write(tmp_path / "globe", draw())
    return tmp_path / "globe"


def test_round_trip(saved):
    assert_same(read(saved), draw())
    assert GlobeCheckpoint(saved).config == CONFIG
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "fit_report.json",
        "globe.safetensors",
        "globe_config.json",
        "metrics.jsonl",
    ]


def test_bytes_are_those_of_the_files_less_their_headers(saved):
    size = (saved / "globe.safetensors").stat().st_size
    header = int.from_bytes((saved / "globe.safetensors").read_bytes()[:8], "little") + 8
    assert CONFIG.tensor_bytes == size - header
    assert GlobeCheckpoint(saved).bytes_on_disk == size


def test_shards_and_what_is_left_of_an_earlier_fit(saved, monkeypatch):
    monkeypatch.setattr(files, "MAX_SHARD_BYTES", 150)
    write(saved, draw(1))
    shards = sorted(path.name for path in saved.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"globe-00001-of-{len(shards):05d}.safetensors"
    assert_same(read(saved), draw(1))
    monkeypatch.undo()
    write(saved, draw(2))
    assert [path.name for path in saved.glob("*.safetensors")] == ["globe.safetensors"]
    assert_same(read(saved), draw(2))


def edit_config(path: Path, **changes) -> None:
    data = json.loads((path / CONFIG_NAME).read_text())
    (path / CONFIG_NAME).write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format_version": 2}, "format version 2 and this library reads version 1"),
        ({"format_version": None}, "format version None"),
        ({"base": {"name": "x"}}, "has nothing as base.hidden_size, where GloBE expects a whole number"),
        ({"rank": "2"}, "has '2' as rank, where GloBE expects a whole number"),
        ({"rank": True}, "has True as rank"),
        ({"rank": 0}, "has 0 as rank, where GloBE expects a whole number from 1 to 2147483647"),
        ({"support": 6}, "has 5 atoms and a support of 6, which no checkpoint has"),
        ({"rank": 2**30, "num_atoms": 2**30}, "bytes, which no checkpoint has"),
        ({"palette": 1.5}, "has 1.5 as palette"),
        ({"files": ["globe.safetensors"]}, r"as files, where GloBE expects an object"),
        ({"files": {"../globe.safetensors": ""}}, "outside of the directory"),
        ({"files": {"a\0b": ""}}, r"names the file a\\x00b, which no path can be"),
        ({"files": {"x" * 300: ""}}, "which no path can be"),
        ({"phi": "relu"}, "phi 'relu'; this library reads identity, silu, tanh"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"families": ["gate"]}, r"families \['gate'\]"),
        ({"rank": 3}, r"bank.gate .* is torch.bfloat16 \(5, 2, 6\) and globe_config.json says .* \(5, 3, 6\)"),
        ({"fingerprint": "0"}, "was not written together with"),
        ({"files": {}}, "has no tensor bank.gate"),
        ({"files": {"other.safetensors": ""}}, "other.safetensors is missing"),
    ],
    ids=str,
)
def test_refuses_a_configuration_that_it_cannot_trust(saved, changes, sentence):
    edit_config(saved, **changes)
    with pytest.raises(GlobeError, match=sentence):
        GlobeCheckpoint(saved)


def test_refuses_a_directory_without_checkpoint(tmp_path):
    with pytest.raises(RequestError, match="holds no globe_config.json"):
        GlobeCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", '{"a": ' + "[" * 10_000, '{"a": ' + "[" * 200 + "]" * 200 + "}", "\x80"], ids=len
)
def test_refuses_broken_json(saved, text):
    (saved / CONFIG_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(GlobeError, match="not valid JSON"):
        GlobeCheckpoint(saved)


@pytest.mark.parametrize("name", ["bank.up", "layers.3.gate_adapter", "layers.1.up_code_value"])
def test_refuses_factors_that_are_not_finite(saved, name):
    tensors = draw()
    tensors[name].view(-1)[1] = float("nan")
    write(saved, tensors)
    with pytest.raises(GlobeError, match=f"{name} in .* holds NaN or infinity"):
        read(saved)


def test_refuses_a_truncated_file(saved):
    path = saved / "globe.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(GlobeError, match="damaged or truncated"):
        GlobeCheckpoint(saved)


@pytest.mark.parametrize("seed", [0, 1], ids=["other settings", "other weights"])
def test_refuses_tensors_of_another_fit(saved, tmp_path, seed):
    write(tmp_path / "other", draw(seed), replace(CONFIG, provenance={"seed": 1 - seed}))
    (tmp_path / "other" / "globe.safetensors").replace(saved / "globe.safetensors")
    with pytest.raises(GlobeError, match="was not written together with"):
        GlobeCheckpoint(saved)


def rewrite(saved: Path, change) -> None:
    tensors = load_file(saved / "globe.safetensors")
    change(tensors)
    fingerprint = json.loads((saved / CONFIG_NAME).read_text())["fingerprint"]
    save_file(tensors, saved / "globe.safetensors", {"fingerprint": fingerprint})


def test_refuses_a_tensor_of_another_shape(saved):
    rewrite(saved, lambda tensors: tensors.update({"bank.up": torch.zeros(5, 2, 7)}))
    with pytest.raises(GlobeError, match=r"bank.up .* is torch.float32 \(5, 2, 7\)"):
        GlobeCheckpoint(saved)


def test_refuses_a_code_outside_the_bank(saved):
    rewrite(saved, lambda tensors: tensors["layers.3.up_code_index"].fill_(5))
    checkpoint = GlobeCheckpoint(saved)
    checkpoint.layer(1, "up")
    with pytest.raises(GlobeError, match="atom ids from 5 to 5 and the bank has 5 atoms"):
        checkpoint.layer(3, "up")


def test_verify_finds_a_changed_value(saved):
    rewrite(saved, lambda tensors: tensors["bank.gate"].mul_(2))
    GlobeCheckpoint(saved)
    with pytest.raises(GlobeError, match="sha256"):
        GlobeCheckpoint(saved, verify=True)


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
    ids=["while syncing", "inside safetensors"],
)
def test_a_full_disk_leaves_the_old_checkpoint(saved, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(*((files, "save_file") if isinstance(failure, SafetensorError) else (os, "fsync")), fail)
        with pytest.raises(GlobeError, match="is full .* nothing was written"):
            write(saved, draw(1))
    assert_same(read(saved), draw())
    assert not list(saved.glob(".staging*"))


def test_a_failed_first_write_leaves_no_directory(tmp_path):
    banks = {family: draw()[f"bank.{family}"] for family in FAMILIES}
    with pytest.raises(ZeroDivisionError), writing_checkpoint(tmp_path / "new", CONFIG, banks):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()


def test_what_a_killed_writer_left_is_cleaned_up_and_a_running_one_is_left_alone(saved):
    killed = subprocess.Popen(["true"])
    killed.wait()
    for pid in (killed.pid, os.getppid()):
        (saved / f".staging-{pid}").mkdir()
        (saved / f".staging-{pid}" / "globe.0.partial").write_text("half")
    write(saved, draw(1))
    assert [path.name for path in saved.glob(".staging*")] == [f".staging-{os.getppid()}"]


def test_a_kill_between_the_renames_leaves_a_directory_that_is_refused(saved, monkeypatch):
    class Killed(BaseException):
        pass

    replaced = []

    def replace_once(source, target):
        if replaced:
            raise Killed
        replaced.append(target)
        Path(source).replace(target)

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(Killed):
        write(saved, draw(1))
    with pytest.raises(RequestError, match="holds no globe_config.json"):
        GlobeCheckpoint(saved)


def test_only_its_own_files_are_replaced(saved):
    (saved / "globe-backup.safetensors").write_text("mine")
    write(saved, draw(1))
    assert (saved / "globe-backup.safetensors").read_text() == "mine"


def test_a_directory_in_the_way_is_named_and_nothing_changes(saved):
    (saved / "globe-00001-of-00002.safetensors").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "MAX_SHARD_BYTES", CONFIG.tensor_bytes * 2 // 3)
        with pytest.raises(RequestError, match="is a directory and a file must go there"):
            write(saved, draw(1))
    assert_same(read(saved), draw())


def test_files_can_be_read_by_those_the_umask_allows(saved):
    current = os.umask(0)
    os.umask(current)
    assert (saved / "globe.safetensors").stat().st_mode & 0o777 == 0o666 & ~current


def test_refuses_to_write_over_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match="is a file"):
        write(tmp_path / "file", draw())
    assert (tmp_path / "file").read_text() == "mine"


def test_refuses_in_advance_what_cannot_fit(tmp_path):
    with pytest.raises(GlobeError, match=r"needs \d+ PB and .* are free"):
        files.require_room(tmp_path / "new", 2**62)
