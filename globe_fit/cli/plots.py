"""Draw the figures of a report, a sweep and a plan with matplotlib, as SVG for a page or as PNG files."""

import io
import re
from typing import TYPE_CHECKING, Any

from globe_kernels.errors import RequestError
from globe_kernels.format.names import FAMILIES
from globe_kernels.strategies import DENSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: dict[str, str] = dict(zip(FAMILIES, ("#2563eb", "#ea7317"), strict=True))
_GREY, _FAINT = "#64748b", "#e2e8f0"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#475569",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "svg.fonttype": "none",
}
_WIDTH, _HEIGHT = 5.8, 3.1
_MOST_BARS = 32


def _figure(rows: int = 1, columns: int = 1, *, width: float = _WIDTH, height: float = _HEIGHT, **axes):
    """Make (figure, axes (rows, columns)) in the style of the report. Raises RequestError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError("GloBE draws with matplotlib; run `pip install matplotlib` and try again.") from None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **axes)


def error_curves(history: dict[str, list[dict]], reports: dict[str, dict]) -> "Figure":
    """Draw the relative error over the steps; dashed: the SVD in the same bytes; dotted: the bound of the rank."""
    figure, ((axes,),) = _figure()
    axes.set(xlabel="step", ylabel="relative squared error", yscale="log")
    for family, records in history.items():
        steps = [record["step"] for record in records]
        marker = "o" if len(steps) < 2 else None
        axes.plot(
            steps, [record["relative_error"] for record in records], color=COLOURS[family], label=family, marker=marker
        )
    styles = (("svd_equal_bytes", "--", "SVD, equal bytes"), ("rank_bound", ":", "lower bound of the rank"))
    for name, style, label in styles:
        for family, report in reports.items():
            if report.get(name, 0) > 1e-9:  # at a full rank there is only rounding
                axes.axhline(report[name], color=COLOURS[family], linestyle=style, linewidth=1)
        if any(report.get(name, 0) > 1e-9 for report in reports.values()):
            axes.plot([], [], color=_GREY, linestyle=style, linewidth=1, label=label)
    _plain_log(axes)
    _legend_above(axes)
    return figure


def _plain_log(axes: "Axes") -> None:
    """Label a log axis with 0.03, not 3 x 10^-2, and put ticks between the decades where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    steps = (1.0, 2.0, 3.0, 5.0) if high / low < 30 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def bars(values: dict[str, dict], xlabel: str, ylabel: str) -> "Figure":
    """Draw grouped bars {family: {label: value}}, equal labels in each family; lines where there are many labels."""
    figure, ((axes,),) = _figure()
    labels = list(next(iter(values.values())))
    width = 0.8 / len(values)
    for number, (family, heights) in enumerate(values.items()):
        if len(labels) > _MOST_BARS:
            axes.plot(list(heights.values()), color=COLOURS[family], label=family, linewidth=1.4)
            axes.set_ylim(bottom=0)
            continue
        centres = [group + (number - (len(values) - 1) / 2) * width for group in range(len(labels))]
        axes.bar(centres, list(heights.values()), width=0.92 * width, color=COLOURS[family], label=family)
    every = -(-len(labels) // 24)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.7, len(labels) - 0.3))
    axes.set_xticks(range(0, len(labels), every), labels[::every])
    _legend_above(axes)
    axes.grid(axis="x", visible=False)
    return figure


def _legend_above(axes: "Axes") -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=4, frameon=False, columnspacing=1.2)


def histograms(values: dict[str, dict[str, list]], xlabel: str, ylabel: str, *, log: bool = False) -> "Figure":
    """Draw histograms {family: {"counts", "edges"}} as outlines over each other, or as bars for few integers."""
    bins = [_whole_bins(histogram) for histogram in values.values()]
    if all(bins):
        seen = [number for counted in bins for number in counted]
        shown = range(max(min(seen) - 2, 0), max(seen) + 3)
        counts = ({str(number): counted.get(number, 0) for number in shown} for counted in bins)
        return bars(dict(zip(values, counts, strict=True)), xlabel, ylabel)
    figure, ((axes,),) = _figure()
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
        _plain_log(axes)
    _legend_above(axes)
    return figure


def _whole_bins(histogram: dict[str, list]) -> dict[int, int]:
    """Return {number: count} of a histogram with a bin per integer; empty for any other histogram."""
    counts, edges = histogram["counts"], histogram["edges"]
    if any(edge % 1 != 0.5 for edge in edges) or edges[1] - edges[0] != 1:
        return {}
    return {round(edge + 0.5): count for edge, count in zip(edges, counts, strict=False)}


def sorted_values(values: dict[str, list[float]], xlabel: str, ylabel: str) -> "Figure":
    """Draw the values of each family from the largest to the smallest, and the mean of all."""
    figure, ((axes,),) = _figure()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    for family, numbers in values.items():
        axes.stairs(sorted(numbers, reverse=True), baseline=None, color=COLOURS[family], label=family, linewidth=1.6)
    means = [sum(numbers) / len(numbers) for numbers in values.values()]
    axes.axhline(sum(means) / len(means), color=_GREY, linestyle=":", linewidth=1, label="mean")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure


def spectra(checks: dict[str, list[dict]]) -> "Figure":
    """Draw the singular values of sampled experts, dense and as stored, a row of panels per family."""
    columns = max(map(len, checks.values()))
    size = {"width": 2 * _WIDTH + 0.4, "height": 2.1 * len(checks) + 0.3}
    figure, grid = _figure(len(checks), columns, sharex=True, sharey=True, **size)
    for row, (family, experts) in zip(grid, checks.items(), strict=True):
        for axes, check in zip(row, experts, strict=False):
            dense, stored = check["spectrum_dense"], check["spectrum_stored"]
            axes.plot(check["number"], dense, color=_GREY, label="dense", linewidth=2.4, alpha=0.45)
            axes.plot(check["number"], stored, color=COLOURS[family], label=f"{family}, stored", linewidth=1.2)
            axes.set_title(f"layer {check['layer']}, expert {check['expert']}", fontsize=8.5, color="#475569")
        row[0].set_ylabel("singular value")
        row[0].legend(fontsize=8, frameon=False)
    # values below a thousandth of the largest are rounding, or beyond the rank
    dense = [check["spectrum_dense"] for experts in checks.values() for check in experts]
    top, low = max(values[0] for values in dense), min(map(min, dense))
    grid[0][0].set(yscale="log", ylim=(max(low / 1.5, top / 1000), top * 1.5))
    _plain_log(grid[0][0])
    for axes in grid[-1]:
        axes.set_xlabel("number of the singular value")
    return figure


def curves(history: dict[str, list[dict]], name: str, ylabel: str) -> "Figure":
    """Draw a metric over the steps."""
    figure, ((axes,),) = _figure()
    for family, records in history.items():
        rows = [record for record in records if record.get(name) is not None]
        values = [row[name] for row in rows]
        axes.plot([row["step"] for row in rows], values, color=COLOURS[family], label=family, marker=".", linewidth=1.2)
    axes.set(xlabel="step", ylabel=ylabel)
    if ylabel != "share":
        axes.set_ylim(bottom=0)
    _legend_above(axes)
    return figure


def sweep(rows: list[dict]) -> "Figure":
    """Draw the error of the points of a sweep against their bytes on disk, a panel per family.

    Each support and palette has a colour, and lines join the points of equal rank. Dashed: the SVD of every expert in
    the same bytes.
    """
    figure, (panels,) = _figure(1, len(FAMILIES), width=2 * _WIDTH, height=1.2 * _HEIGHT, sharey=True)
    series: dict[str, dict[int, list[dict]]] = {}
    for row in sorted(rows, key=lambda row: row["bytes"]["globe_on_disk"]):
        palette = "" if row["palette"] is None else f", palette {row['palette']}"
        series.setdefault(f"support {row['target_support']}{palette}", {}).setdefault(row["r"], []).append(row)
    for axes, family in zip(panels, FAMILIES, strict=True):
        baseline = sorted((row["bytes"]["globe_on_disk"] / 1e6, row["svd_equal_bytes"][family]) for row in rows)
        axes.plot(*zip(*baseline, strict=True), color=_GREY, linestyle="--", linewidth=1, label="SVD, equal bytes")
        for number, (name, ranks) in enumerate(series.items()):
            style: dict[str, Any] = {"color": f"C{number}", "marker": "osD^vP"[number % 6], "markersize": 4}
            label = name
            for joined in ranks.values():
                size = [row["bytes"]["globe_on_disk"] / 1e6 for row in joined]
                error = [row["relative_error"][family] for row in joined]
                axes.plot(size, error, label=label, linewidth=1.2, alpha=0.8, **style)
                label = None  # a single entry of the legend for all ranks
        axes.set(xlabel="MB on disk", yscale="log")
        axes.set_title(family, fontsize=9.5, color="#475569")
    panels[0].set_ylabel("relative squared error")
    panels[-1].legend(frameon=False, fontsize=8)
    _plain_log(panels[0])
    return figure


def plan_figure(figures: dict) -> "Figure":
    """Draw the figures of `globe plan`, a row per point: times relative to the dense experts, bytes by part."""
    rows = figures["points"]
    figure, grid = _figure(len(rows), 2, width=2 * _WIDTH, height=1.2 * _HEIGHT * len(rows))
    for (times, held), point in zip(grid, rows, strict=True):
        strategies = {name: found for name, found in point["strategies"].items() if "refused" not in found}
        dense = strategies["dense"]["us_per_layer"]
        for name, found in strategies.items():
            style: dict[str, Any] = {"color": _GREY} if name == DENSE.name else {}
            style |= {"linewidth": 3, "alpha": 0.35} if name == "auto" else {"linewidth": 1.4}
            relative = [us / dense[tokens] for tokens, us in found["us_per_layer"].items()]
            times.plot([int(tokens) for tokens in dense], relative, label=name, **style)
        times.set(yscale="log", xlabel="tokens", ylabel="time relative to dense")
        times.set_xscale("log", base=2)
        _plain_log(times)
        start = dict.fromkeys(strategies, 0.0)
        for number, part in enumerate(strategies["dense"]["parts"]):
            sizes = {name: found["parts"][part] / 1e9 for name, found in strategies.items()}
            if any(sizes.values()):
                held.barh(
                    list(strategies), list(sizes.values()), left=list(start.values()), label=part, color=f"C{number}"
                )
                start = {name: start[name] + size for name, size in sizes.items()}
        held.invert_yaxis()
        held.set(xlabel="GB on the device")
        held.set_title(f"rank {point['rank']}, {point['atoms']} atoms", fontsize=9.5, color="#475569")
        for axes in (times, held):
            axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=5)
        held.grid(axis="y", visible=False)
    return figure


def inline_svg(figure: "Figure", name: str) -> str:
    """Make an <svg> element without addresses, and without ids that another figure of the page could have."""
    import matplotlib

    buffer = io.StringIO()
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for pattern in (r' xmlns(:\w+)?="[^"]*"', r' id="(?!m|p)[^"]*"', r'(?<=<g) id="[^"]*"'):
        svg = re.sub(pattern, "", svg)
    return re.sub(r'<svg width="[^"]*" height="[^"]*"|<svg height="[^"]*" width="[^"]*"', "<svg", svg, count=1)


def save_png(figure: "Figure", title: str, path: str) -> None:
    """Save a figure with a title to a PNG file."""
    import matplotlib

    figure.suptitle(title, fontsize=11, color="#0f172a")
    with matplotlib.rc_context(_STYLE):
        figure.savefig(path, dpi=150, format="png")
