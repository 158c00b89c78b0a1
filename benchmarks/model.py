"""Run whole models end to end: every strategy against the dense experts, in one run.

    python benchmarks/model.py                          the shipped model on a CPU, fp32
    python benchmarks/model.py --model qwen3-small      a random model of that layer shape; bf16 on a GPU
    python benchmarks/model.py --model qwen3-30b-a3b --layers 4 --rank 768 --palette 32 --ledger
    python benchmarks/model.py --curve cache.png        also the cache: hits and tokens/s over its size

The dense model has the gate and up experts that the checkpoint stands for, so that all models compute the same
function; it runs on the fastest of transformers' experts implementations at each shape. Before anything is timed the
bytes that the experts hold are measured and compared with the memory model, the logits of every call with those of the
dense model in fp32, and counters prove which op ran: what fails stops the run with exit code 1.

Prefill is one sequence without a cache, decode one token for each of a batch, 32 tokens into a static cache. On a CPU
seconds are of the process, on one thread, so that other work of the machine counts for no model.

At the end the measured order of all strategies stands beside the predicted order: for uniform routing, by which `auto`
decides, and for the active experts and the hits of the run, which leaves the cost model alone to blame.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import combinations, cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from curve import draw, measure_curve
from ledger import append, conditions
from measure import captured, device_name, time_side_by_side
from report import table
from shapes import MODELS
from subjects import Subject, Variant, build, experts_of, measured_bytes, random, shipped, variants
from transformers import StaticCache
from transformers.utils.logging import disable_progress_bar

from globe_kernels import cache_stats, call_counts
from globe_kernels.errors import GlobeError
from globe_kernels.format.names import BANK_NAME
from globe_kernels.model.cache import BasisCache
from globe_kernels.model.targets import globe_modules, is_patched
from globe_kernels.strategies import DENSE, STRATEGIES
from globe_kernels.strategies.budget import layer_sizes
from globe_kernels.strategies.cost import machine_for, predict
from globe_kernels.testing import relative_errors

CONTEXT = 32  # tokens in the static cache before a step
_STEPS = 16  # decode inputs that take turns, so that steps do not always choose the same experts
_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
_REFERENCE = "reference"
_FP32_GATE = 1e-4  # of logits, absolute
_BF16_GATE = 2.0  # times the error of dense in bf16
_TIES = 0.01  # share of tokens that may choose other experts, where two tie to rounding
_BYTES_GATE = 0.05
_CLEAR = 1.1  # times that differ by less, or whose quantiles overlap, have no order

Call = Callable[[], Any]


@dataclass(frozen=True)
class Runner:
    """A model, and for a dense model the implementation of its experts."""

    model: Any
    implementation: str = "eager"

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        self.model.config._experts_implementation = self.implementation
        return self.model(*args, **kwargs).logits


@dataclass(frozen=True)
class Case:
    """One number of tokens: {runner: a call whose logits are compared}, {runner: a call that is timed}."""

    op: str
    tokens: int
    compared: dict[str, Callable[[], torch.Tensor]]
    timed: dict[str, Call]
    graphs: tuple[str, ...] = ()  # runners whose timed call replays a CUDA graph


def prefill(runners: dict[str, Runner], subject: Subject, tokens: int) -> Case:
    inputs = subject.tokens[None, :tokens]
    compared = {name: partial(runner, inputs, use_cache=False) for name, runner in runners.items()}
    timed = {name: partial(call, logits_to_keep=1) for name, call in compared.items()}
    return Case("model_prefill", tokens, compared, timed)


def decode(runners: dict[str, Runner], subject: Subject, batch: int) -> Case:
    context = subject.tokens[: batch * CONTEXT].view(batch, CONTEXT)
    inputs = subject.tokens[-_STEPS * batch :].view(_STEPS, batch, 1)
    steps = {name: _step(runner, context, inputs) for name, runner in runners.items()}
    compared = {name: step for name, (step, _, _) in steps.items()}
    timed = {name: next_step for name, (_, next_step, _) in steps.items()}
    return Case(
        "model_decode", batch, compared, timed, tuple(name for name, (*_, is_graph) in steps.items() if is_graph)
    )


def _step(runner: Runner, context: torch.Tensor, inputs: torch.Tensor) -> tuple[Callable[[], torch.Tensor], Call, bool]:
    """Return a step on the first of `inputs` (_STEPS, B, 1), a step that takes turns, and whether it is a graph."""
    cache = StaticCache(runner.model.config, max_cache_len=CONTEXT + 1)
    runner(context, past_key_values=cache, logits_to_keep=1)
    token, turns = inputs[0].clone(), cycle(inputs)
    position = torch.full_like(token, CONTEXT)

    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(CONTEXT)  # pyright: ignore[reportAttributeAccessIssue]
        return runner(token, past_key_values=cache, position_ids=position)

    graph = captured(step) if token.is_cuda else None
    run = graph or step

    def next_step() -> None:
        token.copy_(next(turns))
        run()

    return step, next_step, graph is not None


def gate(cases: list[Case], runners: dict[str, Runner]) -> dict[str, float]:
    """Relative rms error of the logits of each runner, over all cases. Raises SystemExit when one is wrong.

    In fp32 tokens from the first on that chose other experts than in the reference are counted and left out.
    """
    is_fp32 = runners["composed"].model.dtype == torch.float32
    errors = {}
    for name in cases[0].compared:
        found, expected, alike = [], [], []
        for case in cases:
            if name not in case.compared:
                continue
            logits, routes = _counted(name, runners[name].model, case)
            reference, others = _routed(runners[_REFERENCE].model, case.compared[_REFERENCE])
            same = (routes.sort().values == others.sort().values).all(2).all(0)
            alike.append(same.cummin(0).values if case.op == "model_prefill" else same)
            found.append(logits.flatten(0, 1))
            expected.append(reference.flatten(0, 1))
        actual, wanted, kept = torch.cat(found), torch.cat(expected), torch.cat(alike)
        if is_fp32:
            ties = 1 - kept.float().mean().item()
            peak = (actual - wanted).abs().amax(1).where(kept, 0).max().item()
            if not (peak <= _FP32_GATE and ties <= _TIES):
                raise SystemExit(
                    f"model: logits of {name} are {peak:.3g} off, {_FP32_GATE:g} allowed, and {ties:.2%} of the tokens "
                    f"chose other experts, {_TIES:.0%} allowed; nothing was timed."
                )
            actual, wanted = actual[kept], wanted[kept]
        errors[name] = relative_errors(actual, wanted)[0]
    limit = _BF16_GATE * errors[_dense(_IMPLEMENTATIONS[0])]
    for name, error in errors.items():
        if not (is_fp32 or error <= limit):
            raise SystemExit(
                f"model: {name} has relative error {error:.3g}, the gate is {limit:.3g}; nothing was timed."
            )
    return errors


def _counted(name: str, model: Any, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `_routed` returns. Raises SystemExit when a layer ran by another strategy than it should have."""
    before = Counter(call_counts())
    result = _routed(model, case.compared[name])
    ran = Counter(call_counts()) - before
    ending = "_ref" if model.device.type == "cpu" else ""
    expected = Counter(STRATEGIES[module.strategy(case.tokens)].op + ending for module in globe_modules(model).values())
    if ran != expected:
        raise SystemExit(f"model: {name} ran {dict(ran)}, expected {dict(expected)}; nothing was timed.")
    return result


def _routed(model: Any, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, V) in fp32, and the experts (L, tokens, K) that they were routed to."""
    with _routes(model) as routes:
        return call().float(), torch.stack(routes)


@contextmanager
def _routes(model: Any) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
        for module in experts_of(model).values()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def _dense(implementation: str) -> str:
    return f"{DENSE.name} {implementation}"


def time_case(case: Case, runners: dict[str, Runner], repeats: int) -> dict[str, dict]:
    """Return the measurements of each variant; dense is the fastest of its implementations."""
    device = runners["composed"].model.device.type
    caches = {name: cache for name in case.timed if (cache := _cache(runners[name].model)) is not None}
    for name, cache in caches.items():
        for _ in range(_STEPS):
            case.timed[name]()
        cache.reset_stats()
    functions = {name: call for name, call in case.timed.items() if name != _REFERENCE}
    times = time_side_by_side(functions, device, repeats, clock=time.process_time)
    dense = min((name for name in times if name.startswith(DENSE.name)), key=lambda name: times[name].median_us)
    found: dict[str, dict[str, Any]] = {
        DENSE.name: asdict(times[dense]) | {"implementation": dense.removeprefix(f"{DENSE.name} ")}
    }
    for name, timing in times.items():
        if not name.startswith(DENSE.name):
            found[name] = asdict(timing)
            found[name]["graph"] = name in case.graphs
        if name in caches and (stats := cache_stats(runners[name].model)).hits + stats.misses:
            found[name] |= {"hit_rate": stats.hit_rate}
    for own in found.values():
        own |= {"tokens_per_s": 1e6 * case.tokens / own["median_us"]}
        own |= {"ratio_to_dense": found[DENSE.name]["median_us"] / own["median_us"]}
    return found


def _cache(model: Any) -> BasisCache | None:
    return next(iter(getattr(model, BANK_NAME).caches), None) if is_patched(model) else None


def active_experts(case: Case, model: Any) -> list[float]:
    """Return for each layer the mean number of experts that the tokens of a call choose."""
    seen = []
    for _ in range(_STEPS if case.op == "model_decode" else 1):
        case.timed[_REFERENCE]()  # turns to the next input
        _, routes = _routed(model, case.compared[_REFERENCE])
        seen.append([chosen.unique().numel() for chosen in routes])
    return torch.tensor(seen).float().mean(0).tolist()


def predicted_us(
    subject: Subject, model: Any, tokens: int, active: list[float] | None = None, hit_rate: float | None = None
) -> float:
    """Predict the time of all layers of experts, for uniform routing or for the measured active experts and hits."""
    if modules := list(globe_modules(model).values()):
        layers = [(STRATEGIES[module.strategy(tokens)], module.sizes(), module.pool) for module in modules]
    else:
        numbers, item_size = subject.config.base.num_experts, model.dtype.itemsize
        all_sizes = [layer_sizes(subject.config, n, subject.choices, item_size, subject.palettes) for n in numbers]
        layers = [(DENSE, sizes, None) for sizes in all_sizes]
    found = 0.0
    for number, (strategy, sizes, pool) in enumerate(layers):
        if active:
            sizes = replace(sizes, active=active[number])
        if pool and hit_rate is not None:
            pool = replace(pool, miss_rate=1 - hit_rate)
        found += predict(strategy, sizes, tokens, machine_for(model.device), pool).us
    return found


def orders(rows: list[dict]) -> list[str]:
    """Measured beside predicted orders, and how many pairs agree of those that were measured to differ clearly."""
    lines, clear, agree = [], 0, Counter()
    keys = {"predicted_us": "uniform routing", "predicted_as_run_us": "the experts and hits of the run"}
    titles = {"median_us": "measured", "predicted_us": "predicted", "predicted_as_run_us": "as it ran"}
    for op, tokens in dict.fromkeys((row["op"], row["shape"]["tokens"]) for row in rows):
        # auto is one of the others
        own = [r for r in rows if (r["op"], r["shape"]["tokens"]) == (op, tokens) and r["provider"] != "auto"]
        by = {key: sorted(own, key=lambda row: row[key]) for key in ("median_us", *keys)}
        for row, other in combinations(by["median_us"], 2):
            if other["median_us"] > _CLEAR * row["median_us"] and other["p20_us"] > row["p80_us"]:
                clear += 1
                agree.update(key for key in keys if row[key] < other[key])
        lines += [f"{op} {tokens}"]
        for key, ordered in by.items():
            lines.append(f"  {titles[key]:10}" + " < ".join(row["provider"] for row in ordered))
    return lines + [
        f"{agree[key]} of the {clear} pairs whose medians differ by more than {_CLEAR - 1:.0%} and whose 20 to 80 % "
        f"quantiles do not overlap are in the order predicted for {assumed}"
        for key, assumed in keys.items()
    ]


def check_bytes(subject: Subject, chosen: list[Variant], dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Measured and planned bytes of each variant. Raises SystemExit when they are too far apart."""
    found = {}
    for variant in chosen:
        measured, planned = measured_bytes(subject, variant, dtype)
        print(f"{variant.name}: {measured / 1e6:.2f} MB resident, {planned / 1e6:.2f} planned", file=sys.stderr)
        if not abs(measured - planned) <= _BYTES_GATE * planned:
            raise SystemExit(
                f"model: THE EXPERTS OF {variant.name} HOLD {measured} BYTES AND {planned} WERE PLANNED, more than "
                f"{_BYTES_GATE:.0%} apart; correct globe_kernels/strategies/budget.py. Nothing was timed."
            )
        found[variant.name] = {"resident_bytes": measured, "planned_bytes": planned}
    return found


def run(subject: Subject, args: argparse.Namespace, dtype: torch.dtype) -> list[dict]:
    """Return the rows of every case and variant."""
    chosen = variants(subject.config, dtype.itemsize, args.cache_share)
    sizes = check_bytes(subject, chosen, dtype)
    models = {variant.name: build(subject, variant, dtype) for variant in chosen}
    runners = {_REFERENCE: Runner(subject.dense)}
    runners |= {_dense(name): Runner(models[DENSE.name], name) for name in _IMPLEMENTATIONS}
    runners |= {name: Runner(model) for name, model in models.items() if name != DENSE.name}

    def running(tokens: int) -> dict[str, Runner]:
        # it copies a matrix for every row
        left_out = _dense("batched_mm") if tokens * subject.choices > subject.shape["experts"] else None
        return {name: runner for name, runner in runners.items() if name != left_out}

    cases = [prefill(running(tokens), subject, tokens) for tokens in args.tokens]
    cases += [decode(running(batch), subject, batch) for batch in args.batch]
    errors = gate(sorted(cases, key=lambda case: -len(case.compared)), runners)
    rows = []
    for case in cases:
        active = active_experts(case, subject.dense)
        for name, found in time_case(case, runners, args.repeats).items():
            predicted = {
                "predicted_us": predicted_us(subject, models[name], case.tokens),
                "predicted_as_run_us": predicted_us(subject, models[name], case.tokens, active, found.get("hit_rate")),
                "active_experts": statistics.mean(active),
            }
            error = errors[_dense(found["implementation"]) if name == DENSE.name else name]
            common = {"op": case.op, "shape": subject.shape | {"tokens": case.tokens}, "provider": name}
            rows.append(common | found | sizes[name] | predicted | {"relative_error": error})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=list(MODELS), help="random weights in its sizes; the shipped model by default"
    )
    parser.add_argument("--layers", type=int, help="of --model, 4 by default")
    parser.add_argument("--rank", type=int, help="of the shipped model what ratio 0.625 yields, else half of P")
    parser.add_argument("--palette", type=int, help="atoms of a layer: 16, or a quarter of the experts or 12")
    parser.add_argument("--tokens", type=int, action="append", help="of a prefill; may be given several times")
    parser.add_argument("--batch", type=int, action="append", help="of a decode step; may be given several times")
    parser.add_argument("--cache-share", type=float, action="append", help="percent of all bases; several times")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--curve", type=Path, help="measure caches of many sizes too, and plot them there")
    parser.add_argument("--ledger", action="store_true", help="append the rows to benchmarks/results")
    parser.add_argument("--json", action="store_true", help="a list of rows on stdout, nothing else")
    args = parser.parse_args()
    if args.layers and not args.model:
        parser.error("--layers is for --model; the shipped model has its own.")
    if args.curve and find_spec("matplotlib") is None:
        parser.error("--curve needs matplotlib; install it.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; use --device cpu.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and sys.platform != "linux":
        parser.error("the memory of a process is measured as Linux counts it; run on Linux, or on a GPU.")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    args.tokens = args.tokens or ([16, 128, 512] if device == "cpu" else [16, 128, 1024, 4096])
    args.batch = args.batch or ([1, 4, 16] if device == "cpu" else [1, 8, 64])
    args.cache_share = args.cache_share or [10, 50, 100]
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    disable_progress_bar()
    with TemporaryDirectory() as directory:
        place = Path(directory)
        try:
            if args.model:
                subject = random(args.model, args.layers or 4, args.rank, args.palette, place, device)
            else:
                subject = shipped(place, args.rank, args.palette, device)
            with torch.no_grad():  # as generate does; what changes an inference tensor is cheaper
                rows = run(subject, args, dtype)
                curves = measure_curve(subject, dtype) if args.curve else []
        except GlobeError as error:
            raise SystemExit(f"model: {error}") from error
    settings = (
        f"{args.repeats} repeats, decode {CONTEXT} tokens into a static cache, {str(dtype).removeprefix('torch.')}"
    )
    settings += ", seconds of the process on one thread" if device == "cpu" else ""
    facts = conditions(device_name(device)) | {"model": subject.name, "settings": settings}
    rows, curves = ([row | facts for row in some] for some in (rows, curves))
    if args.curve:
        draw(args.curve, curves)
    if args.ledger:
        append("model", facts["device"], rows + curves)
    if args.json:
        print(json.dumps(rows + curves, indent=2))
        return
    for op in dict.fromkeys(row["op"] for row in rows + curves):
        print("\n".join(table([row for row in rows + curves if row["op"] == op])))
    print("\n".join(orders(rows)))


if __name__ == "__main__":
    main()
