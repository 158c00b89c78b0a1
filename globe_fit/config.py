"""Settings of a fit, and the sizes that follow from them."""

import math
import re
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import torch

from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import PHIS, SCOPES, BaseModel, GlobeConfig

# Share of the byte budget that the adapters get when neither rank nor atoms are given, measured best on two models at
# ratios from 0.4 to 0.75 (LOG.md). At ratio 0.625 it makes rank = p for p/d up to 0.42.
_ADAPTER_SHARE = 2 / 3
_RANK_MULTIPLE = 16
_CODE_BYTES = 8  # int32 index + float32 value
_WEIGHT_BYTES = 2  # bf16


@dataclass(frozen=True)
class VarProConfig:
    """Settings of the variable-projection solver (globe_fit.solvers.varpro)."""

    steps: int = 1500
    lr: float = 1.0  # of the bank, in units of its RMS
    code_lr_scale: float = 0.3
    warmup_steps: int = 20
    final_lr_scale: float = 0.02
    betas: tuple[float, float] = (0.8, 0.95)
    ridge: float = 1e-6  # of the mean diagonal of each Gram matrix
    support_at: float = 0.02  # share of the steps after which the support is fixed
    candidates: int = 64  # atoms that an expert chooses its support from; with a palette, a layer its palette

    def __post_init__(self):
        _require("steps", self.steps, int, 0)
        _require("candidates", self.candidates, int, 1)
        _require("lr", self.lr, float, 0)
        _require("code_lr_scale", self.code_lr_scale, float, 0)
        _require("warmup_steps", self.warmup_steps, int, 0)
        _require("final_lr_scale", self.final_lr_scale, float, 0, 1)
        _require("ridge", self.ridge, float, 0)
        _require("support_at", self.support_at, float, 0, 1)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise RequestError(f"betas is {self.betas!r}; expected two numbers from 0 to 1, such as [0.8, 0.95].")
        for beta in self.betas:
            _require("betas", beta, float, 0, 0.99999)


@dataclass(frozen=True)
class CodingConfig:
    """How the alternating solver finds the codes while the support is free; then it is least squares on the support."""

    method: str = "least_squares"  # on the atoms in use; "entmax": gradients; "omp": anew each round
    initial: str = "nnls"  # before the first round: non-negative least squares; on the "simplex"; "given": as started
    l1: float = 0.0  # of initial codes, and of entmax codes times the size of their atoms
    prune: float = 0.0  # codes below this share of an expert's largest are dropped

    def __post_init__(self):
        _require_one_of("method", self.method, ("least_squares", "entmax", "omp"))
        _require_one_of("initial", self.initial, ("nnls", "simplex", "given"))
        _require("l1", self.l1, float, 0)
        _require("prune", self.prune, float, 0, 1)


@dataclass(frozen=True)
class EntmaxConfig:
    """Codes entmax(z / T): gradient steps on z, and control of the temperature T towards the support."""

    alpha: float = 1.5  # 2 is sparsemax
    lr: float = 0.1  # of Adam on z
    steps: int = 2  # of Adam in a round, one pass each
    eta: float = 0.1  # gain of the temperature control
    every: int = 1  # rounds between its changes

    def __post_init__(self):
        _require("alpha", self.alpha, float, 1.01, 4)
        _require("lr", self.lr, float, 0)
        _require("steps", self.steps, int, 0)
        _require("eta", self.eta, float, 0, 1)
        _require("every", self.every, int, 1)


@dataclass(frozen=True)
class AlternatingConfig:
    """Settings of the alternating solver (globe_fit.solvers.alternating)."""

    steps: int = 50  # rounds
    dictionary: str = "exact"  # conjugate gradients; "atoms": atom by atom; "mod": method of optimal directions
    targets: str = "aligned"  # of MOD, pursuit and initial codes; "svd": each expert's own coordinates, and SVD start
    cg_steps: int = 2  # of an exact dictionary step, one pass each
    support_at: float = 0.15  # share of the rounds after which the support is fixed
    patience: int = 10  # rounds that gain less than 0.1 % together, at one support, end the fit
    coding: CodingConfig = field(default_factory=CodingConfig)
    entmax: EntmaxConfig = field(default_factory=EntmaxConfig)

    def __post_init__(self):
        _require("steps", self.steps, int, 0)
        _require_one_of("dictionary", self.dictionary, ("exact", "atoms", "mod"))
        _require_one_of("targets", self.targets, ("aligned", "svd"))
        _require("cg_steps", self.cg_steps, int, 1)
        _require("support_at", self.support_at, float, 0, 1)
        _require("patience", self.patience, int, 1)


def _require_one_of(name: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")


def _require(name: str, value, kind: type, low: float, high: float = math.inf) -> None:
    """Raises RequestError unless `value` is a number of that kind from `low` to `high`."""
    is_kind = isinstance(value, int) if kind is int else isinstance(value, (int, float))
    if isinstance(value, bool) or not is_kind or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        limit = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise RequestError(f"{name} is {value!r}; expected {what} {limit}.")


@dataclass(frozen=True)
class FitConfig:
    """What to fit. Sizes: give `ratio`, or `rank` and `atoms`, or one of them with `ratio`."""

    ratio: float | None = None  # bytes of GloBE over bytes of the dense gate and up experts
    rank: int | None = None  # R
    atoms: int | None = None  # M, per family
    support: int = 12  # C, non-zero codes per expert
    palette: int | None = None  # U, distinct atoms per layer and family; None is no limit
    phi: str = "identity"
    scope: str = "global"  # "layer": each layer uses atoms of its own
    seed: int = 0
    device: str = "auto"
    solver: str = "varpro"
    varpro: VarProConfig = field(default_factory=VarProConfig)
    alternating: AlternatingConfig = field(default_factory=AlternatingConfig)

    def __post_init__(self):
        _require_one_of("phi", self.phi, PHIS)
        _require_one_of("scope", self.scope, SCOPES)
        _require_one_of("solver", self.solver, ("varpro", "alternating"))
        if self.solver == "alternating" and self.phi != "identity":
            raise RequestError(
                f"phi is {self.phi} and the alternating solver takes steps that are exact for identity only; give phi "
                "identity, or solver varpro."
            )
        for name in ("rank", "atoms", "palette"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), int, 1)
        _require("support", self.support, int, 1)
        _require("seed", self.seed, int, 0, 2**62)
        if self.ratio is not None:
            _require("ratio", self.ratio, float, 0)
        if self.ratio is not None and self.rank is not None and self.atoms is not None:
            raise RequestError("ratio, rank and atoms are all given; give at most two of them, the third follows.")

    @property
    def steps(self) -> int:
        """Steps of the solver that is chosen."""
        return (self.varpro if self.solver == "varpro" else self.alternating).steps

    @classmethod
    def from_options(cls, toml_file: Path | None, options: dict) -> "FitConfig":
        """The settings of a TOML file, with a table for each solver, overridden by `options` not None; the option
        `steps` is that of the solver that is chosen.

        Raises RequestError for a file that cannot be read and for a setting that does not exist.
        """
        settings: dict = {}
        if toml_file is not None:
            try:
                settings = tomllib.loads(toml_file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise RequestError(f"{toml_file} is not a readable TOML file ({error}).") from error
        settings |= {name: value for name, value in options.items() if value is not None and name != "steps"}
        config = _from_table(cls, settings, "", toml_file)
        if options.get("steps") is None:
            return config
        chosen = replace(getattr(config, config.solver), steps=options["steps"])
        return replace(config, **{config.solver: chosen})


def _from_table(owner: type, given: dict, table: str, where: Path | None):
    """An `owner` from a TOML table, with tables inside for the fields that are settings themselves."""
    if not isinstance(given, dict):
        raise RequestError(f"{table} in {where} is {given!r}; expected a table, [{table}].")
    inside = {f.name: f.default_factory for f in fields(owner) if is_dataclass(f.default_factory)}
    known = {f.name for f in fields(owner)}
    if unknown := given.keys() - known:
        raise RequestError(
            f"{where} has the unknown setting {min(unknown)!r}; expected {', '.join(sorted(known - inside.keys()))}."
        )
    nested = {
        name: _from_table(inner, given[name], f"{table}.{name}".lstrip("."), where)
        for name, inner in inside.items()
        if name in given
    }
    return owner(**{**given, **nested})


def resolve_device(name: str) -> str:
    """The torch device that `name` stands for: "auto" is a GPU where there is one. Raises RequestError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise RequestError(f"device is {name!r}; expected auto, cpu or cuda.")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RequestError(f"device is {name} and torch sees no CUDA device; use cpu.")
    return name


DEFAULT_RATIO = 0.625


def globe_bytes(base: BaseModel, rank: int, atoms: int, support: int) -> int:
    """Bytes of a GloBE checkpoint in bf16, both families: adapters + bank + codes."""
    experts, inner, width = base.total_experts, base.intermediate_size, base.hidden_size
    adapters = experts * inner * rank * _WEIGHT_BYTES
    bank = atoms * rank * width * _WEIGHT_BYTES
    return 2 * (adapters + bank + experts * support * _CODE_BYTES)


def resolve_sizes(base: BaseModel, config: FitConfig) -> GlobeConfig:
    """The rank and the number of atoms that `config` asks for on this model.

    Raises RequestError, with the range that can be reached, when they cannot be had.
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
                f"With scope layer, {atoms} atoms leave a layer with {fewest} of its own and support is "
                f"{config.support}; give a support of at most {max(fewest, 1)}, or more atoms."
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
    # smallest and largest sizes that the fixed values leave
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
    if config.rank is None and atoms == experts:  # budget left over: only the rank can use it
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


def _up(value: float) -> str:
    return f"{value + 5e-5:.4f}"


def _down(value: float) -> str:
    return f"{value - 5e-5:.4f}"
