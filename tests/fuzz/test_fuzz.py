"""A short run of the fuzzer over all kinds, and bugs that the fuzzer must find."""

import os
import time
from pathlib import Path

import pytest
import torch

from globe_kernels.errors import GlobeError
from tests.fuzz.cases import Input, opened, run_cases
from tests.fuzz.kinds import KINDS, Kind
from tests.fuzz.mutations import CANARY, FIFO, OUTSIDE, plant
from tests.fuzz.watch import watched

# The kinds that draw figures, fit, load or write a model take a tenth of a second a case and more.
SLOW = {"page": 1, "page of an unfinished fit": 2, "resume": 5} | dict.fromkeys(
    ("from_pretrained", "eval", "eval, config", "export of a base", "export of a checkpoint", "sweep", "download"), 8
)
CASES = 25


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs(kind):
    with opened(kind) as valid:
        outcomes = list(run_cases(valid, 0, range(SLOW.get(kind, CASES))))
    assert not [str(outcome) for outcome in outcomes if outcome.finding is not None]
    if len(outcomes) == CASES:  # neither is everything refused nor nothing
        assert len({outcome.outcome for outcome in outcomes}) > 1


def test_a_case_is_the_same_again():
    with opened("settings") as valid:
        first = [valid.run(7, number) for number in range(40)]
        assert [valid.run(7, number) for number in reversed(range(40))] == first[::-1]
    assert len({outcome.outcome for outcome in first}) > 1


def raises_another(_: Path) -> None:
    raise KeyError("x")


def speaks_in_two_lines(_: Path) -> None:
    error = GlobeError("x.")
    error.args = ("one\ntwo.",)
    raise error


def fills_the_memory(_: Path) -> None:
    torch.ones(320 * 2**20, dtype=torch.uint8)


def spins(_: Path) -> None:
    try:
        while True:
            time.time()
    except Exception:  # of a library that catches everything
        pass


BUGS = {
    "KeyError": raises_another,
    "no sentence": speaks_in_two_lines,
    "not finite: result.1.x": lambda _: ([1.0], {"x": float("nan")}),
    "grows by 3": fills_the_memory,
    "takes too long": spins,
    "outside of its directory": lambda path: Path(path.parent / OUTSIDE / CANARY).exists() and read_by_torch(path),
    "opens": lambda path: (path / ".." / OUTSIDE / CANARY).read_text(),
    "writes": lambda path: (path / "new").write_text("x"),
    "os.remove": lambda path: (path / FIFO).unlink(),
    "subprocess.Popen": lambda _: os.popen("true").close(),
}


def read_by_torch(path: Path) -> None:
    """Open a file as safetensors does, which Python does not hear of."""
    from safetensors import SafetensorError, safe_open

    with pytest.raises(SafetensorError):
        safe_open(path.parent / OUTSIDE / CANARY, framework="pt")


@pytest.mark.parametrize("finding", BUGS)
def test_the_fuzzer_finds(tmp_path, monkeypatch, finding):
    monkeypatch.setattr("tests.fuzz.watch.CPU_SECONDS", 2)
    directory = tmp_path / "input"
    directory.mkdir()
    plant(directory)
    assert watched(lambda: None, directory) == ("works", None)
    _, found = watched(lambda: BUGS[finding](directory), directory)
    assert found is not None and finding in found


def test_a_valid_input_that_is_refused(tmp_path, monkeypatch):
    def refuse(_: Path) -> None:
        raise GlobeError("no.")

    monkeypatch.setitem(KINDS, "refused", Kind(lambda path: (path / "x.json").write_text("{}"), refuse, ("x.json",)))
    with pytest.raises(AssertionError, match="refused before any damage: GlobeError None"):
        list(run_cases(Input("refused", tmp_path), 0, range(3)))
