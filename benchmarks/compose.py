"""Compose the bases of one layer from the bank by both kernels and by torch: time, share of the bandwidth.

    python benchmarks/compose.py                   on a GPU: bf16, Qwen3-30B-A3B, rank 384, 12 of 64 atoms
    python benchmarks/compose.py --cpu             the torch reference, on a small layer

The kernels are compared with the reference before anything is timed. Bytes are the least that must move: each atom
that the layer uses read once, each basis written once.
"""

import argparse
import json
from dataclasses import asdict

import torch
from ledger import append, conditions
from measure import device_name, measure_ceilings, time_side_by_side
from shapes import MODELS

from globe_kernels.ops.compose_basis import compose_basis_ref, launch_compose_basis
from globe_kernels.ops.compose_layer import compose_family, layer_code
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
    code = layer_code(index, value)
    used = code.palette.numel()
    dense = (code.value[:, :used] * code.scale[:, None]).to(dtype)
    gathered = bank[code.palette].flatten(1)
    size = (shape.experts, *bank.shape[1:])
    gather = compose_basis_ref if device == "cpu" else launch_compose_basis
    calls = {
        "compose_layer": lambda: compose_family(code, bank, "identity", torch.empty(size, dtype=dtype, device=device)),
        "compose_basis": lambda: gather(index, value, bank, "identity", dtype),
        # one product of the library, given the atoms side by side and the codes in the dtype of the atoms
        "torch_matmul": lambda: (dense @ gathered).view(-1, *bank.shape[1:]),
    }
    ceilings = measure_ceilings(device, dtype)
    errors = _gate(calls, compose_basis_ref(index, value, bank, "identity", torch.float32), dtype)
    times = time_side_by_side(calls, device, args.repeats)
    moved = (used + shape.experts) * rank * shape.hidden * bank.element_size()
    rows = []
    for name, time in times.items():
        gb_per_s = moved / time.median_us / 1e3
        rows.append(
            {
                "op": "compose_layer",
                "shape": {**asdict(shape), "rank": rank, "atoms": used, "support": args.support},
                "provider": name,
                **asdict(time),
                "gb_per_s": gb_per_s,
                "tflop_per_s": 2 * shape.experts * args.support * rank * shape.hidden / time.median_us / 1e6,
                "copy_share": gb_per_s / ceilings.copy_gb_per_s,
                "relative_error": errors[name],
                "ratio_to_best": times["torch_matmul"].median_us / time.median_us,
                **asdict(ceilings),
                **conditions(device_name(device)),
                "model": model,
            }
        )
    if args.ledger:
        append("compose", device_name(device), rows)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{model}, rank {rank}, {args.support} of {used} atoms; a copy moves {ceilings.copy_gb_per_s:.0f} GB/s")
    for row in rows:
        print(
            f"{row['provider']:14}{row['median_us']:10.1f} us{row['gb_per_s']:8.0f} GB/s"
            f"{100 * row['copy_share']:5.0f} % of a copy, {row['ratio_to_best']:.2f}x torch_matmul"
            f", error {row['relative_error']:.1e}"
        )


def _gate(calls: dict, expected: torch.Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Return the relative rms error of each. Raises SystemExit when a kernel errs more than its result is rounded."""
    errors = {name: relative_errors(call(), expected)[0] for name, call in calls.items()}
    limit = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for name, error in errors.items():
        if name != "torch_matmul" and not error <= limit:
            raise SystemExit(
                f"compose: {name} has relative error {error:.3g}, the gate is {limit:g}; nothing was timed."
            )
    return errors


if __name__ == "__main__":
    main()
