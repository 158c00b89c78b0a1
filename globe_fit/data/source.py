"""Stream the experts of a Hugging Face checkpoint from its safetensors files, one layer at a time.

Both layouts are read: a 2-D tensor per expert (`experts.{e}.gate_proj.weight`) and fused 3-D tensors
(`experts.gate_up_proj`, in any layout that transformers reads). Nothing is read before the caller asks for it.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from globe_fit.data.disk_names import DiskNames, ExpertKey
from globe_fit.data.dtypes import DTYPES
from globe_fit.data.outline import Outline, shape_of_most
from globe_fit.data.quantized.config import quantization_of
from globe_fit.data.quantized.tensors import StoredTensors
from globe_fit.data.whole import require_whole
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.directories import holds_export, holds_model, no_weights, not_a_model, weights_entry
from globe_kernels.format.files import inner_file, read_json
from globe_kernels.format.hub import index_of, local_directory
from globe_kernels.format.layout import BIASES, DOWN, GATE_UP
from globe_kernels.format.names import FAMILIES, MODEL_CONFIG_NAME

_READABLE = (torch.bfloat16, torch.float16, torch.float32)


def read_config(model_dir: Path) -> dict:
    """Read config.json of a dense model. Raises RequestError for another directory, GlobeError for a damaged file."""
    if not holds_model(model_dir) or holds_export(model_dir):
        raise not_a_model(model_dir)
    return read_json(inner_file(model_dir, MODEL_CONFIG_NAME), "download it again")


class TensorFiles:
    """The safetensors files from which transformers loads a model, and which file holds which tensor."""

    def __init__(self, model_dir: Path):
        """Open the files that from_pretrained would open, and no others.

        Of a tensor that several shards hold the last shard counts, as in transformers. Raises RequestError when there
        are no such files, GlobeError for a shard that is missing, truncated or outside of the directory, and for a
        tensor that the index lists and no shard holds.
        """
        self.model_dir = model_dir
        entry = weights_entry(model_dir)
        if entry is None:
            raise no_weights(model_dir)
        listed = index_of(self._require(entry, MODEL_CONFIG_NAME)) if entry.endswith(".json") else {}
        lister = entry if listed else MODEL_CONFIG_NAME
        self._handles = {name: self._open(name, lister) for name in sorted(set(listed.values()) or {entry})}
        self.weight_map = {key: name for name, handle in self._handles.items() for key in handle.keys()}  # noqa: SIM118
        for key in self.weight_map:
            if (dtype := self.view(key).get_dtype()) not in DTYPES:
                raise RequestError(f"{key} in {model_dir} is stored as {dtype}, which GloBE does not read.")
        for key, name in listed.items():
            if key not in self.weight_map:
                raise GlobeError(f"Shard {name} in {model_dir} lacks {key}, which the index lists; download it again.")

    def _require(self, name: str, lister: str) -> Path:
        path = inner_file(self.model_dir, name)
        if not path.is_file():
            raise GlobeError(f"Shard {name} is missing from {self.model_dir}; {lister} lists it, download it again.")
        return path

    def _open(self, name: str, lister: str):
        path = self._require(name, lister)
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise GlobeError(
                f"Shard {path} is truncated or damaged ({path.stat().st_size} bytes: {error}); download it again."
            ) from error

    def view(self, key: str):
        """Return a lazy slice of a tensor: its shape, its dtype, and rows on demand."""
        return self._handles[self.weight_map[key]].get_slice(key)

    def num_bytes(self, key: str) -> int:
        view = self.view(key)
        return math.prod(view.get_shape()) * DTYPES[view.get_dtype()].itemsize

    def read(self, key: str) -> torch.Tensor:
        return self._handles[self.weight_map[key]].get_tensor(key)


@dataclass(frozen=True)
class ExpertLayer:
    """The names of the tensors that hold the experts of one layer."""

    layer: int
    num_experts: int
    keys: dict[str, list[str]]  # matrix (as in ExpertKey) -> a key per expert, or the key of the fused tensor

    @property
    def is_fused(self) -> bool:
        """Whether gate and up of all experts are one tensor."""
        return GATE_UP in self.keys

    def gate_or_up(self, family: str) -> list[str]:
        """Return the keys of the tensors that hold a family."""
        return self.keys[GATE_UP if self.is_fused else family]


class ExpertSource:
    """The gate and up experts of every MoE layer of a checkpoint on disk.

    `base` has the sizes, which are read from the tensors and checked against the model that config.json describes. A
    bank needs one shape (P, D): where layers differ, the source has the layers of the shape that holds the most
    weights, and `base.left_dense` alone names the others. `read` returns the experts of one layer and family, and
    keeps nothing.
    """

    def __init__(self, model_dir: str | Path):
        """Read the headers. Raises RequestError for a directory without a known MoE model, GlobeError for damage."""
        self.model_dir = local_directory(model_dir)
        quantization = quantization_of(read_config(self.model_dir))
        self.files = StoredTensors(TensorFiles(self.model_dir), quantization)
        self.outline = Outline.read(self.model_dir)
        configured = self.outline.base
        self.names = DiskNames(self.outline)
        self.expert_keys: dict[str, ExpertKey] = {}
        for key in self.files.keys:
            # a tensor that the model does not have, such as a prediction head, is no expert of it
            parsed = self.names.parse(key, self.files.shape(key))
            if parsed is not None:
                self.expert_keys[key] = parsed
        self.layers = self._group({layer: experts.sizes[0] for layer, experts in self.outline.experts.items()})
        shapes = self._shapes()
        sizes = {layer.layer: (layer.num_experts, *shapes[layer.layer]) for layer in self.layers}
        inner, width = shape_of_most(sizes)
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
        uneven = [e.name.rpartition(".")[0] for layer, e in self.outline.experts.items() if e.sizes != sizes[layer]]
        require_whole(self.model_dir, self.outline.model, self.files, uneven)

    def _group(self, configured: dict[int, int]) -> list[ExpertLayer]:
        """Group the keys by layer; `configured` is {layer id: E} of the model that config.json describes."""
        found: dict[int, dict[tuple[str, int | None], str]] = {}
        for key, parsed in self.expert_keys.items():
            found.setdefault(parsed.layer, {})[parsed.matrix, parsed.expert] = key
        if not found:
            raise RequestError(
                f"{self.model_dir} has no routed experts among its {len(self.files.keys)} tensors; expected "
                f"tensors that transformers reads as {next(iter(self.outline.experts.values())).name}.{GATE_UP}."
            )
        if sorted(found) != sorted(configured):
            raise GlobeError(
                f"{self.model_dir} has experts in layers {sorted(found)} and config.json says {sorted(configured)}; "
                "the checkpoint is incomplete or of another model, download it again."
            )
        routers = self._routers()
        counts = {layer: self._count(found[layer], routers.get(layer)) for layer in configured}
        if not any(counts[layer] == count for layer, count in configured.items()):
            counts = {}  # the configuration of another model, not layers that differ
        layers = []
        for layer, expected in configured.items():
            num_experts = counts.get(layer) or expected
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
            if not ({*FAMILIES} <= keys.keys() or GATE_UP in keys):
                raise GlobeError(f"Layer {layer} of {self.model_dir} lacks gate or up experts; download it again.")
            surplus = [e for _, e in found[layer] if e is not None and e >= num_experts]
            if surplus:
                raise GlobeError(
                    f"Layer {layer} of {self.model_dir} has expert {max(surplus)} and config.json says {num_experts} "
                    "experts; the files are of different models, download them again."
                )
            layers.append(ExpertLayer(layer, num_experts, keys))
        return layers

    def _routers(self) -> dict[int, str]:
        """Return {layer id: key on disk of the router's weights (E, D)}, which stand beside the experts."""
        layers = {}
        for layer, experts in self.outline.experts.items():
            block = experts.name.rpartition(".")[0]
            count, _, width = experts.sizes
            for name, parameter in self.outline.model.get_submodule(block).named_parameters():
                if parameter.shape == (count, width):
                    layers[f"{block}.{name}"] = layer
                    break
        live_keys = {key: self.names.live_key(key) for key in self.files.keys if key not in self.expert_keys}
        return {layers[live]: key for key, live in live_keys.items() if live in layers}

    def _count(self, found: dict[tuple[str, int | None], str], router: str | None) -> int | None:
        """Return E of one layer, where the layer has as many experts as its router has rows; else None."""
        if router is None:
            return None
        (_, expert), key = next(iter(found.items()))
        held = max(e for _, e in found if e is not None) + 1 if expert is not None else self.files.shape(key)[0]
        return held if held == self.files.shape(router)[0] else None

    def _shapes(self) -> dict[int, tuple[int, int]]:
        """Read {layer id: (P, D) of its gate and up experts} from the headers.

        Raises RequestError when the experts of one layer differ, GlobeError when no layer is as config.json says.
        """
        for layer in self.layers:
            for key in (key for matrix in (*FAMILIES, GATE_UP) for key in layer.keys.get(matrix, ())):
                if (dtype := self.files.dtype(key)) not in _READABLE:
                    raise RequestError(
                        f"{key} is stored as {dtype} and GloBE reads {', '.join(map(str, _READABLE))}; convert the "
                        "model to bf16 first."
                    )
        configured = {layer: experts.sizes[1:] for layer, experts in self.outline.experts.items()}
        shapes = {}
        for layer in self.layers:
            read_shape = self._fused_shape if layer.is_fused else self._separate_shape
            shapes[layer.layer] = read_shape(layer, *configured[layer.layer])
        if not any(shapes[layer] == shape for layer, shape in configured.items()):
            layer, (rows, columns) = next(iter(shapes.items()))
            inner, width = configured[layer]
            raise GlobeError(
                f"The experts of {self.model_dir} are {rows} x {columns} and config.json says {inner} x {width}; "
                "the files are of different models, download them again."
            )
        return shapes

    def _separate_shape(self, layer: ExpertLayer, *_: int) -> tuple[int, int]:
        found: dict[tuple[int, ...], str] = {}
        for matrix in (*FAMILIES, "down"):
            for key in layer.keys.get(matrix, ()):
                shape = self.files.shape(key)
                found.setdefault(shape[::-1] if matrix == "down" else shape, key)
        if len(found) > 1:
            (first, key), (second, other) = list(found.items())[:2]
            raise RequestError(
                f"The experts of layer {layer.layer} differ in shape: {key} is of a {first} expert and {other} of a "
                f"{second} expert; GloBE fits models whose layers differ, not layers whose experts differ."
            )
        ((shape, key),) = found.items()
        if len(shape) != 2:
            raise GlobeError(f"{key} in {self.model_dir} is of shape {shape} and no matrix; download it again.")
        return shape[0], shape[1]

    def _fused_shape(self, layer: ExpertLayer, inner: int, width: int) -> tuple[int, int]:
        """Return (P, D) as config.json says, or another shape when all fused tensors of the layer agree on it."""
        layouts = {matrix: self.expert_keys[keys[0]].layout for matrix, keys in layer.keys.items()}
        found = {matrix: self.files.shape(keys[0]) for matrix, keys in layer.keys.items()}

        def expected(inner: int, width: int) -> dict[str, tuple[int, ...]]:
            usual = self.outline.experts[layer.layer].layout
            names = usual.shapes(layer.num_experts, inner, width)
            return {name: layouts.get(name, usual).shapes(layer.num_experts, inner, width)[name] for name in names}

        candidates = [(inner, width)]
        if len(found[GATE_UP]) == 3:
            matrix = found[GATE_UP][1:]
            rows, columns = matrix[::-1] if layouts[GATE_UP].transposed else matrix
            candidates.append((rows // 2, columns))
        for shape in candidates:
            if found == expected(*shape):
                return shape
        name, wanted = next(
            (name, wanted) for name, wanted in expected(inner, width).items() if found.get(name) != wanted
        )
        raise GlobeError(
            f"{name} of the experts of layer {layer.layer} in {self.model_dir} is {found.get(name, 'missing')} and "
            f"config.json says {wanted}; the files are incomplete or of different models, download them again."
        )

    def read(
        self,
        layer: ExpertLayer,
        family: str,
        experts: range | None = None,
        columns: slice | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read experts and columns of one layer and family, by default all, into `out` or float32 (E, P, D).

        Quantised experts become numbers on the device of `out`.
        """
        experts = range(layer.num_experts) if experts is None else experts
        columns = slice(0, self.base.hidden_size) if columns is None else columns
        if out is None:
            out = torch.empty(len(experts), self.base.intermediate_size, columns.stop - columns.start)
        for number, matrix in enumerate(self._matrices(layer, family, experts, columns, out.device)):
            out[number] = matrix
        return out

    def read_kept(self, layer: ExpertLayer, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """Read the tensors of the experts of one layer that no factors stand for, as stored.

        Returns {name in GlobeMoEFFN: tensor}: down_proj (E, D, P), and of experts with biases {family}_bias (E, P) and
        down_bias (E, D).
        """
        if "down" in layer.keys:
            return {DOWN: torch.stack([self.files.read(key, device=device) for key in layer.keys["down"]])}
        found: dict[str, torch.Tensor] = {}
        for (key,) in (keys for matrix, keys in layer.keys.items() if matrix in (DOWN, *BIASES.values())):
            parsed = self.expert_keys[key]
            found |= parsed.layout.kept(parsed.matrix, self.files.read(key, device=device))
        return found

    def stored_dtype(self, layer: ExpertLayer, family: str) -> torch.dtype:
        """Return the dtype of the experts of one layer and family, which `read` keeps; float32 where they differ."""
        found = {self.files.dtype(key) for key in layer.gate_or_up(family)}
        return found.pop() if len(found) == 1 else torch.float32

    def is_quantized(self, layer: ExpertLayer, family: str) -> bool:
        """Whether experts of one layer and family are stored as codes and scales."""
        return any(map(self.files.is_quantized, layer.gate_or_up(family)))

    def stored_bytes(self, family: str) -> int:
        """Count the bytes of all experts of one family in their `stored_dtype`."""
        per_value = sum(layer.num_experts * self.stored_dtype(layer, family).itemsize for layer in self.layers)
        return per_value * self.base.intermediate_size * self.base.hidden_size

    @cached_property
    def facts(self) -> dict[str, int | None]:
        """Bytes of all tensors, of the tensors that a fit does not compress, of the files, and experts per token.

        A quantised tensor counts with its values, in bf16, because every export holds the values. Its codes and scales
        count only as `disk_bytes`, the bytes of the files.
        """
        whole = sum(map(self.files.dense_bytes, self.files.keys))
        replaced = (key for key, parsed in self.expert_keys.items() if parsed.is_compressed)
        return {
            "bytes": whole,
            "rest_bytes": whole - sum(map(self.files.dense_bytes, replaced)),
            "disk_bytes": sum(map(self.files.num_bytes, self.files.keys)),
            "top_k": self.outline.top_k,
        }

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
        broken = (~torch.isfinite(weights)).flatten(1).any(1)
        expert = experts[int(broken.nonzero()[0])]
        keys = layer.gate_or_up(family)
        raise GlobeError(
            f"Expert {expert} of layer {layer.layer} has NaN or infinity in its {family} matrix "
            f"({keys[min(expert, len(keys) - 1)]} in {self.model_dir}); repair or download the checkpoint again."
        )

    def _matrices(
        self, layer: ExpertLayer, family: str, experts: range, columns: slice, device: torch.device
    ) -> Iterator[torch.Tensor]:
        read = partial(self.files.read, device=device)
        if not layer.is_fused:
            for expert in experts:
                yield read(layer.keys[family][expert], slice(None), columns)
            return
        (key,) = layer.keys[GATE_UP]
        layout = self.expert_keys[key].layout
        start = FAMILIES.index(family) * self.base.intermediate_size
        for expert in experts:
            if layout.transposed:  # (D, 2P) on disk
                yield layout.part(read(key, slice(expert, expert + 1), columns), family)[0]
            elif layout.interleaved:  # rows that are not contiguous: both families are read
                yield layout.part(read(key, slice(expert, expert + 1), slice(None), columns), family)[0]
            else:
                yield read(key, expert, slice(start, start + self.base.intermediate_size), columns)

    @cached_property
    def layer_spans(self) -> list[tuple[ExpertLayer, slice]]:
        """Return every layer with the span of its experts among all n experts."""
        spans, start = [], 0
        for layer in self.layers:
            spans.append((layer, slice(start, start + layer.num_experts)))
            start += layer.num_experts
        return spans
