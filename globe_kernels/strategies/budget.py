"""Bytes of a model that runs a checkpoint, by strategy, and which strategies a memory budget holds.

Bytes count all layers. L layers, E experts, n experts of all layers, P intermediate size, D hidden size, R rank,
M atoms, C support, U palette:

    adapters      gate and up (E, P, R)                      every strategy but dense
    codes         index (E, C) int32, value (E, C) float32   every strategy but dense
    down          (E, D, P), and biases                      every strategy
    bases         (E, 2R, D)                                 composed, whose bank stays in host memory
    bank          gate and up (M, R, D)                      bank_first, cached, scratch
    palette_codes (U,) int32, (E, U to the next 32) float32, (E,) float32 per family     bank_first, scratch
    pool          slots of (2R, D), and the maps of the cache                            cached
"""

from collections.abc import Callable
from functools import reduce
from math import ceil
from typing import NamedTuple

from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import GlobeCheckpoint, GlobeConfig
from globe_kernels.format.names import FAMILIES
from globe_kernels.strategies import DENSE, STRATEGIES
from globe_kernels.strategies.base import LayerSizes, Palettes, Pool, Residents, Storage, Strategy
from globe_kernels.strategies.cached import pool_bytes, pool_slots
from globe_kernels.strategies.cost import Machine, Policy, switch_points
from globe_kernels.units import format_bytes

AUTO = "auto"


def strategies_of(config: GlobeConfig) -> tuple[str, ...]:
    """Return the names of the strategies that can run a checkpoint."""
    return tuple(name for name, strategy in STRATEGIES.items() if strategy.refuses(config) is None)


def palettes_of(checkpoint: GlobeCheckpoint) -> Palettes:
    """Count the distinct atoms that each layer uses, by the stored codes."""
    return {
        layer: {family: checkpoint.code(layer, family).palette for family in FAMILIES}
        for layer in checkpoint.config.base.num_experts
    }


def expected_palettes(config: GlobeConfig) -> Palettes:
    """Expect the palettes of a checkpoint that does not exist, as if each expert drew its C atoms at random.

    An expert draws from all M atoms, with scope layer from the layer's share of them, with a palette from as many atoms
    as the palette has. From A atoms the E experts of a layer draw A (1 - (1 - C/A)^E) different ones. A fit lets
    neighbouring experts share atoms, so it uses fewer.
    """
    palettes = {}
    for layer, experts in config.base.num_experts.items():
        atoms = config.num_atoms
        if config.scope == "layer":
            atoms = atoms * experts // config.base.total_experts
        atoms = min(atoms, config.palette or atoms)
        drawn = atoms * (1 - (1 - min(config.support / atoms, 1.0)) ** experts)
        palettes[layer] = dict.fromkeys(FAMILIES, drawn)
    return palettes


def atoms_on_devices(config: GlobeConfig, palettes: Palettes, devices: int) -> int | None:
    """Bound the copies of atoms on `devices` devices that share the layers evenly; None for one, which has the bank."""
    if devices == 1:
        return None
    layers = sorted(palettes)
    bounds = [len(layers) * device // devices for device in range(devices + 1)]
    shares = [layers[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
    used = (sum(ceil(palettes[layer][family]) for layer in share) for share in shares for family in FAMILIES)
    return sum(min(config.num_atoms, count) for count in used)


def layer_sizes(
    config: GlobeConfig, layer: int, top_k: float, item_size: int, palettes: Palettes | None = None
) -> LayerSizes:
    """Return the sizes that the time of one layer depends on."""
    palette = (palettes or expected_palettes(config))[layer]
    return LayerSizes(
        config.base.num_experts[layer],
        top_k,
        config.base.hidden_size,
        config.base.intermediate_size,
        config.rank,
        config.support,
        sum(palette.values()) / len(palette),
        config.phi,
        item_size,
    )


def _named(names: tuple[str, ...]) -> list[Strategy]:
    return [DENSE if name == DENSE.name else STRATEGIES[name] for name in names]


def resident(
    config: GlobeConfig,
    names: tuple[str, ...],
    *,
    item_size: int,
    cache_bytes: int = 0,
    palettes: Palettes | None = None,
    bank_atoms: int | None = None,
) -> Residents:
    """Return the bytes that stay in memory so that a call can take any strategy of `names`.

    `item_size` are the bytes of a weight. Layers on several devices: the bytes of all devices together. Each device
    holds copies of the atoms that its layers use, `bank_atoms` in all, both families, and the bank stays in host
    memory.
    """
    storage = Storage(config, item_size, palettes or expected_palettes(config), cache_bytes, bank_atoms)
    return reduce(Residents.together, (strategy.resident(storage) for strategy in _named(names)))


def workspace(
    config: GlobeConfig,
    strategy_of: Callable[[int], str],
    tokens: int,
    top_k: int,
    item_size: int,
    palettes: Palettes | None = None,
    *,
    on_gpu: bool = True,
) -> int:
    """Return the bytes of the largest temporaries of one layer, over calls with up to `tokens` tokens.

    `strategy_of` says which strategy a call with so many tokens takes. Bytes at the peak are the resident bytes and
    these.
    """
    storage = Storage(config, item_size, palettes or expected_palettes(config))
    counts = {2**power for power in range(tokens.bit_length())} | {tokens}
    return max(_named((strategy_of(count),))[0].workspace(storage, count, top_k, on_gpu=on_gpu) for count in counts)


class Choice(NamedTuple):
    """The strategies that a model holds enough tensors for; every call takes the cheapest."""

    strategies: tuple[str, ...]
    cache_bytes: int  # of the pool, where a strategy takes one

    def pool(self, config: GlobeConfig, item_size: int, miss_rate: float | None = None) -> Pool | None:
        """Return the pool as the cost model takes it."""
        if not any(strategy.takes_pool for strategy in _named(self.strategies)):
            return None
        slots = pool_slots(config, self.cache_bytes, item_size)
        return Pool(slots, config.base.total_experts, miss_rate)

    def policy(self, config: GlobeConfig, sizes: LayerSizes, machine: Machine) -> Policy:
        """Return the strategy of a call by its tokens, in layers of `sizes`."""
        pool = self.pool(config, sizes.item_size)
        return Policy(switch_points(_named(self.strategies), sizes, machine, pool))


def choose_residents(
    config: GlobeConfig,
    sizes: LayerSizes,
    machine: Machine,
    budget: int | None = None,
    strategy: str = AUTO,
    *,
    cache_bytes: int | None = None,
    palettes: Palettes | None = None,
    bank_atoms: int | None = None,
) -> Choice:
    """Choose the strategies to hold within `budget` bytes on all devices; the layers are mostly of `sizes`.

    A named strategy holds what it needs. "auto" takes strategies that hold every basis, where these save something and
    fit (without a budget into the bytes of the dense experts), and beside them the strategies that compose nothing.
    Else it takes all strategies that run from the bank, with a cache. Of these it keeps the strategies that are the
    cheapest on `machine` for some number of tokens.

    The cache has `cache_bytes`, and is then kept in any case, because routing may be less uniform than the cost model
    assumes. Otherwise the cache has what the budget leaves, and without a budget half of the bytes that are saved
    beside the dense experts. The budget does not bound `workspace`. Raises RequestError when the bytes do not suffice.
    """
    item_size = sizes.item_size
    _require_known(config, strategy)
    one_slot = pool_bytes(config, 1, item_size)
    if cache_bytes is not None and cache_bytes < one_slot:
        raise RequestError(
            f"The cache is given {format_bytes(cache_bytes)} and one basis of this checkpoint takes "
            f"{format_bytes(one_slot)}; give more."
        )

    def held(names: tuple[str, ...], cache: int = 0) -> int:
        return resident(
            config, names, item_size=item_size, cache_bytes=cache, palettes=palettes, bank_atoms=bank_atoms
        ).total

    def cache_beside(others: int) -> int:
        """Bytes of the cache, in whole slots, beside `others` bytes."""
        size = cache_bytes
        if size is None:
            size = (held((DENSE.name,)) - others) // 2 if budget is None else budget - others
        slots = pool_slots(config, size, item_size)
        return pool_bytes(config, slots, item_size) if slots else 0

    def within_budget(subject: str, names: tuple[str, ...], cache: int) -> Choice:
        needed = held(names, cache)
        if budget is not None and needed > budget:
            raise RequestError(
                f"The memory budget is {format_bytes(budget)} and {subject} holds {format_bytes(needed)} of experts; "
                "give a larger budget, or a checkpoint of a smaller rank or with fewer atoms."
            )
        return Choice(names, cache)

    if strategy != AUTO:
        if not STRATEGIES[strategy].takes_pool:
            return within_budget(strategy, (strategy,), 0)
        least = pool_bytes(config, min(ceil(sizes.top_k), config.base.total_experts), item_size)
        cache = cache_beside(held((strategy,)) - pool_bytes(config, 0, item_size))
        return within_budget(strategy, (strategy,), cache or (one_slot if budget is not None else least))

    def used(names: tuple[str, ...], cache: int = 0) -> tuple[str, ...]:
        pool = Choice(names, cache).pool(config, item_size)
        taken = {name for _, name in switch_points(_named(names), sizes, machine, pool)}
        return tuple(name for name in names if name in taken)

    limit = held((DENSE.name,)) if budget is None else budget
    usable = _named(strategies_of(config))
    with_bases = tuple(s.name for s in usable if s.holds_bases and s.wastes(config) is None)
    composing_nothing = tuple(s.name for s in usable if not s.holds_bases and not s.composes)
    if with_bases and held(with_bases) <= limit:
        both = with_bases + composing_nothing
        return Choice(used(both) if held(both) <= limit else with_bases, 0)
    from_bank = [s for s in usable if not s.holds_bases]
    names = tuple(s.name for s in from_bank if not s.takes_pool)
    cache = cache_beside(held(names))
    if cache:
        names = tuple(s.name for s in from_bank)
    choice = within_budget("the smallest arrangement of this checkpoint", names, cache)
    if cache_bytes is not None:
        return choice
    kept = used(*choice)
    return Choice(kept, cache if any(s.takes_pool for s in _named(kept)) else 0)


def _require_known(config: GlobeConfig, strategy: str) -> None:
    if strategy not in (AUTO, *STRATEGIES):
        raise RequestError(f"strategy {strategy!r} is not known; expected one of {', '.join((AUTO, *STRATEGIES))}.")
    if strategy != AUTO and (reason := STRATEGIES[strategy].refuses(config)) is not None:
        raise RequestError(f"{reason}; use {', '.join(strategies_of(config))} or auto.")
