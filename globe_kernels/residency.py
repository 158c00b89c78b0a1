"""What the GloBE experts of a model hold on its device, so that they can run as they were asked to."""

import warnings
from collections.abc import Sequence

from globe_kernels.bank import Arrangement, GlobeBank
from globe_kernels.cache import BasisCache
from globe_kernels.errors import RequestError
from globe_kernels.families import FAMILIES
from globe_kernels.memory import choose_residents, layer_sizes, pool_slots
from globe_kernels.modules import GlobeMoEFFN
from globe_kernels.strategy import DENSE, LayerSizes, Machine, machine_for, predict

_SLOW = 1.5  # times the dense experts: a warning


def plan_arrangement(
    bank: GlobeBank,
    modules: Sequence[GlobeMoEFFN],
    choices: int,
    strategy: str,
    memory_budget: int | None = None,
    cache_bytes: int | None = None,
) -> Arrangement:
    """The arrangement for a strategy, within bounds in bytes on what the experts hold and on the pool of the cache.

    Changes nothing. Raises RequestError when that cannot be had.
    """
    devices = sorted({str(module.gate_adapter.device) for module in modules})
    if len(devices) > 1 and strategy == "auto":
        strategy = "composed"
    if len(devices) > 1 and strategy != "composed":
        raise RequestError(
            f"The experts are on {' and '.join(devices)} and strategy {strategy!r} shares a bank on one device; use "
            "strategy 'composed', or load the model on one device."
        )
    config, first = bank.config, modules[0]
    item_size, machine = first.gate_adapter.element_size(), machine_for(first.gate_adapter.device)
    palettes = {one.layer: {f: one.code(f).index.unique().numel() for f in FAMILIES} for one in modules}
    sizes = layer_sizes(config, first.layer, choices, item_size, palettes)
    choice = choose_residents(
        config, sizes, machine, memory_budget, strategy, cache_bytes=cache_bytes, palettes=palettes
    )
    if strategy == "bank_first":
        _warn_of_large_palettes(sizes, machine)
    return Arrangement(strategy, choice.paths, choice.cache_bytes, choices)


def _warn_of_large_palettes(sizes: LayerSizes, machine: Machine) -> None:
    """Where a layer uses so many atoms that no number of tokens makes bank_first pay."""
    ratios = {tokens: _ratio_to_dense(sizes, tokens, machine) for tokens in (2**power for power in range(13))}
    tokens = min(ratios, key=ratios.__getitem__)
    if ratios[tokens] > _SLOW:
        warnings.warn(
            f"A layer of this checkpoint uses {sizes.palette:.0f} atoms per family, and bank_first multiplies every "
            f"token with all of them: by the cost model at least {ratios[tokens]:.1f} times as long as the dense "
            f"experts, at {tokens} tokens; fit with --palette, or use another strategy.",
            stacklevel=4,
        )


def _ratio_to_dense(sizes: LayerSizes, tokens: int, machine: Machine) -> float:
    bank_first, dense = (predict(path, sizes, tokens, machine).us for path in ("bank_first", DENSE))
    return bank_first / dense


def arrange(bank: GlobeBank, modules: Sequence[GlobeMoEFFN], arrangement: Arrangement) -> None:
    """Hold what `arrangement` needs, and nothing else; also on a model that runs otherwise so far."""
    first = modules[0].gate_adapter
    bank.arrangement, bank.cache = arrangement, None
    if arrangement.paths == ("composed",):
        for module in modules:
            module.run_from(bank, arrangement.paths, arrangement.choices)
        bank.park()
        return
    bank.unpark(first.device, first.dtype)
    if arrangement.cache_bytes:
        num_experts = {module.layer: module.num_experts for module in modules}
        rank, width = first.shape[2], modules[0].hidden_dim
        slots = pool_slots(bank.config, arrangement.cache_bytes, first.element_size())
        bank.cache = BasisCache(num_experts, slots, rank, width, first.dtype, first.device)
    for module in modules:
        module.run_from(bank, arrangement.paths, arrangement.choices)
