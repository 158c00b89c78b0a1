"""Write the page of `globe report`: one HTML file, with nothing to fetch."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from globe_fit.cli.plots import save_png
from globe_fit.cli.report.diagnostics import diagnostic_groups, error_group, number
from globe_fit.cli.report.facts import Facts, collect
from globe_fit.cli.report.figures import inline_svg
from globe_kernels.errors import RequestError
from globe_kernels.format.names import PAGE_NAME
from globe_kernels.format.writing import replacing_file, require_room
from globe_kernels.model.patching import PEAK_TOKENS
from globe_kernels.units import format_bytes, format_count
from globe_kernels.version import __version__

_GENERATOR = "globe report"  # marks a page that a report may replace
_MARKED_BYTES = 1024  # the mark is in these first bytes of a page
_SAME_SPEED = 0.05  # a smaller difference is noise
_ENOUGH_BATCHES = 3  # whose median says something about speed


@dataclass(frozen=True)
class _Tile:
    label: str
    value: str
    detail: str


def write_report(directory: Path, out: Path | None = None, *, base: Path | None = None, png: bool = False) -> dict:
    """Write the page about `directory` to `out`, by default in the directory; with `png` also each figure as a file.

    `base`, the dense model, adds spectra of more experts. Returns the written paths and the main figures. Raises
    RequestError when there is neither a checkpoint nor an unfinished fit, when `base` is another model, when `out` is a
    file that no report wrote, or without matplotlib.
    """
    out = directory / PAGE_NAME if out is None else out
    _require_replaceable(out)
    facts = collect(directory, base)
    errors, groups = error_group(facts), diagnostic_groups(facts)
    require_room(out.parent, 0)
    out.parent.mkdir(parents=True, exist_ok=True)
    page = _render(facts, errors=errors, groups=groups)
    with replacing_file(out) as path:
        path.write_text(page, encoding="utf-8")
    written = []
    for plot in (plot for group in (errors, *groups) for plot in group.plots if png):
        written.append(str(out.with_name(f"{out.stem}-{plot.name}.png")))
        with replacing_file(Path(written[-1])) as path:
            save_png(plot.figure, plot.title, str(path))
    found = {family: metrics.get("relative_error") for family, metrics in facts.families.items()}
    return {
        "html": str(out),
        "png": written,
        "finished": facts.checkpoint is not None,
        "sizes": facts.sizes,
        "relative_error": found,
    }


def _require_replaceable(out: Path) -> None:
    if out.is_dir():
        raise RequestError(f"{out} is a directory; give the name of a file for the page, such as {out / PAGE_NAME}.")
    if out.is_file():
        with out.open("rb") as file:
            if _GENERATOR.encode() not in file.read(_MARKED_BYTES):
                raise RequestError(f"{out} is not a page of globe report; move it, or give another file with -o.")


def _render(facts: Facts, **groups: Any) -> str:
    templates = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html")
    advice, level = _advice(facts)
    measured = facts.evaluation
    return template.render(
        generator=_GENERATOR,
        version=__version__,
        headline=_headline(facts),
        subtitle=_subtitle(facts),
        tiles=_tiles(facts),
        advice=advice,
        level=level,
        measure_with=_measure_with(facts) if facts.checkpoint is not None and measured is None else None,
        quality=None if measured is None else _measured_on(measured),
        made_by=facts.report.get("command"),
        measured_by=None if measured is None else measured["command"],
        svg=lambda plot: inline_svg(plot.figure, plot.name, f"{plot.title}. {plot.caption}"),
        **groups,
    )


def _headline(facts: Facts) -> str:
    if facts.checkpoint is None:
        return f"{facts.directory.resolve().name}: a fit that is not finished"
    name, sizes, measured = facts.checkpoint.config.base.name, facts.sizes, facts.evaluation
    assert sizes is not None
    if sizes["model"] is None:
        line = f"Gate and up of {name} take {_ratio(sizes['gate_up'])} of their bytes"
    else:
        counted = "the bytes of its values" if sizes["quantized"] else "its bytes"
        line = f"{name} takes {_ratio(sizes['model'])} of {counted}"
    if measured is None:
        return line
    return f"{line}; perplexity {measured['globe']['perplexity']:.2f} in place of {measured['dense']['perplexity']:.2f}"


def _subtitle(facts: Facts) -> str:
    if facts.checkpoint is None:
        steps = ", ".join(f"{family} at step {records[-1]['step']}" for family, records in facts.history.items())
        return steps or "No step yet."
    config = facts.checkpoint.config
    base = config.base
    return (
        f"{base.model_type}, {base.total_experts} experts of {base.intermediate_size} x {base.hidden_size} in "
        f"{len(base.num_experts)} layers. Rank {config.rank}, {config.num_atoms} atoms per family, support "
        f"{config.support}, phi {config.phi}, scope {config.scope}, {config.dtype}."
    )


def _advice(facts: Facts) -> tuple[str, str]:
    """Return (advice, level): the level of globe_fit.result.FitStatus, "" where it is not known."""
    if facts.checkpoint is None:
        return "Repeat the command of the fit: the fit goes on from its last snapshot.", "unsettled"
    status = facts.report.get("status", {})
    # reports of the first version have no level
    return status.get("advice", ""), status.get("level", "" if status.get("completed", True) else "diverged")


def _tiles(facts: Facts) -> list[_Tile]:
    tiles, sizes, measured = [], facts.sizes, facts.evaluation
    if measured is not None:
        dense, globe = measured["dense"], measured["globe"]
        change = globe["perplexity"] / dense["perplexity"] - 1
        tiles = [
            _Tile("KL(dense, GloBE)", number(globe["kl"]), "nats per token; 0 is the dense model"),
            _Tile(
                "Perplexity", f"{globe['perplexity']:.2f}", f"dense {dense['perplexity']:.2f} ({100 * change:+.1f} %)"
            ),
            _Tile("Same next token", f"{100 * globe['top1']:.1f} %", "as the dense model (top-1)"),
        ]
    if sizes is not None:
        by = f"runs by {' and '.join(sizes['strategies'] or ())}"
        published = sizes["quantized"] and f"the quantised base {format_bytes(sizes['quantized'])}"
        for key, label, basis in (
            ("model", "Whole model on disk", published),
            ("gate_up", "Gate and up on disk", ""),
            ("resident", "Resident in memory", by),
            ("peak", "Peak in memory", f"predicted, calls of up to {PEAK_TOKENS} tokens"),
        ):
            if (size := sizes[key]) is not None:
                detail = f"dense {format_bytes(size['dense'])}, ratio {_ratio(size)}"
                tiles.append(_Tile(label, format_bytes(size["globe"]), f"{detail}; {basis}" if basis else detail))
    if measured is not None:
        tiles.append(_speed(measured))
    return tiles


def _ratio(size: dict[str, int]) -> str:
    return f"{size['globe'] / size['dense']:.2f}"


def _speed(measured: dict) -> _Tile:
    ratio = measured["globe"]["tokens_per_s"] / measured["dense"]["tokens_per_s"]
    if measured["globe"].get("timed_batches", 0) < _ENOUGH_BATCHES:
        return _Tile("Speed", "Not known", f"the text is too short to time; {ratio:.2f} of the dense speed in one go")
    verdict = "As fast" if abs(ratio - 1) < _SAME_SPEED else "Faster" if ratio > 1 else "Slower"
    return _Tile("Speed", verdict, f"{ratio:.2f} of the dense speed in prefill, {_where(measured)} (measured)")


def _where(measured: dict) -> str:
    if measured["device"] == "cpu":
        return f"CPU with {measured['threads']} thread{'' if measured['threads'] == 1 else 's'}"
    return measured["device"]


def _measured_on(measured: dict) -> str:
    text, count = measured["text"], format_count(measured["tokens"])
    return f"Quality and speed were measured on {text}, {count} tokens, {_where(measured)}."


def _measure_with(facts: Facts) -> str:
    base = "MODEL_DIR" if facts.base is None else quote(str(facts.base))
    return f"globe eval {quote(str(facts.directory))} --base {base} --text TEXT"
