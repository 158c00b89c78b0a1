"""Write docs/models/ from the configurations in tests/fit/configs: what `globe plan` predicts for popular models.

python docs/generate_models.py            writes the pages
python docs/generate_models.py --check    exit code 1 when a page differs from the predictions
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path

from globe_fit.plan.fitting import estimate
from globe_fit.plan.serving import Planner, points, read_model
from globe_kernels.strategies.budget import AUTO
from globe_kernels.strategies.cost import machine_named
from globe_kernels.units import format_bytes

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "models"
CONFIGS = ROOT / "tests" / "fit" / "configs"
MACHINE = machine_named("h100")
DEFAULT, PALETTE, HALF_RANK = "default", "palette", "half rank"  # the settings
PALETTE_SIZE = 32
CARDS = (24, 48, 80, 141)  # GB
PLANNED = 80  # GB of the cards of the figures that do not name a card
TOKENS = ("1", "64", "4096")
ROUNDING = "../faq.md#is-plain-8-bit-rounding-better"


@dataclass(frozen=True)
class Model:
    """A published model, and the plans for it."""

    title: str
    repository: str  # on huggingface.co
    exclude: str = ""  # files of the repository that transformers does not read

    @property
    def name(self) -> str:
        """The name of its configuration, of its page and of its directory in the commands."""
        return self.title.lower()

    @cached_property
    def sizes(self):
        return read_model(CONFIGS / f"{self.name}.json")

    @cached_property
    def is_fp8(self) -> bool:
        """Whether the experts are published in FP8."""
        return "quantization_config" in json.loads((CONFIGS / f"{self.name}.json").read_text(encoding="utf-8"))

    @property
    def expert_values(self) -> int:
        """Weights of the routed experts: gate, up and down."""
        base = self.sizes.base
        return 3 * base.total_experts * base.intermediate_size * base.hidden_size

    @property
    def outside(self) -> int:
        """Bytes of the other weights, in bf16."""
        return 2 * self.sizes.outside_values

    @cached_property
    def options(self) -> dict[str, dict[str, int]]:
        """{setting: options of `globe fit`}. Atoms that no palette can hold would take disk and never be used."""
        base = self.sizes.base
        half = min(base.intermediate_size, base.hidden_size) // 2
        most = len(base.num_experts) * PALETTE_SIZE
        found = {DEFAULT: {}}
        for setting, given in ((PALETTE, {}), (HALF_RANK, {"rank": half})):
            ((rank, atoms),) = ((sizes.rank, sizes.num_atoms) for sizes in points(base, given, {}))
            found[setting] = ({"rank": rank, "atoms": most} if atoms > most else given) | {"palette": PALETTE_SIZE}
        return found

    @cached_property
    def checkpoints(self) -> dict:
        """{setting: sizes of its checkpoint}."""
        return {name: points(self.sizes.base, options, {})[0] for name, options in self.options.items()}

    @cached_property
    def plans(self) -> dict[str, dict[int, dict]]:
        """{setting: {GB of a card: plan for as many of these cards as the dense model needs}}."""
        planners = {size: Planner(self.sizes, replace(MACHINE, memory_gb=size), None, None) for size in CARDS}
        return {
            name: {size: planner.plan(checkpoint) for size, planner in planners.items()}
            for name, checkpoint in self.checkpoints.items()
        }

    def whole(self, setting: str, figure: str, strategy: str = AUTO, card: int = PLANNED) -> int:
        """Bytes of the whole model: `figure` is resident or peak."""
        return self.plans[setting][card]["strategies"][strategy][figure] + self.outside

    def on_disk(self, setting: str, kind: str = "globe") -> int:
        """Bytes of all weights on disk, as `kind` globe or dense."""
        return self.plans[setting][PLANNED]["bytes_on_disk"][kind] + self.outside

    @property
    def rounded(self) -> int:
        """Bytes of all weights when the experts take a byte each and the others stay in bf16."""
        return self.expert_values + self.outside

    def cards(self, setting: str, size: int) -> int:
        """Cards of `size` GB that hold the peak. More than the dense model needs: that they do not suffice."""
        return ceil(self.whole(setting, "peak", card=size) / (size * 1e9))

    def dense_cards(self, size: int) -> int:
        return self.plans[DEFAULT][size]["cards"]

    def speed(self, setting: str, tokens: str) -> float:
        """Time of the dense experts over the time of GloBE, by `auto`."""
        strategies = self.plans[setting][PLANNED]["strategies"]
        return strategies[AUTO]["tokens_per_s"][tokens] / strategies["dense"]["tokens_per_s"][tokens]

    @property
    def advised(self) -> str:
        """The setting of the commands: a palette only where it makes calls faster."""
        return PALETTE if self.speed(PALETTE, "64") > self.speed(DEFAULT, "64") else DEFAULT


MODELS = (
    Model("Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"),
    Model("Qwen3-235B-A22B", "Qwen/Qwen3-235B-A22B"),
    Model("GLM-4.5", "zai-org/GLM-4.5"),
    Model("GLM-4.5-Air", "zai-org/GLM-4.5-Air"),
    Model("Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1", exclude="*.pt"),
    Model("OLMoE-1B-7B", "allenai/OLMoE-1B-7B-0924"),
    Model("DeepSeek-V3", "deepseek-ai/DeepSeek-V3"),
)


def pages() -> dict[str, str]:
    """{name of a file: its text}."""
    return {"index.md": _index()} | {f"{model.name}.md": _page(model) for model in MODELS}


def _index() -> str:
    rows = [
        [
            f"[{model.title}]({model.name}.md)",
            _size(model.on_disk(DEFAULT, "dense")),
            _size(model.on_disk(model.advised)),
            _size(model.rounded),
            _size(model.whole(model.advised, "peak")),
            f"{model.dense_cards(PLANNED)} / {_cards(model, model.advised, PLANNED)} / "
            f"{_holding(model.rounded, PLANNED)}",
            _size(_fit_bytes(model, model.advised)),
            " / ".join(f"{model.speed(model.advised, tokens):.2f}" for tokens in TOKENS),
        ]
        for model in MODELS
    ]
    header = [
        "",
        "dense, bf16",
        "GloBE",
        "experts in 8 bits",
        "peak of GloBE",
        f"{PLANNED} GB cards",
        "memory of a fit",
    ]
    header.append(f"speed, T = {', '.join(TOKENS)}")
    return f"""# Models

{_predicted("these models")} Each page has more settings, more cards, and the commands.

{_table(header, rows)}

* Bytes are of the whole model on disk: the experts, and all other weights in bf16. GloBE is fitted with
  `--palette {PALETTE_SIZE}`, where a palette makes it faster.
* The *peak* is what the weights hold on the devices, and the temporaries of calls of up to 4096 tokens. The KV cache
  comes on top.
* *Cards*: dense / GloBE at their peaks / experts in 8 bits, the weights alone.
* The *speed* is of the experts alone on an H100, over dense experts in bf16: above 1, GloBE is faster.
* **Experts in 8 bits**, by plain rounding, take fewer bytes than GloBE on every line, and on the shipped model
  [they lose less]({ROUNDING}). GloBE is for weights that must stay in bf16.

For another model: `globe plan config.json --palette {PALETTE_SIZE}`. [Running](../running.md) explains the strategies,
[fitting](../fitting.md) the settings.
"""


def _page(model: Model) -> str:
    base = model.sizes.base
    (experts,) = set(base.num_experts.values())
    return f"""# {model.title}

{len(base.num_experts)} MoE layers of {experts} experts of {base.intermediate_size} x {base.hidden_size}, \
{model.sizes.top_k} per token. {_billions(model.expert_values + model.sizes.outside_values)} billion weights, \
{_billions(model.expert_values)} billion of them in the routed experts.

{_predicted(model.title)}

{_settings_table(model)}

* Nothing here predicts quality. A smaller file of the same model loses more.
* The memory is of a calibrated fit, device and host together, beside the run of the dense model.

## Bytes of the whole model

{_bytes_table(model)}

* *Resident* is what the weights hold on the devices, *peak* adds the temporaries of calls of up to 4096 tokens. Both
  assume as many {PLANNED} GB cards as the dense model needs: {model.dense_cards(PLANNED)}.
* The last columns count the cards that hold the peak, as if they were one memory and without a KV cache; for 8 bits,
  the weights alone. *more*: more cards than the dense model needs.

## Speed of the experts on an H100

{_speed_table(model)}

* T tokens in a call: time of the dense experts over time of GloBE, and the strategy that `auto` takes. Above 1, GloBE
  is faster.

## Which to choose

{_advice(model)}

## Commands

{_commands(model)}"""


def _predicted(subject: str) -> str:
    return f"""**Predictions, not measurements.** `docs/generate_models.py` writes this page by `globe plan`, from the
numbers of config.json and assumed constants of an H100. The project has not fitted {subject} yet."""


def _settings_table(model: Model) -> str:
    rows = [
        [
            setting,
            _options(model, setting),
            str(checkpoint.rank),
            str(checkpoint.num_atoms),
            f"{model.plans[setting][PLANNED]['ratio']:.3f}",
            _size(_fit_bytes(model, setting)),
        ]
        for setting, checkpoint in model.checkpoints.items()
    ]
    return _table(["setting", "options", "rank", "atoms of a family", "gate and up, of dense", "memory of a fit"], rows)


def _bytes_table(model: Model) -> str:
    dense, rounded = model.on_disk(DEFAULT, "dense"), model.rounded
    cells = [
        _size(dense),
        _size(model.whole(DEFAULT, "resident", "dense")),
        _size(model.whole(DEFAULT, "peak", "dense")),
    ]
    rows = [["dense, bf16", *cells, *(str(model.dense_cards(size)) for size in CARDS)]]
    for setting in model.options:
        cells = [f"{_size(model.on_disk(setting))} ({model.on_disk(setting) / dense:.2f})"]
        cells += [_size(model.whole(setting, figure)) for figure in ("resident", "peak")]
        rows.append([setting, *cells, *(_cards(model, setting, size) for size in CARDS)])
    cells = [f"{_size(rounded)} ({rounded / dense:.2f})", _size(rounded), ""]
    rows.append(["experts in 8 bits", *cells, *(str(_holding(rounded, size)) for size in CARDS)])
    return _table(["", "on disk", "resident", "peak", *(f"{size} GB" for size in CARDS)], rows)


def _speed_table(model: Model) -> str:
    rows = []
    for setting in model.options:
        path = model.plans[setting][PLANNED]["strategies"][AUTO]["path"]
        speeds = [f"{model.speed(setting, tokens):.2f} `{path[tokens]}`" for tokens in TOKENS]
        rows.append([setting, *speeds])
    return _table(["", *(f"T = {tokens}" for tokens in TOKENS)], rows)


def _advice(model: Model) -> str:
    on_disk = _size(model.on_disk(model.advised))
    lines = []
    if model.is_fp8:
        total = _size(model.expert_values + model.sizes.outside_values)
        lines.append(
            f"**Keep the published checkpoint.** It is FP8 and takes about {total}. GloBE reads it and writes "
            f"bf16: {on_disk} with the setting {model.advised}."
        )
    lines.append(
        f"**Fewest bytes: 8 bits.** Plain 8-bit rounding of the experts takes {_size(model.rounded)}, GloBE {on_disk} "
        f"with the setting {model.advised}. On the shipped model rounding [loses less]({ROUNDING})."
    )
    saved = [
        f"{model.cards(model.advised, size)} in place of {model.dense_cards(size)} of {size} GB"
        for size in CARDS
        if model.cards(model.advised, size) < model.dense_cards(size)
    ]
    lines.append(
        f"**bf16 on fewer cards:** {', '.join(saved)}."
        if saved
        else "**bf16 on fewer cards:** GloBE saves none of these cards. It leaves more of them to the KV cache."
    )
    if model.advised == PALETTE:
        copies = ", and each card holds nearly all atoms" if model.dense_cards(PLANNED) > 1 else ""
        lines.append(
            "**Give a palette.** Without a palette a layer uses so many atoms of the bank that every call is slow"
            f"{copies}."
        )
        if used := model.options[PALETTE].get("atoms"):
            layers, made = len(model.sizes.base.num_experts), model.checkpoints[DEFAULT].num_atoms
            lines.append(
                f"**Give the atoms too.** {layers} layers with {PALETTE_SIZE} atoms each use at most {used}. The "
                f"default ratio makes {made}; the others would only take disk."
            )
    if _fit_bytes(model, model.advised) > PLANNED * 1e9:
        lines.append(
            f"**A fit needs more than a card:** {_size(_fit_bytes(model, model.advised))}. "
            "[Several ranks](../fitting.md#several-ranks) split it, for a fit without calibration."
        )
    return "\n".join(f"* {line}" for line in lines)


def _commands(model: Model) -> str:
    name = model.name
    sizes = "".join(f" --{option} {value}" for option, value in model.options[model.advised].items())
    exclude = f' --exclude "{model.exclude}"' if model.exclude else ""
    download = f"hf download {model.repository} --local-dir {name}{exclude}\n"
    fit = f"""globe plan {name}{sizes}
globe fit {name} -o out/{name}{sizes} --calibrate self --dry-run
globe fit {name} -o out/{name}{sizes} --calibrate self
globe export out/{name} --base {name} -o out/{name}-hf
"""
    less = "give a text,\n`--calibrate TEXT`: the model then runs layer by layer from disk"
    if model.is_fp8:
        less = "fit without `--calibrate`:\nthe layers of an FP8 checkpoint cannot run from disk"
    return f"""```bash
{download}{fit}```

`--dry-run` times a step on your machine and prints bytes and seconds. `--calibrate self` runs the dense model, which
takes {_size(model.on_disk(DEFAULT, "dense"))} of memory. With less memory {less}.
"""


def _fit_bytes(model: Model, setting: str) -> int:
    return estimate(model.checkpoints[setting], calibrated=True).peak_bytes


def _options(model: Model, setting: str) -> str:
    options = model.options[setting] or {"ratio": 0.625}
    return "`" + " ".join(f"--{name} {value}" for name, value in options.items()) + "`"


def _cards(model: Model, setting: str, size: int) -> str:
    needed = model.cards(setting, size)
    return str(needed) if needed <= model.dense_cards(size) else "more"


def _holding(size: int, card: int) -> int:
    return ceil(size / (card * 1e9))


def _size(size: float) -> str:
    """Write bytes; the line does not break in between."""
    return format_bytes(size).replace(" ", "\u00a0")


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Write the pages, or check them."""
    written = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    texts = pages()
    if sys.argv[1:] == ["--check"]:
        if changed := sorted(name for name in texts.keys() | written.keys() if texts.get(name) != written.get(name)):
            raise SystemExit(
                f"{', '.join(changed)} in docs/models differ from the predictions; `python docs/generate_models.py` "
                "writes the pages again."
            )
        return
    PAGES.mkdir(exist_ok=True)
    for name, text in texts.items():
        (PAGES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
