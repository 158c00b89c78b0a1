"""The fit as a whole: sizes, statistics, start, solver, refit on the raw weights, report."""

import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors
import torch

from globe_fit.calibration.metric import Calibration
from globe_fit.config import SNAPSHOT_MINUTES, FitConfig, VarProConfig, resolve_device
from globe_fit.data.source import ExpertSource
from globe_fit.data.stream import FamilyWeights, share
from globe_fit.finish import finish
from globe_fit.linalg import regularised_solves
from globe_fit.measure.diagnostics import dense_codes, measure, run_time, support_overlap
from globe_fit.plan.fitting import estimate, require_supported
from globe_fit.result import FamilyFactors, FitResult, FitStatus
from globe_fit.run.distributed import ALONE, Ranks
from globe_fit.run.metrics import check_names
from globe_fit.run.progress import SILENT
from globe_fit.run.snapshots import Snapshots
from globe_fit.sizes import resolve_sizes
from globe_fit.solvers.base import BankState, Solver
from globe_fit.solvers.registry import make_solver
from globe_fit.solvers.start import grouped_svd, initial_codes, separate_svd
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.checkpoint import Code, GlobeConfig
from globe_kernels.format.names import FAMILIES
from globe_kernels.version import __version__

_LOG_EVERY = 10
_EXPENSIVE_TIMES = 4  # about how often a fit measures metrics that take as long as a step, beside its start and end

# RMS of the atoms at the start. A phi that is not linear is nearly linear for small atoms: the fit bends it where that
# lowers the error.
_START_RMS = {"identity": 1.0, "silu": 0.1, "tanh": 0.1}

# Advice after a divergence.
_MILDER = {"varpro": "lower the lr", "alternating": "lower entmax.lr or choose another dictionary"}

OnStep = Callable[[dict], None]


def fit(
    source: ExpertSource,
    config: FitConfig,
    *,
    start: dict[str, BankState] | None = None,
    on_step: OnStep | None = None,
    snapshots: Snapshots | None = None,
    calibration: Calibration | None = None,
    ranks: Ranks = ALONE,
) -> FitResult:
    """Fit one bank per family to all experts of `source`; the objective is in globe_fit.data.stream.

    Deterministic: one seed gives one result on one machine.

    start        replaces the grouped-SVD start of a family; its codes stay, whatever `coding.initial` says
    on_step      gets a record of globe_fit.run.metrics after every step; its exception ends the fit, with `snapshots`
                 once the step and a snapshot are complete
    snapshots    from `open_snapshots`: the fit continues from the last snapshot, and the result is the result of a fit
                 without an interruption, bitwise on a CPU. The factors of a finished family stay in its snapshot
    calibration  from globe_fit.calibration.metric: the error is the error of the outputs of the experts on its text
    ranks        from globe_fit.run.distributed: this process is one of several that fit together, each with some
                 columns of the weights and of the bank; the first rank has the result

    Memory: the bank of one family in fp32 four times (bank, gradient, the addition to the gradient, the two moments of
    Adam in bf16), on a GPU three times, once more in the stored dtype (best state), and blocks of experts, or all
    experts of a family as they are stored where a GPU has room. Without `snapshots` host memory holds the factors of
    both families. Raises RequestError for sizes out of range and for a combination that no fit supports, GlobeError for
    NaN or infinity in an expert and for a divergence before the support is fixed.
    """
    config = replace(config, device=resolve_device(config.device))
    require_supported(source.base, config, calibration is not None, ranks)
    sizes = resolve_sizes(source.base, config)
    sizes = replace(sizes, provenance=_provenance(config, calibration))
    metrics = {} if calibration is None else calibration.metrics(config.device)
    # both families before the first step: a NaN in the second is found now, not after the fit of the first
    weights = [FamilyWeights.measure(source, family, config.device, metrics.get(family), ranks) for family in FAMILIES]
    fits = {each.family: _fit_family(each, sizes, config, start, on_step, snapshots) for each in weights}
    history = [record for done in fits.values() for record in done.history]
    diverged = [family for family, done in fits.items() if not done.completed]
    if diverged:
        advice = f"The fit of {' and '.join(diverged)} diverged and its best state is kept; {_MILDER[config.solver]}."
        status = FitStatus(False, advice, "diverged")
    else:
        status = FitStatus(True, *_advice(history, config))
    reports = {family: done.report for family, done in fits.items()}
    lost = sum(report["relative_error"] * report["energy"] for report in reports.values())
    codes = (dense_codes(done.factors.code, sizes.num_atoms) for done in fits.values())
    overall = {
        "relative_error": share(lost, sum(report["energy"] for report in reports.values())),
        "support_overlap": support_overlap(*codes),
    }
    left_dense = {str(layer): list(shape) for layer, shape in source.base.left_dense.items()}
    report = {"families": reports, "status": asdict(status), "left_dense": left_dense, **check_names(overall)}
    return FitResult(sizes, {family: done.factors for family, done in fits.items()}, status, history, report)


def open_snapshots(
    out: str | Path,
    source: ExpertSource,
    config: FitConfig,
    minutes: float = SNAPSHOT_MINUTES,
    calibrated_on: str | None = None,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] = SILENT.say,
) -> Snapshots:
    """Open the snapshots in `out` of `fit(source, config)` over `ranks`; `calibrated_on` identifies the text, if any.

    `say` gets a sentence as soon as Ctrl-C or SIGTERM asks for the end of the fit. Raises RequestError when `out` holds
    the snapshots of a fit with other settings.
    """
    identity = {**asdict(replace(config, device=resolve_device(config.device))), "model": asdict(source.base)}
    identity |= {"calibration": calibrated_on, "weights": source.weights_sha256}
    return Snapshots(out, identity, minutes, ranks, say)


@dataclass(frozen=True)
class _FamilyFit:
    factors: FamilyFactors
    report: dict
    history: list[dict]
    completed: bool

    def save(self, snapshots: Snapshots, family: str, step: int) -> None:
        f = self.factors
        tensors = {"bank": f.bank, "adapter": f.adapter, "index": f.code.index, "value": f.code.value}
        facts = {"done": True, "report": self.report, "history": self.history, "completed": self.completed}
        snapshots.save(family, step, tensors, facts)

    @classmethod
    def load(cls, tensors: dict[str, torch.Tensor], facts: dict) -> "_FamilyFit":
        factors = FamilyFactors(tensors["bank"], Code(tensors["index"], tensors["value"]), tensors["adapter"])
        return cls(factors, facts["report"], facts["history"], facts["completed"])


def _fit_family(
    weights: FamilyWeights,
    sizes: GlobeConfig,
    config: FitConfig,
    start: dict[str, BankState] | None,
    on_step: OnStep | None,
    snapshots: Snapshots | None,
) -> _FamilyFit:
    """Fit one family; a function, so that its tensors are gone while the next family is fitted."""
    family, ranks = weights.family, weights.ranks
    if torch.device(config.device).type == "cuda":
        calibrated, stored = weights.metric is not None, weights.source.stored_bytes(family)
        needs = estimate(
            sizes,
            ranks.world,
            calibrated=calibrated,
            device=config.device,
            stored_bytes=stored,
            solver=config.solver,
        )
        weights = replace(weights, kept=[] if needs.kept_bytes else None)
    saved = None if snapshots is None else snapshots.load(family)
    if saved is not None and saved[1]["done"]:
        return _FamilyFit.load(*saved)
    if saved is not None:
        tensors, facts = saved
        if facts["energy"] != weights.statistics.total_energy:
            raise RequestError(
                f"The {family} experts of {weights.source.base.name} changed since the unfinished fit began; begin "
                "again with --restart."
            )
        if torch.device(config.device).type == "cpu":  # on a GPU every tensor is copied there
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        state = BankState(tensors["bank"].to(config.device), tensors["codes"].to(config.device), sizes.phi)
        saved = tensors, facts
    elif start is not None and family in start:
        state = replace(start[family], bank=start[family].bank[..., weights.columns]).copy()
        given = replace(config.alternating, coding=replace(config.alternating.coding, initial="given"))
        config = replace(config, alternating=given)
    else:
        state = _start(weights, sizes, config, config.seed + FAMILIES.index(family))
    solver = make_solver(weights, state, sizes, config)
    run = _Run(weights, solver, config, sizes.torch_dtype)
    if saved is not None:
        run.restore(*saved)
    del state, saved, solver
    with snapshots.catching_interrupts() if snapshots is not None else nullcontext():
        completed = run.to_the_end(on_step, snapshots)
        best, history = run.best, run.history
        assert best is not None
        del run
        factors, report = finish(weights, best, sizes, None if snapshots is None else snapshots.room)
        done = _FamilyFit(factors, report, history, completed)
        if snapshots is not None:
            done.save(snapshots, family, config.steps + 1)  # after the snapshot of any step
            snapshots.stop_if_asked()
            del best, factors, done
            saved = snapshots.load(family)
            assert saved is not None
            done = _FamilyFit.load(*saved)
    return done


def _provenance(config: FitConfig, calibration: Calibration | None) -> dict:
    versions = {
        "globe": __version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }
    # through JSON, so that a configuration equals itself after it was saved and loaded
    settings = json.loads(json.dumps(asdict(config)))
    facts = None if calibration is None else calibration.facts
    return {"seed": config.seed, "fit": settings, "calibration": facts, "versions": versions}


def _start(weights: FamilyWeights, sizes: GlobeConfig, config: FitConfig, seed: int) -> BankState:
    if config.solver == "alternating" and config.alternating.targets == "svd":
        return separate_svd(weights, sizes)
    generator = torch.Generator().manual_seed(seed)
    codes = initial_codes(sizes, generator).to(weights.device)
    return BankState(grouped_svd(weights, sizes).mul_(_START_RMS[sizes.phi]), codes, sizes.phi)


class _Run:
    """The steps of one family: they keep the best state that has the support of the fit, and the history."""

    def __init__(self, weights: FamilyWeights, solver: Solver, config: FitConfig, dtype: torch.dtype):
        self._weights, self._solver, self._config, self._dtype = weights, solver, config, dtype
        self.best: BankState | None = None  # its atoms in `dtype`, in which they are stored
        self.history: list[dict] = []
        self._best_error, self._step, self._seconds, self._pass_seconds = math.inf, 0, 0.0, 0.0
        self._regularised = regularised_solves()

    def to_the_end(self, on_step: OnStep | None, snapshots: Snapshots | None) -> bool:
        """Take all steps that the solver needs; False when the state diverged after `best` was found."""
        solver, steps = self._solver, self._config.steps
        began = time.perf_counter() - self._seconds
        while True:
            error = solver.evaluate()
            if not math.isfinite(error):
                if self.best is None:
                    raise GlobeError(
                        f"The fit of {self._weights.family} diverged at step {self._step}, before its support was "
                        f"fixed; {_MILDER[self._config.solver]}."
                    )
                return False
            now = time.perf_counter() - began
            self._seconds, self._pass_seconds = now, now - self._seconds
            self._record(error, on_step, snapshots)
            began = time.perf_counter() - self._seconds
            if self._step == steps or solver.finished:
                return True
            solver.update()
            self._step += 1
            if snapshots is not None and snapshots.due():
                snapshots.save(self._weights.family, self._step, self._tensors(), self._facts())
                snapshots.stop_if_asked()

    def _record(self, error: float, on_step: OnStep | None, snapshots: Snapshots | None) -> None:
        state = self._solver.state
        supports = (state.codes.detach() != 0).sum(1)
        if error < self._best_error and int(supports.max()) <= self._config.support:
            self._best_error = error
            if self.best is None:
                self.best = state.copy(self._dtype)
            else:
                self.best.copy_(state)
        step, last = self._step, self._step == self._config.steps or self._solver.finished
        record = {
            "step": step,
            "family": self._weights.family,
            "relative_error": error,
            "support_median": supports.median().item(),
            "seconds": self._seconds,
            **{name: value if math.isfinite(value) else None for name, value in self._solver.extras.items()},
        }
        if step % _LOG_EVERY == 0 or last:
            expensive = step % (_LOG_EVERY * max(1, self._config.steps // (_EXPENSIVE_TIMES * _LOG_EVERY))) == 0 or last
            record |= measure(self._weights, state, expensive=expensive) | run_time(self._weights, self._pass_seconds)
            if self._weights.metric is None:
                record["mse"] = error * self._weights.statistics.scale**2  # the normalised weights have variance 1
            record["regularised"] = regularised_solves() - self._regularised
            self.history.append(record)
        check_names(record)
        if on_step is not None:
            try:
                on_step(record)
            except Exception as failure:
                if snapshots is None:
                    raise
                snapshots.stop(failure)

    def _tensors(self) -> dict[str, torch.Tensor]:
        best = {} if self.best is None else {"best.bank": self.best.bank, "best.codes": self.best.codes}
        return self._solver.tensors() | best

    def _facts(self) -> dict:
        return {
            "done": False,
            "step": self._step,
            "seconds": self._seconds,
            "best_error": self._best_error,
            "history": self.history,
            "energy": self._weights.statistics.total_energy,
        }

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict) -> None:
        """Continue from a snapshot."""
        self._solver.restore(tensors)
        self._step, self._seconds = facts["step"], facts["seconds"]
        self._best_error, self.history = facts["best_error"], facts["history"]
        if "best.bank" in tensors:
            self.best = self._solver.state.copy(self._dtype)
            self.best.copy_(BankState(tensors["best.bank"], tensors["best.codes"], self.best.phi))


def _advice(history: list[dict], config: FitConfig) -> tuple[str, str]:
    """Advise whether more steps would pay: (advice, level).

    The last cycle of varpro says it: its steps are about twice the steps of the cycle before, and the rate falls to
    zero in both. The alternating solver has no rate: the last tenth of its rounds says it.
    """
    last = [[record for record in history if record["family"] == family][-1] for family in FAMILIES]
    if last[-1]["step"] == 0:
        return "No step was taken: this is the start of a fit.", "unsettled"
    if config.solver == "varpro":
        gains = [record["cycle_gain"] for record in last if "cycle_gain" in record]
        cycle, least = "cycle of steps", config.varpro.plateau
        if len(gains) < len(FAMILIES):
            taken, usual = last[-1]["step"], VarProConfig.steps
            return f"The fit took {taken} steps and {usual} are the default: more steps would pay.", "unsettled"
    else:
        gains, cycle, least = [_late_gain(history, family) for family in FAMILIES], "tenth of the steps", 0.01
    if (gain := max(gains)) >= least:
        return f"The last {cycle} lowered the error by {100 * gain:.1f} %: more steps would pay.", "unsettled"
    return (
        f"The error has settled: the last {cycle} lowered it by {100 * max(gain, 0):.1f} %; a lower error needs a "
        "larger ratio or a larger support.",
        "settled",
    )


def _late_gain(history: list[dict], family: str) -> float:
    errors = [record["relative_error"] for record in history if record["family"] == family]
    before = errors[-1 - max(1, len(errors) // 10)] if len(errors) > 1 else 0.0
    return 1 - errors[-1] / before if before else 0.0
