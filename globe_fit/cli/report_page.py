"""An HTML page about a GloBE checkpoint or an unfinished fit: figures and tables, with nothing to fetch."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from globe_fit.cli import plots
from globe_fit.cli.console import megabytes
from globe_fit.data.source import ExpertSource
from globe_fit.export import require_same_model
from globe_fit.measure.diagnostics import compare, palette_sizes, sampled_experts, sparsity
from globe_fit.measure.inspection import stored_codes
from globe_fit.result import reconstruct, slice_experts
from globe_fit.run.loggers import read_stream
from globe_fit.run.metrics import METRICS
from globe_fit.run.snapshots import stream_path
from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import GlobeCheckpoint
from globe_kernels.format.files import replacing_file, require_room
from globe_kernels.format.names import CONFIG_NAME, FAMILIES, METRICS_NAME
from globe_kernels.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_NAME = "report.html"
_EXPERTS_OF_BASE = 5  # spectra to draw with --base; without --base the spectra of the fit report


@dataclass(frozen=True)
class _Plot:
    name: str
    title: str
    caption: str
    figure: "Figure"
    wide: bool = False


@dataclass(frozen=True)
class _Facts:
    """The facts about a fit. `families` has the newest value of every metric of each family that has begun."""

    title: str
    checkpoint: GlobeCheckpoint | None  # None while the fit is not finished
    advice: str
    overall: dict
    history: dict[str, list[dict]]
    families: dict[str, dict]
    use: dict[str, list[float]]  # experts that use each atom


def write_report(directory: Path, out: Path | None = None, *, base: Path | None = None, png: bool = False) -> dict:
    """Write the page about `directory` to `out`, by default in the directory; with `png` also each figure as a file.

    `base`, the dense model, adds spectra of more experts. Returns the written paths and the main figures. Raises
    RequestError when there is neither a checkpoint nor an unfinished fit, when `base` is another model, or without
    matplotlib.
    """
    facts = _collect(directory, base)
    drawn = _plots(facts)
    out = directory / PAGE_NAME if out is None else out
    if out.is_dir():
        raise RequestError(f"{out} is a directory; give the name of a file for the page, such as {out / PAGE_NAME}.")
    require_room(out.parent, 0)
    out.parent.mkdir(parents=True, exist_ok=True)
    page = _page(facts, drawn)
    with replacing_file(out) as path:
        path.write_text(page, encoding="utf-8")
    written = []
    for plot in drawn if png else ():
        written.append(str(out.with_name(f"{out.stem}-{plot.name}.png")))
        plots.save_png(plot.figure, plot.title, written[-1])
    errors = {family: metrics.get("relative_error") for family, metrics in facts.families.items()}
    figures: dict[str, Any] = {"html": str(out), "png": written, "finished": facts.checkpoint is not None}
    if facts.checkpoint is not None:
        figures["bytes"] = _bytes(facts.checkpoint)
    return figures | {"relative_error": errors}


def _bytes(checkpoint: GlobeCheckpoint) -> dict[str, int]:
    return {"dense_experts": checkpoint.config.base.dense_bytes, "globe_on_disk": checkpoint.bytes_on_disk}


def _collect(directory: Path, base: Path | None) -> _Facts:
    stream = stream_path(directory)
    unfinished = stream.is_file() and not (directory / CONFIG_NAME).is_file()
    checkpoint = None if unfinished else GlobeCheckpoint(directory)
    records = read_stream(stream if checkpoint is None else directory / METRICS_NAME)
    history = {family: [record for record in records if record["family"] == family] for family in FAMILIES}
    history = {family: found for family, found in history.items() if found}
    newest = {family: {name: each[name] for each in found for name in each} for family, found in history.items()}
    if checkpoint is None:
        return _Facts(directory.resolve().name, None, "This fit is not finished.", {}, history, newest, {})
    report, config, use = checkpoint.report(), checkpoint.config, {}
    source = None if base is None else ExpertSource(base)
    if source is not None:
        require_same_model(config, source)
    for family in FAMILIES:
        codes = stored_codes(checkpoint, family)
        use[family] = (codes != 0).sum(0).tolist()
        newest[family] = newest.get(family, {}) | report.get("families", {}).get(family, {})
        newest[family] |= sparsity(codes, config.base) | {"palette_sizes": palette_sizes(codes, config.base)}
        if source is not None:
            newest[family]["spot_checks"] = _spot_checks(checkpoint, source, family)
    advice = report.get("status", {}).get("advice", "")
    return _Facts(config.base.name, checkpoint, advice, report, history, newest, use)


def _spot_checks(checkpoint: GlobeCheckpoint, source: ExpertSource, family: str) -> list[dict]:
    bank, found = checkpoint.bank(family), []
    for number in sampled_experts(source.base.total_experts, _EXPERTS_OF_BASE):
        layer, span = next((layer, span) for layer, span in source.layer_spans if number < span.stop)
        expert = number - span.start
        factors = slice_experts(checkpoint.layer(layer.layer, family), slice(expert, expert + 1))
        dense = source.read(layer, family, range(expert, expert + 1))[0]
        stored = reconstruct(factors, bank, checkpoint.config.phi)[0]
        found.append({"layer": layer.layer, "expert": expert, **compare(dense, stored)})
    return found


def _plots(facts: _Facts) -> list[_Plot]:
    """Draw every figure that has numbers."""

    def of(name: str) -> dict[str, Any]:
        return {family: metrics[name] for family, metrics in facts.families.items() if metrics.get(name)}

    drawn = []

    def add(*args, wide: bool = False) -> None:
        drawn.append(_Plot(*args, wide=wide))

    if facts.history:
        caption = "Error of the normalised weights, as the solver sees them."
        if of("svd_equal_bytes"):
            caption += " Dashed: the SVD of every expert in the same bytes."
        add("error", "Error over the steps", caption, plots.error_curves(facts.history, facts.families))
    if layers := of("relative_error_by_layer"):
        caption = "Relative squared error of the stored factors on the raw weights."
        add("layers", "Error of each layer", caption, plots.bars(layers, "layer", "relative squared error"))
    if facts.use:
        atoms = plots.sorted_values(facts.use, "atoms, most used first", "experts that use the atom")
        add(
            "popularity",
            "Popularity of the atoms",
            "No expert uses an atom at zero: it costs bytes for nothing.",
            atoms,
        )
    if palettes := of("palette_sizes"):
        caption = "Different atoms that the experts of a layer use: the layer needs them when it runs."
        add("palettes", "Palette of each layer", caption, plots.bars(palettes, "layer", "atoms"))
    if supports := of("support_histogram"):
        caption, overlap = "Non-zero codes of an expert.", facts.overall.get("support_overlap")
        if overlap is not None:
            caption += f" Gate and up of an expert share {overlap:.0%} of the atoms that either uses."
        figure = plots.histograms(supports, "atoms of an expert", "experts")
        add("support", "Support of the experts", caption, figure)
    if pairs := of("coherence_histogram"):
        figure = plots.histograms(pairs, "|cosine| of two atoms", "pairs", log=True)
        add("coherence", "Coherence of the atoms", "Two atoms with a |cosine| near 1 duplicate each other.", figure)
    if checks := of("spot_checks"):
        caption = "Sampled experts. Where the coloured line leaves the grey line, energy is lost."
        add("spectra", "Spectra before and after", caption, plots.spectra(checks), wide=True)
    for name, title, caption in (
        (
            "energy_captured",
            "Energy in the composed bases",
            "Share of the energy of sampled experts that their bases can hold.",
        ),
        ("step_seconds", "Seconds of a step", "Seconds of the last pass over all experts before each record."),
    ):
        if any(record.get(name) is not None for records in facts.history.values() for record in records):
            figure = plots.curves(facts.history, name, METRICS[name].unit or "share")
            add(name.replace("_", "-"), title, caption, figure)
    return drawn


def _page(facts: _Facts, drawn: list[_Plot]) -> str:
    cards = "".join(
        f'<figure class="card{" wide" if plot.wide else ""}"><h2>{escape(plot.title)}</h2>'
        f"{plots.inline_svg(plot.figure, plot.name)}<figcaption>{escape(plot.caption)}</figcaption></figure>"
        for plot in drawn
    )
    title = f"GloBE: {facts.title}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head><body><main>'
        f"<header><h1>{escape(facts.title)}</h1><p>{escape(_subtitle(facts))}</p></header>"
        f'<section class="tiles">{_tiles(facts)}</section>'
        f'{f"""<p class="advice">{escape(facts.advice)}</p>""" if facts.advice else ""}'
        f'<section class="grid">{cards}</section>{_spot_table(facts)}{_metric_table(facts)}'
        f"<footer>globe report, GloBE {__version__}</footer></main></body></html>\n"
    )


def _subtitle(facts: _Facts) -> str:
    if facts.checkpoint is None:
        steps = ", ".join(f"{family} at step {records[-1]['step']}" for family, records in facts.history.items())
        return f"A fit that is not finished: {steps or 'no step yet'}"
    config = facts.checkpoint.config
    base = config.base
    return (
        f"{base.model_type}, {base.total_experts} experts of {base.intermediate_size} x {base.hidden_size} in "
        f"{len(base.num_experts)} layers. Rank {config.rank}, {config.num_atoms} atoms per family, support "
        f"{config.support}, phi {config.phi}, scope {config.scope}, {config.dtype}."
    )


def _tiles(facts: _Facts) -> str:
    tiles = []
    if facts.checkpoint is not None:
        dense, disk = _bytes(facts.checkpoint).values()
        sizes = f"{megabytes(dense)} of gate and up experts, {megabytes(disk)} on disk"
        tiles.append((f"{disk / dense:.3f}", "of the bytes", sizes))
    for family, metrics in facts.families.items():
        if "relative_error" not in metrics:
            continue
        baselines = [
            f"{label} {_number(metrics[name])}"
            for name, label in (("svd_equal_bytes", "SVD in the same bytes"), ("rank_bound", "lower bound of the rank"))
            if name in metrics
        ]
        tiles.append((_number(metrics["relative_error"]), f"relative error, {family}", "; ".join(baselines)))
    last = [records[-1] for records in facts.history.values()]
    if seconds := sum(record["seconds"] for record in last):
        passes = sum(record["step"] + 1 for record in last)
        tiles.append((_duration(seconds), "in the solver", f"{seconds / passes:.2g} s per pass over all experts"))
    return "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span><small>{escape(detail)}</small></div>'
        for value, label, detail in tiles
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and not value.is_integer():
        if 1e3 <= abs(value) < 1e9:
            return f"{value:,.0f}"
        return f"{value:.4f}" if 1e-3 <= abs(value) < 10 else f"{value:.3g}"
    return f"{value:,.0f}"


def _spot_table(facts: _Facts) -> str:
    rows = [
        [
            f"{family}, layer {check['layer']}, expert {check['expert']}",
            _number(check["relative_error"]),
            *(f"{angle:.1f}" for angle in (check["angles_degrees"][0], check["angles_degrees"][-1])),
        ]
        for family, metrics in facts.families.items()
        for check in metrics.get("spot_checks", ())
    ]
    header = ["Sampled expert", "relative error", "smallest angle of the top singular vectors, degrees", "largest"]
    return _table("Spot checks", header, rows) if rows else ""


def _metric_table(facts: _Facts) -> str:
    """Tabulate all plain numbers, at the start and at the end of each family."""
    rows = []
    for name, row in METRICS.items():
        values = [
            _number(found[name]) if isinstance(found.get(name), (int, float)) else ""
            for family, newest in facts.families.items()
            for found in (facts.history.get(family, [{}])[0], newest)
        ]
        if any(values):
            rows.append([name, row.unit, *values, row.meaning])
    header = [
        "Metric",
        "unit",
        *(f"{family}, {when}" for family in facts.families for when in ("start", "end")),
        "meaning",
    ]
    return _table("All metrics", header, rows) if rows else ""


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<section class="card wide"><h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


_CSS = """
:root { color-scheme: light; --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Helvetica, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px; }
h1 { font-size: 30px; margin: 0; letter-spacing: -0.02em; }
h2 { font-size: 15px; margin: 0 0 8px; font-weight: 600; }
header p, figcaption, small, footer { color: var(--soft); }
header p { margin: 4px 0 24px; }
.tiles { display: flex; flex-wrap: wrap; gap: 16px; }
.grid { display: grid; gap: 16px; grid-template-columns: 1fr 1fr; }
.tile, .card, .advice { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.tile { flex: 1 1 200px; padding: 16px 20px; }
.tile b { display: block; font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; font-weight: 650; }
.tile span, .tile small { display: block; }
.tile small, figcaption { font-size: 13px; line-height: 1.4; }
.advice { margin: 16px 0; padding: 12px 20px; border-left: 4px solid #2563eb; }
.card { margin: 0; padding: 18px 20px 14px; min-width: 0; }
.grid .wide { grid-column: span 2; }
section.card { margin-top: 16px; }
.card svg { display: block; width: 100%; height: auto; }
.card svg text { font-family: system-ui, "Segoe UI", Helvetica, sans-serif !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
td:last-child { white-space: normal; }
footer { margin-top: 24px; font-size: 13px; }
@media (max-width: 800px) { .grid { display: block; } .grid .card { margin-bottom: 16px; } }
@media print { body { background: #fff; } .card, .tile { break-inside: avoid; } }
"""
