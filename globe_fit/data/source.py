"""Stream the experts of a Hugging Face checkpoint from its safetensors files, one layer at a time.

Both layouts are read: a 2-D tensor per expert (`experts.{e}.gate_proj.weight`) and fused 3-D tensors
(`experts.gate_up_proj`, laid out as the architecture says). Nothing is read before the caller asks for it.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.architectures import ExpertKey, architecture_of
from globe_kernels.format.checkpoint import BaseModel
from globe_kernels.format.directories import holds_export, holds_model, not_a_model
from globe_kernels.format.files import read_json
from globe_kernels.format.names import FAMILIES, MODEL_CONFIG_NAME

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_READABLE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}


def read_config(model_dir: Path) -> dict:
    """Read config.json of a dense model. Raises RequestError for another directory, GlobeError for a damaged file."""
    if not holds_model(model_dir) or holds_export(model_dir):
        raise not_a_model(model_dir)
    return read_json(model_dir / MODEL_CONFIG_NAME, "download it again")


def configured_base(config: dict, where: Path) -> BaseModel:
    """Return the sizes that a config.json, at path `where`, gives the experts; no weight is read.

    Raises RequestError when the model is not a known MoE model, GlobeError when sizes are missing.
    """
    architecture = architecture_of(config.get("model_type"))
    try:
        num_experts = architecture.num_experts(config)
        return BaseModel(
            name=_model_name(where.absolute().parent) if where.name == MODEL_CONFIG_NAME else where.stem,
            model_type=architecture.model_type,
            hidden_size=int(config["hidden_size"]),
            intermediate_size=architecture.intermediate_size(config),
            num_experts=dict.fromkeys(architecture.moe_layers(config), num_experts),
        )
    except (KeyError, TypeError) as error:
        raise GlobeError(
            f"{where} is not a complete {architecture.model_type} configuration ({error}); download it again."
        ) from error


def _model_name(directory: Path) -> str:
    """Name a model by its directory; in the cache of the Hub by its id there, organisation/name."""
    for part in directory.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return directory.resolve().name


class TensorFiles:
    """The safetensors files of a model directory, and which file holds which tensor."""

    def __init__(self, model_dir: Path):
        """Open the files. Raises GlobeError for a shard that is missing, truncated or lacks a tensor of the index."""
        self.model_dir = model_dir
        index = model_dir / INDEX_NAME
        if index.is_file():
            weight_map = read_json(index, "download it again").get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise GlobeError(f"{index} is not a valid shard index, a map of tensors to files; download it again.")
            self.weight_map: dict[str, str] = weight_map
            self._handles = {name: self._open(name) for name in sorted(set(weight_map.values()))}
            self._require_listed_keys()
        elif (model_dir / SINGLE_NAME).is_file():
            self._handles = {SINGLE_NAME: self._open(SINGLE_NAME)}
            self.weight_map = dict.fromkeys(self._handles[SINGLE_NAME].keys(), SINGLE_NAME)
        else:
            raise RequestError(
                f"{model_dir} holds neither {SINGLE_NAME} nor {INDEX_NAME}; GloBE reads safetensors, so download or "
                "convert the model in that format."
            )

    def _open(self, name: str):
        path = self.model_dir / name
        if not path.is_file():
            raise GlobeError(
                f"Shard {name} is missing from {self.model_dir}; {INDEX_NAME} lists it, download it again."
            )
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise GlobeError(
                f"Shard {path} is truncated or damaged ({path.stat().st_size} bytes: {error}); download it again."
            ) from error

    def _require_listed_keys(self) -> None:
        present = {name: set(handle.keys()) for name, handle in self._handles.items()}
        for key, name in self.weight_map.items():
            if key not in present[name]:
                raise GlobeError(
                    f"Shard {name} in {self.model_dir} lacks {key}, which the index lists; download it again."
                )

    @property
    def names(self) -> list[str]:
        """Return the file names of the shards."""
        return list(self._handles)

    def view(self, key: str):
        """Return a lazy slice of a tensor: its shape, its dtype, and rows on demand."""
        return self._handles[self.weight_map[key]].get_slice(key)

    def num_bytes(self, key: str) -> int:
        view = self.view(key)
        return math.prod(view.get_shape()) * _ITEM_BYTES.get(view.get_dtype(), 8)

    def read(self, key: str) -> torch.Tensor:
        return self._handles[self.weight_map[key]].get_tensor(key)


@dataclass(frozen=True)
class ExpertLayer:
    """The names of the tensors that hold the experts of one layer."""

    layer: int
    num_experts: int
    keys: dict[str, list[str]]  # matrix (as in ExpertKey) -> a key per expert, or the key of the fused tensor


class ExpertSource:
    """The gate and up experts of every MoE layer of a checkpoint on disk.

    `base` has the sizes, which are read from the tensors and checked against config.json. A bank needs one shape
    (P, D): where layers differ, the source has the layers of the shape that holds the most weights, and
    `base.left_dense` alone names the others. `read` returns the experts of one layer and family, and keeps nothing.
    """

    def __init__(self, model_dir: str | Path):
        """Read the headers. Raises RequestError for a directory without a known MoE model, GlobeError for damage."""
        self.model_dir = Path(model_dir)
        config = read_config(self.model_dir)
        self._top_k: int | None = config.get("num_experts_per_tok")
        configured = configured_base(config, self.model_dir / MODEL_CONFIG_NAME)
        self.architecture = architecture_of(configured.model_type)
        self.files = TensorFiles(self.model_dir)
        self.expert_keys: dict[str, ExpertKey] = {}
        for key in self.files.weight_map:
            if ".experts." in key and key.endswith(("_blocks", "_scales")):
                raise RequestError(
                    f"{key} in {self.model_dir} is of an MXFP4 checkpoint and GloBE reads {', '.join(_READABLE)}; load "
                    "the model in transformers with Mxfp4Config(dequantize=True) and save it with "
                    "save_original_format=False."
                )
            parsed = self.architecture.parse_key(key)
            # layers past num_hidden_layers are prediction heads that transformers does not load
            if parsed is not None and parsed.layer < config["num_hidden_layers"]:
                self.expert_keys[key] = parsed
        self.layers = self._group(self.architecture.num_experts(config), list(configured.num_experts))
        shapes = self._shapes(configured.intermediate_size, configured.hidden_size)
        inner, width = _shape_of_most(self.layers, shapes)
        left_dense = {layer: shape for layer, shape in shapes.items() if shape != (inner, width)}
        self.layers = [layer for layer in self.layers if layer.layer not in left_dense]
        self.expert_keys = {key: e for key, e in self.expert_keys.items() if e.layer not in left_dense}
        self.base = replace(
            configured,
            hidden_size=width,
            intermediate_size=inner,
            num_experts={layer.layer: layer.num_experts for layer in self.layers},
            left_dense=left_dense,
        )

    def _group(self, configured: int, expected_layers: list[int]) -> list[ExpertLayer]:
        found: dict[int, dict[tuple[str, int | None], str]] = {}
        for key, parsed in self.expert_keys.items():
            found.setdefault(parsed.layer, {})[parsed.matrix, parsed.expert] = key
        if not found:
            raise RequestError(
                f"{self.model_dir} has no routed experts among its {len(self.files.weight_map)} tensors; expected "
                f"the names of {self.architecture.model_type}, such as layers.0.mlp.experts.0."
                f"{self.architecture.gate}.weight or layers.0.mlp.experts.gate_up_proj."
            )
        if sorted(found) != expected_layers:
            raise GlobeError(
                f"{self.model_dir} has experts in layers {sorted(found)} and config.json says {expected_layers}; the "
                "checkpoint is incomplete or of another model, download it again."
            )
        counts = {layer: self._count(found[layer]) for layer in expected_layers}
        if configured not in counts.values():  # the configuration of another model, not layers that differ
            counts = {}
        layers = []
        for layer in expected_layers:
            num_experts = counts.get(layer) or configured
            keys: dict[str, list[str]] = {}
            for (matrix, expert), _ in found[layer].items():
                if matrix not in keys:
                    experts = [None] if expert is None else list(range(num_experts))
                    missing = [e for e in experts if (matrix, e) not in found[layer]]
                    if missing:
                        raise GlobeError(
                            f"Layer {layer} of {self.model_dir} lacks the {matrix} matrix of expert {missing[0]} "
                            f"({len(missing)} of {num_experts} missing); download the checkpoint again."
                        )
                    keys[matrix] = [found[layer][matrix, e] for e in experts]
            if not ({"gate", "up"} <= keys.keys() or "gate_up" in keys):
                raise GlobeError(f"Layer {layer} of {self.model_dir} lacks gate or up experts; download it again.")
            surplus = [e for _, e in found[layer] if e is not None and e >= num_experts]
            if surplus:
                raise GlobeError(
                    f"Layer {layer} of {self.model_dir} has expert {max(surplus)} and config.json says {num_experts} "
                    "experts; the files are of different models, download them again."
                )
            layers.append(ExpertLayer(layer, num_experts, keys))
        return layers

    def _count(self, found: dict[tuple[str, int | None], str]) -> int | None:
        """Return E of one layer, where the layer has as many experts as its router has rows; else None."""
        (_, expert), key = next(iter(found.items()))
        router = self.architecture.router_key(key)
        if router not in self.files.weight_map:
            return None
        held = max(e for _, e in found if e is not None) + 1 if expert is not None else self._shape(key)[0]
        return held if held == self._shape(router)[0] else None

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.files.view(key).get_shape())

    def _shapes(self, inner: int, width: int) -> dict[int, tuple[int, int]]:
        """Read {layer id: (P, D) of its gate and up experts} from the headers; config.json says (inner, width).

        Raises RequestError when the experts of one layer differ, GlobeError when no layer is as config.json says.
        """
        for layer in self.layers:
            for key in (key for matrix in ("gate", "up", "gate_up") for key in layer.keys.get(matrix, ())):
                if (dtype := self.files.view(key).get_dtype()) not in _READABLE:
                    raise RequestError(
                        f"{key} is stored as {dtype} and GloBE reads {', '.join(_READABLE)}; convert the model to bf16 "
                        "first."
                    )
        shapes = {}
        for layer in self.layers:
            read_shape = self._fused_shape if "gate_up" in layer.keys else self._separate_shape
            shapes[layer.layer] = read_shape(layer, inner, width)
        if (inner, width) not in shapes.values():
            rows, columns = next(iter(shapes.values()))
            raise GlobeError(
                f"The experts of {self.model_dir} are {rows} x {columns} and config.json says {inner} x {width}; "
                "the files are of different models, download them again."
            )
        return shapes

    def _separate_shape(self, layer: ExpertLayer, *_: int) -> tuple[int, int]:
        found: dict[tuple[int, ...], str] = {}
        for matrix in ("gate", "up", "down"):
            for key in layer.keys.get(matrix, ()):
                shape = self._shape(key)
                found.setdefault(shape[::-1] if matrix == "down" else shape, key)
        if len(found) > 1:
            (first, key), (second, other) = list(found.items())[:2]
            raise RequestError(
                f"The experts of layer {layer.layer} differ in shape: {key} is of a {first} expert and {other} of a "
                f"{second} expert; GloBE fits models whose layers differ, not layers whose experts differ."
            )
        ((inner, width),) = found
        return inner, width

    def _fused_shape(self, layer: ExpertLayer, inner: int, width: int) -> tuple[int, int]:
        """Return (P, D) as config.json says, or another shape when all fused tensors of the layer agree on it."""
        found = {
            name: [self._shape(key) for key in layer.keys.get(name.replace("_proj", ""), ())]
            for name in self.architecture.fused_shapes(layer.num_experts, inner, width)
        }
        _, *matrix = found["gate_up_proj"][0]
        rows, columns = matrix[::-1] if self.architecture.transposed else matrix
        for shape in ((inner, width), (rows // 2, columns)):
            expected = self.architecture.fused_shapes(layer.num_experts, *shape)
            if all(found[name] == [wanted] for name, wanted in expected.items()):
                return shape
        expected = self.architecture.fused_shapes(layer.num_experts, inner, width)
        name = next(name for name, shape in expected.items() if found[name] != [shape])
        raise GlobeError(
            f"{name} of the experts of layer {layer.layer} in {self.model_dir} is "
            f"{', '.join(map(str, found[name])) or 'missing'} and config.json says {expected[name]}; the files are "
            "incomplete or of different models, download them again."
        )

    def read(
        self,
        layer: ExpertLayer,
        family: str,
        experts: range | None = None,
        columns: slice | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read experts and columns of one layer and family, by default all, into `out` or float32 (E, P, D)."""
        experts = range(layer.num_experts) if experts is None else experts
        columns = slice(0, self.base.hidden_size) if columns is None else columns
        if out is None:
            out = torch.empty(len(experts), self.base.intermediate_size, columns.stop - columns.start)
        for number, matrix in enumerate(self._matrices(layer, family, experts, columns)):
            out[number] = matrix
        return out

    def stored_dtype(self, layer: ExpertLayer, family: str) -> torch.dtype:
        """Return the dtype of the experts of one layer and family on disk; float32 where they differ."""
        keys = layer.keys.get(family) or layer.keys["gate_up"]
        found = {self.files.view(key).get_dtype() for key in keys}
        return _READABLE[found.pop()] if len(found) == 1 else torch.float32

    def stored_bytes(self, family: str) -> int:
        """Count the bytes of all experts of one family on disk."""
        per_value = sum(layer.num_experts * self.stored_dtype(layer, family).itemsize for layer in self.layers)
        return per_value * self.base.intermediate_size * self.base.hidden_size

    @cached_property
    def facts(self) -> dict[str, int | None]:
        """Bytes of all tensors on disk, bytes of the tensors that a fit does not compress, and experts per token."""
        whole = sum(map(self.files.num_bytes, self.files.weight_map))
        replaced = (key for key, parsed in self.expert_keys.items() if parsed.matrix in ("gate", "up", "gate_up"))
        return {"bytes": whole, "rest_bytes": whole - sum(map(self.files.num_bytes, replaced)), "top_k": self._top_k}

    @cached_property
    def weights_sha256(self) -> str:
        """Hash gate and up of the first expert of every layer: models whose experts differ anywhere differ here.

        A training changes every expert, and the hash reads one of them.
        """
        digest = hashlib.sha256()
        for layer in self.layers:
            for family in FAMILIES:
                digest.update(self.read(layer, family, range(1)).numpy().data)
        return digest.hexdigest()

    def require_finite(self, layer: ExpertLayer, family: str, experts: range, weights: torch.Tensor) -> None:
        """Raises GlobeError that names the expert when a value of `weights`, of `experts`, is NaN or infinite."""
        # one reduction: a NaN or an infinity anywhere makes the largest magnitude non-finite
        if torch.isfinite(weights.abs().amax()):
            return
        expert = experts[int((~torch.isfinite(weights)).flatten(1).any(1).nonzero()[0])]
        keys = layer.keys.get(family) or layer.keys["gate_up"]
        raise GlobeError(
            f"Expert {expert} of layer {layer.layer} has NaN or infinity in its {family} matrix "
            f"({keys[min(expert, len(keys) - 1)]} in {self.model_dir}); repair or download the checkpoint again."
        )

    def _matrices(self, layer: ExpertLayer, family: str, experts: range, columns: slice) -> Iterator[torch.Tensor]:
        if family in layer.keys:
            for expert in experts:
                yield self.files.view(layer.keys[family][expert])[:, columns]
            return
        view = self.files.view(layer.keys["gate_up"][0])
        start = 0 if family == "gate" else self.base.intermediate_size
        for expert in experts:
            if self.architecture.transposed:  # (D, 2P) on disk
                yield self.architecture.part(view[expert : expert + 1, columns], family)[0]
            elif self.architecture.interleaved:  # rows that are not contiguous: both families are read
                yield self.architecture.part(view[expert : expert + 1, :, columns], family)[0]
            else:
                yield view[expert, start : start + self.base.intermediate_size, columns]

    @cached_property
    def layer_spans(self) -> list[tuple[ExpertLayer, slice]]:
        """Return every layer with the span of its experts among all n experts."""
        spans, start = [], 0
        for layer in self.layers:
            spans.append((layer, slice(start, start + layer.num_experts)))
            start += layer.num_experts
        return spans


def _shape_of_most(layers: list[ExpertLayer], shapes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the (P, D) of the most weights; of two equal counts, the shape that comes first."""
    weights: dict[tuple[int, int], int] = {}
    for layer in layers:
        shape = shapes[layer.layer]
        weights[shape] = weights.get(shape, 0) + layer.num_experts * math.prod(shape)
    return max(weights, key=lambda shape: weights[shape])
