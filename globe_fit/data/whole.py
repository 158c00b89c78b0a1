"""Refuse a model whose files lack tensors: transformers fills a gap with random values, and warns at most."""

import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import dot_natural_key

from globe_fit.data.quantized.tensors import StoredTensors
from globe_kernels.errors import GlobeError
from globe_kernels.model.renaming import Renaming

_DIFFER = "the files are of different models, download them again"
# Numbers of config.json that count layers behind the last one, which predict further tokens and which no model runs.
_FURTHER = re.compile("mtp|nextn")


def require_whole(where: Path, model: Any, tensors: StoredTensors, uneven: Iterable[str] = ()) -> None:
    """Compare the tensors of the directory `where` with the parameters of `model`, which may be on the meta device.

    Reads headers alone. The modules `uneven` may have other shapes than `model` says. Raises GlobeError for a parameter
    that no tensor becomes, for a tensor of another shape or of whole numbers, and for tensors of a layer that the model
    does not have. A tensor of another kind that the model does not have, such as a further head, is no fault.
    """
    expected = model.state_dict()
    found = _made(where, model, tensors)
    surplus = [key for key in found if key not in expected]
    ties = list(model.all_tied_weights_keys.items())
    for held, other in (*ties, *((source, target) for target, source in ties)):  # either may be on disk
        if held in found:
            found.setdefault(other, found[held])
    needed = [*(name for name, _ in model.named_parameters()), *_stored_buffers(model, found)]
    if missing := list(_without(needed, found.keys(), model._keys_to_ignore_on_load_missing)):
        raise GlobeError(
            f"{where} lacks {missing[0]} ({len(missing)} of {len(needed)} tensors of the model are missing), and "
            "transformers would give it random values; download it again."
        )
    elsewhere = tuple(f"{name}." for name in uneven)
    for name in (name for name in found if name in expected):
        tensor, wanted = found[name], expected[name]
        if tensor.shape != wanted.shape and not name.startswith(elsewhere):
            raise GlobeError(
                f"{name} in {where} is of shape {tuple(tensor.shape)} and config.json says {tuple(wanted.shape)}; "
                f"{_DIFFER}."
            )
        if wanted.is_floating_point() and not tensor.is_floating_point():
            raise GlobeError(f"{name} in {where} is stored as {tensor.dtype}; download it again.")
    _require_no_further_layer(model, _without(surplus, (), model._keys_to_ignore_on_load_unexpected), where)


def _made(where: Path, model: Any, tensors: StoredTensors) -> dict[str, torch.Tensor]:
    """Return {name in the model: tensor on the meta device} of all tensors on disk, as transformers makes them."""
    renaming, expected = Renaming(model), model.state_dict()
    found: dict[str, torch.Tensor] = {}
    converters: dict[str, tuple[str, Any]] = {}
    for key in sorted(tensors.keys, key=dot_natural_key):  # some renamings of transformers depend on the order
        live = renaming.live(key)
        tensor = torch.empty(tensors.shape(key), dtype=tensors.dtype(key), device="meta")
        if live.converter is None or live.key not in expected:
            found[live.key] = tensor
            continue
        if live.key not in converters:
            converters[live.key] = key, deepcopy(live.converter)
        converters[live.key][1].add_tensor(live.key, key, live.pattern, tensor)
    for name, (key, converter) in converters.items():
        try:
            made = converter.convert(name, model=model, config=model.config)
        except Exception as error:  # of any operation of transformers, for shapes that do not fit
            raise GlobeError(
                f"transformers cannot make {name} of {key} and the tensors like it in {where} "
                f"({type(error).__name__}: {error}); {_DIFFER}."
            ) from error
        found |= {target: part[0] if isinstance(part, list) else part for target, part in made.items()}
    return found


def _stored_buffers(model: Any, found: Iterable[str]) -> Iterator[str]:
    """Yield the buffers that belong on disk: transformers computes a buffer that no layer of the checkpoint has."""
    ends = {name.rpartition(".")[2] for name in found}
    stored = model.state_dict().keys()
    yield from (name for name, _ in model.named_buffers() if name in stored and name.rpartition(".")[2] in ends)


def _without(names: Iterable[str], held: Iterable[str], ignored: Iterable[str] | None) -> Iterator[str]:
    """Yield the names that are not held and that no pattern of transformers ignores."""
    patterns = [re.compile(pattern) for pattern in ignored or ()]
    return (name for name in names if name not in held and not any(pattern.search(name) for pattern in patterns))


def _require_no_further_layer(model: Any, surplus: Iterable[str], where: Path) -> None:
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    lists |= {name.removeprefix(f"{model.base_model_prefix}."): count for name, count in lists.items()}
    numbers = model.config.get_text_config().to_dict().items()
    further = sum(value for name, value in numbers if isinstance(value, int) and _FURTHER.search(name))
    for key in surplus:
        for index in re.finditer(r"\.(\d+)\.", key):
            count = lists.get(key[: index.start()])
            if count is not None and int(index[1]) >= count + further:
                raise GlobeError(f"{where} holds {key} and config.json says {count} such layers; {_DIFFER}.")
