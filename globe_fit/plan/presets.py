"""Choose the sizes of a fit by their purpose, and say how fast the cost model expects a checkpoint to run.

    small    the default sizes: few bytes at a given error, at any speed
    fast     half of the rank or so, and a palette, so that no call of 1 to 512 tokens is slower than dense

The speeds are those of `globe plan`: predictions for a machine, where `auto` chooses the strategy of a call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from globe_fit.config import FAST, PRESETS, SMALL, FitConfig
from globe_fit.sizes import resolve_sizes
from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import BaseModel
from globe_kernels.strategies import DENSE
from globe_kernels.strategies.budget import AUTO

if TYPE_CHECKING:
    from globe_fit.plan.serving import Planner

TOKENS = tuple(2**power for power in range(10))  # of the calls that count
_CHOSEN = ("ratio", "rank", "atoms", "palette")  # settings that a preset chooses
_PALETTE = 32  # atoms of a layer: fewer cost error, and more cost time
_RANK_MULTIPLE = 16
_MARGIN = 1.1  # times the dense speed: the cost model is no better


def with_preset(planner: Planner, preset: str, config: FitConfig) -> FitConfig:
    """Return `config` with the sizes of a preset for the model and the machine of `planner`.

    fast takes the largest rank at which every call of `TOKENS` is predicted to be 1.1 times as fast as dense, so that
    as little as possible is lost beside the speed; at most the rank of the default sizes. It takes the atoms that the
    palettes of all layers can hold. Raises RequestError for another preset, for sizes that `config` has already, and
    where no rank is fast enough.
    """
    if preset not in PRESETS:
        raise RequestError(f"preset is {preset!r}; expected {' or '.join(PRESETS)}.")
    if given := [name for name in _CHOSEN if getattr(config, name) is not None]:
        raise RequestError(
            f"The preset {preset} chooses {', '.join(_CHOSEN[1:])} and {given[0]} is given too; give the preset or "
            "sizes of your own."
        )
    if preset == SMALL:
        return config
    base = planner.model.base
    palette = max(_PALETTE, config.support)
    most = min(base.total_experts, len(base.num_experts) * palette)

    def at(rank: int) -> FitConfig:
        atoms = _atoms(base, replace(config, rank=rank), most)
        return replace(config, rank=rank, atoms=atoms, palette=min(palette, atoms))

    def is_fast(rank: int) -> bool:
        return min(speeds(planner.plan(resolve_sizes(base, at(rank)))).values(), default=0) >= _MARGIN

    largest = resolve_sizes(base, config).rank
    ranks = [*range(_RANK_MULTIPLE, largest + 1, _RANK_MULTIPLE)] or [largest]
    low, high = 0, len(ranks)  # ranks before `low` are fast, from `high` on they are not: a smaller rank is faster
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if is_fast(ranks[middle]) else (low, middle)
    if low == 0:
        raise RequestError(
            f"No rank of {base.name} is predicted to run faster than dense on {planner.machine.name}; leave the preset "
            "out, or name another machine with --on."
        )
    return at(ranks[low - 1])


def _atoms(base: BaseModel, config: FitConfig, most: int) -> int:
    """Return the atoms of the default ratio, at most as many as the palettes can hold."""
    try:
        return min(most, resolve_sizes(base, config).num_atoms)
    except RequestError:  # a bank of all experts has fewer bytes than that ratio
        return most


def speeds(planned: dict) -> dict[int, float]:
    """{tokens: speed beside dense} of `auto` in a point of `Planner.plan`; empty where auto is refused."""
    dense, auto = (planned["strategies"][name] for name in (DENSE.name, AUTO))
    if "refused" in auto:
        return {}
    return {tokens: dense["us_per_layer"][str(tokens)] / auto["us_per_layer"][str(tokens)] for tokens in TOKENS}


def verdict(planner: Planner, planned: dict) -> str:
    """Say how fast a point of `planner` is predicted to run, and what the preset fast would gain where it is slower."""
    found = speeds(planned)
    if not found:
        return ""
    slowest = min(found, key=found.__getitem__)
    sentence = (
        f"Predicted on {planner.machine.name}: {found[slowest]:.2f} to {max(found.values()):.2f} times the speed of "
        f"dense experts in calls of {TOKENS[0]} to {TOKENS[-1]} tokens, the least at {slowest}"
    )
    if found[slowest] >= 1:
        return f"{sentence}."
    config = FitConfig(support=planned["support"], phi=planned["phi"], scope=planned["scope"])
    try:
        sizes = resolve_sizes(planner.model.base, with_preset(planner, FAST, config))
    except RequestError:
        return f"{sentence}; no sizes are predicted to be faster than dense."
    point = planner.plan(sizes)
    faster = speeds(point).values()
    return (
        f"{sentence}; --preset {FAST} (rank {sizes.rank}, {sizes.num_atoms} atoms, palette {sizes.palette}, ratio "
        f"{point['ratio']:.2f}, a larger error) is predicted at {min(faster):.2f} to {max(faster):.2f}."
    )
