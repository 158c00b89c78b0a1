"""Read the tensors of a checkpoint under the names and shapes that they have when nothing is quantised."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch

from globe_fit.data.dtypes import DTYPES
from globe_fit.data.quantized.formats import FORMATS, Stored
from globe_fit.data.quantized.refused import require_readable
from globe_fit.data.quantized.weight import Files, QuantizedWeight
from globe_kernels.errors import GlobeError, RequestError

# The codes of weight K are stored as K or as K + one of these ends.
_CODES = ("_packed", "_blocks")
# The tensors that go with weight K: K + an end or, where K is `module.weight`, `module` + an end.
_SCALES = ("_scale_inv", "_scale", "_scales")
_OTHERS = ("_scale_2", "_global_scale", "_zero_point", "_shape", "_activation_scale")
_MODULE_SCALES = (".scale", ".qscale_weight")
_MODULE_OTHERS = (".input_scale", ".input_global_scale", ".input_zero_point", ".activation_scale", ".qscale_act")
_CACHE_SCALES = (".k_scale", ".v_scale")  # of the KV cache: no weight has them


class StoredTensors:
    """The tensors of a checkpoint by logical key: the names and the values of the model without quantisation.

    A quantised weight appears once, under the key that the unquantised checkpoint has (`..gate_proj.weight`,
    `..experts.gate_up_proj`); its scales and other companions do not appear. All other tensors are as stored. Weights
    of one checkpoint may have different formats.
    """

    def __init__(self, files: Files, quantization_config: dict):
        """Read the headers and no data; `quantization_config` is of config.json, {} where it has none.

        Raises RequestError for formats that GloBE does not read, GlobeError for scales that are missing or do not fit.
        """
        self.files = files
        require_readable(files.weight_map, quantization_config)
        self._quantized: dict[str, QuantizedWeight] = {}
        keys = {}  # name of the codes -> logical key
        for name in files.weight_map:
            key = next((name.removesuffix(end) for end in _CODES if name.endswith(end)), name)
            if (weight := _quantized(key, name, files, quantization_config)) is not None:
                if key in self._quantized or (key != name and key in files.weight_map):
                    raise GlobeError(f"The checkpoint holds {key} twice, once as {name}; download it again.")
                keys[name], self._quantized[key] = key, weight
        companions = {name for weight in self._quantized.values() for name in weight.stored} - keys.keys()
        if quantization_config:
            companions |= {name for name in files.weight_map if name.endswith(_CACHE_SCALES)}
        # a dict as a set that keeps the order of the checkpoint
        self.keys = dict.fromkeys(keys.get(name, name) for name in files.weight_map if name not in companions)
        for key in self.keys:
            if key not in self._quantized:
                _require_numbers(key, files)

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    @property
    def has_quantized(self) -> bool:
        """Whether any weight is stored as codes and scales."""
        return bool(self._quantized)

    def is_quantized(self, key: str) -> bool:
        """Whether `key` is stored as codes and scales."""
        return key in self._quantized

    @property
    def default_dtype(self) -> torch.dtype:
        """The dtype that transformers gives the values where config.json states none: of the first floating tensor."""
        return next((dtype for key in self.keys if (dtype := self.dtype(key)).is_floating_point), torch.float32)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of the values."""
        weight = self._quantized.get(key)
        return tuple(self.files.view(key).get_shape()) if weight is None else weight.model_shape

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of the values that `read` returns."""
        weight = self._quantized.get(key)
        return DTYPES[self.files.view(key).get_dtype()] if weight is None else weight.dtype

    def stored(self, key: str) -> tuple[str, ...]:
        """Return the names of the stored tensors behind `key`, the codes first."""
        weight = self._quantized.get(key)
        return (key,) if weight is None else weight.stored

    def num_bytes(self, key: str) -> int:
        """Count the bytes on disk, with the scales and other companions."""
        return sum(map(self.files.num_bytes, self.stored(key)))

    def dense_bytes(self, key: str) -> int:
        """Count the bytes of the values that `read` returns."""
        return math.prod(self.shape(key)) * self.dtype(key).itemsize

    def read(self, key: str, *index: int | slice, device: str | torch.device = "cpu") -> torch.Tensor:
        """Read the values of `key` at `index` onto `device`; an index for each of the first axes, by default all.

        The codes of a quantised weight become numbers on `device`; no more than the slice does. Raises GlobeError when
        a scale is NaN.
        """
        weight = self._quantized.get(key)
        if weight is None:
            values = self.files.view(key)[index] if index else self.files.read(key)
            return values.to(device)
        slices = [part if isinstance(part, slice) else slice(part, part + 1) for part in index]
        slices += [slice(None)] * (len(weight.shape) - len(index))
        values = weight.read(self.files, slices, device)
        return values[*(slice(None) if isinstance(part, slice) else 0 for part in index)]

    def views(self) -> dict[str, Any]:
        """Return the tensors as transformers takes a state dict: a view is read by `view[...]`, when it is needed."""
        return {key: _View(self, key) if key in self._quantized else self.files.view(key) for key in self.keys}


@dataclass(frozen=True)
class _View:
    tensors: StoredTensors
    key: str

    def __getitem__(self, _: EllipsisType) -> torch.Tensor:
        return self.tensors.read(self.key)


def _quantized(key: str, codes: str, files: Files, config: dict) -> QuantizedWeight | None:
    """Return the weight `key` whose codes are the tensor `codes`; None when that tensor is no codes."""
    found = _companions(key, files.weight_map)
    scales = [found.pop(end) for end in (*_SCALES, *_MODULE_SCALES) if end in found]
    dtype = files.view(codes).get_dtype()
    if not scales:
        return None
    if dtype in ("F64", "F32", "BF16", "F16"):
        if key.endswith(".weight") and scales[0].startswith(key):
            raise GlobeError(f"{key} is stored as {dtype} and has scales, {scales[0]}; download the checkpoint again.")
        return None
    if len(scales) > 1:
        raise GlobeError(f"{codes} has two tensors of scales, {' and '.join(scales)}; download the checkpoint again.")
    stored = Stored(codes, scales[0], found, files, config)
    if len(shape := stored.shape(codes)) < 2 or 0 in shape:
        raise GlobeError(f"{codes} has scales and is of shape {shape}, which no matrix has; download it again.")
    weight = next((weight for read in FORMATS if (weight := read(stored)) is not None), None)
    if weight is None:
        raise RequestError(
            f"{codes} is stored as {dtype} with scales of {stored.dtype(scales[0])} ({scales[0]}), which GloBE does "
            "not read; give the unquantised model."
        )
    return weight


def _companions(key: str, names: Mapping[str, str]) -> dict[str, str]:
    """Return {end of the name: name} of the tensors that go with weight `key`."""
    found = {end: key + end for end in (*_SCALES, *_OTHERS) if key + end in names}
    if key.endswith(".weight"):
        module = key.removesuffix(".weight")
        found |= {end: module + end for end in (*_MODULE_SCALES, *_MODULE_OTHERS) if module + end in names}
    return found


def _require_numbers(name: str, files: Files) -> None:
    """Raises GlobeError when a tensor that goes with no quantised weight is codes or scales."""
    dtype = files.view(name).get_dtype()
    is_codes = dtype.startswith("F8") or (dtype in ("U8", "I8", "I32") and name.endswith((".weight", *_CODES)))
    if is_codes:
        raise GlobeError(f"{name} is stored as {dtype} and has no scales beside it; download the checkpoint again.")
    if name.endswith(tuple(f".weight{end}" for end in (*_SCALES, *_OTHERS))):
        raise GlobeError(f"{name} belongs to a quantised weight that the checkpoint lacks; download it again.")
