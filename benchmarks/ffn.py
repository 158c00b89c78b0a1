"""One MoE layer: GloBE against its dense twin and the implementations of transformers, in one run.

    python benchmarks/ffn.py                       on a GPU: bf16, Qwen3-30B-A3B, rank 384
    python benchmarks/ffn.py --cpu                 the reference paths, on a small layer, fp32
    python benchmarks/ffn.py --model olmoe --rank 512 --tokens 1 --tokens 64 --ledger
    python benchmarks/ffn.py --rank 768            the rank of a layer that is to be smaller: globe_bank_first, 32 atoms
    python benchmarks/ffn.py --graph --tokens 1    every provider replayed as a CUDA graph, as engines decode

Every provider computes the same function, and is compared with an fp64 reference before anything is timed: a provider
whose error exceeds 1.5 times that of transformers' eager experts in the same dtype stops the run with exit code 1.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from ledger import append, conditions
from measure import Ceilings, Timing, captured, device_name, measure_ceilings, time_side_by_side
from providers import BATCHED_ROWS, PROVIDERS, Inputs, Layer, random_inputs, random_layer, reference
from rich.console import Console
from rich.table import Table
from shapes import MODELS

from globe_kernels.testing import relative_errors

_GATE = 1.5  # times the error of the eager experts
_FP32_NOISE = 1e-5  # below this, orders of summation differ and nothing else


def run_tokens(
    layer: Layer, names: list[str], tokens: int, ceilings: Ceilings, options: argparse.Namespace
) -> list[dict]:
    """Return the rows of all providers at one number of tokens. Raises SystemExit when a provider is wrong."""
    device = layer.gate_up.device.type
    inputs = random_inputs(layer.shape, tokens, layer.gate_up.dtype, device)
    calls = {}
    for name in names:
        if name == "hf_batched_mm" and inputs.index.numel() > BATCHED_ROWS:
            continue
        calls[name] = PROVIDERS[name].build(layer)
    errors = _gate(layer, inputs, calls)
    functions: dict[str, Callable[[], object]] = {name: partial(call, inputs) for name, call in calls.items()}
    if options.graph:
        graphs = {name: captured(function) for name, function in functions.items()}
        functions = {name: graph for name, graph in graphs.items() if graph is not None}
        if len(functions) < len(graphs):
            left_out = ", ".join(graphs.keys() - functions.keys())
            print(f"{tokens} tokens: cannot be captured and left out: {left_out}", file=sys.stderr)
    times = time_side_by_side(functions, device, options.repeats)
    best = min(time.median_us for name, time in times.items() if not PROVIDERS[name].low_rank)
    return [
        _row(name, time, errors[name], layer, inputs, ceilings)
        | {
            "op": "moe_ffn_graph" if options.graph else "moe_ffn",
            "ratio_to_best": best / time.median_us,
            "ratio_to_twin": times["dense_twin"].median_us / time.median_us if "dense_twin" in times else None,
        }
        for name, time in times.items()
    ]


def _gate(layer: Layer, inputs: Inputs, calls: dict) -> dict[str, float]:
    """Relative rms error of each provider. Raises SystemExit when one exceeds the gate."""
    expected = reference(layer, inputs)
    errors = {name: relative_errors(call(inputs), expected)[0] for name, call in calls.items()}
    limit = max(_GATE * errors["hf_eager"], _FP32_NOISE)
    for name, error in errors.items():
        if not error <= limit:
            raise SystemExit(f"ffn: {name} has relative error {error:.3g}, the gate is {limit:.3g}; nothing was timed.")
    return errors


def _row(name: str, time: Timing, error: float, layer: Layer, inputs: Inputs, ceilings: Ceilings) -> dict:
    shape, rank = layer.shape, layer.weights.from_rank.gate_adapter.shape[2]
    own_rank = rank if PROVIDERS[name].low_rank else None
    palette = None if PROVIDERS[name].composed else layer.palette
    tokens = inputs.hidden.shape[0]
    item_size = inputs.hidden.element_size()
    moved = shape.weight_bytes(inputs.active_experts, own_rank, item_size, palette) + 2 * inputs.hidden.nbytes
    gb_per_s = moved / time.median_us / 1e3
    tflop_per_s = shape.flops(tokens, own_rank, palette) / time.median_us / 1e6
    return {
        "shape": {**asdict(shape), "tokens": tokens, "rank": rank, "palette": layer.palette},
        "provider": name,
        **asdict(time),
        "gb_per_s": gb_per_s,
        "tflop_per_s": tflop_per_s,
        "copy_share": gb_per_s / ceilings.copy_gb_per_s,
        "matmul_share": tflop_per_s / ceilings.matmul_tflop_per_s,
        "relative_error": error,
    }


def _print(model: str, rows: list[dict]) -> None:
    table = Table(
        title=f"{model}, rank {rows[0]['shape']['rank']}, {rows[0]['shape']['palette']} atoms", title_justify="left"
    )
    for name in ("tokens", "provider", "us", "GB/s", "% copy", "TFLOP/s", "% matmul", "vs best", "vs twin", "error"):
        table.add_column(name, justify="left" if name == "provider" else "right")
    last = rows[0]["shape"]["tokens"]
    for row in rows:
        if row["shape"]["tokens"] != last:
            table.add_section()
            last = row["shape"]["tokens"]
        twin = row["ratio_to_twin"]
        table.add_row(
            str(last),
            row["provider"],
            f"{row['median_us']:.1f}",
            f"{row['gb_per_s']:.0f}",
            f"{100 * row['copy_share']:.0f}",
            f"{row['tflop_per_s']:.2f}",
            f"{100 * row['matmul_share']:.0f}",
            f"{row['ratio_to_best']:.2f}x",
            "-" if twin is None else f"{twin:.2f}x",
            f"{row['relative_error']:.1e}",
        )
    console = Console()
    # where there is no terminal to tell its width, cut off nothing
    (console if console.is_terminal else Console(width=120)).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the torch reference paths, fp32")
    parser.add_argument("--model", choices=list(MODELS), help="qwen3-30b-a3b; with --cpu qwen3-small")
    parser.add_argument("--rank", type=int, help="half the intermediate size by default")
    parser.add_argument("--palette", type=int, help="atoms of the layer, a quarter of its experts or 12 by default")
    parser.add_argument("--tokens", type=int, action="append", help="may be given several times")
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--ledger", action="store_true", help="append the rows to benchmarks/results")
    parser.add_argument("--json", action="store_true", help="a list of rows on stdout, nothing else")
    args = parser.parse_args()
    if args.cpu and args.graph:
        parser.error("--graph replays CUDA graphs, which a CPU has not; leave out --cpu.")
    if not args.cpu and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; use --cpu for the reference paths.")
    device, dtype = ("cpu", torch.float32) if args.cpu else ("cuda", torch.bfloat16)
    model = args.model or ("qwen3-small" if args.cpu else "qwen3-30b-a3b")
    shape = MODELS[model]
    rank = args.rank or shape.intermediate // 2
    if not 1 <= rank <= min(shape.intermediate, shape.hidden):
        parser.error(f"--rank is {rank}; expected 1 to {min(shape.intermediate, shape.hidden)} for {model}.")
    if args.palette is not None and args.palette < 1:
        parser.error(f"--palette is {args.palette}; expected 1 or more.")
    torch.manual_seed(0)
    names = [name for name, provider in PROVIDERS.items() if provider.runs(device)]
    for name, provider in PROVIDERS.items():
        if name not in names and (provider.cpu or not args.cpu):
            print(f"{name} is left out: it needs {provider.package}, which is not installed", file=sys.stderr)
    layer, ceilings = random_layer(shape, rank, dtype, device, args.palette), measure_ceilings(device, dtype)
    tokens = args.tokens or ([1, 16, 128, 512] if args.cpu else [1, 4, 16, 64, 256, 1024, 4096, 16384])
    with torch.inference_mode():
        rows = [row for count in tokens for row in run_tokens(layer, names, count, ceilings, args)]
    facts = conditions(device_name(device)) | {"model": model}
    rows = [row | asdict(ceilings) | facts for row in rows]
    if args.ledger:
        append("ffn", facts["device"], rows)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _print(model, rows)
        print(
            f"copy {ceilings.copy_gb_per_s:.0f} GB/s, matmul {ceilings.matmul_tflop_per_s:.2f} TFLOP/s on "
            f"{facts['device']}; GB/s counts each active weight once"
        )


if __name__ == "__main__":
    sys.exit(main())
