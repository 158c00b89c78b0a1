"""Settings of a fit: a frozen dataclass per owner, from options and from a TOML file."""

import math
import re
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path

from globe_kernels.errors import RequestError
from globe_kernels.format.names import PHIS, SCOPES

SOLVERS = ("varpro", "alternating")
DEFAULT_RATIO = 0.625
PRESETS = SMALL, FAST = "small", "fast"  # sizes for a purpose (globe_fit.plan.presets)
_PERCENT_FROM = 2  # a larger ratio was meant in percent
SELF = "self"  # in place of a text to calibrate on: the model writes the text
AUTO = "auto"  # the same where the model can write, and no text where it cannot
SNAPSHOT_MINUTES = 5.0  # between two snapshots


@dataclass(frozen=True)
class VarProConfig:
    """Settings of the variable-projection solver (globe_fit.solvers.varpro)."""

    steps: int = 1500  # at most
    lr: float = 1.0  # of the bank, in units of its RMS
    code_lr_scale: float = 0.3
    first_cycle: int = 100  # steps; each cycle is twice as long as the cycle before
    warmup_steps: int = 20  # of each cycle, at most a fifth of it; the support is fixed after the first warm-up
    plateau: float = 0.01  # end the fit after a cycle that lowers the error by a smaller share
    ridge: float = 1e-6  # of the mean diagonal of each Gram matrix
    candidates: int = 64  # atoms from which an expert chooses its support and, with a palette, a layer its palette

    def __post_init__(self):
        _require("steps", self.steps, int, 0)
        _require("candidates", self.candidates, int, 1)
        _require("first_cycle", self.first_cycle, int, 1)
        _require("lr", self.lr, float, 0)
        _require("code_lr_scale", self.code_lr_scale, float, 0)
        _require("warmup_steps", self.warmup_steps, int, 0)
        _require("plateau", self.plateau, float, 0, 1)
        _require("ridge", self.ridge, float, 0)


@dataclass(frozen=True)
class CodingConfig:
    """Settings of the codes of the alternating solver while the support is free; afterwards codes are least squares."""

    method: str = "least_squares"  # on the atoms in use; "entmax": gradient steps; "omp": a new pursuit each round
    initial: str = "nnls"  # non-negative least squares; "simplex": codes that sum to 1; "given": the codes of the start
    l1: float = 0.0  # weight of the l1 norm, for initial codes and entmax codes
    prune: float = 0.0  # drop codes below this share of the largest code of an expert

    def __post_init__(self):
        _require_one_of("method", self.method, ("least_squares", "entmax", "omp"))
        _require_one_of("initial", self.initial, ("nnls", "simplex", "given"))
        _require("l1", self.l1, float, 0)
        _require("prune", self.prune, float, 0, 1)


@dataclass(frozen=True)
class EntmaxConfig:
    """Codes entmax(z / T): gradient steps on z, and a temperature T that leads the codes to the support."""

    alpha: float = 1.5  # 2 is sparsemax
    lr: float = 0.1  # of Adam on z
    steps: int = 2  # of Adam in a round, one pass each
    eta: float = 0.1  # gain of the control of T
    every: int = 1  # rounds between two changes of T

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
    targets: str = "aligned"  # of MOD, pursuit and initial codes; "svd": in the coordinates of separate SVDs
    cg_steps: int = 2  # of an exact dictionary step, one pass each
    support_at: float = 0.15  # share of the rounds after which the support is fixed
    patience: int = 10  # end the fit after so many rounds that gain less than 0.1 % together and keep the support
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
    """Raise RequestError unless `value` is a number of type `kind` from `low` to `high`."""
    is_kind = isinstance(value, int) if kind is int else isinstance(value, (int, float))
    if isinstance(value, bool) or not is_kind or not low <= value <= high or value == math.inf:
        number = "a whole number" if kind is int else "a number"
        limit = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise RequestError(f"{name} is {value!r}; expected {number} {limit}.")


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit. For the sizes give `ratio`, or `rank` and `atoms`, or `ratio` with `rank` or `atoms`."""

    ratio: float | None = None  # bytes of GloBE over bytes of the dense gate and up experts, in bf16
    rank: int | None = None  # R
    atoms: int | None = None  # M, per family
    support: int = 12  # C, non-zero codes per expert
    palette: int | None = None  # U, distinct atoms per layer and family; None: no limit
    phi: str = "identity"
    scope: str = "global"  # "layer": no two layers share an atom
    seed: int = 0
    device: str = "auto"
    solver: str = "varpro"
    varpro: VarProConfig = field(default_factory=VarProConfig)
    alternating: AlternatingConfig = field(default_factory=AlternatingConfig)

    def __post_init__(self):
        _require_one_of("phi", self.phi, PHIS)
        _require_one_of("scope", self.scope, SCOPES)
        _require_one_of("solver", self.solver, SOLVERS)
        if self.solver == "alternating" and self.phi != "identity":
            raise RequestError(
                f"phi is {self.phi} and the steps of the alternating solver are exact for identity only; give phi "
                "identity, or solver varpro."
            )
        for name in ("rank", "atoms", "palette"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), int, 1)
        if not isinstance(self.device, str):
            raise _unknown_device(self.device)
        _require("support", self.support, int, 1)
        _require("seed", self.seed, int, 0, 2**62)
        if self.ratio is not None:
            _require("ratio", self.ratio, float, 0)
            if self.ratio >= _PERCENT_FROM:
                raise RequestError(
                    f"ratio is {self.ratio:g} and a ratio is a share of the dense bytes; did you mean "
                    f"{self.ratio / 100:g}?"
                )
        if self.ratio is not None and self.rank is not None and self.atoms is not None:
            raise RequestError("ratio, rank and atoms are all given; give at most two of them, and the third follows.")

    @property
    def steps(self) -> int:
        """Steps of the chosen solver."""
        return (self.varpro if self.solver == "varpro" else self.alternating).steps

    @classmethod
    def from_options(cls, toml_file: Path | None, options: dict) -> "FitConfig":
        """Read the settings of a TOML file, which has a table for each solver; `options` that are not None win.

        The option `steps` goes to the chosen solver. Raises RequestError for a file that cannot be read and for a
        setting that does not exist.
        """
        settings: dict = {}
        if toml_file is not None:
            try:
                settings = tomllib.loads(toml_file.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise RequestError(f"{toml_file} is not a readable TOML file ({error}).") from error
        settings |= {name: value for name, value in options.items() if value is not None and name != "steps"}
        config = _from_table(cls, settings, "", toml_file)
        if options.get("steps") is None:
            return config
        chosen = replace(getattr(config, config.solver), steps=options["steps"])
        return replace(config, **{config.solver: chosen})


def _from_table(owner: type, given: dict, table: str, where: Path | None):
    """Make an `owner` from a TOML table; a field that is a settings class has a table inside."""
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
    """Return the torch device for `name`: "auto" is a GPU where there is one. Raises RequestError."""
    import torch  # here: the command line reads these settings before it has seconds for torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise _unknown_device(name)
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RequestError(f"device is {name} and torch sees no CUDA device; use cpu.")
    return name


def _unknown_device(name: object) -> RequestError:
    return RequestError(f"device is {name!r}; expected auto, cpu or cuda.")
