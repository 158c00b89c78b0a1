import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from globe_kernels.errors import GlobeError, GlobeWarning, RequestError
from globe_kernels.format import writing
from globe_kernels.format.checkpoint import (
    BaseModel,
    Code,
    GlobeCheckpoint,
    GlobeConfig,
    LayerFactors,
    writing_checkpoint,
)
from globe_kernels.format.names import CONFIG_NAME, LOCK_NAME
from globe_kernels.format.verification import verifies
from globe_kernels.format.writing import only_writer, replacing_file, staged_directory

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


def write(
    path: Path,
    tensors: dict[str, torch.Tensor],
    config: GlobeConfig = CONFIG,
    report: dict | None = None,
    metrics: tuple[dict, ...] = ({"step": 0},),
) -> None:
    banks = {family: tensors[f"bank.{family}"] for family in FAMILIES}
    with writing_checkpoint(path, config, banks) as writer:
        for family in FAMILIES:
            for layer in config.base.num_experts:
                prefix = f"layers.{layer}.{family}"
                code = Code(tensors[f"{prefix}_code_index"], tensors[f"{prefix}_code_value"])
                writer.add_layer(layer, family, LayerFactors(tensors[f"{prefix}_adapter"], code))
        writer.finish(report or {"fit": 0}, [*metrics])


def read(path: Path) -> dict[str, torch.Tensor]:
    checkpoint, tensors = GlobeCheckpoint(path), {}
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
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 150)
    write(saved, draw(1))
    shards = sorted(path.name for path in saved.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"globe-00001-of-{len(shards):05d}.safetensors"
    assert_same(read(saved), draw(1))
    monkeypatch.undo()
    for seed in (2, 3, 3):  # a name that is taken gets digits of its hash, until it is free again
        write(saved, draw(seed))
        (left,) = saved.glob("*.safetensors")
        assert re.fullmatch(r"globe(-[0-9a-f]{8})?\.safetensors", left.name)
        assert_same(read(saved), draw(seed))


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
    checkpoint = GlobeCheckpoint(saved, verify=False)
    checkpoint.layer(1, "up")
    with pytest.raises(GlobeError, match="atom ids from 5 to 5 and the bank has 5 atoms"):
        checkpoint.layer(3, "up")


@pytest.mark.parametrize("place", range(8))
def test_a_flipped_bit_is_refused(saved, place, monkeypatch):
    path = saved / "globe.safetensors"
    data, header = bytearray(path.read_bytes()), int.from_bytes(path.read_bytes()[:8], "little") + 8
    position = random.Random(place).randrange(8 * header, 8 * len(data))
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)
    checkpoint = GlobeCheckpoint(saved)
    with pytest.raises(GlobeError, match=r"has sha256 .* is recorded: the file was changed or damaged; copy"):
        checkpoint.code(1, "gate")
    with pytest.raises(GlobeError, match="sha256"):
        GlobeCheckpoint(saved).verify()
    GlobeCheckpoint(saved, verify=False).bank("gate")
    with pytest.raises(GlobeError, match="sha256"):
        GlobeCheckpoint(saved, verify=False).verify()
    monkeypatch.setenv("GLOBE_VERIFY", "0")
    GlobeCheckpoint(saved).bank("gate")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, True), ("", True), ("1", True), ("0", False), ("false", False), ("No", False), ("OFF", False)],
)
def test_the_words_that_turn_hashes_off(monkeypatch, value, expected):
    monkeypatch.delenv("GLOBE_VERIFY", raising=False)
    if value is not None:
        monkeypatch.setenv("GLOBE_VERIFY", value)
    assert verifies() is expected


def test_threads_and_forks_share_the_hashes(saved):
    for _ in range(20):
        checkpoint = GlobeCheckpoint(saved)
        with ThreadPoolExecutor(8) as pool:
            for layer in pool.map(checkpoint.layer, [1] * 8, ["gate"] * 8, timeout=60):
                assert torch.equal(layer.adapter, draw()["layers.1.gate_adapter"])
    checkpoint = GlobeCheckpoint(saved)
    children = []
    for number in range(4):
        if number == 2:
            checkpoint._verification.begin()
        if not (child := os.fork()):
            try:
                checkpoint.bank("up")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
    ids=["while syncing", "inside safetensors"],
)
def test_a_full_disk_leaves_the_old_checkpoint(saved, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(*((writing, "save_file") if isinstance(failure, SafetensorError) else (os, "fsync")), fail)
        with pytest.raises(GlobeError, match="has no room for the new files .* nothing was written"):
            write(saved, draw(1))
    assert_same(read(saved), draw())
    assert not list(saved.glob(".staging*"))


def test_a_failed_first_write_leaves_no_directory(tmp_path):
    banks = {family: draw()[f"bank.{family}"] for family in FAMILIES}
    with pytest.raises(ZeroDivisionError), writing_checkpoint(tmp_path / "new", CONFIG, banks):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()


def test_what_a_killed_writer_left_is_cleaned_up(saved, tmp_path):
    (tmp_path / "of others").mkdir()
    (tmp_path / "of others" / "file").write_text("theirs")
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to(tmp_path / "of others")):
        make(saved / ".staging")
        (saved / LOCK_NAME).touch()
        write(saved, draw(1))
        assert not [*saved.glob(".*")]
    assert (tmp_path / "of others" / "file").read_text() == "theirs"
    assert_same(read(saved), draw(1))


class Killed(BaseException):
    pass


def kill_at(monkeypatch, number: int) -> None:
    """Ends the process, as far as it can be seen from outside, before its `number`-th rename."""
    renames = []
    replace_file = os.replace

    def replace_or_end(source, target):
        renames.append(target)
        if len(renames) >= number:
            raise Killed
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", replace_or_end)


@pytest.mark.parametrize("number", range(1, 7))
def test_a_kill_between_the_renames_leaves_the_old_or_the_new(saved, monkeypatch, number):
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, number)
        write(saved, draw(1), report={"fit": 1})
        raise Killed  # after the last rename
    renamed = number > 5  # config.json, fit_report.json, tensors, metrics.jsonl, globe_config.json
    with pytest.warns(GlobeWarning, match="is of another fit") if 3 <= number <= 5 else nullcontext():
        checkpoint = GlobeCheckpoint(saved)
    assert_same({name: checkpoint._tensor(name) for name in CONFIG.tensor_shapes()}, draw(int(renamed)))
    assert checkpoint.report() == ({"fit": 1} if renamed else {} if number >= 3 else {"fit": 0})
    write(saved, draw(1), report={"fit": 1})
    assert_same(read(saved), draw(1))
    assert len([*saved.glob("*.safetensors")]) == 1


def test_a_second_writer_is_refused(saved):
    with only_writer(saved):
        with only_writer(saved):  # the same thread
            pass
        with ThreadPoolExecutor() as pool, pytest.raises(RequestError, match="Another command is writing to .*; wait"):
            pool.submit(write, saved, draw(1)).result()
        with_path = [sys.executable, "-c", SECOND_WRITER, str(saved)]
        assert subprocess.run(with_path, capture_output=True, text=True, check=True).stdout == "refused\n"
    assert_same(read(saved), draw())
    write(saved, draw(1))
    assert_same(read(saved), draw(1))
    assert not (saved / LOCK_NAME).exists()


def test_a_writer_leaves_the_lock_of_a_directory_that_was_made_anew(tmp_path):
    out = tmp_path / "out"
    with ThreadPoolExecutor(1) as pool, ExitStack() as second:
        with only_writer(out):
            shutil.rmtree(out)
            pool.submit(second.enter_context, only_writer(out)).result()
        assert (out / LOCK_NAME).exists()
        with pytest.raises(RequestError, match="Another command is writing to"), only_writer(out):
            pass
        pool.submit(second.close).result()
    assert not out.exists()


SECOND_WRITER = """
import sys
from pathlib import Path
from globe_kernels.errors import RequestError
from globe_kernels.format.writing import only_writer
try:
    with only_writer(Path(sys.argv[1])):
        print("written")
except RequestError:
    print("refused")
"""


def test_readers_see_the_old_or_the_new(saved):
    """A writer replaces the checkpoint while readers open it: tensors, configuration, report, stream of one fit."""
    fits = {seed: draw(seed) for seed in (0, 1)}
    write(saved, fits[0], replace(CONFIG, provenance={"seed": 0}), report={"fit": 0}, metrics=({"fit": 0},))
    ended = threading.Event()

    def read_until_the_end() -> int:
        opened = 0
        while not ended.is_set() or not opened:
            checkpoint = GlobeCheckpoint(saved)
            seed = checkpoint.config.provenance["seed"]
            assert checkpoint.report() == {"fit": seed} and json.loads(checkpoint.metrics) == {"fit": seed}
            assert torch.equal(checkpoint.bank("up"), fits[seed]["bank.up"])
            assert torch.equal(checkpoint.layer(3, "gate").adapter, fits[seed]["layers.3.gate_adapter"])
            opened += 1
        return opened

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error")
        readers = [pool.submit(read_until_the_end) for _ in range(3)]
        try:
            for seed in [1, 0] * 25:
                config = replace(CONFIG, provenance={"seed": seed})
                write(saved, fits[seed], config, report={"fit": seed}, metrics=({"fit": seed},))
        finally:
            ended.set()
        assert all(reader.result() for reader in readers)


def test_nothing_that_lies_at_the_temporary_path_is_followed(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / ".page.html.partial").symlink_to(tmp_path / "theirs")
    with replacing_file(tmp_path / "page.html") as path:
        path.write_text("page")
    assert (tmp_path / "theirs").read_text() == "theirs" and not (tmp_path / "page.html").is_symlink()
    assert [*tmp_path.glob("*.partial")] == []


def test_only_its_own_files_are_replaced(saved):
    (saved / "globe-backup.safetensors").write_text("mine")
    write(saved, draw(1))
    assert (saved / "globe-backup.safetensors").read_text() == "mine"


def test_the_new_set_leaves_no_optional_file_of_the_old(tmp_path):
    old = {"switch": "old", "a.jsonl": "old", "b.jsonl": "old", "mine.jsonl": "mine"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    with staged_directory(tmp_path, switch="switch", stems=[], optional=["a.jsonl", "b.jsonl", "c.jsonl"]) as staging:
        (staging / "switch").write_text("new")
        (staging / "b.jsonl").write_text("new")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"switch": "new", "b.jsonl": "new", "mine.jsonl": "mine"}


def test_a_directory_in_the_way_is_named_and_nothing_changes(saved):
    (saved / "metrics.jsonl").unlink()
    (saved / "metrics.jsonl").mkdir()
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


@pytest.mark.parametrize("inner", [".", "inner"])
def test_refuses_a_link_that_leads_nowhere(tmp_path, inner):
    link = tmp_path / "link"
    link.symlink_to("gone")
    sentence = f"{link} is a link to gone, which does not exist; make that directory, or give another."
    with pytest.raises(RequestError, match=f"^{re.escape(sentence)}$"):
        writing.require_writable(link / inner)
    (tmp_path / "gone").mkdir()
    writing.require_writable(link / inner)


def test_refuses_in_advance_what_cannot_fit(tmp_path):
    with pytest.raises(GlobeError, match=r"needs \d+ PB and .* are free"):
        writing.require_room(tmp_path / "new", 2**62)
