"""End the fit of a family: round the factors, refit the adapters on the raw weights, and measure the result."""

from collections.abc import Callable

import torch

from globe_fit.data.stream import FamilyWeights, share
from globe_fit.linalg import refit_adapters
from globe_fit.measure.baselines.svd import equal_byte_rank, svd_errors
from globe_fit.measure.diagnostics import measure, palette_sizes, spot_checks
from globe_fit.result import FamilyFactors
from globe_fit.run.metrics import check_names
from globe_fit.solvers.base import BankState
from globe_fit.solvers.support import pack_codes
from globe_kernels.errors import GlobeError
from globe_kernels.format.checkpoint import Code, GlobeConfig
from globe_kernels.ops.compose_basis import compose_basis_ref

Place = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def finish(
    weights: FamilyWeights, best: BankState, sizes: GlobeConfig, place: Place | None = None
) -> tuple[FamilyFactors, dict]:
    """Return the factors in the stored dtype, with refitted adapters, and the report on them.

    `place` makes the tensors of bank and adapters, such as on a disk; by default they are in host memory. Of several
    ranks the first gets the whole bank, all adapters and the spot checks; the others get none of them.
    """
    base, dtype, ranks = sizes.base, sizes.torch_dtype, weights.ranks
    bank, code = best.bank.to(dtype), pack_codes(best.codes, sizes.support)
    make = place or (lambda shape, dtype: torch.empty(shape, dtype=dtype))
    adapter = make((base.total_experts if ranks.leads else 0, base.intermediate_size, sizes.rank), dtype)
    lost, residual_sum = dict.fromkeys(base.num_experts, 0.0), 0.0
    lost_in_metric, energy_in_metric, unit = 0.0, 0.0, weights.statistics.unit
    for block in weights.raw():
        # the basis is rounded as the runtime rounds it, so that the adapters make up for the rounding
        basis = compose_basis_ref(code.index[block.span], code.value[block.span], bank, sizes.phi, dtype)
        target = weights.in_metric(block, block.weights)
        stored = refit_adapters(target, weights.in_metric(block, basis.float()), ranks).to(dtype)
        if ranks.leads:
            adapter[block.span] = stored.cpu()
        if not torch.isfinite(stored).all():
            raise GlobeError(
                f"The {weights.family} adapters of layer {block.layer.layer} have values that {sizes.dtype} cannot "
                "hold; scale the experts down, and down_proj up by as much."
            )
        block.weights.div_(unit)
        residual = block.weights - (stored.float() / unit) @ basis.float()
        lost_in_metric += weights.weighted(block, residual).square().sum(dtype=torch.float64).item()
        energy_in_metric += weights.weighted(block, block.weights).square().sum(dtype=torch.float64).item()
        lost[block.layer.layer] += residual.square().sum(dtype=torch.float64).item()
        residual_sum += residual.sum(dtype=torch.float64).item()
        del block, basis, target, stored, residual  # before the next block is read
    residual_sum, lost_in_metric, energy_in_metric, *by_layer = ranks.sums(
        residual_sum, lost_in_metric, energy_in_metric, *lost.values()
    )
    lost = {layer: of_layer * unit**2 for layer, of_layer in zip(lost, by_layer, strict=True)}
    whole = bank.cpu() if ranks.world == 1 and place is None else _collected(bank, weights, make)
    factors = FamilyFactors(whole, Code(code.index.cpu(), code.value.cpu()), adapter)
    count = base.total_experts * base.intermediate_size * base.hidden_size
    statistics = weights.statistics
    svd_rank = equal_byte_rank(base, sizes.tensor_bytes)
    svd, bound = svd_errors(weights, (svd_rank, sizes.rank))
    report = {
        "relative_error": share(sum(lost.values()), statistics.total_energy),
        "calibrated_error": None if weights.metric is None else share(lost_in_metric, energy_in_metric),
        "relative_error_by_layer": {str(layer): share(lost[layer], statistics.energy[layer]) for layer in lost},
        "mse": sum(lost.values()) / count,
        "energy": statistics.total_energy,
        "svd_equal_bytes": svd,
        "svd_equal_bytes_rank": svd_rank,
        "rank_bound": bound,
        "mean": statistics.mean,
        "scale": statistics.scale,
        "mean_energy_left": (residual_sum * unit / count / statistics.mean) ** 2 if statistics.mean else 0.0,
        **measure(weights, BankState(bank.float(), best.codes, best.phi), expensive=True),
        "palette_sizes": palette_sizes(best.codes, base),
        "spot_checks": spot_checks(weights, factors, sizes.phi) if ranks.leads else [],
    }
    return factors, check_names(report)


def _collected(bank: torch.Tensor, weights: FamilyWeights, make: Place) -> torch.Tensor:
    """Return the bank (M, R, D) of all columns in host memory on the first rank, and no atoms on the others."""
    ranks, width = weights.ranks, weights.source.base.hidden_size
    whole = make((len(bank) if ranks.leads else 0, bank.shape[1], width), bank.dtype)
    for number, part in enumerate(bank):  # an atom at a time: only the first rank has room for more
        atom = ranks.whole(part, width)
        if ranks.leads:
            whole[number] = atom.cpu()
    return whole
