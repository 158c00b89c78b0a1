"""Tell the tensors of routed experts on disk from all others, and the layouts in which they are stored."""

import re
from dataclasses import dataclass, replace

from globe_fit.data.outline import Outline
from globe_kernels.errors import RequestError
from globe_kernels.format.layout import DOWN, GATE_UP, ExpertsLayout
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.discovery import DenseExperts
from globe_kernels.model.renaming import LiveKey, Renaming

# The steps by which transformers makes one parameter of the matrices of all experts.
_MERGES = (("MergeModulelist", "Concatenate"), ("MergeModulelist",))

_LEAF = re.compile(r"(\.\d+)?\.\w+(\.weight)?$")  # of the name of a tensor: all behind its experts

# Some of the tensors of GlobeMoEFFN, all of which are renamed alike.
_EXPORTED = ("gate_adapter", "up_code_index", "up_code_value", "gate_bias", DOWN)


@dataclass(frozen=True)
class ExpertKey:
    """One tensor of routed experts on disk."""

    layer: int
    expert: int | None  # None: a fused tensor of all experts
    matrix: str  # "gate", "up" or "down" of one expert; of a fused tensor the parameter of the live module
    layout: ExpertsLayout  # of a fused tensor, on disk

    @property
    def is_compressed(self) -> bool:
        """Whether factors stand for the tensor: gate, up or both."""
        return self.matrix in (*FAMILIES, GATE_UP)


class DiskNames:
    """The names of a model's tensors on disk, as transformers maps them to its modules."""

    def __init__(self, outline: Outline):
        self._experts = {experts.name: experts for experts in outline.experts.values()}
        exported = [f"{path}.{name}" for path in self._experts for name in _EXPORTED]
        self._renaming = Renaming(outline.model, exported)
        # experts on disk in a layer that is dense in config.json are found too, and refused later
        for experts in list(self._experts.values()):
            for layer in range(outline.num_layers):
                path = f"layers.{layer}".join(experts.name.rsplit(f"layers.{experts.layer}", 1))
                self._experts.setdefault(path, replace(experts, layer=layer, name=path))

    def live_key(self, key: str) -> str:
        """Return the key of the parameter that the tensor `key` becomes, or becomes a part of."""
        return self._renaming.live(key).key

    def parse(self, key: str, shape: tuple[int, ...]) -> ExpertKey | None:
        """Return the routed-expert tensor that `key`, of this shape, holds; None for any other tensor.

        Raises RequestError when transformers makes the experts of the tensor in a way that GloBE does not know.
        """
        live = self._renaming.live(key)
        converter, (path, _, name) = live.converter, live.key.rpartition(".")
        experts = self._experts.get(path)
        if experts is None or name not in dict(experts.module.named_parameters()):
            return None
        steps = () if converter is None else tuple(type(step).__name__ for step in converter.operations)
        if converter and steps in _MERGES and not (experts.layout.transposed or experts.layout.interleaved):
            sources = converter.source_patterns
            matrix = FAMILIES[sources.index(live.pattern)] if name != DOWN else "down"
            if len(sources) == (1 if name == DOWN else len(FAMILIES)):
                return ExpertKey(experts.layer, int(re.findall(r"\.(\d+)(?=\.)", key)[-1]), matrix, experts.layout)
        if layout := self._fused_layout(steps, live, experts, shape):
            return ExpertKey(experts.layer, None, name, layout)
        raise RequestError(
            f"transformers makes {live.key} of {key} by {', '.join(steps)}, which GloBE does not know; load the model "
            "in transformers and save it with save_original_format=False."
        )

    def exported_path(self, path: str, key: str) -> str:
        """Return the path under which an export stores the GloBE module at `path`, of which the tensor `key` is a part.

        It is the path of `key` where transformers reads that as `path`: every class of a model reads the names of
        published files, and not every class has a module at `path`. Raises RequestError when transformers would load
        the GloBE tensors elsewhere.
        """
        for start in (_LEAF.sub("", key), path):
            if all(self.live_key(f"{start}.{name}") == f"{path}.{name}" for name in _EXPORTED):
                return start
        raise RequestError(
            f"transformers loads {path}.{DOWN} as {self.live_key(f'{path}.{DOWN}')}, so an export could not be loaded; "
            "patch the live model with the checkpoint instead."
        )

    def _fused_layout(
        self, steps: tuple[str, ...], live: LiveKey, experts: DenseExperts, shape: tuple[int, ...]
    ) -> ExpertsLayout | None:
        layout = experts.layout
        if not steps:
            return layout
        (step, *others) = live.converter.operations
        if others:
            return None
        if steps == ("Transpose",) and {step.dim0, step.dim1} == {1, 2}:
            # transformers asks the shape: a file in the layout of the live module is left as it is
            as_live = getattr(step, "check_dims", False) and shape == self._renaming.shape(live.key)
            return layout if as_live else replace(layout, transposed=not layout.transposed)
        if steps == ("Interleave",) and step.dim == 1 and not step.inverse and not layout.transposed:
            return replace(layout, interleaved=True)
        return None
