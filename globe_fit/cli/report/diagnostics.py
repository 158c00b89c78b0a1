"""Choose the diagnostics of a report: the figures, tables and sentences of each folded group.

A figure without numbers is left out, and a sentence replaces a figure that would show a single value.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from globe_fit.cli.report import figures
from globe_fit.cli.report.facts import Facts
from globe_fit.run.metrics import METRICS
from globe_fit.run.reports import healed_on
from globe_kernels.table import Table
from globe_kernels.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plot:
    """A figure; `name` is part of the name of its file."""

    name: str
    title: str
    caption: str
    figure: "Figure"
    small: bool = False


@dataclass(frozen=True)
class Group:
    """Diagnostics with one subject, and a line that sums them up."""

    title: str
    summary: str = ""
    sentences: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.sentences or self.plots or self.tables)


def error_group(facts: Facts) -> Group:
    """Show the error of each family beside its baselines, and its curve."""
    labels = {
        "relative_error": "GloBE",
        "calibrated_error": "GloBE, in the metric of the text",
        "svd_equal_bytes": "SVD, in the same bytes",
        "rank_bound": "lower bound of the rank",
    }
    rows = [
        [label, *(number(found.get(name)) for found in facts.families.values())]
        for name, label in labels.items()
        if any(found.get(name) is not None for found in facts.families.values())
    ]
    group = Group("Error of the weights")
    if rows:
        group.tables.append(Table("Relative squared error", ["", *facts.families], rows))
    if any(_is_curve(records, "relative_error") for records in facts.history.values()):
        caption = "Error of the normalised weights, as the solver sees them."
        figure = figures.error_curves(facts.history, facts.families)
        group.plots.append(Plot("error", "Error over the steps", caption, figure))
    elif facts.history:
        group.sentences.append("There is one record so far; a curve of the error needs two.")
    return group


def diagnostic_groups(facts: Facts) -> list[Group]:
    """Return all groups that have something to show."""
    groups = [_healing(facts), _layers(facts), _atoms(facts), _spectra(facts), _course(facts), _metrics(facts)]
    return [group for group in groups if not group.is_empty]


def _healing(facts: Facts) -> Group:
    """Show the error of the outputs of every layer before and after it was healed."""
    group = Group("Healing")
    if facts.healing is not None:
        group.sentences.append(healed_on(facts.healing))
        rows = [
            [layer, *(number(found[name]) for name in ("before", "after"))]
            for layer, found in facts.healing["layers"].items()
        ]
        title = "Relative squared error of the outputs, on tokens held out"
        group.tables.append(Table(title, ["layer", "before", "after"], rows))
    return group


def _of(facts: Facts, name: str) -> dict[str, Any]:
    return {family: found[name] for family, found in facts.families.items() if found.get(name)}


def _is_curve(records: list[dict], name: str) -> bool:
    values = [record[name] for record in records if record.get(name) is not None]
    return len(values) > 1 and any(values)


def _layers(facts: Facts) -> Group:
    errors, palettes = _of(facts, "relative_error_by_layer"), _of(facts, "palette_sizes")
    found = [error for layers in errors.values() for error in layers.values()]
    group = Group("Layers", f"errors from {number(min(found))} to {number(max(found))}" if found else "")
    if any(len(layers) > 1 for layers in errors.values()) and any(found):
        caption = "Relative squared error of the stored factors on the raw weights."
        figure = figures.bars(errors, "layer", "relative squared error")
        group.plots.append(Plot("layers", "Error of each layer", caption, figure))
    sizes = {size for layers in palettes.values() for size in layers.values()}
    if len(sizes) == 1:
        group.sentences.append(f"The experts of every layer use {sizes.pop()} different atoms (the palette).")
    elif sizes:
        caption = "Different atoms that the experts of a layer use: the layer needs them when it runs."
        figure = figures.bars(palettes, "layer", "atoms")
        group.plots.append(Plot("palettes", "Palette of each layer", caption, figure))
    return group


def _atoms(facts: Facts) -> Group:
    dead = sum(found.get("dead_atoms", 0) for found in facts.families.values())
    group = Group("Atoms and codes", f"atoms that no expert uses: {dead}" if dead else "every atom is in use")
    if any(any(used) for used in facts.use.values()):
        caption = "No expert uses an atom at zero: it costs bytes for nothing."
        figure = figures.sorted_values(facts.use, "atoms, most used first", "experts that use the atom")
        group.plots.append(Plot("popularity", "Popularity of the atoms", caption, figure))
    overlap = facts.report.get("support_overlap")
    if overlap is not None:
        group.sentences.append(f"Gate and up of an expert share {100 * overlap:.0f} % of the atoms that either uses.")
    if supports := _of(facts, "support_histogram"):
        least = {found["support_min"] for found in facts.families.values() if "support_min" in found}
        most = {found["support_max"] for found in facts.families.values() if "support_max" in found}
        if least == most and len(most) == 1:
            group.sentences.append(f"Every expert mixes {number(most.pop())} atoms (the support).")
        else:
            figure = figures.histograms(supports, "atoms of an expert", "experts")
            group.plots.append(Plot("support", "Support of the experts", "Non-zero codes of an expert.", figure))
    if pairs := {family: found for family, found in _of(facts, "coherence_histogram").items() if any(found["counts"])}:
        caption = "Two atoms with a |cosine| near 1 duplicate each other."
        figure = figures.histograms(pairs, "|cosine| of two atoms", "pairs", log=True)
        group.plots.append(Plot("coherence", "Coherence of the atoms", caption, figure))
    return group


def _spectra(facts: Facts) -> Group:
    sampled = [
        (family, check, f"{family}, layer {check['layer']}, expert {check['expert']}")
        for family, checks in _of(facts, "spot_checks").items()
        for check in checks
        if max(check["spectrum_dense"]) > 0
    ]
    group = Group("Spectra of sampled experts", f"{len(sampled)} matrices before and after")
    if not sampled:
        return group
    group.sentences.append(
        "Singular values (up) by their number (across): dense in grey, as stored in colour. Where the coloured line "
        "leaves the grey line, energy is lost."
    )
    for family, check, name in sampled:
        slug = f"spectrum-{family}-{check['layer']}-{check['expert']}"
        caption = f"error {number(check['relative_error'])}"
        group.plots.append(Plot(slug, name, caption, figures.spectrum(family, check), small=True))
    header = ["sampled expert", "relative error", "smallest angle, degrees", "largest angle, degrees"]
    rows = [
        [name, number(check["relative_error"]), *(f"{check['angles_degrees'][end]:.1f}" for end in (0, -1))]
        for _, check, name in sampled
    ]
    group.tables.append(Table("Angles of the top singular vectors", header, rows))
    return group


def _course(facts: Facts) -> Group:
    last = [records[-1] for records in facts.history.values()]
    seconds = sum(record["seconds"] for record in last)
    group = Group("Course of the fit", f"{format_seconds(seconds)} in the solver" if seconds else "")
    for name, title, caption in (
        (
            "energy_captured",
            "Energy in the composed bases",
            "Share of the energy that the bases of sampled experts hold.",
        ),
        ("step_seconds", "Seconds of a step", "Seconds of the last pass over all experts before each record."),
    ):
        if any(_is_curve(records, name) for records in facts.history.values()):
            figure = figures.curves(facts.history, name, METRICS[name].unit or "share")
            group.plots.append(Plot(name.replace("_", "-"), title, caption, figure))
    return group


def _metrics(facts: Facts) -> Group:
    """Tabulate all plain numbers, at the start and at the end of each family."""
    rows = []
    for name, row in METRICS.items():
        values = [
            _with_unit(found[name], row.unit) if isinstance(found.get(name), (int, float)) else ""
            for family, newest in facts.families.items()
            for found in (facts.history.get(family, [{}])[0], newest)
        ]
        if any(values):
            rows.append([name, row.unit, *values, row.meaning])
    moments = [f"{family}, {when}" for family in facts.families for when in ("start", "end")]
    group = Group("All metrics", f"{len(rows)} numbers at the start and at the end")
    if rows:
        group.tables.append(Table("Metrics", ["metric", "unit", *moments, "meaning"], rows))
    return group


def _with_unit(value: float, unit: str) -> str:
    return format_bytes(value) if unit == "B" else number(value)


def number(value: Any) -> str:
    """Write a number with three or four digits; "-" stands for None."""
    if value is None:
        return "-"
    if isinstance(value, float) and not value.is_integer():
        if 1e3 <= abs(value) < 1e9:
            return f"{value:,.0f}"
        return f"{value:.4f}" if 1e-3 <= abs(value) < 10 else f"{value:.3g}"
    return f"{value:,.0f}"
