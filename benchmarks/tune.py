"""Find the fastest launch configurations of one layer on this card and write them for everybody who has the same card.

    python benchmarks/tune.py                                 Qwen3-30B-A3B, rank 384, bf16, 1 to 16384 tokens
    python benchmarks/tune.py --model olmoe --rank 512 --tokens 64
    python benchmarks/tune.py --op moe_ffn_bank_first --rank 768 --palette 64

Writes globe_kernels/ops/tables/<device>.json, which launches read. Each stage is searched on its own, for every row
tile that makes sense; the rest is coordinate descent from the default: tile, then warps, pipeline stages and grouping.
What a card cannot run is not compiled. An entry is written only for results that agree with the reference. It holds the
found configuration where that is faster than the default, measured side by side, else the default: for moe_ffn and
dense_twin as a whole layer, for moe_ffn_bank_first as its own stages, palette_in and mix (the others run as those of
moe_ffn of the same rank), for compose_layer as the composition of one family.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from measure import device_name, time_side_by_side
from providers import Inputs, Layer, random_inputs, random_layer, reference
from shapes import MODELS

from globe_kernels.ops import tuning
from globe_kernels.ops.compose_layer import (
    ComposeConfig,
    ComposeShape,
    LayerCode,
    compose_layer_ref,
    default_compose,
    launch_compose_layer,
)
from globe_kernels.ops.down import launch_down
from globe_kernels.ops.gate_up import GatedAdapters, launch_gate_up
from globe_kernels.ops.low_rank_in import launch_low_rank_in
from globe_kernels.ops.mix import MixConfig, MixShape, default_mix, launch_mix, mix_ref
from globe_kernels.ops.palette_in import (
    PaletteInConfig,
    PaletteInShape,
    default_palette_in,
    launch_palette_in,
    palette_in_ref,
)
from globe_kernels.ops.routing import RoutingPlan, launch_routing_plan
from globe_kernels.ops.triton_import import triton
from globe_kernels.ops.tuning import AnyLaunches, FfnConfig, FfnShape, GemmConfig, Target, rows_per_expert, supports
from globe_kernels.testing import relative_errors

OPS = ("moe_ffn", "dense_twin", "moe_ffn_bank_first", "compose_layer")

# Searched one line after the other, all combinations of the fields of a line.
Axes = tuple[dict[str, tuple[int, ...]], ...]
GEMM_AXES: Axes = (
    {"block_n": (32, 64, 128, 256), "block_k": (32, 64, 128)},
    {"num_warps": (4, 8)},
    {"num_stages": (2, 3, 4, 5)},
    {"group_m": (1, 4, 8, 16)},
)
MIX_AXES: Axes = (
    {"block_r": (32, 64, 128, 256, 512), "num_warps": (2, 4, 8)},
    {"block_u": (16, 32)},  # divides the padding of codes
    {"num_stages": (1, 2, 3)},
)
COMPOSE_AXES: Axes = (
    {"block_e": (16, 32, 64, 128, 256), "block_v": (64, 128, 256), "num_warps": (4, 8)},
    {"block_u": (16, 32)},
    {"num_stages": (1, 3, 5, 7)},  # two stages hold one tile
)
_ERROR_LIMIT = {2: 1e-2, 4: 1e-5}  # by item size; a wrong tile is off by order one

Run = Callable[[FfnConfig, Inputs], torch.Tensor]
Sizes = TypeVar("Sizes", GemmConfig, MixConfig, ComposeConfig)


@dataclass(frozen=True)
class Bench:
    """The device, its limits, and the number of measurements."""

    device: str
    target: Target
    repeats: int

    def time(self, function: Callable[[], object], warm: Sequence[torch.Tensor] = ()) -> float:
        """Microseconds, infinite for what the card cannot run."""
        try:
            return time_side_by_side({"": function}, self.device, self.repeats, warmup=1, warm=warm)[""].median_us
        except triton.runtime.errors.OutOfResources:
            return float("inf")


def row_tiles(rows: int) -> list[int]:
    """Return the row tiles worth a try for `rows` rows per expert; routing leaves the others mostly empty."""
    return [block_m for block_m in (16, 32, 64, 128) if block_m <= max(16, 2 * rows)]


def neighbours(config: Sizes, axis: dict[str, tuple[int, ...]]) -> Iterator[Sizes]:
    """Yield every combination of the fields of `axis`; other fields stay as in `config`."""
    for values in itertools.product(*axis.values()):
        yield replace(config, **dict(zip(axis, values, strict=True)))


def search(
    config: Sizes, axes: Axes, allowed: Callable[[Sizes], bool], time: Callable[[Sizes], float]
) -> tuple[Sizes, float]:
    """Return (the fastest configuration found from `config` on, its microseconds)."""
    best, fastest = config, time(config)
    for axis in axes:
        for candidate in neighbours(best, axis):
            if candidate != best and allowed(candidate):
                took = time(candidate)
                if took < fastest:
                    best, fastest = candidate, took
    return best, fastest


def stage_runs(layer: Layer, op: str) -> tuple[dict[str, Callable], Run]:
    """Return each stage of `op` as (config, inputs, plan, tensor of the stage before) -> tensor, and all in turn."""
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
            "gate_up": lambda c, i, plan, x: launch_gate_up(x, plan, dense, "silu", c.gate_up, plan.top_k),
            "down": down,
        }

    def whole(config: FfnConfig, inputs: Inputs) -> torch.Tensor:
        plan = launch_routing_plan(inputs.index, layer.shape.experts, config.block_m)
        values = inputs.hidden
        for stage in stages.values():
            values = stage(config, inputs, plan, values)
        return values

    return stages, whole


def tune_experts(layer: Layer, inputs: Inputs, op: str, bench: Bench) -> dict:
    """Return the entry of a whole layer of moe_ffn or dense_twin for these inputs."""
    rows, item_size = rows_per_expert(inputs.index.numel(), layer.shape.experts), inputs.hidden.element_size()
    default = tuning.default_config(rows, item_size, bench.target)
    stages, whole = stage_runs(layer, op)
    found: dict[FfnConfig, float] = {}
    for block_m in row_tiles(rows):
        config = tuning.fit_to(replace(default, block_m=block_m), item_size, bench.target)
        plan = launch_routing_plan(inputs.index, layer.shape.experts, block_m)
        values, total = inputs.hidden, 0.0
        for name, stage in stages.items():
            config, took = search_stage(config, name, stage, (inputs, plan, values), bench)
            total += took
            values = stage(config, inputs, plan, values)
        found[config] = total
    best = min(found, key=lambda config: found[config])
    rank = layer.factors.rank if op == "moe_ffn" else layer.shape.intermediate
    shape = FfnShape(layer.shape.experts, layer.shape.hidden, layer.shape.intermediate, rank)
    call = {"op": op, "shape": asdict(shape), "rows": rows, "item_size": item_size}
    return judged(call, (best, default), lambda c: whole(c, inputs), reference(layer, inputs), bench)


def search_stage(
    config: FfnConfig, name: str, stage: Callable, arguments: tuple[Inputs, RoutingPlan, torch.Tensor], bench: Bench
) -> tuple[FfnConfig, float]:
    """Return (config with the fastest launch found for the stage `name`, its microseconds)."""
    item_size = arguments[0].hidden.element_size()

    def whole(gemm: GemmConfig) -> FfnConfig:
        return replace(config, **{name: gemm})

    best, fastest = search(
        getattr(config, name),
        GEMM_AXES,
        lambda gemm: supports(whole(gemm), item_size, bench.target),
        lambda gemm: bench.time(lambda: stage(whole(gemm), *arguments)),
    )
    return whole(best), fastest


def tune_palette_in(layer: Layer, inputs: Inputs, bench: Bench) -> dict:
    """Return the entry of S1 of moe_ffn_bank_first for one family."""
    w, x, item_size = layer.factors, inputs.hidden, inputs.hidden.element_size()
    operands = (x, w.gate_palette, w.gate_bank)
    default = default_palette_in(len(x), item_size, bench.target)
    found: dict[PaletteInConfig, float] = {}
    for block_m in row_tiles(len(x)):
        gemm, took = search(
            tuning.fit_gemm(default.gemm, block_m, item_size, bench.target),
            GEMM_AXES,
            lambda gemm, m=block_m: supports(PaletteInConfig(m, gemm), item_size, bench.target),
            lambda gemm, m=block_m: bench.time(lambda: launch_palette_in(*operands, PaletteInConfig(m, gemm))),
        )
        found[PaletteInConfig(block_m, gemm)] = took
    best = min(found, key=lambda config: found[config])
    shape = PaletteInShape(x.shape[1], w.rank, w.gate_palette.numel())
    call = {"op": "palette_in", "shape": asdict(shape), "rows": len(x), "item_size": item_size}
    return judged(call, (best, default), lambda c: launch_palette_in(*operands, c), palette_in_ref(*operands), bench)


def tune_mix(layer: Layer, inputs: Inputs, bench: Bench) -> dict:
    """Return the entry of the mix of moe_ffn_bank_first, on products that S1 has just written."""
    w, item_size, (tokens, top_k) = layer.factors, inputs.hidden.element_size(), inputs.index.shape
    z = (
        palette_in_ref(inputs.hidden, w.gate_palette, w.gate_bank),
        palette_in_ref(inputs.hidden, w.up_palette, w.up_bank),
    )
    out = inputs.hidden.new_empty(tokens * top_k, 2 * w.rank)

    def run(config: MixConfig) -> torch.Tensor:
        launch_mix(z, inputs.index, w.codes, out, config)
        return out

    default = default_mix(tokens)
    best, _ = search(
        default, MIX_AXES, lambda c: supports(c, item_size, bench.target), lambda c: bench.time(lambda: run(c), z)
    )
    call = {"op": "mix", "shape": asdict(MixShape(w.rank, layer.palette, top_k)), "rows": tokens}
    return judged({**call, "item_size": item_size}, (best, default), run, mix_ref(z, inputs.index, w.codes), bench, z)


def tune_compose_layer(layer: Layer, bench: Bench) -> dict:
    """Return the entry of the composition of the bases of one family."""
    w, bank = layer.factors, layer.factors.gate_bank
    code, item_size = LayerCode(w.gate_palette, w.gate_value, w.gate_scale), bank.element_size()
    shape = ComposeShape(layer.shape.experts, code.palette.numel(), bank[0].numel())
    out = bank.new_empty(shape.experts, *bank.shape[1:])

    def run(config: ComposeConfig) -> torch.Tensor:
        return launch_compose_layer(code, bank, "identity", out, config)

    default = default_compose(shape.experts)
    best, _ = search(
        default, COMPOSE_AXES, lambda c: supports(c, item_size, bench.target), lambda c: bench.time(lambda: run(c))
    )
    call = {"op": "compose_layer", "shape": asdict(shape), "rows": 1, "item_size": item_size}
    return judged(call, (best, default), run, compose_layer_ref(code, bank, "identity", torch.empty_like(out)), bench)


def judged(
    call: dict[str, Any],
    configs: tuple[AnyLaunches, AnyLaunches],  # the best found and the default
    run: Callable[[AnyLaunches], torch.Tensor],
    expected: torch.Tensor,
    bench: Bench,
    warm: Sequence[torch.Tensor] = (),
) -> dict:
    """Return the entry for `call`: the faster of the two. Raises SystemExit when the result is wrong."""
    best, default = configs
    error, _ = relative_errors(run(best), expected)
    if not error <= _ERROR_LIMIT[call["item_size"]]:
        raise SystemExit(f"tune: {best} has relative error {error:.3g}; nothing was written.")
    runs = {"best": lambda: run(best), "default": lambda: run(default)}
    times = time_side_by_side(runs, bench.device, 3 * bench.repeats, warm=warm)
    if times["best"].median_us >= times["default"].median_us:
        # that is worth an entry as well: without, a call like this one would take that of other rows
        best, times["best"] = default, times["default"]
    return {
        **call,
        "triton": triton.__version__,
        "median_us": times["best"].median_us,
        "default_us": times["default"].median_us,
        "config": asdict(best),
    }


def write(path: Path, device: str, architecture: str, entries: list[dict]) -> None:
    """Put `entries` into a table, in the place of earlier ones for the same calls."""
    key = ("op", "shape", "rows", "item_size", "triton")
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"entries": []}
    new = [[entry[name] for name in key] for entry in entries]
    kept = [entry for entry in table["entries"] if [entry[name] for name in key] not in new]
    lines = ",\n".join(json.dumps(entry) for entry in kept + entries)
    head = f'{{"device": {json.dumps(device)}, "architecture": {json.dumps(architecture)}, "entries": [\n'
    path.write_text(f"{head}{lines}\n]}}\n", encoding="utf-8")


def entries(layer: Layer, ops: Sequence[str], tokens: Sequence[int], bench: Bench) -> Iterator[tuple[str, dict]]:
    """Yield (subject of the search, its entry), one after the other."""

    def inputs(count: int) -> Inputs:
        return random_inputs(layer.shape, count, layer.factors.gate_bank.dtype, bench.device)

    for op in ("moe_ffn", "dense_twin"):
        for count in tokens if op in ops else ():
            yield f"{op}, {count} tokens", tune_experts(layer, inputs(count), op, bench)
    if "moe_ffn_bank_first" in ops:
        # its first stages take tokens in chunks
        for count in dict.fromkeys(min(count, layer.factors.chunk_tokens()) for count in tokens):
            yield f"palette_in, {count} tokens", tune_palette_in(layer, inputs(count), bench)
            yield f"mix, {count} tokens", tune_mix(layer, inputs(count), bench)
    if "compose_layer" in ops:
        yield "compose_layer", tune_compose_layer(layer, bench)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, action="append", help="may be given several times; all by default")
    parser.add_argument("--model", choices=list(MODELS), default="qwen3-30b-a3b")
    parser.add_argument("--rank", type=int, help="half the intermediate size by default")
    parser.add_argument("--palette", type=int, default=32, help="atoms that the layer uses in each family")
    parser.add_argument("--tokens", type=int, action="append", help="may be given several times")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; tables are measured on the card that they are for.")
    shape, device = MODELS[args.model], torch.device("cuda")
    torch.manual_seed(0)
    layer = random_layer(shape, args.rank or shape.intermediate // 2, torch.bfloat16, "cuda", args.palette)
    name, bench = device_name("cuda"), Bench("cuda", tuning.target_of(device), args.repeats)
    path = tuning.TABLES / f"{tuning.slug(name)}.json"
    for label, entry in entries(layer, args.op or OPS, args.tokens or (1, 4, 16, 64, 256, 1024, 4096, 16384), bench):
        # after every entry: a run that is cut short keeps what it found
        write(path, name, tuning.compiler_name(device), [entry])
        print(f"{label}: {entry['default_us']:.1f} -> {entry['median_us']:.1f} us", flush=True)


if __name__ == "__main__":
    main()
