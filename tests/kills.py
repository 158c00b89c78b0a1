"""Kill a `globe` command at each of its write operations, and run it again: python -m tests.kills --command fit

The command runs in a forked process, on a tiny model. SIGKILL comes before an operation that changes a file or a folder
below OUT, or after half of the bytes of a file. After every kill:

* If OUT held an older whole output, OUT loads, and it is the older output or the new output, bitwise.
* The same command ends with exit code 0, and OUT holds the files that a command without a kill writes, bitwise but for
  measured times.

`--signal TERM` sends SIGTERM in place of SIGKILL: the command ends with exit code 143, a sentence and no temporary
file. With `--signal FULL` the operation fails, as on a full disk. `--random 100` stops one command that often at random
moments, and lets it go on each time; with `--cold` in a new Python, whose imports it stops too.
"""

import argparse
import builtins
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has none of the threads of its parent, and would wait for them

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from globe_fit import FitConfig, VarProConfig, compress  # noqa: E402
from globe_fit.__main__ import main as globe  # noqa: E402
from globe_fit.calibration import metric  # noqa: E402
from globe_fit.cli.report.page import write_report  # noqa: E402
from globe_kernels import GlobeCheckpoint  # noqa: E402
from globe_kernels.format.names import FAMILIES, INDEX_NAME, LOCK_NAME  # noqa: E402
from globe_kernels.testing import tiny_model  # noqa: E402

_SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 32, "num_attention_heads": 2, "head_dim": 8}
_SIZES |= {"num_key_value_heads": 1, "moe_intermediate_size": 32, "num_experts": 3}
_QUICK = ("--ratio", "1.2", "--support", "2", "--steps", "2", "--device", "cpu", "--snapshot-minutes", "0")
_TIMES = {"seconds", "step_seconds", "experts_per_second", "read_gb_per_second", "peak_host_bytes", "tokens_per_s"}
_TIMES |= {"metrics_sha256"}  # of a file that has times
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_WINDOWS = 2  # that a model writes
_TAKES_ROOM = {"open", "save", "fsync", "os.mkdir", "os.rename"}
FULL = 0  # in place of a signal: the operation fails
_END = "globe.end"  # an operation too: the file that was written last may be half written
_TEMPORARY = (".partial", ".staging", "offload-")


# --- a command in a process of its own ---


def start(*arguments: object, output: Path, before: Callable[[], object] = lambda: None, cold: bool = False) -> int:
    """Run `globe ARGUMENTS` in a forked process, after `before` there; return its id. Both streams go to a file.

    `cold`: in a new Python, which imports everything.
    """
    output.write_text("")
    if child := os.fork():
        return child
    code = 99
    try:
        stream = output.open("w", buffering=1, encoding="utf-8")
        sys.stdout = sys.stderr = stream
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        sys.argv = ["globe", *map(str, arguments)]
        before()
        if cold:
            os.execv(sys.executable, [sys.executable, "-m", "globe_fit", *sys.argv[1:]])
        globe()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 98
        sys.audit(_END)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def end(child: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Operations:
    """Counts the operations that change something below `folder`; at number `at` the process gets a signal, or FULL.

    `half`: after half of the bytes of the file that was written last, if nothing has happened to it since.
    """

    def __init__(self, folder: Path, at: int, half: bool, number: int = signal.SIGKILL, seen: Path | None = None):
        self._folder, self._at, self._half, self._seen = f"{folder}{os.sep}", at, half, seen
        self._number, self._count, self._written, self._is_killing = number, 0, "", False

    def install(self) -> None:
        """Watch from now on; only the end of the process takes this back."""
        serialize, fsync = safetensors.torch.serialize_file, os.fsync

        def watched_serialize(tensors: Any, filename: Any, *rest: Any, **options: Any) -> None:
            name = os.path.abspath(filename)  # written by Rust, of which Python does not hear
            self._happen("save", name)
            serialize(tensors, filename, *rest, **options)
            self._written = name

        def watched_fsync(descriptor: int) -> None:
            self._happen("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        safetensors.torch.serialize_file, os.fsync = watched_serialize, watched_fsync
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if event == _END:
            self._happen(event, self._folder)
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes, os.PathLike)) and isinstance(flags, int) and flags & _WRITES:
                name = os.path.abspath(os.fsdecode(path))
                self._happen("open", name)
                self._written = name
        elif event in _CHANGES and not self._is_killing:
            name, folder = arguments[0], "."
            if isinstance(name, int):
                name = f"/proc/self/fd/{name}"
            elif event in ("os.remove", "os.rmdir") and arguments[1] >= 0:
                folder = os.readlink(f"/proc/self/fd/{arguments[1]}")
            self._happen(event, os.path.abspath(os.path.join(folder, os.fsdecode(name))))

    def _happen(self, event: str, name: str) -> None:
        if not name.startswith(self._folder):
            return
        is_whole = self._written.startswith(self._folder) and os.path.isfile(self._written)
        size = os.path.getsize(self._written) if is_whole else 0
        if self._seen is not None:
            with builtins.open(self._seen, "a") as file:
                file.write(json.dumps([f"{event} {name.removeprefix(self._folder)}", size > 1]) + "\n")
        if self._count == self._at:
            if self._half:
                self._is_killing = True
                os.truncate(self._written, size // 2)
            self._count += 1
            if self._number == FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), self._number)
        self._count, self._written = self._count + 1, ""


# --- the commands, and the meaning of their outputs ---


@dataclass(frozen=True)
class Case:
    """A command: its arguments, the output that is there before, and the content of OUT as loaders read it."""

    arguments: Callable[..., tuple]
    before: Callable[[Path, Path], object] = lambda home, out: None
    content: Callable[[Path], Any] | None = None
    fits: tuple[str, ...] = ()  # that its arguments name


def _save_model(path: Path) -> None:
    tiny_model("qwen3_moe", **_SIZES).bfloat16().save_pretrained(path)
    vocabulary = {chr(97 + letter): letter for letter in range(26)} | {" ": 26, "?": 27}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    (path.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)


@cache
def _warm_up() -> None:
    """Import here, once, all that a forked process would import."""
    import_module("globe_fit.cli.commands")
    with tempfile.TemporaryDirectory() as home:
        _save_model(Path(home) / "model")
        settings = FitConfig(ratio=1.2, support=2, device="cpu", varpro=VarProConfig(steps=1))
        compress(Path(home) / "model", Path(home) / "out", settings, calibrate=Path(home) / "text.txt")
        write_report(Path(home) / "out", png=True)


def _fitted(out: Path) -> Any:
    checkpoint, hashed = GlobeCheckpoint(out), hashlib.sha256()
    for family in FAMILIES:
        tensors = [checkpoint.bank(family)]
        for layer in checkpoint.config.base.num_experts:
            factors = checkpoint.layer(layer, family)
            tensors += [factors.adapter, factors.code.index, factors.code.value]
        for tensor in tensors:
            hashed.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return checkpoint.config.to_dict(), hashed.hexdigest()  # a report of another fit is left out


def _loaded(out: Path) -> Any:
    model, hashed = AutoModelForCausalLM.from_pretrained(out, dtype="auto"), hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _fit(home: Path, *more: object) -> tuple:
    text = () if "--calibrate" in more else ("--no-calibrate",)
    return "fit", home / "model", "-o", home / "out", *_QUICK, *text, *more


def _export(home: Path, *more: object, of: str = "fit") -> tuple:
    return "export", home / of, "--base", home / "model", "-o", home / "out", *more


def _sweep(home: Path, *more: object) -> tuple:
    sizes = ("--rank", "8,12", "--atoms", "3", "--support", "2", "--steps", "1")
    return "sweep", home / "model", "-o", home / "out", *sizes, *_QUICK[6:], *more


def _eval(home: Path, text: str) -> tuple:
    return "eval", home / "out", "--base", home / "model", "--text", home / text


def _old(home: Path, out: Path, *arguments: object) -> None:
    """Make the older output, by another command."""
    assert end(start(*arguments, output=home / "log")) == 0, (home / "log").read_text()


def _copy(home: Path, out: Path) -> None:
    shutil.copytree(home / "fit", out)


def _evaluated(home: Path, out: Path) -> None:
    _copy(home, out)
    (home / "short.txt").write_text("the quick brown fox " * 20)
    _old(home, out, *_eval(home, "short.txt"))


def _reported(home: Path, out: Path) -> None:
    _evaluated(home, out)
    _old(home, out, "report", out, "--png")
    (out / "evaluation.json").unlink()


def _reported_too(home: Path, out: Path) -> None:
    """Make a checkpoint with figures that its healing removes."""
    _evaluated(home, out)
    _old(home, out, "report", out)


def _small_files(out: Path, *names: str) -> Any:
    return _fitted(out), [_read(out / name) for name in names]


COMMANDS = {
    "fit": Case(_fit),
    "fit --restart": Case(
        lambda home: _fit(home, "--restart"), lambda home, out: _old(home, out, *_fit(home, "--seed", 1)), _fitted
    ),
    "fit --calibrate": Case(lambda home: _fit(home, "--calibrate", home / "text.txt")),
    "fit --calibrate self": Case(lambda home: _fit(home, "--calibrate", "self")),
    "heal": Case(
        lambda home: ("heal", home / "out", "--base", home / "model", "--text", home / "text.txt", "--device", "cpu"),
        _reported_too,
        _fitted,
        ("fit",),
    ),
    "sweep": Case(_sweep),
    "sweep --restart": Case(
        lambda home: _sweep(home, "--restart"),
        lambda home, out: _old(home, out, *_sweep(home, "--seed", 1)),
        lambda out: [_fitted(path) for path in sorted(out.glob("r*"))],
    ),
    "export": Case(_export, fits=("fit",)),
    "export over": Case(
        _export, lambda home, out: _old(home, out, *_export(home, of="other")), _loaded, ("fit", "other")
    ),
    "export --dense": Case(lambda home: _export(home, "--dense"), fits=("fit",)),
    "export --dense over": Case(
        lambda home: _export(home, "--dense"),
        lambda home, out: _old(home, out, *_export(home, "--dense", of="other")),
        _loaded,
        ("fit", "other"),
    ),
    "eval": Case(
        lambda home: _eval(home, "text.txt"),
        _evaluated,
        lambda out: _small_files(out, "evaluation.json"),
        ("fit",),
    ),
    "report": Case(
        lambda home: ("report", home / "out"), _reported, lambda out: _small_files(out, "report.html"), ("fit",)
    ),
    "report --png": Case(
        lambda home: ("report", home / "out", "--png"),
        _reported,
        lambda out: _small_files(out, "report.html", "report-layers.png"),
        ("fit",),
    ),
}  # fmt: skip


# --- contents ---


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(inner) for key, inner in value.items() if key not in _TIMES}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value


def _read(path: Path) -> Any:
    """Return the content of a file, of JSON without times."""
    if path.suffix in (".json", ".jsonl"):
        text = _plain(path.read_text(encoding="utf-8"))
        found = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        return json.dumps(_without_times(found))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(out: Path) -> dict[str, Any]:
    """Return {path below `out`: its content} of all files and folders."""
    # the index: a dense model in one file has it where an older model had the file's name
    paths = sorted(path for path in out.rglob("*") if path.name not in (LOCK_NAME, INDEX_NAME))
    return {_plain(str(path.relative_to(out))): _read(path) if path.is_file() else None for path in paths}


def _plain(text: str) -> str:
    """Return names of tensor files without the digits that tell them from older files of the same name."""
    return re.sub(r"-[0-9a-f]{8}(\.safetensors)", r"\1", text)


# --- the kills ---


class Victim:
    """A command with its inputs in a folder of its own, which is killed again and again."""

    def __init__(self, name: str, home: Path):
        self.case, self.home, self.out = COMMANDS[name], home, home / "out"
        _warm_up()
        _save_model(home / "model")
        for fit in self.case.fits:
            _old(home, self.out, "fit", home / "model", "-o", home / fit, *_QUICK, "--no-calibrate", "--seed", len(fit))
        self.case.before(home, self.out)
        if self.out.exists():
            self.out.rename(home / "before")
        self._content_before = self._content()
        operations = home / "operations"
        self.restore()
        code = self.run(Operations(self.out, -1, False, seen=operations).install)
        assert code == 0, self.said
        self.expected, self._content_after = contents(self.out), self._content()
        lines = map(json.loads, operations.read_text().splitlines())
        self.operations = [(operation, has_half) for operation, has_half in lines]

    def _content(self) -> Any:
        if self.case.content is None:
            return None
        self.restore() if not self.out.exists() else None
        return self.case.content(self.out)

    @property
    def said(self) -> str:
        """The output of the last command."""
        return (self.home / "log").read_text()

    def restore(self) -> None:
        """Put OUT back as it was before the command."""
        shutil.rmtree(self.out, ignore_errors=True)
        if (self.home / "before").exists():
            shutil.copytree(self.home / "before", self.out)

    def start(self, before: Callable[[], object] = lambda: None, cold: bool = False) -> int:
        return start(*self.case.arguments(self.home), output=self.home / "log", before=before, cold=cold)

    def run(self, before: Callable[[], object] = lambda: None) -> int:
        return end(self.start(before))

    def points(self, by: int = signal.SIGKILL) -> list[tuple[int, bool]]:
        """List the stops: the number of the operation, and whether the file before it is half written."""
        if by == FULL:  # the other operations need no room
            return [
                (number, False) for number, (name, _) in enumerate(self.operations) if name.split()[0] in _TAKES_ROOM
            ]
        whole = [(number, False) for number in range(len(self.operations))]
        if by != signal.SIGKILL:
            return whole[:-1]  # without the end
        return sorted(whole + [(number, True) for number, (_, has_half) in enumerate(self.operations) if has_half])

    def stop_at(self, number: int, half: bool, by: int = signal.SIGKILL) -> str | None:
        """Stop the command at an operation and run it again; return the finding, None where all is right."""
        self.restore()
        code = self.run(Operations(self.out, number, half, by).install)
        where = f"{'in half of the file before' if half else 'before'} {number}: {self.operations[number][0]}"
        finding = self.check_end(code, by) or self.check()
        return None if finding is None else f"{where}: {finding}"

    def check_end(self, code: int, by: int) -> str | None:
        """Return the finding about a command that a signal has ended."""
        if by == signal.SIGKILL:
            return None if code == -by else f"not killed: exit code {code}, {self.said}"
        *_, last = ["", *self.said.splitlines()]
        left = [name for name in contents(self.out) if any(mark in name for mark in _TEMPORARY)]
        is_right = code in (0, 1) if by == FULL else code == 128 + by and last.startswith("globe: interrupted")
        if is_right and not any(word in self.said for word in ("Traceback", "Exception ignored")) and not left:
            return None
        return f"exit code {code}, left {left}, said {self.said}"

    def check(self) -> str | None:
        """Compare OUT after a kill, and run the command to its end; return the finding."""
        findings = []
        if self.case.content is not None:
            try:
                content = self.case.content(self.out)
                sides = content, self._content_before, self._content_after
                # of a sweep each point by itself
                each = zip(*sides, strict=True) if isinstance(content, list) else [sides]
                if any(found not in (before, after) for found, before, after in each):
                    findings.append("OUT is a mixture")
            except Exception as error:
                findings.append(f"OUT does not load: {' '.join(str(error).split())[:120]}")
        code = self.run()
        if code != 0:
            findings.append(f"again: exit code {code}, {self.said.splitlines()[-1:]}")
        elif (found := contents(self.out)) != self.expected:
            names = {name for name in {*found, *self.expected} if found.get(name, 0) != self.expected.get(name, 0)}
            findings.append(f"again: {', '.join(sorted(names))} differ")
        return "; ".join(findings) or None


@contextmanager
def opened(name: str) -> Iterator[Victim]:
    """Make the inputs of a command, on a disk in memory where there is one."""
    torch.set_num_threads(1)
    sample, memory = metric.sample_windows, "/dev/shm" if Path("/dev/shm").is_dir() else None
    metric.sample_windows = partial(sample, count=_WINDOWS)
    try:
        with tempfile.TemporaryDirectory(prefix="globe-kills-", dir=memory) as home:
            yield Victim(name, Path(home))
    finally:
        metric.sample_windows = sample


def stop_at_random(
    victim: Victim, count: int, seed: int, by: int = signal.SIGKILL, cold: bool = False
) -> tuple[int, list[float], str | None]:
    """Stop the command `count` times, each time after a random time, and let it go on.

    Returns the runs that came to their end, the seconds from each signal to the end of the process, and the finding.
    """
    moments, whole, seconds = random.Random(seed), 0, []
    victim.restore()
    began = time.monotonic()
    end(victim.start(cold=cold))
    longest = time.monotonic() - began
    victim.restore()
    while len(seconds) < count:
        child = victim.start(cold=cold)
        time.sleep(moments.uniform(0, longest))
        sent = time.monotonic()
        os.kill(child, by)
        code = end(child)
        if code == 0:
            whole += 1
            if contents(victim.out) != victim.expected:
                return whole, seconds, f"the end after {len(seconds)} stops differs"
            victim.restore()
            continue
        seconds.append(time.monotonic() - sent)
        # Python itself was starting, or ending
        is_outside = code == -by and (not victim.said or contents(victim.out) == victim.expected)
        if not is_outside and (finding := victim.check_end(code, by)):
            return whole, seconds, finding
    return whole, seconds, victim.check()


def main() -> int:
    """Print the findings and a line per command; return 1 when there is a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--command", action="append", choices=COMMANDS, help="a command (all)")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT", "FULL"), default="KILL")
    parser.add_argument("--random", type=int, help="so many stops at random moments, each followed by going on")
    parser.add_argument("--cold", action="store_true", help="random stops of a new Python")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    by = FULL if given.signal == "FULL" else signal.Signals[f"SIG{given.signal}"]
    found = 0
    for name in given.command or COMMANDS:
        began = time.monotonic()
        with opened(name) as victim:
            if given.random:
                whole, seconds, finding = stop_at_random(victim, given.random, given.seed, by, given.cold)
                findings, latest = [finding], f"the end {median(seconds):.2f} s later, at most {max(seconds):.2f} s"
                count = f"{given.random} times {given.signal} at random moments, {latest}, {whole + 1} whole runs"
            else:
                points = victim.points(by)
                findings = [victim.stop_at(*point, by) for point in points]
                count = f"{len(points)} times {given.signal} at {len(victim.operations)} operations"
        findings = [finding for finding in findings if finding is not None]
        for finding in findings:
            print(f"  {finding}")
        print(f"{name}: {count}, {len(findings)} findings, {time.monotonic() - began:.0f} s", flush=True)
        found += len(findings)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
