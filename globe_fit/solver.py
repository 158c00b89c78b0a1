"""The fit as a whole: sizes, statistics, start, solver, refit on the raw weights, report."""

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import safetensors
import torch

from globe_fit.adapters import refit_adapters
from globe_fit.baselines import equal_byte_rank, svd_errors
from globe_fit.codes import pack_codes
from globe_fit.config import FitConfig, resolve_sizes
from globe_fit.factors import FamilyFactors, FitResult, FitStatus
from globe_fit.metrics import check_names
from globe_fit.objective import FamilyWeights
from globe_fit.source import ExpertSource
from globe_fit.varpro import BankState, solve
from globe_fit.warm_start import grouped_svd, initial_codes
from globe_kernels.checkpoint import Code, GlobeConfig
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
    globe_fit.metrics. Deterministic: one seed gives one result on one machine. Memory: bank, codes, their
    Adam state, the best state, the adapters and one block of experts of one family.
    Raises RequestError for sizes that cannot be had, GlobeError for a NaN in an expert.
    """
    sizes = resolve_sizes(source.base, config)
    sizes = replace(sizes, provenance=_provenance(config))
    families, history, report, status = {}, [], {}, FitStatus(True, "")
    for number, family in enumerate(FAMILIES):
        weights = FamilyWeights.measure(source, family, config.device)
        state = (start or {}).get(family) or _start(weights, sizes, config.seed + number)
        best, steps, completed = _optimise(weights, state, config, on_step)
        history += steps
        families[family], report[family] = _finalise(weights, best, sizes)
        if not completed:
            advice = f"The {family} error became NaN at step {len(steps)}; the best state before is kept, lower lr."
            status = FitStatus(False, advice)
    if status.completed:
        status = FitStatus(True, _advice(history))
    return FitResult(sizes, families, status, history, {"families": report, "status": asdict(status)})


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
    best, best_error, history = None, math.inf, []
    began = time.perf_counter()
    for step, error, state in solve(weights, start, config.support, config.scope, config.varpro):
        if not math.isfinite(error):
            assert best is not None, "the start itself has no finite error"
            return best, history, False
        supports = (state.codes.detach() != 0).sum(1)
        if error < best_error and int(supports.max()) <= config.support:
            best, best_error = state.copy(), error
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
        "relative_error": sum(lost.values()) / statistics.total_energy,
        "relative_error_by_layer": {str(layer): lost[layer] / statistics.energy[layer] for layer in lost},
        "svd_equal_bytes": svd,
        "svd_equal_bytes_rank": svd_rank,
        "rank_bound": bound,
        "mean": statistics.mean,
        "scale": statistics.scale,
        "mean_energy_left": (residual_sum / count / statistics.mean) ** 2 if statistics.mean else 0.0,
    }


def _advice(history: list[dict]) -> str:
    """What the last tenth of the steps gained, and so whether more steps would pay."""
    gains = []
    for family in FAMILIES:
        errors = [record["relative_error"] for record in history if record["family"] == family]
        if len(errors) > 1 and errors[-1] > 0:
            gains.append(1 - errors[-1] / errors[-1 - max(1, len(errors) // 10)])
    gain = max(gains, default=0.0)
    if gain > 0.01:
        return f"The last tenth of the steps still lowered the error by {100 * gain:.1f} %: more steps would pay."
    return "The error has settled; a lower error needs a larger ratio, a larger support or many more steps."
