"""What a checkpoint takes in memory, by the ways to run it (globe_kernels.strategies.cost), and which of them a budget holds.

Bytes of all layers, on the device; L layers, E experts, n experts of all layers, P intermediate size, D hidden size,
R rank, M atoms, C support, U palette:

    adapters      gate and up (E, P, R)                      every path but dense
    codes         index (E, C) int32, value (E, C) float32   every path but dense
    down          (E, D, P), and biases                      every path
    bases         (E, 2R, D)                                 composed, whose bank stays in host memory
    bank          gate and up (M, R, D)                      bank_first, cached, scratch
    palette_codes (U,) int32, (E, U to the next 32) float32, (E,) float32 per family     bank_first, scratch
    pool          slots of (2R, D), and the maps of the cache                            cached
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil
from typing import NamedTuple

from globe_kernels.errors import RequestError
from globe_kernels.format.architectures import FAMILIES, architecture_of
from globe_kernels.format.checkpoint import GlobeCheckpoint, GlobeConfig
from globe_kernels.ops.compose_layer import PALETTE_PADDING
from globe_kernels.ops.moe_ffn_bank_first import WORKSPACE_BYTES
from globe_kernels.strategies.cost import (
    DENSE,
    PATHS,
    LayerSizes,
    Machine,
    Pool,
    break_even_rank,
    paths_of,
    switch_points,
)

AUTO = "auto"
_INDEX_BYTES = 4  # int32
_CODE_BYTES = _INDEX_BYTES + 4  # float32 value
_SLOT_MAP_BYTES = 4 + 4 + 8  # owner, referenced, pinned
_EXPERT_MAP_BYTES = 4 + 8  # slot_of, uses
_REGISTER_BYTES = 5 * 8
_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}

Palettes = Mapping[int, Mapping[str, float]]  # layer id -> family -> U


@dataclass(frozen=True)
class Residents:
    """Bytes on the device by what they hold, and beside them those that stay in host memory."""

    down: int
    dense: int = 0  # gate and up matrices
    adapters: int = 0
    codes: int = 0
    bases: int = 0
    bank: int = 0
    palette_codes: int = 0
    pool: int = 0
    host: int = 0  # the bank of a composed model

    @property
    def parts(self) -> dict[str, int]:
        """On the device."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "host"}

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self.parts.values())


def parse_bytes(size: str | int) -> int:
    """Bytes that "20GiB", "1.5 GB" or a number stand for. Raises RequestError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    if match is None or match[2] not in _UNITS:
        raise RequestError(f"{size!r} is no size in bytes; give a number with a unit, such as 20GiB or 800MB.")
    return int(float(match[1]) * _UNITS[match[2]])


def said(size: int) -> str:
    """Bytes for a person, in a unit that `parse_bytes` takes."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def palettes_of(checkpoint: GlobeCheckpoint) -> Palettes:
    """The distinct atoms that each layer uses, by the stored codes."""
    return {
        layer: {family: checkpoint.code(layer, family).index.unique().numel() for family in FAMILIES}
        for layer in checkpoint.config.base.num_experts
    }


def expected_palettes(config: GlobeConfig) -> Palettes:
    """As `palettes_of` for a checkpoint that does not exist: experts draw their C atoms at random.

    From all M atoms, with scope layer from the layer's share of them, with a palette from as many as that; of A atoms
    A (1 - (1 - C/A)^E) are drawn by someone. A fit lets neighbouring experts share atoms, so it uses fewer.
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


def atoms_on_cards(config: GlobeConfig, palettes: Palettes, cards: int) -> int | None:
    """At most how many atoms `cards` devices hold that have equal shares of the layers; None for one, with the bank."""
    if cards == 1:
        return None
    layers = sorted(palettes)
    shares = [layers[len(layers) * card // cards : len(layers) * (card + 1) // cards] for card in range(cards)]
    used = (sum(ceil(palettes[layer][family]) for layer in own) for own in shares for family in FAMILIES)
    return sum(min(config.num_atoms, count) for count in used)


def layer_sizes(
    config: GlobeConfig, layer: int, choices: int, item_size: int, palettes: Palettes | None = None
) -> LayerSizes:
    """The sizes that the time of one layer depends on."""
    palette = (palettes or expected_palettes(config))[layer]
    return LayerSizes(
        config.base.num_experts[layer],
        choices,
        config.base.hidden_size,
        config.base.intermediate_size,
        config.rank,
        config.support,
        sum(palette.values()) / len(palette),
        config.phi,
        item_size,
    )


def resident(
    config: GlobeConfig,
    paths: tuple[str, ...],
    *,
    item_size: int,
    cache_bytes: int = 0,
    palettes: Palettes | None = None,
    bank_atoms: int | None = None,
) -> Residents:
    """What stays in memory to take any of `paths`, with weights of `item_size` bytes a value.

    Of layers on several devices that of all: each holds copies of the atoms that its layers use, of both families
    `bank_atoms` in all, and the bank stays in host memory.
    """
    base = config.base
    experts, inner, width = base.total_experts, base.intermediate_size, base.hidden_size
    biases = 2 * inner + width if architecture_of(base.model_type).has_bias else 0
    down = experts * (width * inner + biases) * item_size
    if paths == (DENSE,):
        return Residents(down, dense=2 * experts * inner * width * item_size)
    atom = config.rank * width
    whole = len(FAMILIES) * config.num_atoms
    needs_bank = not {"bank_first", "cached", "scratch"}.isdisjoint(paths)
    palette_codes = 0
    if "bank_first" in paths or "scratch" in paths:
        for layer, palette in (palettes or expected_palettes(config)).items():
            for used in map(ceil, palette.values()):
                padded = -(-used // PALETTE_PADDING) * PALETTE_PADDING
                palette_codes += 4 * used + base.num_experts[layer] * 4 * (padded + 1)
    slots = pool_slots(config, cache_bytes, item_size)
    local_index = _INDEX_BYTES if bank_atoms is not None and "cached" in paths else 0
    return Residents(
        down,
        adapters=2 * experts * inner * config.rank * item_size,
        codes=2 * experts * config.support * (_CODE_BYTES + local_index),
        bases=experts * 2 * atom * item_size if "composed" in paths else 0,
        bank=(whole if bank_atoms is None else bank_atoms) * atom * item_size if needs_bank else 0,
        palette_codes=palette_codes,
        pool=pool_bytes(config, slots, item_size) if "cached" in paths else 0,
        host=0 if needs_bank and bank_atoms is None else whole * atom * config.torch_dtype.itemsize,
    )


def pool_bytes(config: GlobeConfig, slots: int, item_size: int) -> int:
    """Bytes of a cache with that many slots, its maps included."""
    slot = 2 * config.rank * config.base.hidden_size * item_size + _SLOT_MAP_BYTES
    return slots * slot + config.base.total_experts * _EXPERT_MAP_BYTES + _REGISTER_BYTES


def pool_slots(config: GlobeConfig, cache_bytes: int, item_size: int) -> int:
    """Slots of a cache of at most that many bytes: no more than there are experts."""
    empty = pool_bytes(config, 0, item_size)
    slots = (cache_bytes - empty) // (pool_bytes(config, 1, item_size) - empty)
    return max(0, min(slots, config.base.total_experts))


def workspace(
    config: GlobeConfig,
    paths: tuple[str, ...],
    tokens: int,
    choices: int,
    item_size: int,
    palettes: Palettes | None = None,
    *,
    on_gpu: bool = True,
) -> int:
    """Bytes of the largest temporaries of one layer's call, over `paths`: what comes to the residents at the peak.

    Rows h (S, 2R), y (S, P), those before the sum over choices (S, D) and the sum (T, D); of bank_first z (T, 2U, R) of
    a chunk of tokens, of scratch the bases (E, 2R, D) of the largest layer, on a GPU twice: one layer runs while the
    next is composed. Of the dense experts, as transformers runs them: rows of x, gate and up, their product, rows of
    the output.
    """
    rows, inner, width = tokens * choices, config.base.intermediate_size, config.base.hidden_size
    if paths == (DENSE,):
        return (rows * (2 * width + 3 * inner) + tokens * width) * item_size
    size = (rows * (2 * config.rank + inner + width) + tokens * width) * item_size
    if "bank_first" in paths:
        largest = max(sum(palette.values()) for palette in (palettes or expected_palettes(config)).values())
        z_row = ceil(largest) * config.rank * item_size
        size += min(tokens, max(1, WORKSPACE_BYTES // z_row)) * z_row
    if "scratch" in paths:
        buffers = 2 if on_gpu else 1
        size += buffers * max(config.base.num_experts.values()) * 2 * config.rank * width * item_size
    return size


def why_not_composed(config: GlobeConfig) -> str | None:
    """Why `auto` does not compose every basis at this rank; None where composing saves bytes and arithmetic."""
    inner, width, rank = config.base.intermediate_size, config.base.hidden_size, config.rank
    limit = break_even_rank(inner, width)
    if rank <= limit:
        return None
    dense, composed = 2 * inner * width, 2 * rank * (inner + width)
    return (
        f"composed at rank {rank} holds {composed / 1e6:.2f} M values for gate and up of an expert and computes "
        f"{2 * composed / 1e6:.2f} M floating point operations per row, the dense matrices {dense / 1e6:.2f} M and "
        f"{2 * dense / 1e6:.2f} M: it saves nothing above rank {limit}, so auto does not take it"
    )


class Choice(NamedTuple):
    """What a model holds: enough for each of `paths`, of which every call takes the cheapest."""

    paths: tuple[str, ...]
    cache_bytes: int  # of the pool, when "cached" is among them

    def pool(self, config: GlobeConfig, item_size: int, miss_rate: float | None = None) -> Pool | None:
        """The pool as the cost model takes it."""
        slots = pool_slots(config, self.cache_bytes, item_size)
        return Pool(slots, config.base.total_experts, miss_rate) if "cached" in self.paths else None


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
    """What to hold within `budget` bytes on all devices, for a model whose layers are mostly of `sizes`.

    A named strategy holds what it needs. "auto" takes composed where the rank is below break-even and it fits (without
    a budget into what the dense experts held), and bank_first beside it where both fit; else bank_first, scratch and a
    cache. Of these it keeps those that are the cheapest on `machine` for some number of tokens. The cache has
    `cache_bytes`, and is kept when these are given, because routing may be less uniform than the cost model takes it
    to be; otherwise what the budget leaves, and without one half of what is saved beside the dense experts. The budget
    does not bound what `workspace` adds. Raises RequestError when it cannot be had.
    """
    item_size = sizes.item_size
    if strategy not in (AUTO, *PATHS):
        raise RequestError(f"strategy {strategy!r} is not known; expected one of {', '.join((AUTO, *PATHS))}.")
    if strategy not in (AUTO, *paths_of(config.phi)):
        raise RequestError(
            f"strategy bank_first needs phi identity and this checkpoint has phi {config.phi}; use "
            f"{', '.join(paths_of(config.phi))} or auto."
        )
    one_slot = pool_bytes(config, 1, item_size)
    if cache_bytes is not None and cache_bytes < one_slot:
        raise RequestError(
            f"The cache is given {cache_bytes} bytes and one basis of this checkpoint takes {one_slot}; give more."
        )

    def held(paths: tuple[str, ...], cache: int = 0) -> int:
        return resident(
            config, paths, item_size=item_size, cache_bytes=cache, palettes=palettes, bank_atoms=bank_atoms
        ).total

    def cache_beside(others: int) -> int:
        """Bytes of the cache, in whole slots, beside what holds `others`."""
        size = cache_bytes
        if size is None:
            size = (held((DENSE,)) - others) // 2 if budget is None else budget - others
        slots = pool_slots(config, size, item_size)
        return pool_bytes(config, slots, item_size) if slots else 0

    def within_budget(what: str, paths: tuple[str, ...], cache: int) -> Choice:
        needed = held(paths, cache)
        if budget is not None and needed > budget:
            raise RequestError(
                f"The memory budget is {said(budget)} and {what} holds {said(needed)} of experts; "
                "give a larger budget, or a checkpoint of a smaller rank or with fewer atoms."
            )
        return Choice(paths, cache)

    if strategy == "cached":
        least = pool_bytes(config, min(sizes.choices, config.base.total_experts), item_size)
        cache = cache_beside(held(("cached",)) - pool_bytes(config, 0, item_size))
        return within_budget("cached", ("cached",), cache or (one_slot if budget is not None else least))
    if strategy != AUTO:
        return within_budget(strategy, (strategy,), 0)

    def used(paths: tuple[str, ...], cache: int = 0) -> tuple[str, ...]:
        pool = Choice(paths, cache).pool(config, item_size)
        taken = {path for _, path in switch_points(paths, sizes, machine, pool)}
        return tuple(path for path in paths if path in taken)

    limit = held((DENSE,)) if budget is None else budget
    bank_first = ("bank_first",) if "bank_first" in paths_of(config.phi) else ()
    if why_not_composed(config) is None and held(("composed",)) <= limit:
        both = ("composed", *bank_first)
        return Choice(used(both) if held(both) <= limit else ("composed",), 0)
    paths = (*bank_first, "scratch")
    cache = cache_beside(held(paths))
    if cache:
        paths = (*bank_first, "cached", "scratch")
    choice = within_budget("the smallest way to run this checkpoint", paths, cache)
    if cache_bytes is not None:
        return choice
    kept = used(*choice)
    return Choice(kept, cache if "cached" in kept else 0)
