"""The fit as a whole: sizes, statistics, start, solver, refit on the raw weights, report."""

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import safetensors
import torch

from globe_fit.adapters import refit_adapters
from globe_fit.baselines import equal_byte_rank, svd_errors
from globe_fit.codes import pack_codes
from globe_fit.config import FitConfig, resolve_device, resolve_sizes
from globe_fit.factors import FamilyFactors, FitResult, FitStatus
from globe_fit.metrics import check_names
from globe_fit.objective import FamilyWeights, share
from globe_fit.source import ExpertSource
from globe_fit.varpro import BankState, solve
from globe_fit.warm_start import grouped_svd, initial_codes
from globe_kernels.checkpoint import Code, GlobeConfig
from globe_kernels.errors import GlobeError
from globe_kernels.families import FAMILIES
from globe_kernels.ops.compose_basis import compose_basis_ref
from globe_kernels.version import __version__

_LOG_EVERY = 10

OnStep = Callable[[dict], None]


def fit(
    source: ExpertSource,
    config: FitConfig,
    *,
    start: dict[str, BankState] | None = None,
    on_step: OnStep | None = None,
) -> FitResult:
    """Fit one bank per family to all experts of `source`; the objective is in globe_fit.objective.

    `start` replaces the grouped-SVD start of a family. `on_step` is called after every step with a record of
    globe_fit.metrics. Deterministic: one seed gives one result on one machine. Memory: six times the bank
    of one family in fp32 (bank, gradient and what is being added to it, Adam state, best), the factors, and one block
    of experts.
    Raises RequestError for sizes that cannot be had, GlobeError for a NaN in an expert.
    """
    config = replace(config, device=resolve_device(config.device))
    sizes = resolve_sizes(source.base, config)
    sizes = replace(sizes, provenance=_provenance(config))
    fits = {family: _fit_family(source, family, sizes, config, start, on_step) for family in FAMILIES}
    history = [record for one in fits.values() for record in one.history]
    diverged = [family for family, one in fits.items() if not one.completed]
    if diverged:
        advice = f"The fit of {' and '.join(diverged)} diverged; the best state before is kept, lower the lr."
    else:
        advice = _advice(history)
    status = FitStatus(not diverged, advice)
    report = {"families": {family: one.report for family, one in fits.items()}, "status": asdict(status)}
    return FitResult(sizes, {family: one.factors for family, one in fits.items()}, status, history, report)


@dataclass(frozen=True)
class _FamilyFit:
    factors: FamilyFactors
    report: dict
    history: list[dict]
    completed: bool


def _fit_family(
    source: ExpertSource,
    family: str,
    sizes: GlobeConfig,
    config: FitConfig,
    start: dict[str, BankState] | None,
    on_step: OnStep | None,
) -> _FamilyFit:
    """One family; a function of its own, so that nothing of it is alive while the next is fitted."""
    weights = FamilyWeights.measure(source, family, config.device)
    given = (start or {}).get(family)
    state = _start(weights, sizes, config.seed + FAMILIES.index(family)) if given is None else given.copy()
    best, history, completed = _optimise(weights, state, config, on_step)
    del state
    factors, report = _finalise(weights, best, sizes)
    return _FamilyFit(factors, report, history, completed)


def _provenance(config: FitConfig) -> dict:
    versions = {
        "globe": __version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }
    # through JSON, so that a saved and reloaded configuration is equal to this one
    settings = json.loads(json.dumps(asdict(config)))
    return {"seed": config.seed, "fit": settings, "versions": versions}


def _start(weights: FamilyWeights, sizes: GlobeConfig, seed: int) -> BankState:
    generator = torch.Generator().manual_seed(seed)
    codes = initial_codes(sizes, generator).to(weights.device)
    return BankState(grouped_svd(weights, sizes), codes, sizes.phi)


def _optimise(
    weights: FamilyWeights, start: BankState, config: FitConfig, on_step: OnStep | None
) -> tuple[BankState, list[dict], bool]:
    """The best state with the asked support, the history, and whether all steps ran."""
    best: BankState | None = None
    best_error, history = math.inf, []
    began = time.perf_counter()
    for step, error, state in solve(weights, start, config.support, config.scope, config.varpro):
        if not math.isfinite(error):
            if best is None:
                raise GlobeError(
                    f"The fit of {weights.family} diverged at step {step}, before its support was fixed; lower the lr."
                )
            return best, history, False
        supports = (state.codes.detach() != 0).sum(1)
        if error < best_error and int(supports.max()) <= config.support:
            best_error = error
            if best is None:
                best = state.copy()
            else:
                best.copy_(state)
        record = check_names(
            {
                "step": step,
                "family": weights.family,
                "relative_error": error,
                "support_median": supports.median().item(),
                "seconds": time.perf_counter() - began,
            }
        )
        if step % _LOG_EVERY == 0 or step == config.varpro.steps:
            history.append(record)
        if on_step is not None:
            on_step(record)
    assert best is not None
    return best, history, True


def _finalise(weights: FamilyWeights, best: BankState, sizes: GlobeConfig) -> tuple[FamilyFactors, dict]:
    """Round to the stored dtype, refit the adapters on the raw weights, measure what is stored."""
    base, dtype = sizes.base, sizes.torch_dtype
    bank, code = best.bank.to(dtype), pack_codes(best.codes, sizes.support)
    adapter = torch.empty(base.total_experts, base.intermediate_size, sizes.rank, dtype=dtype)
    lost, residual_sum = dict.fromkeys(base.num_experts, 0.0), 0.0
    for block in weights.raw():
        # rounded as the runtime holds it in this dtype, so that the adapters make up for the rounding
        basis = compose_basis_ref(code.index[block.places], code.value[block.places], bank, sizes.phi, dtype)
        stored = refit_adapters(block.weights, basis).to(dtype)
        adapter[block.places] = stored.cpu()
        residual = block.weights - stored.float() @ basis.float()
        lost[block.layer.layer] += residual.square().sum(dtype=torch.float64).item()
        residual_sum += residual.sum(dtype=torch.float64).item()
        del block, basis, stored, residual  # before the next block is read
    factors = FamilyFactors(bank.cpu(), Code(code.index.cpu(), code.value.cpu()), adapter)
    count = base.total_experts * base.intermediate_size * base.hidden_size
    statistics = weights.statistics
    svd_rank = equal_byte_rank(base, sizes.tensor_bytes)
    svd, bound = svd_errors(weights, (svd_rank, sizes.rank))
    return factors, {
        "relative_error": share(sum(lost.values()), statistics.total_energy),
        "relative_error_by_layer": {str(layer): share(lost[layer], statistics.energy[layer]) for layer in lost},
        "svd_equal_bytes": svd,
        "svd_equal_bytes_rank": svd_rank,
        "rank_bound": bound,
        "mean": statistics.mean,
        "scale": statistics.scale,
        "mean_energy_left": (residual_sum / count / statistics.mean) ** 2 if statistics.mean else 0.0,
    }


def _advice(history: list[dict]) -> str:
    """What the last tenth of the steps gained, and so whether more steps would pay."""
    if history[-1]["step"] == 0:
        return "No step was taken: this is the start of a fit."
    gains = []
    for family in FAMILIES:
        errors = [record["relative_error"] for record in history if record["family"] == family]
        if len(errors) > 1 and errors[-1] > 0:
            gains.append(1 - errors[-1] / errors[-1 - max(1, len(errors) // 10)])
    gain = max(gains, default=0.0)
    if gain > 0.01:
        return f"The last tenth of the steps still lowered the error by {100 * gain:.1f} %: more steps would pay."
    return "The error has settled; a lower error needs a larger ratio, a larger support or many more steps."
