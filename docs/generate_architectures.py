"""Write docs/architectures.md: GloBE on a tiny random model of every model type of transformers with routed experts.

python docs/generate_architectures.py                  tries every type and writes the page, in minutes
python docs/generate_architectures.py --check          exit code 1 when the page differs in anything but figures
python docs/generate_architectures.py --check --full   exit code 1 when it differs
"""

import re
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

from globe_fit import ExpertSource, FitConfig, VarProConfig, export_dense, export_globe, fit, save_fit
from globe_fit.data.disk_names import ExpertKey
from globe_fit.data.model import load_model, with_experts
from globe_fit.plan.serving import read_model
from globe_fit.result import reconstruct
from globe_kernels import GlobeCheckpoint, RequestError, patch
from globe_kernels.format.layout import DOWN, GATE_UP
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.discovery import activation_of, routed_experts, top_k_of
from globe_kernels.testing import auto_class, moe_model_types, save_layouts, text_logits, tiny_model

PAGE = Path(__file__).resolve().parent / "architectures.md"
FIT = FitConfig(ratio=0.8, support=4, varpro=VarProConfig(steps=6, warmup_steps=2))
LEAST_EFFECT = 0.1
LIMITS = (2e-6, 1e-5)  # a difference is shown as the first limit above it: the page is the same on every machine
# Experts that are published in a layout which transformers reads and does not write: of (E, D, 2P).
TRANSPOSED = ("qwen3_vl_moe",)


class Figures(NamedTuple):
    """Largest differences of logits to the logits of the dense reconstruction, of the largest logit."""

    effect: float  # of the original model: the compression changes the logits by so much
    patched: float  # of the patched model
    exported: float  # of both exports, loaded again


class Trial:
    """A tiny model, and its checkpoint in every layout that transformers reads, in a folder.

    Raises RequestError where GloBE refuses the model.
    """

    def __init__(self, model: Any, folder: Path):
        self.folder, self.model = folder, model
        self.experts = routed_experts(self.model)
        _make_experts_matter(self.model)
        self.loader = auto_class(self.model)
        layouts = save_layouts(self.model, folder)
        if model.config.model_type in TRANSPOSED:
            layouts["published"] = folder / "published"
            self.model.save_pretrained(layouts["published"])
            _transpose(layouts["published"] / "model.safetensors")
        self.sources = {name: ExpertSource(path) for name, path in layouts.items()}

    @cached_property
    def loaders(self) -> list[Any]:
        """The Auto classes that load the model; a nested model may have a class for its text alone."""
        text = transformers.AutoModelForCausalLM
        found = text._model_mapping.get(type(self.model.config), None)
        return [self.loader] if found in (None, type(self.model)) else [self.loader, text]

    @property
    def row(self) -> list[str]:
        """The cells of the page that need no fit."""
        first, *_ = self.experts.values()
        return [
            f"`{type(self.model).__name__}`",
            ", ".join(f"`{loader.__name__}`" for loader in self.loaders),
            f"`{re.sub(r'layers[.][0-9]+', 'layers.N', first.name)}`",
            "; ".join(dict.fromkeys(_layout(source) for source in self.sources.values())),
            f"`{activation_of(first)}`",
        ]

    def check_reading(self) -> None:
        """Check that files give the weights of the live model, and that config.json alone gives the sizes."""
        sizes = {layer: experts.sizes for layer, experts in self.experts.items()}
        for source in self.sources.values():
            assert {layer.layer for layer in source.layers} == {*self.experts}
            for layer in source.layers:
                live = self.experts[layer.layer]
                for family in FAMILIES:
                    part = live.layout.part(live.module.gate_up_proj.detach(), family)
                    assert torch.equal(source.read(layer, family), part), (source.model_dir, layer.layer, family)
            planned = read_model(source.model_dir / "config.json")
            base = planned.base
            shape = (base.intermediate_size, base.hidden_size)
            assert {layer: (count, *shape) for layer, count in base.num_experts.items()} == sizes
            assert base.num_experts == source.base.num_experts and base.model_type == source.base.model_type
            values = sum(parameter.numel() for parameter in self.model.parameters())
            inside = sum(p.numel() for each in self.experts.values() for p in each.module.parameters())
            assert planned.outside_values == values - inside
            assert planned.top_k == top_k_of(self.model, next(iter(self.experts.values())))

    def figures(self) -> Figures:
        """Fit, patch, export and load every layout by every loader; return the worst figures."""
        found = [self._figures(name, source) for name, source in self.sources.items()]
        return Figures(
            min(one.effect for one in found), *(max(column) for column in list(zip(*found, strict=True))[1:])
        )

    def _figures(self, name: str, source: ExpertSource) -> Figures:
        fitted, exported, dense = (self.folder / f"{name}-{kind}" for kind in ("globe", "hf", "dense"))
        save_fit(fit(source, FIT), source, fitted)
        checkpoint = GlobeCheckpoint(fitted)
        export_globe(checkpoint, source, exported)
        export_dense(checkpoint, source, dense)
        banks = {family: checkpoint.bank(family) for family in FAMILIES}
        expected = text_logits(
            with_experts(
                source,
                lambda layer, family: reconstruct(
                    checkpoint.layer(layer.layer, family), banks[family], checkpoint.config.phi
                ),
            ).float()
        )
        patched = {loader: self._load(loader, source.model_dir) for loader in self.loaders}
        # live names do not load into every class for text alone, published names do
        loaders = [loader for loader, model in patched.items() if model is not None]
        assert loaders == self.loaders or (loaders == [self.loader] and name != "original"), name
        for loader in loaders:
            patch(patched[loader], fitted)
        again = [load_model(dense).float(), *(self._load(loader, exported) for loader in loaders)]
        return Figures(
            _difference(text_logits(self.model), expected),
            max(_difference(text_logits(patched[loader]), expected) for loader in loaders),
            max(_difference(text_logits(model), expected) for model in again),
        )

    def _load(self, loader: Any, path: Path) -> Any:
        """Load a directory; None where it lacks tensors of the model."""
        model, report = loader.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        # a class for text alone passes over the towers
        assert loader is not self.loader or not report["unexpected_keys"], report
        return None if report["missing_keys"] else model.eval()


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def _make_experts_matter(model: Any) -> None:
    """Scale the down experts until wrong gate and up experts show in the logits."""
    every = [experts.module for experts in routed_experts(model).values()]

    def exchange(by: int) -> None:
        """Give each expert the gate and up weights of another."""
        for module in every:
            module.gate_up_proj.copy_(module.gate_up_proj.roll(by, 0))

    def effect() -> float:
        exchange(1)
        wrong = text_logits(model)
        exchange(-1)
        return _difference(wrong, text_logits(model))

    for _ in range(4):
        if effect() > 0.3:
            break
        for module in every:
            module.down_proj.mul_(4)


def _transpose(path: Path) -> None:
    tensors = load_file(path)
    for key, tensor in tensors.items():
        if key.endswith((GATE_UP, DOWN)) and tensor.ndim == 3:
            tensors[key] = tensor.mT.contiguous()
    save_file(tensors, path, {"format": "pt"})


def _layout(source: ExpertSource) -> str:
    """Describe how a checkpoint stores gate, and gate and up: the layout and the last part of the name."""
    name, key = next((name, key) for name, key in source.expert_keys.items() if key.matrix in (FAMILIES[0], GATE_UP))
    return f"{_kind(key)} `{name.removesuffix('.weight').rpartition('.')[2]}`"


def _kind(key: ExpertKey) -> str:
    if key.expert is not None:
        return "per expert"
    flags = [name for name in ("transposed", "interleaved") if getattr(key.layout, name)]
    return ", ".join(["fused", *flags])


class Row(NamedTuple):
    """A model type on the page."""

    model_type: str
    cells: list[str]
    is_supported: bool


def rows(full: bool) -> Iterator[Row]:
    """Try every model type. Raises AssertionError where GloBE runs a type and is wrong."""
    for model_type in moe_model_types():
        with TemporaryDirectory() as folder:
            yield row_of(model_type, Path(folder), full)


def row_of(model_type: str, folder: Path, full: bool = False) -> Row:
    """Try a model type in `folder`; without `full` the row has no figures."""
    try:
        trial = Trial(tiny_model(model_type), folder)
    except RequestError as refusal:
        return Row(model_type, [_reason(str(refusal))], False)
    trial.check_reading()
    return Row(model_type, trial.row + (_figures(model_type, trial.figures()) if full else []), True)


def _reason(sentence: str) -> str:
    """Return the part of the sentence before its advice; names of modules and classes are code."""
    reason = sentence.partition("; ")[0]
    return re.sub(r"\b(?!GloBE)(?:\w+\.[\w.]+|[A-Z]\w*[A-Z]\w*)", lambda name: f"`{name[0]}`", reason)


def _figures(model_type: str, found: Figures) -> list[str]:
    print(model_type, found, file=sys.stderr)
    limits = [next((limit for limit in LIMITS if one < limit), None) for one in (found.patched, found.exported)]
    assert found.effect > LEAST_EFFECT and all(limits), model_type
    return [f"< {limit:.0e}".replace("e-0", "e-") for limit in limits]


def page(found: list[Row]) -> str:
    """Return the page; without figures where the rows have none."""
    supported = [[f"`{row.model_type}`", *row.cells] for row in found if row.is_supported]
    refused = [[f"`{row.model_type}`", *row.cells] for row in found if not row.is_supported]
    count, version = f"{len(supported)} of the {len(found)}", transformers.__version__
    header = ["model type", "class", "loaded by", "experts", "on disk", "activation", "patched", "exported"]
    return f"""# Architectures

GloBE runs {count} model types with routed experts that transformers {version} has. It knows none by
name: it finds experts by their structure, so a new model type of the same structure runs too. For another model
`globe plan config.json` says within seconds whether GloBE runs it, and if not, why.

`docs/generate_architectures.py` writes this page. It makes a tiny random model of every type, with the class of the
published checkpoints, and saves it in every layout on disk. It compares the live model with the experts that a fit
reads from the files, and with the experts that `globe plan` counts in config.json. Then it fits, patches, exports and
loads. **The published models themselves were not fitted.**

## Types that run

{_table(header, supported)}

* *Experts*: the path of the module that GloBE replaces. `N` is the layer.
* *On disk*: the layouts that were tried, with the name of gate, or of gate and up. *Per expert* is a matrix per expert,
  *fused* a tensor of all experts.
* *Activation*: as GloBE found it, by calls of the module.
* *Patched*, *exported*: the logits differ from the logits of the dense model with the reconstructed weights by less
  than this part of the largest logit. The compression itself changes the logits by more than {LEAST_EFFECT:g} in every
  row: the down experts of a tiny model are scaled up where its experts would hardly matter. *Patched* is `patch`;
  *exported* is `globe export`, and `globe export --dense`, loaded again. Each is the worst of all layouts and loaders,
  in float32 on a CPU.
* `AutoModelForCausalLM` beside another loader loads the text model alone. Its experts have other paths.
* A model that wraps one of these types runs too, such as `kimi_k25`, whose text model is a deepseek_v3.

## Types that GloBE refuses

{_table(["model type", "reason"], refused)}
"""


def _table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    every = [list(header), *map(list, lines)]
    every.insert(1, ["---"] * len(every[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def without_figures(text: str) -> str:
    """Return a page as `page` makes it of rows without figures."""
    return re.sub(r"( \| < [\d.e-]+){2} \|$", " |", text, flags=re.MULTILINE)


def main() -> None:
    """Write the page, or check it."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    is_check, full = "--check" in sys.argv, "--check" not in sys.argv or "--full" in sys.argv
    text = page(list(rows(full)))
    if not is_check:
        PAGE.write_text(text, encoding="utf-8")
        return
    written = PAGE.read_text(encoding="utf-8")
    if text != (written if full else without_figures(written)):
        raise SystemExit(
            "docs/architectures.md differs from the results; `python docs/generate_architectures.py` writes it again."
        )


if __name__ == "__main__":
    main()
