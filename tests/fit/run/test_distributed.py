"""A fit over two ranks on the CPU: the result of one, half of the bank in each, and what the death of one leaves."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from globe_fit import ExpertSource, FitConfig, VarProConfig, fit, save_fit
from globe_fit.__main__ import _run
from globe_fit.calibration import metric
from globe_fit.calibration.metric import calibrate
from globe_fit.calibration.self_text import sample_windows
from globe_fit.cli.demo import shipped_model
from globe_fit.config import SELF, AlternatingConfig, CodingConfig
from globe_fit.fitting import open_snapshots
from globe_fit.plan.fitting import estimate
from globe_fit.run.distributed import ALONE, Ranks, join, say
from globe_fit.run.snapshots import Snapshots
from globe_fit.run.stopping import Terminated
from globe_fit.sizes import resolve_sizes
from globe_kernels.errors import RequestError
from globe_kernels.testing import assert_close, tiny_model
from tests.warm import WarmPython

CONFIG = FitConfig(ratio=0.8, support=4, varpro=VarProConfig(steps=12, warmup_steps=2))

# The command, in which rank 1 is killed at its n-th snapshot, when that of rank 0 is already written.
COMMAND = """
import os, signal, sys, time
from globe_fit.run import snapshots
from globe_fit.__main__ import main

write, saves, kill_at = snapshots.save_file, 0, int(os.environ["KILL_AT"])

def save_file(tensors, path, metadata):
    global saves
    saves += 1
    if os.environ["RANK"] == "1" and saves == kill_at:
        other = path.name.removeprefix(".").replace("-1.safetensors.partial", "-0.safetensors")
        while not path.with_name(other).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    write(tensors, path, metadata)

snapshots.save_file = save_file
main()
"""

# Before the command: the model does not run over a text again.
NOT_AGAIN = "from globe_fit.calibration import metric; metric.collect = None"


# Every variant of a fit beside the default: {name: (settings, text to calibrate on)}.
ROUNDS = {"steps": 3, "support_at": 0.4, "patience": 99}
TURNS = {
    "exact": AlternatingConfig(**ROUNDS),
    "atoms": AlternatingConfig(**ROUNDS, dictionary="atoms"),
    "mod": AlternatingConfig(**ROUNDS, dictionary="mod"),
    "svd": AlternatingConfig(**ROUNDS, dictionary="mod", targets="svd", coding=CodingConfig(initial="given")),
    "omp": AlternatingConfig(**ROUNDS, coding=CodingConfig(method="omp")),
    "entmax": AlternatingConfig(**ROUNDS, coding=CodingConfig(method="entmax", initial="simplex")),
}
VARIANTS: dict[str, tuple[FitConfig, str | None]] = {
    name: (replace(CONFIG, solver="alternating", alternating=turns), None) for name, turns in TURNS.items()
}
VARIANTS |= {text: (CONFIG, text) for text in ("text.txt", SELF)}


def fit_variants(model: str, out: str, ranks: Ranks = ALONE) -> None:
    """Fit each variant into `out`/its name."""
    source = ExpertSource(model)
    for name, (config, text) in VARIANTS.items():
        given = None if text is None else calibrate(source, text if text == SELF else Path(model) / text, ranks=ranks)
        result = fit(source, config, ranks=ranks, calibration=given)
        if ranks.leads:
            save_fit(result, source, Path(out) / name)


# What both ranks run, and what no rank alone shows: parts of unequal widths.
BOTH_FIT = """
import sys
import torch
from globe_fit.run.distributed import join
from tests.fit.run.test_distributed import fit_variants, write_little
write_little(setattr)
joined, numbers = join("cpu"), torch.arange(14.0).view(2, 7)
assert torch.equal(joined.whole(numbers[:, joined.part(7)], 7), numbers)
fit_variants(*sys.argv[1:], joined)
sys.exit()
"""


def write_little(patch) -> None:
    """Let a model write a text of four windows."""
    patch(metric, "sample_windows", partial(sample_windows, count=4))


# What torchrun does while no rank fails: two processes that know their rank and where the first of them listens.
BOTH = """
import os, socket, sys
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
given = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
given |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0}
ranks = []
for rank in (0, 1):
    ranks.append(os.fork())
    if not ranks[-1]:
        os.environ.update({name: str(value) for name, value in (given | {"RANK": rank, "LOCAL_RANK": rank}).items()})
        exec(open("command.py").read())
sys.exit(any([os.waitpid(rank, 0)[1] for rank in ranks]))
"""


def arguments(directory: Path, model: Path, *more: object) -> list[str]:
    """Of a fit into `directory`/out, which command.py runs."""
    directory.mkdir(exist_ok=True)
    (directory / "command.py").write_text(COMMAND)
    (directory / "fit.toml").write_text("[varpro]\nsteps = 12\nwarmup_steps = 2\n")
    sizes = ["--ratio", "0.8", "--support", "4", "--config", "fit.toml"]
    return [
        "fit",
        str(model),
        "-o",
        "out",
        *sizes,
        "--json",
        "--device",
        "cpu",
        "--snapshot-minutes",
        "0",
        *map(str, more or ("--no-calibrate",)),
    ]


def run(python: WarmPython, directory: Path, model: Path) -> None:
    """A fit over two ranks that ends well and says nothing."""
    done = python.run("-c", BOTH, *arguments(directory, model), cwd=directory, KILL_AT="0")
    assert done.returncode == 0 and "globe: " not in done.stderr, done.stderr


def run_by_torchrun(directory: Path, model: Path, kill_at: int) -> tuple[int, list[str], str]:
    """(exit code of torchrun, the sentences of its ranks, everything on stderr)"""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "command.py"]
        + arguments(directory, model),
        cwd=directory,
        env=os.environ | {"KILL_AT": str(kill_at), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("globe: ")]
    return done.returncode, said, done.stderr


@pytest.fixture(scope="module")
def two_ranks(save_tiny, warm_python, tmp_path_factory) -> Path:
    """The checkpoint of an uninterrupted fit over two ranks."""
    directory = tmp_path_factory.mktemp("two-ranks")
    run(warm_python, directory, save_tiny("qwen3_moe"))
    return directory / "out" / "globe.safetensors"


def test_two_ranks_come_to_the_result_of_one(save_tiny, two_ranks, tmp_path):
    source = ExpertSource(save_tiny("qwen3_moe"))
    save_fit(fit(source, CONFIG), source, tmp_path)
    assert_alike(tmp_path / "globe.safetensors", two_ranks)


def assert_alike(of_one: Path, of_two: Path) -> None:
    """The factors of two ranks are the factors of one but for the order of sums."""
    one, two = load_file(of_one), load_file(of_two)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        if name.endswith("index"):
            assert torch.equal(two[name], expected)
        elif name.endswith("value"):  # float32, after 12 steps with moments in bf16
            assert_close(two[name], expected, rms=1e-3, peak=1e-3)
        else:  # bf16, in which what differs by the rounding of a sum may round to the next number
            assert_close(two[name].float(), expected.float(), rms=3e-3, peak=1e-2)


@pytest.fixture(scope="module")
def variants(tmp_path_factory, warm_python) -> tuple[Path, Path]:
    """(the model, the checkpoints of its variants from two ranks)"""
    model, out = (tmp_path_factory.mktemp(name) for name in ("model", "variants"))
    tiny_model("qwen3_moe", vocab_size=2048).save_pretrained(model)
    for file in shipped_model().glob("tokenizer*"):
        shutil.copy(file, model)
    text = (shipped_model() / "heldout.txt").read_text(encoding="utf-8")
    (model / "text.txt").write_text(text[:5000], encoding="utf-8")
    (out / "command.py").write_text(BOTH_FIT)
    done = warm_python.run("-c", BOTH, model, out, cwd=out)
    assert done.returncode == 0, done.stderr
    return model, out


@pytest.fixture(scope="module")
def one_rank(variants, tmp_path_factory) -> Path:
    """The checkpoints of the variants from one rank."""
    out = tmp_path_factory.mktemp("one-rank")
    with pytest.MonkeyPatch.context() as patched:
        write_little(patched.setattr)
        fit_variants(str(variants[0]), str(out))
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_come_to_the_result_of_one_in_every_variant(variants, one_rank, name):
    assert_alike(one_rank / name / "globe.safetensors", variants[1] / name / "globe.safetensors")


def test_the_sums_over_a_text_outlive_a_rank(variants, warm_python, tmp_path):
    model, out = variants
    command = arguments(tmp_path, model, "--calibrate", model / "text.txt")
    killed = warm_python.run("-c", BOTH, *command, cwd=tmp_path, KILL_AT="1")
    assert killed.returncode != 0 and "Another rank of the fit stopped" in killed.stderr
    (tmp_path / "command.py").write_text(NOT_AGAIN + COMMAND)
    resumed = warm_python.run("-c", BOTH, *command, cwd=tmp_path, KILL_AT="0")
    assert resumed.returncode == 0, resumed.stderr
    one, two = (load_file(path / "globe.safetensors") for path in (tmp_path / "out", out / "text.txt"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_killed_rank_ends_the_fit_which_then_goes_on(save_tiny, two_ranks, warm_python, tmp_path):
    model = save_tiny("qwen3_moe")
    code, said, errors = run_by_torchrun(tmp_path, model, kill_at=5)
    assert code != 0 and len(said) == 1, errors
    assert "Another rank of the fit stopped" in said[0] and "run the same command again" in said[0]
    assert "globe_fit/" not in errors  # no traceback of ours
    saved = tmp_path / "out" / ".snapshot"
    assert {"gate-4-0.safetensors", "gate-4-1.safetensors", "gate-5-0.safetensors"} <= {
        path.name for path in saved.iterdir()
    }

    source = ExpertSource(model)
    sizes = resolve_sizes(source.base, CONFIG)
    for rank in (0, 1):
        tensors = load_file(saved / f"gate-4-{rank}.safetensors")
        for name in ("bank", "bank.first", "bank.second"):
            assert tensors[name].shape == (sizes.num_atoms, sizes.rank, source.base.hidden_size // 2)
        assert tensors["codes"].shape == (source.base.total_experts, sizes.num_atoms)
    first, second = (load_file(saved / f"gate-4-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first if "codes" in name)
    assert not torch.equal(first["bank"], second["bank"])

    with pytest.raises(RequestError, match=r"ranks was 2 and is 1\)"):
        open_snapshots(tmp_path / "out", source, replace(CONFIG, device="cpu"))
    run(warm_python, tmp_path, model)
    assert (tmp_path / "out" / "globe.safetensors").read_bytes() == two_ranks.read_bytes()
    assert not saved.exists()


def test_what_several_ranks_cannot_do_is_refused(save_tiny):
    source = ExpertSource(save_tiny("qwen3_moe"))
    with pytest.raises(RequestError, match="have 64 columns to split and torchrun started 65 ranks"):
        fit(source, CONFIG, ranks=Ranks(0, 65))


@pytest.fixture
def under_torchrun(monkeypatch):
    """What torchrun gives to one of two ranks."""
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    given = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    given |= {"LOCAL_RANK": 1, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    return store


def test_why_a_fit_ends_is_said_once(under_torchrun, monkeypatch, capsys):
    monkeypatch.setattr("globe_fit.cli.commands.end_with_the_others", lambda: None)  # this process hears no torchrun
    monkeypatch.setattr("sys.argv", ["globe", "inspect", "somewhere"])
    code, message = _run()
    assert code == 2 and message.startswith("Under torchrun only globe fit runs")
    say(message)
    say(message)
    assert capsys.readouterr().err == f"globe: {message}\n"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    say(message)
    assert message in capsys.readouterr().err


def test_each_rank_has_a_gpu_of_its_own(under_torchrun, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RequestError, match="started 2 ranks on a machine with 1 GPU.s.; start one rank per GPU"):
        join("cuda")
    with pytest.raises(RequestError, match="device is cuda:1 and each rank needs another GPU"):
        join("cuda:1")


def test_the_parts_of_the_ranks_are_everything_once():
    for world in (1, 2, 3, 7):
        parts = [Ranks(rank, world).part(10) for rank in range(world)]
        assert [place for part in parts for place in range(part.start, part.stop)] == list(range(10))
        assert {part.stop - part.start for part in parts} <= {10 // world, -(-10 // world)}


def test_the_others_wait_for_the_first_rank(monkeypatch):
    met = iter([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    monkeypatch.setattr(Ranks, "every", lambda self, *values: next(met))
    assert Ranks(1, 2).on_first(lambda beat: beat()) is None
    with pytest.raises(Terminated):  # torchrun has sent SIGTERM to the second rank
        Ranks(0, 2).on_first(lambda beat: beat())
    assert next(met, None) is None


def test_a_rank_takes_half_of_what_is_split(save_tiny):
    sizes = resolve_sizes(ExpertSource(save_tiny("qwen3_moe")).base, CONFIG)
    one, two = estimate(sizes), estimate(sizes, 2)
    codes = 6 * sizes.base.total_experts * sizes.num_atoms * 4
    assert two.ranks == 2
    assert two.solver_bytes - codes == (one.solver_bytes - codes) / 2 and two.block_bytes == one.block_bytes / 2
    calibrated = estimate(sizes, 2, calibrated=True)  # the columns of all ranks arrive and are joined
    assert calibrated.block_bytes > two.block_bytes + one.block_bytes / 6


@pytest.mark.parametrize(("mine", "others", "left"), [([4, 5], 4, [4]), ([5], 5, [5]), ([5], -1, []), ([], 3, [])])
def test_a_fit_goes_on_from_a_step_that_all_have(tmp_path, monkeypatch, mine, others, left):
    snapshots = Snapshots(tmp_path, {})
    for step in mine:
        snapshots.save("gate", step, {"step": torch.tensor(step)}, {"done": False, "step": step})
        (tmp_path / ".snapshot" / f"gate-{step}-0.safetensors").rename(tmp_path / f"{step}")
    for step in mine:
        (tmp_path / f"{step}").rename(tmp_path / ".snapshot" / f"gate-{step}-0.safetensors")
    monkeypatch.setattr(Ranks, "every", lambda self, *values: [list(values), [others, -1]])
    snapshots = Snapshots(tmp_path, {})
    assert list(snapshots.reached().values()) == left
    saved = snapshots.load("gate")
    assert [int(saved[0]["step"])] == left if saved else not left
