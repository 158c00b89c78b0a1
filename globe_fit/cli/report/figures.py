"""Draw the figures of a report, and write them as SVG that takes its colours from the page."""

import io
import re
from html import escape
from typing import TYPE_CHECKING

from globe_fit.cli.plots import COLOURS, EDGE, FAINT, GREY, INK, SOFT, STYLE, new_figure, plain_log, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sizes in inches. Shown 320 pixels wide, as on a phone, a figure keeps its text above 9 pixels.
_SIZE = (4.4, 2.75)
_SMALL = (2.1, 1.8)
_MOST_BARS = 32
_VARIABLES = {
    **{colour: family for family, colour in COLOURS.items()},
    INK: "ink",
    SOFT: "soft",
    GREY: "grey",
    EDGE: "edge",
    FAINT: "line",
}


@styled
def error_curves(history: dict[str, list[dict]], reports: dict[str, dict]) -> "Figure":
    """Draw the relative error over the steps; dashed: the SVD in the same bytes; dotted: the bound of the rank."""
    figure, ((axes,),) = new_figure(*_SIZE)
    axes.set(xlabel="step", ylabel="relative squared error", yscale="log")
    for family, records in history.items():
        steps = [record["step"] for record in records]
        axes.plot(steps, [record["relative_error"] for record in records], color=COLOURS[family], label=family)
    styles = (("svd_equal_bytes", "--", "SVD, equal bytes"), ("rank_bound", ":", "bound of the rank"))
    for name, style, label in styles:
        values = {family: report[name] for family, report in reports.items() if report.get(name, 0) > 1e-9}
        for family, value in values.items():  # at a full rank the bound is rounding
            axes.axhline(value, color=COLOURS[family], linestyle=style, linewidth=1)
        if values:
            axes.plot([], [], color=GREY, linestyle=style, linewidth=1, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    plain_log(axes)
    _legend_above(axes)
    return figure


@styled
def bars(values: dict[str, dict], xlabel: str, ylabel: str) -> "Figure":
    """Draw grouped bars {family: {label: value}}, equal labels in each family; lines where there are many labels."""
    figure, ((axes,),) = new_figure(*_SIZE)
    labels = list(next(iter(values.values())))
    width = 0.8 / len(values)
    for number, (family, heights) in enumerate(values.items()):
        if len(labels) > _MOST_BARS:
            axes.plot(list(heights.values()), color=COLOURS[family], label=family, linewidth=1.4)
            axes.set_ylim(bottom=0)
            continue
        centres = [group + (number - (len(values) - 1) / 2) * width for group in range(len(labels))]
        axes.bar(centres, list(heights.values()), width=0.92 * width, color=COLOURS[family], label=family)
    every = -(-len(labels) // 16)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.7, len(labels) - 0.3))
    axes.set_xticks(range(0, len(labels), every), labels[::every])
    _legend_above(axes)
    axes.grid(axis="x", visible=False)
    return figure


def _legend_above(axes: "Axes") -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.98), ncols=4, columnspacing=1, handlelength=1.4)


@styled
def histograms(values: dict[str, dict[str, list]], xlabel: str, ylabel: str, *, log: bool = False) -> "Figure":
    """Draw histograms {family: {"counts", "edges"}} as outlines over each other, or as bars for few integers."""
    bins = [_whole_bins(histogram) for histogram in values.values()]
    if all(bins):
        seen = [number for counted in bins for number in counted]
        shown = range(max(min(seen) - 2, 0), max(seen) + 3)
        counts = ({str(number): counted.get(number, 0) for number in shown} for counted in bins)
        return bars(dict(zip(values, counts, strict=True)), xlabel, ylabel)
    figure, ((axes,),) = new_figure(*_SIZE)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    filled = []  # right edges of the bins that are not empty
    for family, histogram in values.items():
        counts, edges = histogram["counts"], histogram["edges"]
        axes.stairs(counts, edges, fill=True, color=COLOURS[family], alpha=0.18)
        axes.stairs(counts, edges, color=COLOURS[family], label=family, linewidth=1.4)
        filled += [edge for edge, count in zip(edges[1:], counts, strict=True) if count]
    first = min(histogram["edges"][0] for histogram in values.values())
    last = max(histogram["edges"][-1] for histogram in values.values())
    axes.set_xlim(first, min(first + 1.1 * (max(filled) - first), last))
    if log:
        axes.set_ylim(bottom=0.7)
        plain_log(axes)
    _legend_above(axes)
    return figure


def _whole_bins(histogram: dict[str, list]) -> dict[int, int]:
    """Return {number: count} of a histogram with a bin per integer; empty for any other histogram."""
    counts, edges = histogram["counts"], histogram["edges"]
    if any(edge % 1 != 0.5 for edge in edges) or edges[1] - edges[0] != 1:
        return {}
    return {round(edge + 0.5): count for edge, count in zip(edges, counts, strict=False)}


@styled
def sorted_values(values: dict[str, list[int]], xlabel: str, ylabel: str) -> "Figure":
    """Draw the values of each family from the largest to the smallest, and the mean of all."""
    figure, ((axes,),) = new_figure(*_SIZE)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    for family, numbers in values.items():
        axes.stairs(sorted(numbers, reverse=True), baseline=None, color=COLOURS[family], label=family, linewidth=1.6)
    means = [sum(numbers) / len(numbers) for numbers in values.values()]
    axes.axhline(sum(means) / len(means), color=GREY, linestyle=":", linewidth=1, label="mean")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    _legend_above(axes)
    return figure


@styled
def spectrum(family: str, check: dict) -> "Figure":
    """Draw the singular values of one expert, dense in grey and as stored in the colour of the family."""
    figure, ((axes,),) = new_figure(*_SMALL)
    dense, stored = check["spectrum_dense"], check["spectrum_stored"]
    axes.plot(check["number"], dense, color=GREY, linewidth=2.8, alpha=0.5)
    axes.plot(check["number"], stored, color=COLOURS[family], linewidth=1.3)
    # values below a thousandth of the largest are rounding, or beyond the rank
    axes.set(yscale="log", ylim=(max(min(dense) / 1.5, dense[0] / 1000), dense[0] * 1.5))
    plain_log(axes)
    return figure


@styled
def curves(history: dict[str, list[dict]], name: str, ylabel: str) -> "Figure":
    """Draw a metric over the steps."""
    figure, ((axes,),) = new_figure(*_SIZE)
    for family, records in history.items():
        rows = [record for record in records if record.get(name) is not None]
        values = [row[name] for row in rows]
        axes.plot([row["step"] for row in rows], values, color=COLOURS[family], label=family, marker=".", linewidth=1.2)
    axes.set(xlabel="step", ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if ylabel != "share":
        axes.set_ylim(bottom=0)
    _legend_above(axes)
    return figure


def inline_svg(figure: "Figure", name: str, description: str) -> str:
    """Make an <svg> element for a page: colours are its CSS variables, ids begin with a hash of `name`.

    It has no address, and `description` is read to a person who does not see it.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for pattern in (r' xmlns(:\w+)?="[^"]*"', r' id="(?!m|p)[^"]*"', r'(?<=<g) id="[^"]*"'):
        svg = re.sub(pattern, "", svg)
    svg = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda found: f"var(--{_VARIABLES[found[0]]})", svg)
    start = f'<svg role="img" aria-label="{escape(description)}"'
    return re.sub(r'<svg width="[^"]*" height="[^"]*"|<svg height="[^"]*" width="[^"]*"', lambda _: start, svg, count=1)
