"""`benchmarks/machine.py`: what it measures is an entry that decides, and what cannot be is not written."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from globe_kernels.strategies import DENSE, cost
from globe_kernels.strategies.base import LayerSizes
from globe_kernels.strategies.cost import Machine, machine_for, machine_named, predict
from tests.benchmarks.test_benchmarks import BENCHMARKS, run
from tests.kernels.cases import DEVICE

SIZES = LayerSizes(16, 4, 64, 48, 16, 4, 8, "identity", 4)


@pytest.fixture(scope="module")
def benchmark_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import machine

        yield machine


@pytest.fixture(scope="module")
def measured(benchmark_module) -> Machine:
    """This CPU."""
    torch.set_num_threads(1)
    return benchmark_module.measure("cpu", repeats=15)


@pytest.fixture
def machine(benchmark_module, monkeypatch, tmp_path):
    """The benchmark, beside a machines.json of its own."""
    path = Path(shutil.copy(cost.MACHINES, tmp_path))
    for module in (cost, benchmark_module):
        monkeypatch.setattr(module, "MACHINES", path)
    cost.machines.cache_clear()
    yield benchmark_module
    cost.machines.cache_clear()


@pytest.fixture
def main(machine, measured, monkeypatch, capsys):
    """Runs the benchmark with what was measured: its standard output."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(machine, "measure", lambda *_: measured)
        monkeypatch.setattr(sys, "argv", ["machine.py", "--device", "cpu", *arguments])
        machine.main()
        return capsys.readouterr().out

    return run


def test_the_constants_of_a_cpu(machine, main):
    before = machine.MACHINES.read_text()
    (found,) = json.loads(main("--json")).values()
    assert machine.MACHINES.read_text() == before, "only --write writes"
    assert 0.1 < found["copy_gb_per_s"] < 10000 and 1e-3 < found["matmul_tflop_per_s"] < 100
    assert found["launch_us"] > 0.05 and found["memory_gb"] > 0.5 and found["item_size"] == 4
    own = found["references"]
    assert own["expert"] > own["dense_expert"], "three stages of several calls, and a loop in C++"
    assert own["lookup"] > own["miss"] > 1 and own["read_gb_per_s"] > 0.1
    assert "measured 20" in found["origin"] and torch.__version__ in found["origin"]


def test_the_constants_of_a_card(machine, monkeypatch):
    """Put together from what a GPU would measure."""
    from measure import Ceilings

    monkeypatch.setattr(machine, "measure_ceilings", lambda *_: Ceilings(2876.54, 701.2))
    monkeypatch.setattr(machine, "launches_us", lambda *_: (1.234, 5.67))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=85 * 10**9))
    before = [*cost.machines()]
    names = {"NVIDIA H100 80GB HBM3": ("h100", "H100"), "NVIDIA L40S": ("nvidia-l40s", "NVIDIA L40S")}
    for name, (listed_as, device) in names.items():
        monkeypatch.setattr(machine, "device_name", lambda _, name=name: name)
        target = machine.measure("cuda", 3)
        machine.write(target, machine.MACHINES)
        found = machine_for(name)
        assert (found.name, found.device, found.item_size, found.references) == (listed_as, device, 2, None)
        assert (found.copy_gb_per_s, found.matmul_tflop_per_s, found.launch_us) == (2880, 701, 1.23)
        assert found.memory_gb == 85 and name in found.origin and "as calls of torch 5.7 us each" in found.origin
    assert list(cost.machines()) == [*before, "nvidia-l40s"]


def test_what_is_written_decides(machine, main):
    before = json.loads(machine.MACHINES.read_text())
    assert "cpu: measured, and as listed before" in main("--write")
    listed = json.loads(machine.MACHINES.read_text())
    assert list(listed) == list(before) and listed["h100"] == before["h100"]
    found = machine_for(torch.device("cpu"))
    assert machine.entry(found) == listed["cpu"] and found.references is not None
    slower = replace(found, references=replace(found.references, dense_call=1e6))
    machine.write(slower, machine.MACHINES)
    assert predict(DENSE, SIZES, 1, machine_for("cpu")).us > 1e6 > predict(DENSE, SIZES, 1, found).us


def test_a_name_is_found_whatever_is_in_it(machine):
    name = "Some Card (48 GB) C++"
    machine.write(replace(machine_named("a100"), name="some", device=name), machine.MACHINES)
    assert machine_for(name).name == "some"
    assert machine_for("Some Card 48 GB C").name.endswith("taken for a100")


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


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_way_out_is_named():
    done = run("machine.py", "--device", "cuda", "--write")
    assert done.returncode == 2 and "torch sees no CUDA device; use --device cpu" in done.stderr
