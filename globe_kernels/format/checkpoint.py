"""Read and write the GloBE checkpoint, format version 1. This module is the only owner of the format.

A directory with

    globe_config.json    GlobeConfig, provenance, the sha256 of each tensor file, a fingerprint that they share
    globe.safetensors    or globe-0000i-of-0000N.safetensors above 4 GiB, or such a name with the first digits of its
                         sha256, as globe-1f0c22ab.safetensors, where an older file had the name:
                         bank.{family}                          (M, R, D)
                         layers.{l}.{family}_adapter            (E, P, R)
                         layers.{l}.{family}_code_index         (E, C) int32
                         layers.{l}.{family}_code_value         (E, C) float32
    fit_report.json      measurements of the fit: errors per layer and family, baselines
    metrics.jsonl        the metric stream of the fit, one JSON object a line
    config.json          a sentence, for a person who gives the directory to from_pretrained

for family in gate, up; l is the id of the layer in the base model. Unused places of a code hold
index 0 and value 0. An exported Hugging Face directory holds the same tensors under the path of each layer's experts in
the model, the atoms under `exported_bank_key`, and the same configuration as `quantization_config`. Tensors that the
base fuses beside gate and up have the layout of GlobeMoEFFN there: down_proj (E, D, P), {family}_bias (E, P),
down_bias (E, D).

Symbols: E experts, P intermediate size, D hidden size, R rank, M atoms, C support.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError, safe_open

from globe_kernels.errors import GlobeError, tolerating, warn
from globe_kernels.format.directories import had_writer, holds_model, not_a_checkpoint
from globe_kernels.format.files import inner_file, parse_object, read_json
from globe_kernels.format.hub import local_directory
from globe_kernels.format.json_text import to_json
from globe_kernels.format.names import (
    BANK_NAME,
    CHECKPOINT_GUARD,
    CONFIG_NAME,
    FAMILIES,
    GUARD_KEY,
    METRICS_NAME,
    MODEL_CONFIG_NAME,
    PHIS,
    REPORT_NAME,
    SCOPES,
)
from globe_kernels.format.typed import Size, checked
from globe_kernels.format.verification import Verification, verifies
from globe_kernels.format.writing import ShardWriter, staged_directory

FORMAT_VERSION = 1
_MOST_BYTES = 2**60
_STEM = "globe"
_REMEDY = "restore the file or fit again with --restart"
# Keys of fit_report.json that tie it and the metric stream to the tensors.
_FIT, _METRICS = "fingerprint", "metrics_sha256"
_TRIES, _PAUSE = 40, 0.05  # openings while a writer replaces the files, and seconds between two of them
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class BaseModel:
    """The dense model that a checkpoint stands for: the facts about its experts."""

    name: str  # id or path, for people
    model_type: str
    hidden_size: Size  # D
    intermediate_size: Size  # P
    num_experts: dict[int, Size]  # layer id -> E
    left_dense: dict[int, tuple[Size, Size]] = field(default_factory=dict)  # (P, D) of layers that no bank stands for
    has_bias: bool = False  # gate, up and down of every expert have a bias

    @property
    def total_experts(self) -> int:
        """n: experts over all layers."""
        return sum(self.num_experts.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense gate and up experts in bf16."""
        return len(FAMILIES) * self.total_experts * self.intermediate_size * self.hidden_size * 2


@dataclass(frozen=True)
class GlobeConfig:
    """The configuration of a GloBE checkpoint: its base model and the sizes of its factors."""

    base: BaseModel
    rank: Size  # R
    num_atoms: Size  # M, per family
    support: Size  # C
    phi: str = "identity"
    scope: str = "global"
    palette: Size | None = None  # U: most atoms that one layer uses in one family; None is no limit
    dtype: str = "bfloat16"
    provenance: dict = field(default_factory=dict)  # seed, fit settings, library versions

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def bank_shape(self) -> tuple[int, int, int]:
        return (self.num_atoms, self.rank, self.base.hidden_size)

    def layer_shapes(self, layer: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return {name of a tensor within its layer: (shape, dtype)}."""
        num_experts = self.base.num_experts[layer]
        code = (num_experts, self.support)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for family in FAMILIES:
            adapter = (num_experts, self.base.intermediate_size, self.rank)
            shapes[f"{family}_adapter"] = (adapter, self.torch_dtype)
            shapes[f"{family}_code_index"] = (code, torch.int32)
            shapes[f"{family}_code_value"] = (code, torch.float32)
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return {tensor name: (shape, dtype)} of every tensor of the checkpoint."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            f"bank.{family}": (self.bank_shape(), self.torch_dtype) for family in FAMILIES
        }
        for layer in self.base.num_experts:
            for name, spec in self.layer_shapes(layer).items():
                shapes[f"layers.{layer}.{name}"] = spec
        return shapes

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensor_shapes().values())

    def to_dict(self) -> dict:
        base = asdict(self.base)
        base["num_experts"] = {str(layer): count for layer, count in self.base.num_experts.items()}
        base["left_dense"] = {str(layer): list(shape) for layer, shape in self.base.left_dense.items()}
        for name in ("left_dense", "has_bias"):  # a file without them is as it was before there were any
            if not base[name]:
                del base[name]
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "base"}
        return {"format_version": FORMAT_VERSION, "families": list(FAMILIES), "base": base, **others}

    @classmethod
    def from_dict(cls, data: dict, where: str) -> "GlobeConfig":
        """Parse and check; `where` names the file in the error."""
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise GlobeError(
                f"{where} has GloBE format version {version!r} and this library reads version {FORMAT_VERSION}; "
                "update globe_kernels, or fit and export again."
            )
        names = {f.name for f in fields(cls)}
        config = checked(cls, {name: value for name, value in data.items() if name in names}, where, _REMEDY)
        for name, value, allowed in (
            ("phi", config.phi, PHIS),
            ("scope", config.scope, SCOPES),
            ("dtype", config.dtype, tuple(DTYPES)),
            ("families", data.get("families"), (list(FAMILIES),)),
        ):
            if value not in allowed:
                raise GlobeError(f"{where} has {name} {value!r}; this library reads {', '.join(map(str, allowed))}.")
        for found, is_wrong in (
            ("no layers", not config.base.num_experts),
            (f"{config.num_atoms} atoms and a support of {config.support}", config.support > config.num_atoms),
            (f"sizes of {config.tensor_bytes} bytes", config.tensor_bytes >= _MOST_BYTES),
        ):
            if is_wrong:
                raise GlobeError(f"{where} has {found}, which no checkpoint has; {_REMEDY}.")
        return config


def exported_bank_key(family: str) -> str:
    return f"{BANK_NAME}.{family}"


@dataclass(frozen=True)
class Code:
    """Sparse codes of the experts of one layer and family."""

    index: torch.Tensor  # (E, C) int32, global atom ids
    value: torch.Tensor  # (E, C) float32

    @property
    def palette(self) -> int:
        """U: the distinct atoms that these experts use."""
        return self.index.unique().numel()


@dataclass(frozen=True)
class LayerFactors:
    """The factors of one layer and family, without the bank."""

    adapter: torch.Tensor  # (E, P, R)
    code: Code


class _Listed(TypedDict, total=False):
    """The parts of globe_config.json that name the tensor files."""

    files: dict[str, str]  # name -> sha256
    fingerprint: str | None


class GlobeCheckpoint:
    """An opened checkpoint: `config`, and tensors read on demand. Opening checks names, shapes and dtypes.

    All files belong to one fit, also while a writer replaces them, and stay readable then.
    """

    def __init__(self, path: str | Path, *, verify: bool = True):
        """Open the checkpoint in directory `path`.

        `path` may be the id of a checkpoint on the Hub, also as id@revision. `verify`: compare the sha256 of a file
        before the first of its tensors is used. Raises RequestError when `path` holds no GloBE checkpoint, GlobeError
        when it is damaged.
        """
        self.path, self._verify = local_directory(path), verify and verifies()
        if not (self.path / CONFIG_NAME).is_file():
            raise not_a_checkpoint(path)
        for _ in range(_TRIES):
            before = self._switch()
            try:
                self._open_all()
            except (GlobeError, OSError):
                if self._switch() == before:
                    raise
                continue
            is_written = had_writer(self.path)  # before the switch is looked at: a writer may end in between
            if self._switch() == before and (self._is_whole() or not is_written):
                break
            time.sleep(_PAUSE)
        if not self._is_whole():
            self._report = self.metrics = ""
            warn(
                f"{REPORT_NAME} or {METRICS_NAME} in {self.path} is of another fit than the tensors, so GloBE reads "
                "the checkpoint without both; restore the files, or run the command that wrote them again."
            )

    def _switch(self) -> tuple[int, int] | None:
        """Identify the file that a writer replaces last."""
        with suppress(OSError):
            status = (self.path / CONFIG_NAME).stat()
            return status.st_ino, status.st_mtime_ns
        return None

    def _open_all(self) -> None:
        data = read_json(inner_file(self.path, CONFIG_NAME), _REMEDY, finite=True)
        where = str(self.path / CONFIG_NAME)
        self.config = GlobeConfig.from_dict(data, where)
        listed = checked(_Listed, data, where, _REMEDY)
        files, self.fingerprint = listed.get("files", {}), listed.get("fingerprint")
        handles = {name: self._open(name) for name in files}
        self._verification = Verification(self.path, files, "copy the file again, or fit again with --restart")
        self.bytes_on_disk = sum((self.path / name).stat().st_size for name in files)  # of the tensor files
        self._where = {key: (name, handle) for name, handle in handles.items() for key in handle.keys()}  # noqa: SIM118
        self._check_tensors()
        self._report = self._text(REPORT_NAME)
        #: The metric stream of the fit, one JSON object a line; empty when the checkpoint came without it.
        self.metrics = self._text(METRICS_NAME)

    def _text(self, name: str) -> str:
        """Read a file without which the checkpoint is whole; empty when there is none."""
        path = inner_file(self.path, name)
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def _is_whole(self) -> bool:
        """Whether report and metric stream are of this fit, as far as the files tell."""
        with suppress(GlobeError):  # the report is damaged, which counts where somebody asks for it
            report = self._parsed_report()
            fit, metrics = report.get(_FIT), report.get(_METRICS)
            return fit in (None, self.fingerprint) and (not self.metrics or metrics in (None, _sha256(self.metrics)))
        return True

    def _open(self, name: str):
        path = inner_file(self.path, name)
        if not path.is_file():
            raise GlobeError(f"{path} is missing; {CONFIG_NAME} lists it, so restore the file or fit again.")
        try:
            handle = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: torch cannot map the file
            raise GlobeError(
                f"{path} is damaged or truncated ({error}); copy it again, or fit again with --restart."
            ) from error
        if (handle.metadata() or {}).get("fingerprint") != self.fingerprint:
            raise GlobeError(
                f"{path} was not written together with the {CONFIG_NAME} beside it; restore both from one fit, or "
                "fit again."
            )
        return handle

    def _check_tensors(self) -> None:
        for name, (shape, dtype) in self.config.tensor_shapes().items():
            if name not in self._where:
                raise GlobeError(f"{self.path} has no tensor {name}; restore its tensor files or fit again.")
            view = self._where[name][1].get_slice(name)
            found = (tuple(view.get_shape()), _TORCH_DTYPES.get(view.get_dtype(), view.get_dtype()))
            if found != (shape, dtype):
                raise GlobeError(
                    f"Tensor {name} in {self.path} is {found[1]} {found[0]} and {CONFIG_NAME} says {dtype} {shape}; "
                    "the files are of different fits, restore them or fit again."
                )

    def verify(self) -> None:
        """Compare the sha256 of every tensor file with the recorded sha256 now. Raises GlobeError."""
        self._verification.require()

    def remove_leftovers(self) -> None:
        """Remove the files that a killed writer of this checkpoint left beside it, such as the shards from before."""
        with staged_directory(self.path, switch=CONFIG_NAME, stems=[_STEM]) as staging:
            for name in {CONFIG_NAME, *(name for name, _ in self._where.values())}:
                shutil.copyfile(self.path / name, staging / name)

    def bank(self, family: str) -> torch.Tensor:
        """Read the atoms (M, R, D) of a family."""
        return self._tensor(f"bank.{family}")

    def layer(self, layer: int, family: str) -> LayerFactors:
        """Read the factors of the layer with id `layer`. Raises GlobeError when a code points outside the bank."""
        return LayerFactors(self._tensor(f"layers.{layer}.{family}_adapter"), self.code(layer, family))

    def code(self, layer: int, family: str) -> Code:
        """Read the codes of a layer without its adapters."""
        index, value = (self._tensor(f"layers.{layer}.{family}_code_{part}") for part in ("index", "value"))
        check_codes(index, self.config.num_atoms, f"layers.{layer}.{family}_code_index in {self.path}")
        return Code(index, value)

    def _tensor(self, name: str) -> torch.Tensor:
        file, handle = self._where[name]
        if self._verify:
            self._verification.require([file])
        tensor = handle.get_tensor(name)
        require_finite(tensor, f"{name} in {self.path}")
        return tensor

    def report(self) -> dict:
        """Return fit_report.json, the measurements of the fit; {} when the checkpoint came without it."""
        report = self._parsed_report()
        return {key: value for key, value in report.items() if key not in (_FIT, _METRICS)}

    def _parsed_report(self) -> dict:
        return parse_object(self._report, self.path / REPORT_NAME, _REMEDY, finite=True) if self._report else {}


_TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
}


def check_codes(index: torch.Tensor, num_atoms: int, where: str) -> None:
    """Raise GlobeError when a code index names no atom: a GPU would read outside the bank."""
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= num_atoms:
        raise GlobeError(
            f"{where} has atom ids from {low} to {high} and the bank has {num_atoms} atoms; the file is damaged, "
            "restore it or fit again."
        )


def require_finite(tensor: torch.Tensor, where: str) -> None:
    """Raise GlobeError when a tensor of factors has NaN or infinity."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise GlobeError(f"{where} holds NaN or infinity; restore the file or fit again.")


class CheckpointWriter:
    """Add the factors of a checkpoint layer by layer; `writing_checkpoint` makes one."""

    def __init__(self, staging: Path, target: Path, config: GlobeConfig, banks: dict[str, torch.Tensor]):
        self._config = config
        self._staging, self._target = staging, target
        # ties the tensor files to the configuration: files of two fits are refused when they are opened
        digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
        for family in FAMILIES:
            digest.update(banks[family].cpu().contiguous().view(torch.uint8).numpy().data)
        self._fingerprint = digest.hexdigest()
        self._shards = ShardWriter(staging, target, _STEM, {"fingerprint": self._fingerprint})
        self._missing = config.tensor_shapes()
        for family in FAMILIES:
            self._add(f"bank.{family}", banks[family])

    def add_layer(self, layer: int, family: str, factors: LayerFactors) -> None:
        prefix = f"layers.{layer}.{family}"
        self._add(f"{prefix}_adapter", factors.adapter)
        self._add(f"{prefix}_code_index", factors.code.index)
        self._add(f"{prefix}_code_value", factors.code.value)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        expected = self._missing.pop(name)
        found = (tuple(tensor.shape), tensor.dtype)
        assert found == expected, f"{name} is {found}, the configuration says {expected}"
        self._shards.add(name, tensor.cpu())

    def finish(self, report: dict, metrics: list[dict]) -> None:
        assert not self._missing, f"not written: {sorted(self._missing)}"
        self._shards.finish()
        config = {**self._config.to_dict(), "fingerprint": self._fingerprint, "files": self._shards.sha256}
        (self._staging / CONFIG_NAME).write_text(_lines(config), encoding="utf-8")
        if not holds_model(self._target):  # of a checkpoint beside its model: that config.json stays
            self._write_beside(MODEL_CONFIG_NAME, _lines({"model_type": CHECKPOINT_GUARD, GUARD_KEY: CHECKPOINT_GUARD}))
        stream = "".join(to_json(record) + "\n" for record in metrics)
        self._write_beside(METRICS_NAME, stream)
        self._write_beside(REPORT_NAME, _lines({_FIT: self._fingerprint, _METRICS: _sha256(stream), **report}))

    def _write_beside(self, name: str, text: str) -> None:
        """Write a file without which the checkpoint is whole; a failure leaves the checkpoint without it."""
        path = self._staging / name
        with tolerating(f"Writing {name}", f"the checkpoint in {self._target} is complete without it"):
            try:
                path.write_text(text, encoding="utf-8")
            except OSError:
                path.unlink(missing_ok=True)  # half a file
                raise


@contextmanager
def writing_checkpoint(
    path: str | Path, config: GlobeConfig, banks: dict[str, torch.Tensor]
) -> Iterator[CheckpointWriter]:
    """Write a checkpoint atomically: `path` holds the old one until the block ends, the new one after it.

    `banks` holds the atoms (M, R, D) of each family. Shards of the checkpoint that was there and that the new one does
    not replace are removed; other files are left alone.
    """
    target = Path(path)
    beside = [METRICS_NAME, REPORT_NAME, *([] if holds_model(target) else [MODEL_CONFIG_NAME])]
    with staged_directory(target, switch=CONFIG_NAME, stems=[_STEM], optional=beside) as staging:
        yield CheckpointWriter(staging, target, config, banks)


def _lines(value: dict) -> str:
    return to_json(value, indent=2) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
