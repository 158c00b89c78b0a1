"""The methods that benchmarks/fit.py compares: a method is an entry of METHODS."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mobe import MobeConfig, fit_mobe

from globe_fit import ExpertSource, FitConfig, FitResult, VarProConfig, compress, fit
from globe_fit.calibration.metric import Calibration, calibrate
from globe_fit.calibration.self_text import sample_windows
from globe_fit.config import SELF, AlternatingConfig, resolve_device
from globe_fit.data.model import WINDOW, load_model, token_windows, with_experts
from globe_fit.data.source import ExpertLayer
from globe_fit.data.stream import FamilyWeights
from globe_fit.measure.baselines.errors import relative_errors
from globe_fit.measure.baselines.gptq import gptq, routed_moments
from globe_fit.measure.baselines.pruning import most_salient, prune, saliencies
from globe_fit.measure.baselines.rounding import FORMATS, CodeFormat, rounded
from globe_fit.measure.baselines.svd import equal_byte_rank, stored_svd
from globe_fit.result import FamilyFactors, reconstruct
from globe_fit.sizes import resolve_sizes
from globe_kernels.format.checkpoint import GlobeConfig
from globe_kernels.format.names import FAMILIES

# Rounds for about the seconds of the default solver.
_ALTERNATING = FitConfig(solver="alternating", alternating=AlternatingConfig(steps=150))
_LITERAL = Path(__file__).parent / "literal.toml"
_WINDOWS = 16  # of a batch that a model runs over for its saliencies

_GROUPED = [name for name, codes in FORMATS.items() if codes.group]

FILE, ANY = "a text file", "a text"  # to calibrate on; or SELF

Trace = list[tuple[float, float]]  # (seconds, relative error)
Weights = Callable[[ExpertLayer, str], torch.Tensor]  # (E, P, D) of a layer and family


@dataclass(frozen=True)
class Method:
    """The result of a method on a model."""

    model: Callable[[], Any]  # loads the dense model with the experts of the method
    seconds: float
    num_bytes: int  # of gate and up
    errors: dict[str, float] = field(default_factory=dict)  # by family; none where experts are dropped
    traces: dict[str, Trace] = field(default_factory=dict)
    kept: float | None = None  # share of the experts, where some are dropped
    result: FitResult | None = None  # of a fit of GloBE


@dataclass(frozen=True)
class Bench:
    """A model, the settings of a run, and what several methods need of them."""

    source: ExpertSource
    args: argparse.Namespace
    _made: dict[tuple[str, str], tuple[Any, float]] = field(default_factory=dict)

    @cached_property
    def device(self) -> str:
        return resolve_device(self.args.device)

    @property
    def dtype(self) -> torch.dtype | str:
        """The dtype of the models whose quality is measured."""
        return torch.float32 if self.args.float32 else "auto"

    @cached_property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.device == "cpu" else time.perf_counter

    def config(self, seed: int, **settings: Any) -> FitConfig:
        """Return the settings of a fit of GloBE: those of the run, and `settings` in place of some."""
        args = self.args
        common: dict[str, Any] = {"ratio": args.ratio, "rank": args.rank, "support": args.support}
        common |= {"device": self.device, "seed": seed, "varpro": VarProConfig(steps=args.steps)}
        return FitConfig(**(common | settings))

    @cached_property
    def sizes(self) -> GlobeConfig:
        """The sizes of a fit of GloBE, which set the bytes of others."""
        return resolve_sizes(self.source.base, self.config(0))

    @cached_property
    def families(self) -> dict[str, FamilyWeights]:
        return {family: FamilyWeights.measure(self.source, family, self.device) for family in FAMILIES}

    def calibration(self, text: str) -> tuple[Calibration, float]:
        """Return the sums of a calibrated fit over a text, and the seconds of collecting them."""
        return self._once("calibration", text, lambda: calibrate(self.source, text, self.device))

    def watched(
        self, watch: Callable[[Any, Sequence[torch.Tensor], str], dict[int, torch.Tensor]], text: str
    ) -> tuple[dict[int, torch.Tensor], float]:
        """Return the tensors by layer id that `watch` collects while the model runs over a text, and its seconds."""

        def collect() -> dict[int, torch.Tensor]:
            model = load_model(self.source.model_dir, self.device)
            if text == SELF:
                windows = sample_windows(model, WINDOW, self.device)
            else:
                windows = token_windows(self.source.model_dir, text)
            return watch(model, windows.split(_WINDOWS), self.device)

        return self._once(watch.__name__, text, collect)

    def _once(self, name: str, text: str, make: Callable[[], Any]) -> tuple[Any, float]:
        """Return the result of `make` and its seconds: it is made once, and each method that takes it counts them."""
        if (name, text) not in self._made:
            began = self.clock()
            self._made[name, text] = make(), self.clock() - began
        return self._made[name, text]

    def text(self, kind: str | None) -> str | None:
        """Return the first text of --calibrate that is of this kind."""
        fits = {SELF: lambda text: text == SELF, FILE: lambda text: text != SELF, ANY: lambda text: True}
        return next(filter(fits[kind], self.args.calibrate), None) if kind else None

    def reconstructed(self, weights: Weights, seconds: float, num_bytes: int, errors: dict, **more: Any) -> Method:
        """Return the result of a method that makes new gate and up experts."""
        return Method(
            lambda: with_experts(self.source, weights, self.device, self.dtype), seconds, num_bytes, errors, **more
        )

    def measured(self, weights: Callable[[torch.Tensor, ExpertLayer], torch.Tensor], num_bytes: int) -> Method:
        """Return the result of a method that makes new experts of the raw experts (E, P, D) of a layer and family."""
        began = self.clock()

        def made(layer: ExpertLayer, family: str) -> torch.Tensor:
            return weights(self.source.read(layer, family).to(self.device), layer).cpu()

        errors = relative_errors(self.source, made)
        return self.reconstructed(made, self.clock() - began, num_bytes, errors)


def _globe(bench: Bench, config: FitConfig, text: str | None = None) -> Method:
    calibration, took = (None, 0.0) if text is None else bench.calibration(text)
    clock, source = bench.clock, bench.source
    traces: dict[str, Trace] = {family: [] for family in FAMILIES}
    began, first = clock(), {}

    def on_step(record: dict) -> None:
        family, now = record["family"], clock()
        # the start of up cannot be told from the end of gate: assume that it takes as long as the start of gate
        seconds = now - first.setdefault(family, now) + first["gate"] - began
        if calibration is None and record["support_median"] <= config.support:
            traces[family].append((seconds, record["relative_error"]))

    result = fit(source, config, on_step=on_step, calibration=calibration)
    return _of_factors(bench, result, result.families, clock() - began + took, traces)


def _of_factors(
    bench: Bench, result: FitResult, factors: Mapping[str, FamilyFactors], seconds: float, traces: dict[str, Trace]
) -> Method:
    spans = {layer.layer: span for layer, span in bench.source.layer_spans}

    def weights(layer: ExpertLayer, family: str) -> torch.Tensor:
        return reconstruct(factors[family].at(spans[layer.layer]), factors[family].bank, result.config.phi)

    errors = {family: result.report["families"][family]["relative_error"] for family in FAMILIES}
    return bench.reconstructed(weights, seconds, result.config.tensor_bytes, errors, traces=traces, result=result)


def _plain(bench: Bench, seed: int, text: str | None, **settings: Any) -> Method:
    return _globe(bench, bench.config(seed, **settings), text)


def _healed(bench: Bench, seed: int, text: str) -> Method:
    """Run all stages of `globe fit`."""
    source, config = bench.source, bench.config(seed)
    with TemporaryDirectory() as folder:
        began = bench.clock()
        result = compress(source.model_dir, Path(folder) / "globe", config, calibrate=text)
        seconds = bench.clock() - began
        factors = dict(result.families)  # read before the folder goes
    return _of_factors(bench, result, factors, seconds, {})


def _quick(bench: Bench, seed: int, text: str | None) -> Method:
    return _plain(bench, seed, text, phi="tanh", varpro=VarProConfig(steps=bench.args.steps // 4))


def _palette(bench: Bench, seed: int, text: str | None) -> Method:
    two_groups = max(bench.args.support, -(-2 * bench.sizes.num_atoms // len(bench.source.layers)))
    return _plain(bench, seed, text, palette=two_groups)


def _alternating(bench: Bench, seed: int, text: str | None, recipe: FitConfig | Path) -> Method:
    config = FitConfig.from_options(recipe, {}) if isinstance(recipe, Path) else recipe
    if bench.args.rounds is not None:
        config = replace(config, alternating=replace(config.alternating, steps=bench.args.rounds))
    common = bench.config(seed)
    sizes = {name: getattr(common, name) for name in ("ratio", "rank", "support", "device", "seed")}
    return _globe(bench, replace(config, **sizes), text)


def _svd(bench: Bench, seed: int, text: str | None) -> Method:
    base = bench.source.base
    rank = equal_byte_rank(base, bench.sizes.tensor_bytes)
    num_bytes = 2 * len(FAMILIES) * base.total_experts * rank * (base.intermediate_size + base.hidden_size)
    return bench.measured(lambda raw, layer: stored_svd(raw, rank), num_bytes)


def _mobe(bench: Bench, seed: int, text: str | None, *, warm: bool) -> Method:
    config = MobeConfig(steps=bench.args.mobe_steps, warm_start=warm, seed=seed)
    families, began = bench.families, bench.clock()
    fits = {family: fit_mobe(whole, bench.sizes, config, bench.clock) for family, whole in families.items()}
    seconds = bench.clock() - began
    for family, fitted in fits.items():
        if not fitted.completed:
            print(f"mobe: a layer of {family} diverged; its best state before is kept", file=sys.stderr)
    return bench.reconstructed(
        lambda layer, family: fits[family].reconstruct(layer),
        seconds,
        sum(fitted.num_bytes for fitted in fits.values()),
        {family: fitted.relative_error for family, fitted in fits.items()},
        traces={family: [(took, error) for _, took, error in fitted.history] for family, fitted in fits.items()},
    )


def _rounded(bench: Bench, seed: int, text: str | None, codes: CodeFormat) -> Method:
    return bench.measured(lambda raw, layer: rounded(raw, codes), codes.bytes_of(bench.source.base))


def _gptq(bench: Bench, seed: int, text: str, codes: CodeFormat) -> Method:
    calibration, took = bench.calibration(text)
    moments = {layer: sums.moment for layer, sums in calibration.sums.items()}
    method = bench.measured(
        lambda raw, layer: gptq(raw, moments[layer.layer], codes), codes.bytes_of(bench.source.base)
    )
    return replace(method, seconds=method.seconds + took)


def _gptq_routed(bench: Bench, seed: int, text: str, codes: CodeFormat) -> Method:
    """Give each expert its own moment and its own order of columns, of 2 bytes a column for gate and up together."""
    moments, took = bench.watched(routed_moments, text)
    base = bench.source.base
    method = bench.measured(
        lambda raw, layer: gptq(raw, moments[layer.layer], codes, by_activation=True),
        codes.bytes_of(base) + 2 * base.total_experts * base.hidden_size,
    )
    return replace(method, seconds=method.seconds + took)


def _reap(bench: Bench, seed: int, text: str, dropped: float | None = None) -> Method:
    """Drop this share of the experts, or by default so many that all matrices take the bytes of GloBE's."""
    base = bench.source.base
    gate_up, down = base.dense_bytes, base.dense_bytes // len(FAMILIES)
    wanted = (bench.sizes.tensor_bytes + down) / (gate_up + down) if dropped is None else 1 - dropped
    saliency, seconds = bench.watched(saliencies, text)
    kept = {layer.layer: most_salient(saliency[layer.layer], wanted) for layer in bench.source.layers}

    def model() -> Any:
        pruned = load_model(bench.source.model_dir, bench.device, bench.dtype)
        prune(pruned, kept)
        return pruned

    found = sum(map(len, kept.values())) / base.total_experts
    return Method(model, seconds, round(found * gate_up), kept=found)


@dataclass(frozen=True)
class Entry:
    """The way to run a method, from a seed and a text to calibrate on."""

    run: Callable[..., Method]  # of the bench, the seed and the text
    text: str | None = None  # the kind of text that it needs: SELF, FILE or ANY
    seeded: bool = False  # whether the seed changes the result


def _on_codes(run: Callable[..., Method], prefix: str, text: str | None, *names: str) -> dict[str, Entry]:
    return {f"{prefix}{name}": Entry(partial(run, codes=FORMATS[name]), text) for name in names}


METHODS = {
    "globe": Entry(_plain, seeded=True),
    "globe_healed": Entry(_healed, ANY, seeded=True),
    "globe_tanh": Entry(partial(_plain, phi="tanh"), seeded=True),
    "globe_tanh_quick": Entry(_quick, seeded=True),
    "globe_palette": Entry(_palette, seeded=True),
    "globe_self": Entry(_plain, SELF, seeded=True),
    "globe_tanh_self": Entry(partial(_plain, phi="tanh"), SELF, seeded=True),
    "globe_calibrated": Entry(_plain, FILE, seeded=True),
    "globe_tanh_calibrated": Entry(partial(_plain, phi="tanh"), FILE, seeded=True),
    "alternating": Entry(partial(_alternating, recipe=_ALTERNATING), seeded=True),
    "literal": Entry(partial(_alternating, recipe=_LITERAL), seeded=True),
    "svd": Entry(_svd),
    "mobe": Entry(partial(_mobe, warm=False), seeded=True),
    "mobe_warm": Entry(partial(_mobe, warm=True)),
    **_on_codes(_rounded, "", None, *FORMATS),
    **_on_codes(_gptq, "gptq_", ANY, *_GROUPED),
    **_on_codes(_gptq_routed, "gptq_routed_", ANY, *_GROUPED),
    "reap": Entry(_reap, ANY),
    "reap_25": Entry(partial(_reap, dropped=0.25), ANY),
    "reap_50": Entry(partial(_reap, dropped=0.5), ANY),
}
