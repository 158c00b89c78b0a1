"""Write the model card of an export: the model, its licence, sizes, errors and quality, and how to load it."""

from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from globe_fit.data.source import ExpertSource
from globe_fit.measure.evaluate import read_evaluation
from globe_fit.plan.footprint import footprint, quantized_note
from globe_fit.run.reports import read_report
from globe_kernels.format.checkpoint import GlobeCheckpoint
from globe_kernels.format.names import CARD_MARK, CARD_NAME, FAMILIES
from globe_kernels.strategies.budget import palettes_of
from globe_kernels.units import format_bytes

# Of the card of the base. The Hub refuses other kinds of values.
_STATED = ("license", "license_name", "license_link", "language", "pipeline_tag")
# Licences that a file states in its first lines; of others the card links to the file.
_LICENCES = {"Apache License Version 2.0": "apache-2.0", "MIT License": "mit"}
_GLOBE = """\
The gate and up matrices of all experts share one bank of {atoms} atoms per family: rank {rank}, {support} atoms per
expert, phi {phi}. The model runs from this compressed form.

## Load it

With transformers, where GloBE is installed (`pip install .` in a clone of its repository); the import comes first:

```python
import globe_kernels
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")  # or its id on the Hub
```

In vLLM, where GloBE is installed too, `vllm serve path/of/this/directory` runs the same form.

Other engines do not know the compressed form. For them `globe export CHECKPOINT --base BASE -o OUT --dense` writes a
plain model, which has the size of the original.
"""
_DENSE = """\
This is a plain model in the layout of {name}, with the size of the original. Its gate and up experts have the weights
that a GloBE checkpoint stands for (rank {rank}, {atoms} atoms per family, {support} atoms per expert, phi {phi}).

## Load it

As {name}, in any engine that runs that model. With transformers:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")
```
"""


def model_card(checkpoint: GlobeCheckpoint, base: ExpertSource, *, dense: bool) -> str:
    """Return the text of README.md of an export of `checkpoint`; `dense`: of the reconstructed dense model."""
    sizes, report = checkpoint.config, read_report(checkpoint)
    name, shape = base.base.name, {"atoms": sizes.num_atoms, "rank": sizes.rank, "support": sizes.support}
    facts = {"library_name": "transformers", "tags": ["globe", "moe"], "pipeline_tag": "text-generation"}
    if "/" in name:  # the Hub takes the id of a model there and nothing else
        facts |= {"base_model": name} if dense else {"base_model": name, "base_model_relation": "quantized"}
    stated = _stated(base.model_dir)
    facts |= stated if "license" in stated else _licence(base.model_dir) | stated
    data = ModelCardData(ignore_metadata_errors=True, **facts)
    text = (_DENSE if dense else _GLOBE).format(name=name, phi=sizes.phi, **shape)
    parts = [f"---\n{data.to_yaml()}\n---\n\n# {name}, {CARD_MARK}\n\n{text}", _costs(checkpoint, report, base, dense)]
    if command := report.get("command"):
        parts.append(f"## Made by\n\n```bash\n{command}\n```\n")
    return "\n".join(parts)


def _licence(base_dir: Path) -> dict:
    """Return the licence that a file of the base states."""
    for path in sorted(base_dir.glob("LICEN[CS]E*")):
        words = " ".join(path.read_text(encoding="utf-8", errors="replace").split())[:1000]
        known = next((licence for start, licence in _LICENCES.items() if words.startswith(start)), None)
        return {"license": known or "other"} | ({} if known else {"license_name": "license", "license_link": path.name})
    return {}


def _stated(base_dir: Path) -> dict:
    """Return the facts that the card of the base states and that hold for a compressed model too."""
    card = base_dir / CARD_NAME
    try:
        stated = metadata_load(card) if card.is_file() else None
    except Exception:  # a front matter that is no YAML: the export is worth more than its licence line
        stated = None
    return {key: value for key in _STATED if isinstance(value := (stated or {}).get(key), (str, list))}


def _costs(checkpoint: GlobeCheckpoint, report: dict, base: ExpertSource, dense: bool) -> str:
    figures = footprint(checkpoint.config, base.facts, palettes=palettes_of(checkpoint))
    rows = [] if dense else [_size(label, figures[key]) for label, key in _SIZES]
    errors = report.get("families", {})
    if errors:
        found = " / ".join(f"{errors[family]['relative_error']:.4f}" for family in FAMILIES)
        rows.append(f"| relative squared error of gate / up | 0 | {found} | |")
    measured = read_evaluation(checkpoint)
    if measured is not None:
        before, after, text = measured["dense"], measured["globe"], measured["text"].replace("|", " ")
        rows += [
            f"| perplexity, {text} | {before['perplexity']:.3f} | {after['perplexity']:.3f} | |",
            f"| KL(dense, this), nats per token | 0 | {after['kl']:.5f} | |",
            f"| same next token as the base | 100 % | {after['top1']:.1%} | |",
        ]
    note = "" if measured else "\nPerplexity and KL were not measured: `globe eval` measures them.\n"
    if not dense:
        note = f"\nResident bytes and peak are predicted, the peak for a call of 4096 tokens.\n{note}"
    if quantized := quantized_note(figures):
        note = f"\n{quantized}\n{note}"
    return (
        "## Sizes and quality\n\n| | base | this model | ratio |\n|---|---|---|---|\n" + "\n".join(rows) + f"\n{note}"
    )


_SIZES = (
    ("gate and up experts on disk", "gate_up"),
    ("whole model on disk", "model"),
    ("whole model resident", "resident"),
    ("whole model at the peak", "peak"),
)


def _size(label: str, found: dict[str, int]) -> str:
    dense, globe = found["dense"], found["globe"]
    return f"| {label} | {format_bytes(dense)} | {format_bytes(globe)} | {globe / dense:.2f} |"
