"""A model without its weights: built by transformers on the meta device, from config.json alone."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
import transformers
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from globe_kernels.errors import GlobeError, RequestError, one_line
from globe_kernels.format.checkpoint import BaseModel
from globe_kernels.format.files import inner_file, inner_values, read_json
from globe_kernels.format.hub import model_name
from globe_kernels.format.names import MODEL_CONFIG_NAME
from globe_kernels.format.typed import checked
from globe_kernels.model.discovery import DenseExperts, routed_experts, top_k_of

# Of counts in config.json, and of the modules of a model: more than any model has, and few enough for some seconds.
_MOST, _MOST_MODULES = 2**18, 25_000
_COUNT = re.compile(r"num|^n_|layers|depth|labels")
# Where config.json names no class: the heads that a language model may have.
_HEADS = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel")


def read_transformers_config(where: Path) -> Any:
    """Read the configuration of a model from its directory or its config.json, as transformers reads it.

    Raises RequestError for a model that transformers does not know, GlobeError for a damaged file.
    """
    _require_sane(where)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    except ValueError as error:
        if "model_type" in str(error) or "model type" in str(error) or "trust_remote_code" in str(error):
            raise RequestError(
                f"{where} is not of a model that transformers {transformers.__version__} knows without the code of the "
                "model's author; update transformers, or give another model."
            ) from error
        raise _incomplete(where, error) from error
    except Exception as error:  # the classes of configurations check their values in many ways
        raise _incomplete(where, error) from error
    if not isinstance(config.get_text_config(), PreTrainedConfig):
        raise GlobeError(
            f"{where} has a part for the language model that transformers does not know; download it again."
        )
    dtype = getattr(config, "dtype", None)  # of a model of several parts, a dtype for each
    for stated in dtype.values() if isinstance(dtype, dict) else (dtype,):
        if str(stated).removeprefix("torch.") not in ("None", "bfloat16", "float16", "float32", "float64"):
            raise GlobeError(f"{where} says dtype {stated}, in which no model runs; download it again.")
    return config


def _require_sane(where: Path) -> None:
    """Refuse values that would end in the code of a configuration or of a model in any way, or never."""
    path = inner_file(where, MODEL_CONFIG_NAME) if where.is_dir() else where
    config = read_json(path, "download it again")
    checked(_Config, config, str(path), "download it again")
    level: list[Any] = [config]
    while level:
        part = level.pop()
        if isinstance(part, dict):
            for name, value in part.items():
                most = _MOST_MODULES if "layers" in name else _MOST
                if isinstance(value, int) and value > most and _COUNT.search(name):
                    raise GlobeError(
                        f"{path} says {name} is {value}, and no model has more than {most}; download it again."
                    )
        level += inner_values(part)


class _Config(TypedDict, total=False):
    model_type: str | None
    architectures: list[str] | None


def _incomplete(where: Path, error: Exception) -> GlobeError:
    first = str(error).strip().partition("\n")[0]
    return GlobeError(
        f"transformers cannot build the model of {where} ({type(error).__name__}: {first}); download it again."
    )


def model_class(config: Any) -> Any:
    """Return the class of transformers that config.json names, else the class that has a head for its model type."""
    for name in getattr(config, "architectures", None) or ():
        named: Any = getattr(transformers, name, None)
        is_model = isinstance(named, type) and issubclass(named, PreTrainedModel)
        if is_model and named.config_class is not None and isinstance(config, named.config_class):
            return named
    for head in _HEADS:
        mapping = getattr(transformers, head, None) and getattr(transformers, head)._model_mapping
        if mapping and type(config) in mapping:
            found = mapping[type(config)]
            found = found[0] if isinstance(found, tuple) else found
            if isinstance(config, found.config_class):  # not the class for the text alone of a nested model
                return found
    raise RequestError(
        f"transformers {transformers.__version__} has no language model for model_type {config.model_type!r}; update "
        "transformers, or give another model."
    )


@contextmanager
def _counting_modules() -> Iterator[None]:
    """Raise inside when a model has more modules than any model has: config.json may say any number of layers."""
    thread, count = threading.get_ident(), 0

    def register(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > _MOST_MODULES:
            raise ValueError(f"it has more than {_MOST_MODULES} modules")

    hook = register_module_module_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Outline:
    """The modules and sizes of a model; `model` is on the meta device."""

    where: Path  # its config.json, or its directory
    model: Any

    @classmethod
    def read(cls, where: Path) -> "Outline":
        """Build the model of a directory or of a config.json. Raises as `read_transformers_config` does."""
        config = read_transformers_config(where)
        if hasattr(config, "quantization_config"):  # the sizes do not depend on it, and its libraries may be missing
            del config.quantization_config
        builder = model_class(config)
        try:
            config._attn_implementation = "eager"  # a kernel that config.json names could be fetched from the Hub
            with torch.device("meta"), _counting_modules():
                return cls(where, builder(config))
        except Exception as error:  # a configuration of wrong values fails anywhere in the code of a model
            raise _incomplete(where, error) from error

    @cached_property
    def experts(self) -> dict[int, DenseExperts]:
        """{layer id: experts}. Raises RequestError for a model without experts that GloBE can stand in for."""
        found = routed_experts(self.model)
        for each in found.values():
            if 0 in each.sizes:
                count, inner, width = each.sizes
                raise GlobeError(
                    f"{self.where} says that {each.name} has {count} experts of {inner} x {width}; download it again."
                )
        return found

    @cached_property
    def top_k(self) -> int:
        """K, the experts per token."""
        return top_k_of(self.model, next(iter(self.experts.values())))

    @property
    def name(self) -> str:
        """The name of the model, for people."""
        if self.where.is_dir() or self.where.name == MODEL_CONFIG_NAME:
            return one_line(model_name(self.where if self.where.is_dir() else self.where.parent))
        return one_line(self.where.stem)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that config.json states for the language model; bf16 where it states none."""
        config = self.model.config
        stated = (getattr(each, "dtype", None) for each in (config.get_text_config(), config))
        return next((dtype for dtype in stated if isinstance(dtype, torch.dtype)), torch.bfloat16)

    @property
    def num_layers(self) -> int:
        """The layers of the language model, with and without experts."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def layer_configs(self) -> list[Any]:
        """The configuration of every layer of the language model; one that all layers share, where they are alike."""
        config = self.model.config.get_text_config()
        # an older transformers has none
        return getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers

    @cached_property
    def base(self) -> BaseModel:
        """The sizes of the experts. Raises RequestError as `experts` does."""
        first, *_ = self.experts.values()
        sizes = {layer: experts.sizes for layer, experts in self.experts.items()}
        inner, width = shape_of_most(sizes)
        return BaseModel(
            name=self.name,
            model_type=first.model_type,
            hidden_size=width,
            intermediate_size=inner,
            num_experts={layer: count for layer, (count, *shape) in sizes.items() if shape == [inner, width]},
            left_dense={layer: (p, d) for layer, (_, p, d) in sizes.items() if (p, d) != (inner, width)},
            has_bias=first.layout.has_bias,
        )


def shape_of_most(sizes: dict[int, tuple[int, int, int]]) -> tuple[int, int]:
    """Return the (P, D) that holds the most weights, of {layer id: (E, P, D)}; of two equals, the first."""
    weights: dict[tuple[int, int], int] = {}
    for count, inner, width in sizes.values():
        weights[inner, width] = weights.get((inner, width), 0) + count * inner * width
    return max(weights, key=lambda shape: weights[shape])
