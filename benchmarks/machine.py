"""Measure the constants of this machine, by which `auto` and `explain` decide, and write them into their list.

    python benchmarks/machine.py             prints them beside those of globe_kernels/strategies/machines.json
    python benchmarks/machine.py --write     puts them there, in the place of the entry that this machine falls under

On a GPU: a copy and a product in bf16, and the time of one more small kernel in a CUDA graph (`launch_us`; what it
takes as a call of torch is said in `origin`). On a CPU, in fp32 on one thread and seconds of the process: a square
product, products of four rows with weights that no cache holds, and the calls of the references, which are differences
between layers whose matrices are next to nothing.
"""

import argparse
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from ledger import conditions
from measure import captured, device_name, measure_ceilings, time_side_by_side
from providers import (
    SUPPORT,
    Inputs,
    Layer,
    Provider,
    globe,
    globe_bank_first,
    random_layer,
    transformers_experts,
)
from shapes import LayerShape

from globe_kernels.functional import moe_ffn_cached
from globe_kernels.model.cache import BasisCache
from globe_kernels.ops.compose_layer import compose_bases
from globe_kernels.ops.compose_slots import Mixtures
from globe_kernels.ops.moe_ffn_cached import CachedWeights
from globe_kernels.ops.tuning import slug
from globe_kernels.strategies.cost import MACHINES, Machine, References, machine_for, machines

_FEW, _MANY = 16, 64  # experts, or atoms
_CHOICES = 4
_LAYERS = 4  # that follow each other, as in a model: the next finds the code of the last in the cache
_SIZE = 16  # of every matrix whose product shall take no time
_WEIGHTS = (256, 512, 512)  # 256 MB: no cache holds them
_LAUNCHES = (100, 200)
_CLOCK = time.process_time  # other work of a machine is not its own


def measure(device: str, repeats: int) -> Machine:
    """Measure all constants of the machine that `device` is on, under the name of its entry."""
    name, on_gpu = device_name(device), device == "cuda"
    listed = machine_for(name)
    if listed.name not in machines():  # a card of its own
        listed = replace(listed, name=slug(name), device=name)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    ceilings = measure_ceilings(device, dtype, _CLOCK)
    launch_us, call_us = launches_us(device, repeats)
    facts = conditions(name)
    origin = f"measured {facts['date'][:10]} by benchmarks/machine.py, torch {facts['torch']}"
    measured = replace(
        listed,
        copy_gb_per_s=ceilings.copy_gb_per_s,
        matmul_tflop_per_s=ceilings.matmul_tflop_per_s,
        launch_us=launch_us,
        item_size=dtype.itemsize,
    )
    if on_gpu:
        return replace(
            measured,
            memory_gb=torch.cuda.get_device_properties("cuda").total_memory / 1e9,
            origin=f"{origin}, triton {facts['triton']}: {name}, bf16, launches in a CUDA graph (as calls of torch "
            f"{call_us:.1f} us each), clocks {facts['clocks']} MHz",
        )
    return replace(
        measured,
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        origin=f"{origin}: one thread of {_processor()}, fp32",
        references=references(ceilings.matmul_tflop_per_s, repeats),
    )


def _processor() -> str:
    """Return the name that Linux gives the processor."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", path.read_text(encoding="utf-8") if path.exists() else "", re.MULTILINE)
    return found[1] if found else platform.machine()


def launches_us(device: str, repeats: int) -> tuple[float, float]:
    """Return microseconds per small operation: (in a CUDA graph, where there is a GPU; as a call of torch)."""
    value = torch.ones(256, device=device)

    def sequence(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                value.mul_(1.0)

        return run

    runs: dict[str, Callable[[], object]] = {f"eager {count}": sequence(count) for count in _LAUNCHES}
    kinds = ["eager"]
    if device == "cuda":
        for count in _LAUNCHES:
            graph = captured(sequence(count))
            assert graph is not None, "nothing in it waits for the device"
            runs[f"graph {count}"] = graph
        kinds = ["graph", "eager"]
    times = time_side_by_side(runs, device, repeats, clock=_CLOCK)
    few, many = _LAUNCHES
    each = [(times[f"{kind} {many}"].median_us - times[f"{kind} {few}"].median_us) / (many - few) for kind in kinds]
    return each[0], each[-1]


def read_gb_per_s(matmul_tflop_per_s: float, repeats: int) -> float:
    """Measure the rate at which products of four rows read weights, without the time of their arithmetic."""
    weights, rows = torch.randn(_WEIGHTS), torch.randn(_CHOICES, _WEIGHTS[2])

    def run() -> None:
        for weight in weights:
            F.linear(rows, weight)

    took = time_side_by_side({"run": run}, "cpu", repeats, clock=_CLOCK)["run"].median_us
    arithmetic = 2 * _CHOICES * weights.numel() / matmul_tflop_per_s / 1e6
    return weights.numel() * weights.element_size() / (took - arithmetic) / 1e3


def references(matmul_tflop_per_s: float, repeats: int) -> References:
    """Measure each constant as the difference of two layers that differ in its count alone."""
    torch.manual_seed(0)
    base, more_experts, more_atoms = (_tiny_layer(*counts) for counts in ((_FEW, _FEW), (_MANY, _FEW), (_FEW, _MANY)))
    providers = {"": globe, "bank_first_": globe_bank_first, "dense_": transformers_experts("grouped_mm")}
    calls = {name: _call(build(base)) for name, build in providers.items()}
    calls |= {f"{name}more": _call(build(more_experts), _MANY) for name, build in providers.items()}
    calls["more atoms"] = _call(globe_bank_first(more_atoms))
    calls["layer"] = lambda: compose_bases(list(base.factors[2:8]), list(base.factors[:2]), "identity", torch.float32)
    # a layer that the cache holds, and two that push each other out of it
    calls |= {name: _call(_cached(base, layers)) for name, layers in (("hits", 1), ("misses", 2))}
    runs = {name: partial(_layers, call) for name, call in calls.items()}
    with torch.no_grad():
        times = time_side_by_side(runs, "cpu", repeats, clock=_CLOCK)
    us = {name: timing.median_us / _LAYERS for name, timing in times.items()}
    expert = {name: (us[f"{name}more"] - us[name]) / (_MANY - _FEW) for name in providers}
    call = {name: us[name] - _FEW * expert[name] for name in providers}
    atom = (us["more atoms"] - us["bank_first_"]) / (2 * (more_atoms.palette - base.palette))
    call["bank_first_"] -= 2 * base.palette * atom
    return References(
        read_gb_per_s=read_gb_per_s(matmul_tflop_per_s, repeats),
        **{f"{name}call": value for name, value in call.items()},
        **{f"{name}expert": value for name, value in expert.items()},
        atom=atom,
        lookup=us["hits"] - us[""],
        miss=(us["misses"] - us["hits"]) / _FEW,
        layer=us["layer"],
    )


def _layers(call: Callable[[], object]) -> None:
    for _ in range(_LAYERS):
        call()


def _tiny_layer(experts: int, atoms: int) -> Layer:
    return random_layer(LayerShape(_SIZE, _SIZE, experts, _CHOICES), _SIZE, torch.float32, "cpu", atoms)


def _call(provider: Provider, experts: int = _FEW) -> Callable[[], object]:
    """Call a provider on tokens that give each expert one token."""
    index = torch.arange(experts).view(-1, _CHOICES)
    hidden, weights = torch.randn(len(index), _SIZE), torch.full(index.shape, 1 / _CHOICES)
    return lambda: provider(Inputs(hidden, index, weights))


def _cached(layer: Layer, layers: int) -> Provider:
    """Call `layers` layers in turn; the cache holds the experts of one layer."""
    factors = layer.factors
    index = torch.rand(_FEW, layer.palette).topk(SUPPORT).indices.int()
    code = (index, torch.randn(index.shape))
    weights = CachedWeights(Mixtures(factors.gate_bank, factors.up_bank, *code, *code), layer.weights.from_rank)
    cache = BasisCache(dict.fromkeys(range(layers), _FEW), _FEW, _SIZE, _SIZE, torch.float32, "cpu")
    first_experts = cycle(range(0, layers * _FEW, _FEW))
    return lambda i: moe_ffn_cached(
        i.hidden, i.index, i.weights, weights, cache, next(first_experts), "identity", "silu"
    )


def entry(machine: Machine) -> dict:
    """Write a machine as machines.json holds it, in three digits. Raises SystemExit for a constant that cannot be."""

    def rounded(name: str, value: object) -> object:
        if isinstance(value, dict):
            return {own: rounded(f"{name}.{own}", of_it) for own, of_it in value.items()}
        if not isinstance(value, float):
            return value
        if not (math.isfinite(value) and value > 0):
            raise SystemExit(
                f"machine: {name} was measured as {value:.3g}, and a positive number was expected; run it again with "
                "more --repeats while the machine does nothing else. Nothing was written."
            )
        return float(f"{value:.3g}")

    fields = asdict(machine)
    return {name: rounded(name, value) for name, value in fields.items() if name != "name" and value is not None}


def write(machine: Machine, path: Path) -> None:
    """Write the entry into the file; replace the entry of that name."""
    listed = json.loads(path.read_text(encoding="utf-8"))
    listed[machine.name] = entry(machine)
    path.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    machines.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument(
        "--write", action="store_true", help="put the entry into globe_kernels/strategies/machines.json"
    )
    parser.add_argument("--json", action="store_true", help="{name: entry} on stdout, nothing else")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; use --device cpu.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        torch.set_num_threads(1)
    machine = measure(device, args.repeats)
    found, listed = entry(machine), machines().get(machine.name)
    if args.write:
        write(machine, MACHINES)
    if args.json:
        print(json.dumps({machine.name: found}, indent=2))
        return
    before = entry(listed) if listed else {}
    print(f"{machine.name}: measured, and as listed before")
    for name in ("copy_gb_per_s", "matmul_tflop_per_s", "launch_us", "memory_gb"):
        print(f"  {name:20}{found[name]:>10}{before.get(name, ''):>10}")
    for name, value in found.get("references", {}).items():
        print(f"  {name:20}{value:>10}{before.get('references', {}).get(name, ''):>10}")
    print(found["origin"])


if __name__ == "__main__":
    main()
