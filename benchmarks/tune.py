"""Find the fastest launch configurations of one layer on this card and write them for everybody who has the same card.

    python benchmarks/tune.py                                 Qwen3-30B-A3B, rank 384, bf16, 1 to 16384 tokens
    python benchmarks/tune.py --model olmoe --rank 512 --tokens 64

Writes globe_kernels/ops/tables/<device>.json, which launches read. Each stage is searched on its own, for every row
tile that makes sense; the rest is coordinate descent from the default: tile, then warps, pipeline stages and grouping.
What a card cannot run is not compiled. An entry is written only for results that agree with the reference, and only
when the whole layer is faster with it than with the default, measured side by side.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from measure import device_name, time_side_by_side
from providers import Inputs, Layer, random_inputs, random_layer, reference
from shapes import MODELS

from globe_kernels.ops import tuning
from globe_kernels.ops.down import launch_down
from globe_kernels.ops.gate_up import GatedAdapters, launch_gate_up
from globe_kernels.ops.low_rank_in import launch_low_rank_in
from globe_kernels.ops.routing_plan import launch_routing_plan
from globe_kernels.ops.triton_import import triton
from globe_kernels.ops.tuning import Card, FfnConfig, FfnShape, GemmConfig, default_config, rows_per_expert, supports
from globe_kernels.testing import relative_errors

# Searched one line after the other, all combinations of the fields of a line.
AXES: tuple[dict[str, tuple[int, ...]], ...] = (
    {"block_n": (32, 64, 128, 256), "block_k": (32, 64, 128)},
    {"num_warps": (4, 8)},
    {"num_stages": (2, 3, 4, 5)},
    {"group_m": (1, 4, 8, 16)},
)
_ERROR_LIMIT = {2: 1e-2, 4: 1e-5}  # by item size; a wrong tile is off by order one

Run = Callable[[FfnConfig, Inputs], torch.Tensor]
TimeOf = Callable[[Callable[[], object]], float]


def row_tiles(rows: int) -> list[int]:
    """Row tiles worth a try for `rows` rows per expert: those that routing does not leave mostly empty."""
    return [block_m for block_m in (16, 32, 64, 128) if block_m <= max(16, 2 * rows)]


def neighbours(gemm: GemmConfig, axis: dict[str, tuple[int, ...]]) -> Iterator[GemmConfig]:
    """Every combination of the fields of `axis`, the rest as in `gemm`."""
    for values in itertools.product(*axis.values()):
        yield replace(gemm, **dict(zip(axis, values, strict=True)))


def search(config: FfnConfig, stage: str, allowed: Callable[[FfnConfig], bool], time: Callable[[FfnConfig], float]):
    """(config with the fastest launch found for `stage`, its microseconds)"""
    best, fastest = config, time(config)
    for axis in AXES:
        for gemm in neighbours(getattr(best, stage), axis):
            candidate = replace(best, **{stage: gemm})
            if candidate != best and allowed(candidate):
                took = time(candidate)
                if took < fastest:
                    best, fastest = candidate, took
    return best, fastest


def stage_runs(layer: Layer, op: str) -> tuple[dict[str, Callable], Run]:
    """Each stage of `op` as (config, inputs, plan, what the stage before it made) -> tensor, and all in turn."""
    w, inner = layer.weights, layer.shape.intermediate
    down: Callable = lambda c, i, plan, y: launch_down(y, plan, w.from_rank.down, (i.index, i.weights), c.down)  # noqa: E731
    if op == "moe_ffn":
        stages = {
            "low_rank_in": lambda c, i, plan, x: launch_low_rank_in(x, plan, w.basis, c.low_rank_in),
            "gate_up": lambda c, i, plan, h: launch_gate_up(h, plan, w.from_rank.adapters, "silu", c.gate_up),
            "down": down,
        }
    else:
        dense = GatedAdapters(layer.gate_up[:, :inner].contiguous(), layer.gate_up[:, inner:].contiguous())
        stages = {
            "gate_up": lambda c, i, plan, x: launch_gate_up(x, plan, dense, "silu", c.gate_up, plan.num_choices),
            "down": down,
        }

    def whole(config: FfnConfig, inputs: Inputs) -> torch.Tensor:
        plan = launch_routing_plan(inputs.index, layer.shape.experts, config.block_m)
        values = inputs.hidden
        for stage in stages.values():
            values = stage(config, inputs, plan, values)
        return values

    return stages, whole


def tune(layer: Layer, inputs: Inputs, op: str, card: Card, device: str, repeats: int) -> dict | None:
    """The table entry for these inputs, or None when nothing found is faster than the default."""
    rows, item_size = rows_per_expert(inputs.index.numel(), layer.shape.experts), inputs.hidden.element_size()
    default = default_config(rows, item_size, card)
    stages, whole = stage_runs(layer, op)

    def time(function: Callable[[], object]) -> float:
        try:
            return time_side_by_side({"": function}, device, repeats, warmup=1)[""].median_us
        except triton.runtime.errors.OutOfResources:
            return float("inf")

    found: dict[FfnConfig, float] = {}
    for block_m in row_tiles(rows):
        config = tuning.fit_to(replace(default, block_m=block_m), item_size, card)
        plan = launch_routing_plan(inputs.index, layer.shape.experts, block_m)
        values, total = inputs.hidden, 0.0
        for name, stage in stages.items():
            config, took = search(
                config,
                name,
                lambda c: supports(c, item_size, card),
                lambda c, stage=stage, plan=plan, values=values: time(lambda: stage(c, inputs, plan, values)),
            )
            total += took
            values = stage(config, inputs, plan, values)
        found[config] = total
    best = min(found, key=lambda config: found[config])
    error, _ = relative_errors(whole(best, inputs), reference(layer, inputs))
    if not error <= _ERROR_LIMIT[item_size]:
        raise SystemExit(f"tune: {best} has relative error {error:.3g}; nothing was written.")
    if best == default:
        return None
    runs = {"best": lambda: whole(best, inputs), "default": lambda: whole(default, inputs)}
    times = time_side_by_side(runs, device, 3 * repeats)
    if times["best"].median_us >= times["default"].median_us:
        return None
    shape = FfnShape(layer.shape.experts, layer.shape.hidden, layer.shape.intermediate, _rank(layer, op))
    return {
        "op": op,
        "shape": asdict(shape),
        "rows_per_expert": rows,
        "item_size": item_size,
        "triton": triton.__version__,
        "median_us": times["best"].median_us,
        "default_us": times["default"].median_us,
        "config": asdict(best),
    }


def _rank(layer: Layer, op: str) -> int:
    return layer.weights.from_rank.gate_adapter.shape[2] if op == "moe_ffn" else layer.shape.intermediate


def write(path: Path, device: str, architecture: str, entries: list[dict]) -> None:
    """Put `entries` into a table, in the place of earlier ones for the same calls."""
    key = ("op", "shape", "rows_per_expert", "item_size", "triton")
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"entries": []}
    new = [[entry[name] for name in key] for entry in entries]
    kept = [entry for entry in table["entries"] if [entry[name] for name in key] not in new]
    lines = ",\n".join(json.dumps(entry) for entry in kept + entries)
    head = f'{{"device": {json.dumps(device)}, "architecture": {json.dumps(architecture)}, "entries": [\n'
    path.write_text(f"{head}{lines}\n]}}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="qwen3-30b-a3b")
    parser.add_argument("--rank", type=int, help="half the intermediate size by default")
    parser.add_argument("--tokens", type=int, action="append", help="may be given several times")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; tables are measured on the card that they are for.")
    shape, device = MODELS[args.model], torch.device("cuda")
    torch.manual_seed(0)
    layer = random_layer(shape, args.rank or shape.intermediate // 2, torch.bfloat16, "cuda")
    name, card = device_name("cuda"), tuning.card_of(device)
    path = tuning.TABLES / f"{tuning.slug(name)}.json"
    for tokens in args.tokens or (1, 4, 16, 64, 256, 1024, 4096, 16384):
        inputs = random_inputs(shape, tokens, torch.bfloat16, "cuda")
        for op in ("moe_ffn", "dense_twin"):
            entry = tune(layer, inputs, op, card, "cuda", args.repeats)
            if entry is None:
                print(f"{op}, {tokens} tokens: the default is the fastest found", flush=True)
                continue
            # after every entry: a run that is cut short keeps what it found
            write(path, name, tuning.architecture_of(device), [entry])
            print(f"{op}, {tokens} tokens: {entry['default_us']:.1f} -> {entry['median_us']:.1f} us", flush=True)


if __name__ == "__main__":
    main()
