"""End the fit of a family: round the factors, refit the adapters on the raw weights, and measure the result."""

from collections.abc import Callable

import torch

from globe_fit.data.stream import FamilyWeights
from globe_fit.linalg import refit_adapters
from globe_fit.measure.baselines.svd import equal_byte_rank, svd_errors
from globe_fit.measure.diagnostics import measure, palette_sizes, spot_checks
from globe_fit.measure.errors import StoredErrors
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
    errors = StoredErrors(weights)
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
        errors.add(block, stored, basis)
        del block, basis, target, stored  # before the next block is read
    measured = errors.report()
    whole = bank.cpu() if ranks.world == 1 and place is None else _collected(bank, weights, make)
    factors = FamilyFactors(whole, Code(code.index.cpu(), code.value.cpu()), adapter)
    statistics = weights.statistics
    svd_rank = equal_byte_rank(base, sizes.tensor_bytes)
    svd, bound = svd_errors(weights, (svd_rank, sizes.rank))
    report = {
        **measured,
        "energy": statistics.total_energy,
        "svd_equal_bytes": svd,
        "svd_equal_bytes_rank": svd_rank,
        "rank_bound": bound,
        "mean": statistics.mean,
        "scale": statistics.scale,
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
