"""`benchmarks/machine.py`: what it measures is an entry that decides, and what cannot be is not written."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from globe_kernels import strategy
from globe_kernels.strategy import DENSE, LayerSizes, machine_for, machine_named, predict
from tests.kernels.cases import DEVICE
from tests.kernels.test_benchmarks import BENCHMARKS, run

SIZES = LayerSizes(16, 4, 64, 48, 16, 4, 8, "identity", 4)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """The benchmark, beside a machines.json of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import machine

    path = shutil.copy(strategy.MACHINES, tmp_path)
    for module in (strategy, machine):
        monkeypatch.setattr(module, "MACHINES", Path(path))
    strategy.machines.cache_clear()
    yield machine
    strategy.machines.cache_clear()


def measured(machine, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["machine.py", "--device", "cpu", "--repeats", "3", *arguments])
    machine.main()


def test_the_constants_of_a_cpu(machine, monkeypatch, capsys):
    before = machine.MACHINES.read_text()
    measured(machine, monkeypatch, "--json")
    (found,) = json.loads(capsys.readouterr().out).values()
    assert machine.MACHINES.read_text() == before, "only --write writes"
    assert 0.1 < found["copy_gb_per_s"] < 10000 and 1e-3 < found["matmul_tflop_per_s"] < 100
    assert found["launch_us"] > 0.05 and found["memory_gb"] > 0.5 and found["item_size"] == 4
    own = found["references"]
    assert own["expert"] > own["dense_expert"], "three stages of several calls, and a loop in C++"
    assert own["lookup"] > own["miss"] > 1 and own["read_gb_per_s"] > 0.1
    assert "measured 20" in found["origin"] and torch.__version__ in found["origin"]


def test_what_is_written_decides(machine, monkeypatch, capsys):
    measured(machine, monkeypatch, "--write")
    assert "cpu: measured, and as listed before" in capsys.readouterr().out
    listed = json.loads(machine.MACHINES.read_text())
    assert list(listed) == ["h100", "h200", "a100", "rtx4090", "cpu"]
    assert listed["h100"] == json.loads(Path(strategy.__file__).with_name("machines.json").read_text())["h100"]
    found = machine_for(torch.device("cpu"))
    assert machine.entry(found) == listed["cpu"] and "measured 20" in found.origin
    assert found.references is not None
    slower = replace(found, references=replace(found.references, dense_call=1e6))
    machine.write(slower, machine.MACHINES)
    assert predict(DENSE, SIZES, 1, machine_for("cpu")).us > 1e6


def test_a_card_that_is_not_listed_gets_an_entry_of_its_own(machine):
    name = "Some Card (48 GB) C++"
    card = replace(machine_named("a100"), name="some-card-48-gb-c", device=name, copy_gb_per_s=123.456)
    assert machine_for(name).name == f"{name}, taken for a100"
    machine.write(card, machine.MACHINES)
    assert machine_for(name) == replace(card, copy_gb_per_s=123.0)
    assert machine_for("NVIDIA A100-SXM4-80GB").name == "a100"


@pytest.mark.parametrize("field", ["copy_gb_per_s", "launch_us", "references.lookup"])
@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
def test_nonsense_is_refused(machine, field, value):
    before, found = machine.MACHINES.read_text(), machine_for("cpu")
    assert found.references is not None
    if field.startswith("references."):
        wrong = replace(found, references=replace(found.references, lookup=value))
    else:
        wrong = replace(found, **{field: value})
    with pytest.raises(SystemExit, match=f"{field} was measured as .*, and a positive number .* Nothing was written"):
        machine.write(wrong, machine.MACHINES)
    assert machine.MACHINES.read_text() == before


def test_what_is_listed_is_an_entry(machine):
    for found in strategy.machines().values():
        assert machine.entry(found).keys() <= asdict(found).keys()


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_way_out_is_named():
    done = run("machine.py", "--device", "cuda", "--write")
    assert done.returncode == 2 and "torch sees no CUDA device; use --device cpu" in done.stderr
