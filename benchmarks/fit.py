"""Compare GloBE with MoBE and the truncated SVD of every expert, at equal bytes, one after the other in one process.

    python benchmarks/fit.py                                  the shipped model
    python benchmarks/fit.py --size qwen3-30b                 GloBE alone, experts of that size made on the fly
    python benchmarks/fit.py MODEL_DIR --text TEXT --calibrate self OTHER_TEXT --curves out.png --ledger

Errors are squared, relative to the raw weights, of the factors as they are stored. Seconds on a CPU are process time on
one thread, so that other work of the machine counts for no method; on a GPU they are wall time. They sum both families,
start and refit included. "s to MoBE's" counts per family from the start until the error under way first is at most the
final error of the better MoBE; for MoBE, until it finds the state that it returns. A GloBE step counts only once its
supports are chosen. Perplexity, KL(dense || compressed) and top-1 agreement are of dense models with the gate and up
experts that a method reconstructs.

"globe_tanh_quick" takes a quarter of the steps. "globe_palette" lets a layer use as many atoms as two layers have on
average. "globe_self" and "globe_tanh_self" are calibrated on a text that the model writes, which takes no data;
"globe_calibrated" and "globe_tanh_calibrated" on a given text. The table shows their errors of the weights, which they
do not minimise. "alternating" is the corrected classic recipe, "literal" the recipe as it is usually told
(benchmarks/literal.toml).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ledger import append, conditions
from measure import device_name
from mobe import Clock, MobeConfig, fit_mobe
from report import table
from synthetic import SIZES, SyntheticSource

from globe_fit import ExpertSource, FitConfig, FitResult, VarProConfig, fit
from globe_fit.calibration.metric import Calibration, calibrate, require_text
from globe_fit.cli.demo import shipped_model
from globe_fit.config import DEFAULT_RATIO, SELF, AlternatingConfig, resolve_device
from globe_fit.data.model import load_model, token_windows, with_experts
from globe_fit.data.source import ExpertLayer
from globe_fit.data.stream import FamilyWeights, share
from globe_fit.measure.baselines import stored_svd
from globe_fit.measure.evaluate import evaluate
from globe_fit.plan.fitting import estimate
from globe_fit.result import reconstruct
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.names import FAMILIES

# Rounds for about the seconds of the default solver.
_ALTERNATING = FitConfig(solver="alternating", alternating=AlternatingConfig(steps=150))
_LITERAL = Path(__file__).parent / "literal.toml"

Trace = list[tuple[float, float]]  # (seconds, relative error)


@dataclass(frozen=True)
class Method:
    """The result of a method on a model."""

    weights: Callable[[ExpertLayer, str], torch.Tensor]  # (E, P, D) of a layer and family
    errors: dict[str, float]
    traces: dict[str, Trace]
    seconds: float
    num_bytes: int


def globe(
    source: ExpertSource, config: FitConfig, clock: Clock, calibration: Calibration | None = None
) -> tuple[Method, FitResult]:
    traces: dict[str, Trace] = {family: [] for family in FAMILIES}
    began, first = clock(), {}

    def on_step(record: dict) -> None:
        family, now = record["family"], clock()
        # the start of up cannot be told from the end of gate: assume that it takes as long as the start of gate
        seconds = now - first.setdefault(family, now) + first["gate"] - began
        if calibration is None and record["support_median"] <= config.support:
            traces[family].append((seconds, record["relative_error"]))

    result = fit(source, config, on_step=on_step, calibration=calibration)
    seconds = clock() - began
    spans = {layer.layer: span for layer, span in source.layer_spans}

    def weights(layer: ExpertLayer, family: str) -> torch.Tensor:
        factors = result.families[family]
        return reconstruct(factors.at(spans[layer.layer]), factors.bank, result.config.phi)

    errors = {family: result.report["families"][family]["relative_error"] for family in FAMILIES}
    return Method(weights, errors, traces, seconds, result.config.tensor_bytes), result


def svd(source: ExpertSource, families: dict[str, FamilyWeights], rank: int, clock: Clock) -> Method:
    errors, began = {}, clock()

    def weights(layer: ExpertLayer, family: str) -> torch.Tensor:
        return stored_svd(source.read(layer, family).to(families[family].device), rank).cpu()

    for family, whole in families.items():
        lost = sum(
            (source.read(layer, family) - weights(layer, family)).square().sum(dtype=torch.float64).item()
            for layer in source.layers
        )
        errors[family] = share(lost, whole.statistics.total_energy)
    num_bytes = 2 * len(FAMILIES) * source.base.total_experts * rank
    num_bytes *= source.base.intermediate_size + source.base.hidden_size
    return Method(weights, errors, {}, clock() - began, num_bytes)


def mobe(families: dict[str, FamilyWeights], result: FitResult, config: MobeConfig, clock: Clock) -> Method:
    began = clock()
    fits = {family: fit_mobe(weights, result.config, config, clock) for family, weights in families.items()}
    seconds = clock() - began
    for family, fitted in fits.items():
        if not fitted.completed:
            print(f"mobe: a layer of {family} diverged; its best state before is kept", file=sys.stderr)
    return Method(
        lambda layer, family: fits[family].reconstruct(layer),
        {family: fitted.relative_error for family, fitted in fits.items()},
        {family: [(took, error) for _, took, error in fitted.history] for family, fitted in fits.items()},
        seconds,
        sum(fitted.num_bytes for fitted in fits.values()),
    )


def run(source: ExpertSource, args: argparse.Namespace) -> tuple[dict[str, Method], FitResult]:
    """Run every method; return the methods by name, and the GloBE fit that sets the bytes."""
    device, varpro = resolve_device(args.device), VarProConfig(steps=args.steps)
    clock = time.process_time if device == "cpu" else time.perf_counter
    methods: dict[str, Method] = {}

    def add(name: str, method: Method) -> None:
        methods[name] = method
        print(f"{name}: {method.seconds:.1f} s", file=sys.stderr, flush=True)

    common: dict[str, Any] = {"ratio": args.ratio, "rank": args.rank, "support": args.support, "device": device}
    identity = FitConfig(**common, varpro=varpro)
    method, result = globe(source, identity, clock)
    add("globe", method)
    if args.size:
        return methods, result
    tanh = replace(identity, phi="tanh")
    add("globe_tanh", globe(source, tanh, clock)[0])
    quick = replace(tanh, varpro=replace(varpro, steps=args.steps // 4))
    add("globe_tanh_quick", globe(source, quick, clock)[0])
    two_groups = max(args.support, -(-2 * result.config.num_atoms // len(source.layers)))
    add("globe_palette", globe(source, replace(identity, palette=two_groups), clock)[0])
    for text in args.calibrate:
        began = clock()
        calibration = calibrate(source, text, device)
        took, ending = clock() - began, "self" if text == SELF else "calibrated"
        for name, config in ((f"globe_{ending}", identity), (f"globe_tanh_{ending}", tanh)):
            method, _ = globe(source, config, clock, calibration)
            add(name, replace(method, seconds=method.seconds + took))
    for name, config in (("alternating", _ALTERNATING), ("literal", FitConfig.from_options(_LITERAL, {}))):
        if args.rounds is not None:
            config = replace(config, alternating=replace(config.alternating, steps=args.rounds))
        add(name, globe(source, replace(config, **common), clock)[0])
    families = {family: FamilyWeights.measure(source, family, device) for family in FAMILIES}
    add("svd", svd(source, families, result.report["families"]["gate"]["svd_equal_bytes_rank"], clock))
    for name, warm in (("mobe", False), ("mobe_warm", True)):
        add(name, mobe(families, result, MobeConfig(steps=args.mobe_steps, warm_start=warm), clock))
    return methods, result


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


def _row(name: str, method: Method, methods: dict[str, Method]) -> dict:
    row = {"op": "fit", "provider": name, "seconds": method.seconds, "bytes": method.num_bytes}
    for family in FAMILIES:
        trace = method.traces.get(family, [])
        # MoBE ends with a refit that the error under way lacks
        target = min((m.errors[family] for other, m in methods.items() if other.startswith("mobe")), default=0.0)
        if name.startswith("mobe"):
            target = min(error for _, error in trace)
        row |= {f"{family}_error": method.errors[family], f"{family}_seconds_to_mobe": _seconds_to(trace, target)}
    return row


def _draw(path: Path, title: str, methods: dict[str, Method]) -> None:
    """Draw the error against the seconds, a plot per family; a method without steps is a dotted line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    plots = figure.subplots(1, len(FAMILIES), sharey=True)
    for axes, family in zip(plots, FAMILIES, strict=True):
        for color, (name, method) in enumerate(methods.items()):
            if trace := method.traces.get(family):
                axes.plot(*zip(*trace, strict=True), color=f"C{color}", label=name)
            else:
                axes.axhline(method.errors[family], color=f"C{color}", linestyle=":", label=name)
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
    parser.add_argument(
        "--calibrate",
        nargs="+",
        default=[],
        help="a text file, or self (the model writes the text); adds fits",
    )
    parser.add_argument("--curves", type=Path, help="a plot of the errors over time")
    parser.add_argument("--ledger", action="store_true", help="append the rows to benchmarks/results")
    parser.add_argument("--json", action="store_true", help="a list of rows on stdout, nothing else")
    args = parser.parse_args()
    if args.curves and find_spec("matplotlib") is None:
        parser.error("--curves needs matplotlib; install it.")
    if args.size and (args.model_dir or args.text or args.calibrate):
        parser.error("--size makes the experts up; give no model and no text with it.")
    torch.set_num_threads(1)
    try:
        source = planted(args) if args.size else ExpertSource(args.model_dir or shipped_model())
        windows = token_windows(source.model_dir, args.text) if args.text else None
        for text in args.calibrate:
            require_text(text)
        methods, result = run(source, args)
    except RequestError as error:
        parser.error(str(error))
    except GlobeError as error:
        raise SystemExit(f"fit: {error}") from error
    sizes, base = result.config, source.base
    shape = {"layers": len(base.num_experts), "experts": base.total_experts, "intermediate": base.intermediate_size}
    shape |= {"hidden": base.hidden_size, "rank": sizes.rank, "atoms": sizes.num_atoms, "support": sizes.support}
    device = resolve_device(args.device)
    settings = f"{args.steps} steps, MoBE {args.mobe_steps}"
    facts = conditions(device_name(device)) | {"model": base.name, "shape": shape, "settings": settings}
    rows = [_row(name, method, methods) | facts for name, method in methods.items()]
    if args.size:
        rows[0] |= _peak_bytes(result, source, device)
        rows[0] |= {"svd_error": result.report["families"]["gate"]["svd_equal_bytes"]}
    if windows is not None:
        models = {"dense": load_model(source.model_dir, device)}
        models |= {name: with_experts(source, method.weights, device) for name, method in methods.items()}
        quality = evaluate(models, windows)
        for row in rows:
            measured = quality[row["provider"]]
            row |= {"perplexity": measured.perplexity, "kl": measured.kl, "top1": measured.top1}
            row |= {"dense_perplexity": quality["dense"].perplexity}
    if args.curves:
        _draw(args.curves, f"{base.name}: {', '.join(f'{name} {value}' for name, value in shape.items())}", methods)
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
        if windows is not None:
            print(f"perplexity of the dense model {rows[0]['dense_perplexity']:.2f}")


if __name__ == "__main__":
    main()
