"""The names of tensors on disk and in a live model: transformers says which tensor becomes which parameter."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class LiveKey(NamedTuple):
    """The parameter that a tensor on disk becomes, or becomes a part of."""

    key: str  # in the model's state_dict
    pattern: str = ""  # of `converter`, that `key` matched
    converter: Any = None  # WeightConverter that makes the parameter of this tensor, and of others


class Renaming:
    """The renaming of `from_pretrained` for one model, which may be on the meta device."""

    def __init__(self, model: Any, later: Iterable[str] = ()):
        """`later`: keys that the model does not have yet, and will have when it is loaded."""
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix, self._parameters = model.base_model_prefix, model.state_dict()
        self._keys = dict.fromkeys((*self._parameters, *later), True)

    def live(self, key: str) -> LiveKey:
        """Return the parameter of the tensor `key`; a key that the model does not have stays as it is renamed."""
        live, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._keys)
        if live not in self._keys and key in self._keys:  # a name of the model that looks like a name on disk
            live, pattern = key, None
        if pattern is None:
            return LiveKey(live)
        return LiveKey(live, pattern, next(c for c in self._converters if pattern in c.source_patterns))

    def shape(self, live_key: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter; None for a key that the model does not have."""
        parameter = self._parameters.get(live_key)
        return None if parameter is None else tuple(parameter.shape)
