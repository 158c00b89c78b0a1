"""Look at a model that runs on GloBE experts, and change it: its strategy, the reasons for it, its cache."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from globe_kernels.errors import RequestError
from globe_kernels.format.names import BANK_NAME
from globe_kernels.model.arrange import arrange, plan_arrangement
from globe_kernels.model.bank import Arrangement, GlobeBank
from globe_kernels.model.cache import BasisCache, CacheStats, sum_stats
from globe_kernels.model.experts import GlobeMoEFFN
from globe_kernels.model.owners import model_in
from globe_kernels.model.parallel import make_parameters_split
from globe_kernels.model.targets import globe_modules, is_patched
from globe_kernels.strategies import DENSE, STRATEGIES
from globe_kernels.strategies.budget import strategies_of
from globe_kernels.strategies.cached import cached_weights
from globe_kernels.strategies.cost import predict
from globe_kernels.table import Table
from globe_kernels.units import format_bytes, parse_bytes


@dataclass(frozen=True)
class StrategyCost:
    """The predicted cost of a call by one strategy."""

    strategy: str
    us: float  # microseconds of one layer
    bytes: float  # moved
    state: str  # "taken", "held", "not held"; "-" for the dense experts, beside which the strategies stand


@dataclass(frozen=True)
class LayerCosts:
    """The costs in layers of the same sizes, on the same kind of machine."""

    layers: tuple[str, ...]  # names of modules
    machine: str
    origin: str  # of the constants of the machine
    costs: tuple[StrategyCost, ...]

    @property
    def taken(self) -> str:
        """The strategy that a call takes."""
        return next(cost.strategy for cost in self.costs if cost.state == "taken")


@dataclass(frozen=True, repr=False)
class Explanation:
    """The strategies that a call with `tokens` tokens can take, by groups of layers; prints as text, shows as HTML."""

    tokens: int
    groups: tuple[LayerCosts, ...]

    def _tables(self) -> Iterator[Table]:
        for group in self.groups:
            title = f"T = {self.tokens}: {group.taken}, in each of {len(group.layers)} layers such as {group.layers[0]}"
            rows = [(cost.strategy, f"{cost.us:,.1f}", format_bytes(cost.bytes), cost.state) for cost in group.costs]
            origin = f"predicted for {group.machine} ({group.origin})"
            yield Table(f"{title}\n{origin}", ("a layer by", "us", "bytes moved", "state"), rows)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._tables()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self._tables())


def set_strategy(
    model: nn.Module,
    strategy: str = "auto",
    *,
    memory_budget: int | str | None = None,
    cache_bytes: int | str | None = None,
) -> Arrangement:
    """Run the GloBE experts of `model` by another strategy from now on; weights and results stay.

    Takes the arguments of `globe_kernels.patch`. Waits for the layers that other threads run, and layers that they run
    next wait. Raises RequestError, and changes nothing, when the arguments cannot be met.
    """
    model = model_in(model)
    bank, modules = bank_of(model), list(globe_modules(model).values())
    bounds = (None if size is None else parse_bytes(size) for size in (memory_budget, cache_bytes))
    with bank.calls.change(modules):
        make_parameters_split(model)
        arrangement = plan_arrangement(bank, modules, bank.arrangement.top_k, strategy, *bounds)
        arrange(bank, modules, arrangement)
    return arrangement


def cache_stats(model: nn.Module) -> CacheStats:
    """Return hits and misses of the caches of all devices, since they were made; waits for the devices."""
    with bank_of(model).calls.no_change():
        return sum_stats([cache.stats() for cache in _caches_of(model)])


def warm_cache(model: nn.Module, uses: Mapping[int, torch.Tensor]) -> None:
    """Fill the cache with the experts that were used most, before any token comes.

    `uses`: {layer id: (E,) times each expert was used}, such as `cache_stats(model).uses` of an earlier run.
    """
    bank = bank_of(model)
    with bank.calls.no_change():
        caches = _caches_of(model)
        weights = {module.layer: cached_weights(module) for module in globe_modules(model).values()}
        for cache in caches:
            elsewhere = {layer for other in caches if other is not cache for layer in other.num_experts}
            here = {layer: counts for layer, counts in uses.items() if layer not in elsewhere}
            cache.warm(weights, here, bank.config.phi)


def explain(model: nn.Module, tokens: int) -> Explanation:
    """Say which strategy a call with `tokens` tokens takes in each layer, and what the cost model predicts for all.

    Per layer: microseconds and bytes moved of every strategy that this checkpoint can run by, beside the dense experts;
    strategies whose tensors the model does not hold are marked. Layers of the same sizes share a table. The
    result prints as text.
    """
    bank = bank_of(model)
    groups: dict[Any, list[str]] = {}
    with bank.calls.no_change():
        modules = globe_modules(model)
        for name, module in modules.items():
            groups.setdefault((module.sizes(), module.machine, module.pool), []).append(name)
        found = [_layer_costs(modules[names[0]], tuple(names), tokens) for names in groups.values()]
    return Explanation(tokens, tuple(found))


def _layer_costs(module: GlobeMoEFFN, names: tuple[str, ...], tokens: int) -> LayerCosts:
    """Predict the costs of `module`, in whose place layers of all `names` stand."""
    sizes, machine, pool = module.sizes(), module.machine, module.pool
    chosen, costs = module.strategy(tokens), []
    for strategy in (DENSE, *(STRATEGIES[name] for name in strategies_of(module.device_bank.config))):
        if strategy.takes_pool and pool is None:
            continue
        cost = predict(strategy, sizes, tokens, machine, pool)
        state = "taken" if strategy.name == chosen else "held" if strategy.name in module.strategies else "not held"
        if strategy is DENSE:
            state = "-"
        costs.append(StrategyCost(strategy.name, cost.us, cost.bytes, state))
    return LayerCosts(names, machine.name, machine.origin, tuple(costs))


def _caches_of(model: nn.Module) -> list[BasisCache]:
    """Return the cache of each device. Raises RequestError when there is none."""
    caches = bank_of(model).caches
    if not caches:
        raise RequestError(
            'This model holds no cache of composed bases; globe_kernels.set_strategy(model, "cached") makes one.'
        )
    return caches


def bank_of(model: nn.Module) -> GlobeBank:
    """Return the bank of a patched model. Raises RequestError for another model."""
    model = model_in(model)
    if not is_patched(model):
        raise RequestError("This model does not run on GloBE experts; call globe_kernels.patch(model, path) first.")
    return getattr(model, BANK_NAME)
