"""The sizes of a GloBE checkpoint: they follow from the settings of a fit and from its model."""

from collections.abc import Mapping, Sequence
from typing import Any

from globe_fit.config import DEFAULT_RATIO, FitConfig
from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import BaseModel, GlobeConfig

# Share of the byte budget that the adapters get when neither rank nor atoms are given: measured best on two models at
# ratios from 0.4 to 0.75. At ratio 0.625 it makes rank = p for p/d up to 0.42.
_ADAPTER_SHARE = 2 / 3
_RANK_MULTIPLE = 16
_CODE_BYTES = 8  # int32 index + float32 value
_WEIGHT_BYTES = 2  # bf16


def globe_bytes(base: BaseModel, rank: int, atoms: int, support: int) -> int:
    """Return the bytes of a GloBE checkpoint in bf16, both families: adapters + bank + codes."""
    experts, inner, width = base.total_experts, base.intermediate_size, base.hidden_size
    adapters = experts * inner * rank * _WEIGHT_BYTES
    bank = atoms * rank * width * _WEIGHT_BYTES
    return 2 * (adapters + bank + experts * support * _CODE_BYTES)


def resolve_sizes(base: BaseModel, config: FitConfig) -> GlobeConfig:
    """Find the rank and the number of atoms that `config` asks for on this model.

    Raises RequestError, with the range that can be reached, for sizes out of range.
    """
    experts, inner, width = base.total_experts, base.intermediate_size, base.hidden_size
    largest_rank = min(inner, width)
    if config.rank is not None and config.rank > largest_rank:
        raise RequestError(
            f"rank is {config.rank} and the experts of {base.name} are {inner} x {width}; give a rank of at most "
            f"{largest_rank}."
        )
    if config.atoms is not None and config.atoms > experts:
        raise RequestError(
            f"atoms is {config.atoms} and {base.name} has {experts} experts; give at most one atom per expert."
        )
    if config.atoms is not None and config.support > config.atoms:
        raise RequestError(
            f"support is {config.support} and the bank has {config.atoms} atoms; give a support of at most "
            f"{config.atoms}, or more atoms."
        )
    rank, atoms = _solve(base, config, largest_rank)
    if config.scope == "layer":
        fewest = min(atoms * count // experts for count in base.num_experts.values())
        if fewest < config.support:
            raise RequestError(
                f"With scope layer, {atoms} atoms give a layer only {fewest} atoms and support is {config.support}; "
                f"give a support of at most {max(fewest, 1)}, or more atoms."
            )
    if config.palette is not None and not config.support <= config.palette <= atoms:
        raise RequestError(
            f"palette is {config.palette}, support is {config.support} and the bank has {atoms} atoms; give a palette "
            f"from {config.support} to {atoms}."
        )
    return GlobeConfig(
        base=base,
        rank=rank,
        num_atoms=atoms,
        support=config.support,
        phi=config.phi,
        scope=config.scope,
        palette=config.palette,
    )


def _solve(base: BaseModel, config: FitConfig, largest_rank: int) -> tuple[int, int]:
    if config.rank is not None and config.atoms is not None:
        return config.rank, config.atoms
    ratio = DEFAULT_RATIO if config.ratio is None else config.ratio
    experts, support = base.total_experts, config.support
    budget = ratio * base.dense_bytes
    # the smallest and the largest sizes, where the settings leave a choice
    ranks = (config.rank, config.rank) if config.rank else (1, largest_rank)
    atoms_range = (config.atoms, config.atoms) if config.atoms else (support, experts)
    if support > experts:
        raise RequestError(f"support is {support} and {base.name} has {experts} experts; give at most {experts}.")
    low, high = (globe_bytes(base, r, m, support) for r, m in zip(ranks, atoms_range, strict=True))
    if not low <= budget <= high:
        raise RequestError(
            f"ratio {ratio:g} cannot be reached on {base.name} with support {support}"
            + (f", rank {config.rank}" if config.rank else "")
            + (f", {config.atoms} atoms" if config.atoms else "")
            + f"; give a ratio from {_up(low / base.dense_bytes)} to {_down(high / base.dense_bytes)}."
        )
    if config.atoms is not None:
        rank = max(r for r in range(1, largest_rank + 1) if globe_bytes(base, r, config.atoms, support) <= budget)
        return rank, config.atoms
    rank = config.rank or _default_rank(base, ratio, largest_rank, support)
    atoms = max(m for m in range(support, experts + 1) if globe_bytes(base, rank, m, support) <= budget)
    if config.rank is None and atoms == experts:  # only the rank can use the bytes that are left
        rank = max(r for r in range(rank, largest_rank + 1) if globe_bytes(base, r, atoms, support) <= budget)
    return rank, atoms


def _default_rank(base: BaseModel, ratio: float, largest_rank: int, support: int) -> int:
    rank = int(_ADAPTER_SHARE * ratio * base.hidden_size)
    if rank > _RANK_MULTIPLE:
        rank = round(rank / _RANK_MULTIPLE) * _RANK_MULTIPLE
    rank = min(rank, largest_rank)
    # a bank of `support` atoms must fit beside the adapters
    while rank > 1 and globe_bytes(base, rank, support, support) > ratio * base.dense_bytes:
        rank -= 1
    return max(rank, 1)


def left_dense_note(shape: Sequence[int], layers: Mapping[Any, Sequence[int]]) -> str:
    """Say which layers a fit leaves dense, and why: `shape` (P, D) of the bank, `layers` {layer: (P, D)}."""
    found = ", ".join(f"{layer} ({inner} x {width})" for layer, (inner, width) in layers.items())
    return (
        f"These layers stay dense: {found}; one bank needs one shape of experts, and {shape[0]} x {shape[1]} holds the "
        "most weights."
    )


def _up(value: float) -> str:
    return f"{value + 5e-5:.4f}"


def _down(value: float) -> str:
    return f"{value - 5e-5:.4f}"
