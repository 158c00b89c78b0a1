"""Composing the bases of one layer from the bank, whole layer: time and share of the copy bandwidth.

    python benchmarks/compose.py                   on a GPU: bf16, Qwen3-30B-A3B, rank 384, 12 of 64 atoms
    python benchmarks/compose.py --cpu             the torch reference, on a small layer

The kernel is compared with the reference before it is timed. Bytes are the least that must move: each atom that the
layer uses read once, each basis written once.
"""

import argparse
import json
from dataclasses import asdict

import torch
from ledger import append, conditions
from measure import device_name, measure_ceilings, time_side_by_side
from shapes import MODELS

from globe_kernels.ops.compose_basis import compose_basis, compose_basis_ref
from globe_kernels.testing import relative_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the torch reference, fp32")
    parser.add_argument("--model", choices=list(MODELS), help="qwen3-30b-a3b; with --cpu qwen3-small")
    parser.add_argument("--rank", type=int, help="half the intermediate size by default")
    parser.add_argument("--atoms", type=int, default=64, help="distinct atoms that the layer uses")
    parser.add_argument("--support", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--ledger", action="store_true", help="append the rows to benchmarks/results")
    parser.add_argument("--json", action="store_true", help="a list of rows on stdout, nothing else")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; use --cpu for the reference.")
    if not 1 <= args.support <= args.atoms:
        parser.error(f"--support is {args.support}; expected 1 to the {args.atoms} atoms.")
    device, dtype = ("cpu", torch.float32) if args.cpu else ("cuda", torch.bfloat16)
    model = args.model or ("qwen3-small" if args.cpu else "qwen3-30b-a3b")
    shape = MODELS[model]
    rank = args.rank or shape.intermediate // 2
    torch.manual_seed(0)
    bank = torch.randn(args.atoms, rank, shape.hidden, device=device).to(dtype)
    index = torch.rand(shape.experts, args.atoms, device=device).topk(args.support).indices.int()
    value = torch.randn(shape.experts, args.support, device=device)
    ceilings = measure_ceilings(device, dtype)

    expected = compose_basis_ref(index, value, bank, "identity", torch.float32)
    error, _ = relative_errors(compose_basis(index, value, bank, "identity", dtype), expected)
    limit = 1e-6 if args.cpu else 4e-3
    if not error <= limit:
        raise SystemExit(f"compose: relative error {error:.3g}, the gate is {limit:g}; nothing was timed.")
    run = {"globe": lambda: compose_basis(index, value, bank, "identity", dtype)}
    time = time_side_by_side(run, device, args.repeats)["globe"]
    used = index.unique().numel()
    moved = (used + shape.experts) * rank * shape.hidden * bank.element_size()
    gb_per_s = moved / time.median_us / 1e3
    row = {
        "op": "compose_basis",
        "shape": {**asdict(shape), "rank": rank, "atoms": used, "support": args.support},
        "provider": "globe",
        **asdict(time),
        "gb_per_s": gb_per_s,
        "tflop_per_s": 2 * shape.experts * args.support * rank * shape.hidden / time.median_us / 1e6,
        "copy_share": gb_per_s / ceilings.copy_gb_per_s,
        "relative_error": error,
        **asdict(ceilings),
        **conditions(device_name(device)),
        "model": model,
    }
    if args.ledger:
        append("compose", row["device"], [row])
    if args.json:
        print(json.dumps([row], indent=2))
    else:
        print(
            f"{model}, rank {rank}, {args.support} of {used} atoms: {time.median_us:.1f} us, {gb_per_s:.0f} GB/s, "
            f"{100 * row['copy_share']:.0f} % of a copy at {ceilings.copy_gb_per_s:.0f} GB/s on {row['device']}"
        )


if __name__ == "__main__":
    main()
