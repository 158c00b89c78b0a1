"""Time batched solves of small positive definite systems: the CUDA extension against torch.

    python benchmarks/spd.py                       on a GPU, fp32
    python benchmarks/spd.py --cpu                 torch alone, on fewer systems

Providers: "globe_extension" is the CUDA extension, where it is built; "globe" is the call of the fit, which `FASTER` in
globe_kernels/ops/batched_spd_solve.py decides; "torch_cholesky" and "torch_solve" are torch. Solutions are compared
with torch.linalg.solve in float64 before anything is timed. Bytes are the least that must move: each gram and
right-hand side read once, each solution written once.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from ledger import append, conditions
from measure import device_name, measure_ceilings, time_side_by_side

from globe_kernels.ops.batched_spd_solve import LARGEST, batched_spd_solve, launch_batched_spd_solve, load_extension
from globe_kernels.testing import relative_errors

ORDERS, COLUMNS = (12, 32, 64, 128), (1, 16)
OTHERS = ("torch_cholesky", "torch_solve")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="torch alone, on a CPU")
    parser.add_argument("--systems", type=int, action="append", help="512 and 6144; with --cpu 64")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--ledger", action="store_true", help="append the rows to benchmarks/results")
    parser.add_argument("--json", action="store_true", help="a list of rows on stdout, nothing else")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; use --cpu to time torch on a CPU.")
    device, dtype = "cpu" if args.cpu else "cuda", DTYPES[args.dtype]
    with_extension = not args.cpu and load_extension()
    if not (args.cpu or with_extension):
        print("spd: the CUDA extension is not built and not timed; see csrc/README.md.", file=sys.stderr)
    torch.manual_seed(0)
    ceilings = measure_ceilings(device, dtype)
    rows = []
    for systems in args.systems or ((64,) if args.cpu else (512, 6144)):
        for k in (order for order in ORDERS if order <= LARGEST[dtype]):
            for q in COLUMNS:
                gram, rhs = random_systems(systems, k, q, dtype, device)
                calls = providers(gram, rhs, with_extension)
                errors = _gate(calls, torch.linalg.solve(gram.double(), rhs.double()), k)
                times = time_side_by_side(calls, device, args.repeats)
                best = min(times[name].median_us for name in OTHERS)
                moved = (gram.numel() + 2 * rhs.numel()) * gram.element_size()
                rows += [
                    {
                        "op": "batched_spd_solve",
                        "shape": {"systems": systems, "k": k, "q": q, "dtype": args.dtype},
                        "provider": name,
                        **asdict(time),
                        "gb_per_s": moved / time.median_us / 1e3,
                        "tflop_per_s": systems * (k**3 / 3 + 2 * k * k * q) / time.median_us / 1e6,
                        "relative_error": errors[name],
                        "ratio_to_best": best / time.median_us,
                        **asdict(ceilings),
                        "model": "any",
                    }
                    for name, time in times.items()
                ]
    run = conditions(device_name(device))
    rows = [{**row, **run} for row in rows]
    if args.ledger:
        append("spd", device_name(device), rows)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        sizes = "{systems:6} x {k:3} x {q:2}".format(**row["shape"])
        print(
            f"{sizes}  {row['provider']:15}{row['median_us']:10.1f} us{row['gb_per_s']:8.1f} GB/s, "
            f"{row['ratio_to_best']:.2f}x the best of torch, error {row['relative_error']:.1e}"
        )


def random_systems(systems: int, k: int, q: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw gram (systems, k, k) with condition numbers of about 10, and rhs (systems, k, q)."""
    factor = torch.randn(systems, k, 4 * k, device=device, dtype=dtype)
    return factor @ factor.mT, torch.randn(systems, k, q, device=device, dtype=dtype)


def providers(gram: torch.Tensor, rhs: torch.Tensor, with_extension: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """Return {provider: a call that solves}."""
    extension = {"globe_extension": lambda: launch_batched_spd_solve(gram, rhs).solution}
    return {
        **(extension if with_extension else {}),
        "globe": lambda: batched_spd_solve(gram, rhs).solution,
        "torch_cholesky": lambda: torch.cholesky_solve(rhs, torch.linalg.cholesky_ex(gram)[0]),
        "torch_solve": lambda: torch.linalg.solve(gram, rhs),
    }


def _gate(calls: dict[str, Callable[[], torch.Tensor]], expected: torch.Tensor, k: int) -> dict[str, float]:
    """Return {provider: relative rms error}. Raises SystemExit when a provider of this project is wrong."""
    solutions = {name: call() for name, call in calls.items()}
    errors = {name: relative_errors(solution, expected)[0] for name, solution in solutions.items()}
    for name, error in errors.items():
        limit = k * torch.finfo(solutions[name].dtype).eps
        if name not in OTHERS and not error <= limit:
            raise SystemExit(f"spd: {name} has relative error {error:.3g}, the gate is {limit:g}; nothing was timed.")
    return errors


if __name__ == "__main__":
    main()
