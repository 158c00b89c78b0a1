"""Compare GloBE with MoBE, truncated SVD, rounding, GPTQ and pruning, one after the other in one process.

    python benchmarks/fit.py                                  the shipped model
    python benchmarks/fit.py --size qwen3-30b                 GloBE alone, experts of that size made on the fly
    python benchmarks/fit.py MODEL_DIR --text TEXT --calibrate self OTHER_TEXT --curves out.png --ledger
    python benchmarks/fit.py --calibrate self --text TEXT --text2 CODE --methods globe_self,int8,reap --seeds 0 1 2

Errors are squared, relative to the raw weights, of the factors as they are stored. Seconds on a CPU are process time on
one thread, so that other work of the machine counts for no method; on a GPU they are wall time. They sum both families,
start and refit included. "s to MoBE's" counts per family from the start until the error under way first is at most the
final error of the better MoBE; for MoBE, until it finds the state that it returns. A GloBE step counts only once its
supports are chosen. Perplexity, KL(dense || compressed) and top-1 agreement are of dense models with the gate and up
experts that a method reconstructs, in the dtype of the model, or in float32: a small loss in bf16 is hidden by the
rounding of activations.

"globe" is `globe fit --no-calibrate`, "globe_healed" is `globe fit`: calibrated and healed on the first text of
--calibrate. "globe_tanh_quick" takes a quarter of the steps. "globe_palette" lets a layer use as many atoms as two
layers have on average. "globe_self" and "globe_tanh_self" are calibrated on a text that the model writes, which takes
no data; "globe_calibrated" and "globe_tanh_calibrated" on a given text. The table shows their errors of the weights,
which they do not minimise. "alternating" is the corrected classic recipe, "literal" the recipe as it is usually told
(benchmarks/literal.toml). GloBE, MoBE and SVD take the same bytes.

"int8" rounds to 8 bits with a scale per row, "int4_g128" to 4 bits with a scale and a zero point for each 128 columns
(globe_fit/measure/baselines/rounding.py); bytes count scales and zero points. "gptq_..." rounds to the same formats so
that the outputs err least, on the first text of --calibrate; "gptq_routed_..." with a moment and an order of columns
for each expert. "reap" drops experts on this text, so many that gate, up
and down together take at most the bytes that they take with GloBE; "reap_25" and "reap_50" drop that many percent.
"bytes" are of gate and up; "of experts" is the share of the dense bytes that gate, up and down together take.

With several seeds a method that has a seed is run once for each; the table shows mean and standard deviation.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ledger import append, conditions
from measure import device_name
from methods import METHODS, Bench, Method, Trace
from mobe import MobeConfig
from report import table
from synthetic import SIZES, SyntheticSource

from globe_fit import ExpertSource, FitConfig, FitResult, VarProConfig
from globe_fit.calibration.metric import require_text
from globe_fit.cli.demo import shipped_model
from globe_fit.config import DEFAULT_RATIO, resolve_device
from globe_fit.data.model import load_model, token_windows
from globe_fit.measure.evaluate import evaluate
from globe_fit.plan.fitting import estimate
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.names import FAMILIES


@dataclass(frozen=True)
class Run:
    """A method that was run, with its seed if it has one."""

    name: str
    seed: int | None
    method: Method


def run(bench: Bench, names: list[str], seeds: list[int]) -> list[Run]:
    """Run the methods one after the other, a method with a seed once per seed."""
    runs = []
    for name in names:
        entry = METHODS[name]
        for seed in seeds if entry.seeded else [None]:
            method = entry.run(bench, seed or 0, bench.text(entry.text))
            runs.append(Run(name, seed, method))
            shown = name if seed is None else f"{name}, seed {seed}"
            print(f"{shown}: {method.seconds:.1f} s", file=sys.stderr, flush=True)
    return runs


def chosen(bench: Bench, methods: str | None) -> list[str]:
    """Return the names of a list, or of all methods whose text --calibrate gives; RequestError for another."""
    if methods is None:
        return [name for name, entry in METHODS.items() if entry.text is None or bench.text(entry.text)]
    names = methods.split(",")
    for name in names:
        if name not in METHODS:
            raise RequestError(f"--methods has {name!r}; expected some of {', '.join(METHODS)}.")
        if (kind := METHODS[name].text) and not bench.text(kind):
            raise RequestError(f"{name} is calibrated; give it {kind} with --calibrate.")
    return names


def planted(args: argparse.Namespace) -> SyntheticSource:
    """Return the source for --size, with a planted atom for every four experts."""
    layers, shape = SIZES[args.size]
    atoms = max(layers * shape.experts // 4, args.support)
    name, device = f"synthetic_{args.size}", resolve_device(args.device)
    return SyntheticSource(
        name, layers, shape, rank=shape.intermediate, atoms=atoms, support=args.support, device=device
    )


def _peak_bytes(result: FitResult, source: ExpertSource, device: str) -> dict:
    """Return the peak memory of the process, of a GPU where there is one, and the estimate; the planted bank counts."""
    last = result.history[-1]
    needs = estimate(result.config, device=device, stored_bytes=source.stored_bytes(FAMILIES[0]))
    if "peak_device_bytes" in last:
        return {"peak_bytes": last["peak_device_bytes"], "estimated_bytes": needs.device_bytes}
    return {"peak_bytes": last["peak_host_bytes"], "estimated_bytes": needs.peak_bytes}


def _seconds_to(trace: Trace, error: float) -> float | None:
    return next((seconds for seconds, reached in trace if reached <= error), None)


def _row(done: Run, runs: list[Run], dense_bytes: int) -> dict:
    method, is_mobe = done.method, done.name.startswith("mobe")
    dense_down = dense_bytes // len(FAMILIES)
    down = dense_down if method.kept is None else method.kept * dense_down
    row = {"op": "fit", "provider": done.name, "seconds": method.seconds, "bytes": method.num_bytes}
    row["share_of_experts"] = (method.num_bytes + down) / (dense_bytes + dense_down)
    row |= {} if done.seed is None else {"seed": done.seed}
    row |= {} if method.kept is None else {"kept": method.kept}
    for family, error in method.errors.items():
        trace = method.traces.get(family, [])
        # MoBE ends with a refit that the error under way lacks
        target = min((r.method.errors[family] for r in runs if r.name.startswith("mobe")), default=0.0)
        if is_mobe:
            target = min(reached for _, reached in trace)
        row |= {f"{family}_error": error, f"{family}_seconds_to_mobe": _seconds_to(trace, target)}
    return row


def _quality(bench: Bench, runs: list[Run], texts: dict[str, torch.Tensor]) -> list[dict]:
    """Measure every method on every text, {ending of the keys: windows}, beside the dense model; one is in memory."""
    dense, rows = load_model(bench.source.model_dir, bench.device, bench.dtype), []
    for done in runs:
        row, model = {}, done.method.model()
        for ending, windows in texts.items():
            found = evaluate({"dense": dense, done.name: model}, windows)
            measured = found[done.name]
            row |= {f"perplexity{ending}": measured.perplexity, f"kl{ending}": measured.kl}
            row |= {f"top1{ending}": measured.top1, f"dense_perplexity{ending}": found["dense"].perplexity}
        rows.append(row)
    return rows


def _draw(path: Path, title: str, runs: list[Run]) -> None:
    """Draw the error against the seconds, a plot per family; a method without steps is a dotted line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    plots = figure.subplots(1, len(FAMILIES), sharey=True)
    drawn = [done for done in runs if done.method.errors and not done.seed]  # of several seeds the first
    for axes, family in zip(plots, FAMILIES, strict=True):
        for number, done in enumerate(drawn):
            if trace := done.method.traces.get(family):
                axes.plot(*zip(*trace, strict=True), color=f"C{number}", label=done.name)
            else:
                axes.axhline(done.method.errors[family], color=f"C{number}", linestyle=":", label=done.name)
        axes.set(title=family, xscale="log", yscale="log", xlabel="seconds")
    plots[0].set_ylabel("relative squared error")
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, nargs="?", help="the shipped model by default")
    parser.add_argument("--size", choices=list(SIZES), help="no model, but planted experts in its sizes")
    parser.add_argument("--ratio", type=float, default=DEFAULT_RATIO)
    parser.add_argument("--rank", type=int, help="of every method but SVD; the ratio decides by default")
    parser.add_argument("--support", type=int, default=FitConfig.support)
    parser.add_argument("--steps", type=int, default=VarProConfig.steps, help="of GloBE")
    parser.add_argument("--rounds", type=int, help="of the alternating recipes; as many as they name by default")
    parser.add_argument("--mobe-steps", type=int, default=MobeConfig.steps)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--text", type=Path, help="measure perplexity, KL and top-1 agreement on it")
    parser.add_argument("--text2", type=Path, help="measure them on this text too, of another kind")
    parser.add_argument("--float32", action="store_true", help="measure them in float32")
    parser.add_argument(
        "--calibrate",
        nargs="+",
        default=[],
        help="a text file, or self (the model writes the text); adds the methods that need a text",
    )
    parser.add_argument("--methods", metavar="A,B,...", help=f"some of {', '.join(METHODS)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the methods that have one")
    parser.add_argument("--curves", type=Path, help="a plot of the errors over time")
    parser.add_argument("--ledger", action="store_true", help="append the rows to benchmarks/results")
    parser.add_argument("--json", action="store_true", help="a list of rows on stdout, nothing else")
    args = parser.parse_args()
    if args.curves and find_spec("matplotlib") is None:
        parser.error("--curves needs matplotlib; install it.")
    if args.size and (args.model_dir or args.text or args.text2 or args.calibrate or args.methods):
        parser.error("--size makes the experts up; give no model, no text and no methods with it.")
    torch.set_num_threads(1)
    try:
        source: Any = planted(args) if args.size else ExpertSource(args.model_dir or shipped_model())
        bench = Bench(source, args)
        given = {"": args.text, "2": args.text2}
        texts = {ending: token_windows(source.model_dir, text) for ending, text in given.items() if text}
        for text in args.calibrate:
            require_text(text)
        runs = run(bench, ["globe"] if args.size else chosen(bench, args.methods), args.seeds)
        qualities = _quality(bench, runs, texts) if texts else [{} for _ in runs]
    except RequestError as error:
        parser.error(str(error))
    except GlobeError as error:
        raise SystemExit(f"fit: {error}") from error
    sizes, base = bench.sizes, source.base
    shape = {"layers": len(base.num_experts), "experts": base.total_experts, "intermediate": base.intermediate_size}
    shape |= {"hidden": base.hidden_size, "rank": sizes.rank, "atoms": sizes.num_atoms, "support": sizes.support}
    settings = f"{args.steps} steps, MoBE {args.mobe_steps}" + (", quality in float32" if args.float32 else "")
    for verb, named in (("calibrated", args.calibrate), ("measured", filter(None, given.values()))):
        if names := " and ".join(Path(text).name for text in named):
            settings += f", {verb} on {names}"
    facts = conditions(device_name(bench.device)) | {"model": base.name, "shape": shape, "settings": settings}
    rows = [_row(done, runs, base.dense_bytes) | facts | quality for done, quality in zip(runs, qualities, strict=True)]
    if args.size and (result := runs[0].method.result):
        rows[0] |= _peak_bytes(result, source, bench.device)
        rows[0] |= {"svd_error": result.report["families"]["gate"]["svd_equal_bytes"]}
    if args.curves:
        _draw(args.curves, f"{base.name}: {', '.join(f'{name} {value}' for name, value in shape.items())}", runs)
    if args.ledger:
        append("fit", facts["device"], rows)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(table(rows)))
        if args.size:
            print(
                "peak {peak_bytes} bytes, estimated {estimated_bytes}; SVD of equal bytes {svd_error:.4f}".format(
                    **rows[0]
                )
            )
        for ending in texts:
            print(f"perplexity of the dense model on {given[ending]}: {rows[0][f'dense_perplexity{ending}']:.2f}")


if __name__ == "__main__":
    main()
