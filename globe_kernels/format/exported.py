"""Read the experts of a directory that `globe export` wrote, for an engine that loads the other weights itself.

globe_kernels.format.checkpoint describes the tensors. A process reads the experts and rows that it runs.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.checkpoint import GlobeConfig, check_codes, exported_bank_key, require_finite
from globe_kernels.format.directories import holds_checkpoint, holds_export
from globe_kernels.format.files import inner_file, read_json
from globe_kernels.format.names import FAMILIES, MODEL_CONFIG_NAME
from globe_kernels.format.typed import checked
from globe_kernels.format.verification import Verification, verifies

_REMEDY = "export the checkpoint again"
_LAYER = re.compile(r".*\blayers\.(\d+)\..*")
_OF_EXPERT = re.compile(r"(.*)\.(\d+)\.\w+\.weight")
_FRACTIONS, _INTEGERS = ("BF16", "F16", "F32"), ("I32",)  # dtypes of an export, as safetensors names them
_DOWN, _DOWN_BIAS = "down_proj", "down_bias"
_BIASES = (*(f"{family}_bias" for family in FAMILIES), _DOWN_BIAS)


class ExportedConfig:
    """The `quantization_config` of an export.

    `globe` has its sizes, `weights` the file in which a reader begins, None where the name is the usual, and `files`
    {name: sha256} of its tensor files, empty in older exports.
    """

    def __init__(self, data: dict, where: str):
        """Parse and check; `where` names the file in the error. Raises GlobeError."""
        self.weights = checked(str | None, data.get("weights"), f"weights of {where}", _REMEDY)
        self.files = checked(dict[str, str], data.get("files", {}), f"files of {where}", _REMEDY)
        self.globe = GlobeConfig.from_dict(data, where)


class Export:
    """An opened export. Opening compares the names, shapes and dtypes of all tensors of experts with the sizes."""

    def __init__(self, path: Path, *, verify: bool = True):
        """Open the export in the directory `path`; `verify`: compare the sha256 of its files too.

        Raises RequestError when `path` holds no export, GlobeError when it is damaged.
        """
        self.path = path
        if not holds_export(path):
            raise _not_an_export(path)
        where = path / MODEL_CONFIG_NAME
        config = read_json(inner_file(path, MODEL_CONFIG_NAME), _REMEDY)
        parsed = ExportedConfig(config["quantization_config"], f"quantization_config in {where}")
        self.config = parsed.globe
        files = sorted(parsed.files) or sorted(file.name for file in path.glob("*.safetensors"))
        self._require_no_others(files)
        handles = {name: _open(inner_file(path, name)) for name in files}
        self._handles = {key: handle for handle in handles.values() for key in handle.keys()}  # noqa: SIM118
        self._paths = self._find_layers()
        self._down = self._find_down()
        self._check()
        self._verification = None
        if parsed.files and verify and verifies():
            self._verification = Verification(path, parsed.files, _REMEDY)
            self._verification.begin()

    def _require_no_others(self, files: Sequence[str]) -> None:
        """Refuse files that the configuration does not list: an engine loads whatever safetensors lie there."""
        if others := {file.name for file in self.path.glob("*.safetensors")} - {*files}:
            raise GlobeError(
                f"{self.path / min(others)} is of another export, which was killed or copied there; remove the file, "
                f"or {_REMEDY}."
            )

    def _find_layers(self) -> dict[int, str]:
        """{layer id: path of its experts in the model}"""
        end = f".{FAMILIES[0]}_adapter"
        paths = [key.removesuffix(end) for key in self._handles if key.endswith(end)]
        found = {int(match[1]): path for path in paths if (match := _LAYER.fullmatch(f"{path}."))}
        if missing := self.config.base.num_experts.keys() - found.keys():
            raise self._damaged(f"has no adapters of layer {min(missing)}")
        if more := found.keys() - self.config.base.num_experts.keys():
            raise self._damaged(f"has adapters of layer {min(more)}, which {MODEL_CONFIG_NAME} does not list")
        return {layer: found[layer] for layer in self.config.base.num_experts}

    def _find_down(self) -> dict[int, str | list[str]]:
        """{layer id: key of its fused down matrices, or the keys of the matrices of all experts in their order}"""
        of_path: dict[str, dict[int, str]] = {path: {} for path in self._paths.values()}
        for key in self._handles:
            if (match := _OF_EXPERT.fullmatch(key)) and match[1] in of_path:
                of_path[match[1]][int(match[2])] = key
        down: dict[int, str | list[str]] = {}
        for layer, path in self._paths.items():
            if f"{path}.{_DOWN}" in self._handles:
                down[layer] = f"{path}.{_DOWN}"
                continue
            if missing := set(range(self.config.base.num_experts[layer])) - of_path[path].keys():
                raise self._damaged(f"has no down matrix of expert {min(missing)} of layer {layer}")
            down[layer] = [key for _, key in sorted(of_path[path].items())]
        return down

    def _check(self) -> None:
        base = self.config.base
        inner, width = base.intermediate_size, base.hidden_size
        expected: dict[str, tuple[tuple[int, ...], bool]] = {  # shape, whether it holds fractions
            exported_bank_key(family): (self.config.bank_shape(), True) for family in FAMILIES
        }
        for layer, path in self._paths.items():
            experts = base.num_experts[layer]
            for name, (shape, dtype) in self.config.layer_shapes(layer).items():
                expected[f"{path}.{name}"] = shape, dtype.is_floating_point
            down = self._down[layer]
            if isinstance(down, str):
                expected[down] = (experts, width, inner), True
            else:
                expected |= dict.fromkeys(down, ((width, inner), True))
            if base.has_bias:
                sizes = ((experts, inner), (experts, inner), (experts, width))
                expected |= {f"{path}.{name}": (size, True) for name, size in zip(_BIASES, sizes, strict=True)}
        for key, (shape, is_float) in expected.items():
            if key not in self._handles:
                raise self._damaged(f"has no tensor {key}")
            part = self._handles[key].get_slice(key)
            found = tuple(part.get_shape())
            if found != shape or part.get_dtype() not in (_FRACTIONS if is_float else _INTEGERS):
                raise self._damaged(f"has {key} as {part.get_dtype()} {found} in place of {shape}")
        self.keys = frozenset(expected)  # of the tensors that this class reads

    def _damaged(self, trouble: str) -> GlobeError:
        return GlobeError(f"{self.path} {trouble}, so it is no whole export; {_REMEDY}, or copy all its files again.")

    def verify(self) -> None:
        """Wait until the sha256 of every tensor file is compared. Raises GlobeError for a file that was changed."""
        if self._verification is not None:
            self._verification.require()

    def bank(self, family: str) -> torch.Tensor:
        """Read the atoms (M, R, D) of a family."""
        return self._read(exported_bank_key(family))

    def experts(self, layer: int, ids: Sequence[int], rows: range) -> dict[str, torch.Tensor]:
        """Read the tensors of GlobeMoEFFN for the experts `ids` and these rows of their matrices, E' and P' of them.

        Returns {gate,up}_adapter (E', P', R), {gate,up}_code_index and _value (E', C), down_proj (E', D, P'), with
        biases {gate,up}_bias (E', P') and down_bias (E', D). Raises GlobeError for damage.
        """
        path, base = self._paths[layer], self.config.base
        whole, part = slice(None), slice(rows.start, rows.stop)
        wanted = {name: (whole,) for name in self.config.layer_shapes(layer)}
        wanted |= {f"{family}_adapter": (part,) for family in FAMILIES}
        if base.has_bias:
            wanted |= dict(zip(_BIASES, ((part,), (part,), (whole,)), strict=True))
        tensors = {name: self._some(f"{path}.{name}", ids, *each) for name, each in wanted.items()}
        for family in FAMILIES:
            name = f"{family}_code_index"
            check_codes(tensors[name], self.config.num_atoms, f"{path}.{name} in {self.path}")
        down = self._down[layer]
        if isinstance(down, str):
            tensors[_DOWN] = self._some(down, ids, whole, part)
        else:
            tensors[_DOWN] = torch.stack([self._read(down[expert], whole, part) for expert in ids])
        return tensors

    def _some(self, key: str, ids: Sequence[int], *rest: slice) -> torch.Tensor:
        """Read a part of each of some experts."""
        first = min(ids)
        span = self._read(key, slice(first, max(ids) + 1), *rest)
        places = [expert - first for expert in ids]
        return span if places == list(range(len(span))) else span[places]

    def _read(self, key: str, *part: slice) -> torch.Tensor:
        handle = self._handles[key]
        tensor = handle.get_slice(key)[part] if part else handle.get_tensor(key)
        require_finite(tensor, f"{key} in {self.path}")
        return tensor


def _open(file: Path) -> Any:
    try:
        if not file.is_file():
            raise GlobeError(f"{file} is missing and {MODEL_CONFIG_NAME} beside it lists the file; {_REMEDY}.")
        return safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: torch cannot map the file
        raise GlobeError(f"{file} is truncated or damaged ({error}); {_REMEDY}.") from error


def _not_an_export(path: Path) -> RequestError:
    if holds_checkpoint(path):
        return RequestError(
            f"{path} is a GloBE checkpoint without the rest of its model; write `globe export {path} --base MODEL -o "
            "DIRECTORY` and give the directory."
        )
    return RequestError(f"{path} is no model that `globe export` wrote; give the directory of an export.")
