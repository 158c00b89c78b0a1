"""Draw with matplotlib: the style of all figures, and the figures of a sweep and of a plan."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from globe_kernels.errors import RequestError
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.patching import PEAK_TOKENS
from globe_kernels.strategies import DENSE, STRATEGIES
from globe_kernels.strategies.budget import AUTO
from globe_kernels.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Given = ParamSpec("_Given")

COLOURS: dict[str, str] = dict(zip(FAMILIES, ("#2563eb", "#c2570c"), strict=True))
INK, SOFT, GREY, EDGE, FAINT = "#0f172a", "#475569", "#64748b", "#94a3b8", "#e2e8f0"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": SOFT,
    "axes.titlecolor": SOFT,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": EDGE,
    "axes.labelcolor": SOFT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "svg.fonttype": "none",
}
# Colours that differ in lightness too. A strategy or a rank has the same colour in every panel.
_SERIES = ("#2563eb", "#c2570c", "#0d9488", "#9333ea", "#ca8a04", "#db2777", "#4d7c0f", "#0e7490")
_MARKERS = "osD^vPXp"


def styled(draw: "Callable[_Given, Figure]") -> "Callable[_Given, Figure]":
    """Decorate a function that draws a figure: it draws in the style, and raises RequestError without matplotlib."""

    @wraps(draw)
    def in_style(*args: "_Given.args", **named: "_Given.kwargs") -> "Figure":
        try:
            import matplotlib
        except ImportError:
            raise RequestError("GloBE draws with matplotlib; run `pip install matplotlib` and try again.") from None
        with matplotlib.rc_context(STYLE):
            return draw(*args, **named)

    return in_style


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **axes):
    """Make (figure, axes (rows, columns)) of a size in inches; the caller is `styled`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **axes)


def plain_log(axes: "Axes") -> None:
    """Label a log axis with 0.03, not 3 x 10^-2, and put ticks between the decades where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axes.get_ylim()
    steps = (1.0, 2.0, 3.0, 5.0) if high / low < 30 else (1.0, 3.0)
    axes.yaxis.set_major_locator(MaxNLocator(5) if high / low < 4 else LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def save_png(figure: "Figure", title: str, path: str) -> None:
    """Save a figure with a title to a PNG file."""
    import matplotlib

    figure.suptitle(title, fontsize=11, color=INK, parse_math=False)  # a name may hold dollars
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=150, format="png")


@styled
def sweep(rows: list[dict]) -> "Figure":
    """Draw the error of the points of a sweep against their ratio, a panel per family and a colour per rank.

    A line joins the points of equal rank, support (s) and palette (u), and is labelled where the points of its rank
    differ in them. Dashed: the SVD of every expert in the same bytes.
    """
    figure, (panels,) = new_figure(11.6, 4.6, 1, len(FAMILIES), sharey=True)
    rows = sorted(rows, key=lambda row: row["ratio"])
    ranks = sorted({row["r"] for row in rows})
    lines: dict[tuple, list[dict]] = {}
    for row in rows:
        lines.setdefault((row["r"], row["target_support"], row["palette"]), []).append(row)
    # letter: place in the key of a line, of the sizes that differ within a rank
    varied = {
        letter: place
        for place, letter in ((1, "s"), (2, "u"))
        if len({(key[0], key[place]) for key in lines}) > len(ranks)
    }
    colours = {rank: _SERIES[number % len(_SERIES)] for number, rank in enumerate(ranks)}
    markers = {rank: _MARKERS[number % len(_MARKERS)] for number, rank in enumerate(ranks)}
    for axes, family in zip(panels, FAMILIES, strict=True):
        baseline = [(row["ratio"], row["svd_equal_bytes"][family]) for row in rows]
        dashed: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1, "marker": "_"}
        axes.plot(*zip(*baseline, strict=True), label="SVD, equal bytes", **dashed)
        for (rank, *_), joined in lines.items():
            ratios, errors = [row["ratio"] for row in joined], [row["relative_error"][family] for row in joined]
            style: dict[str, Any] = {"color": colours[rank], "label": f"rank {rank}"}
            axes.plot(ratios, errors, marker=markers[rank], markersize=5, linewidth=0.8, **style)
        axes.set(xlabel="bytes of gate and up over dense", yscale="log", title=family)
        axes.margins(x=0.15, y=0.1)
    plain_log(panels[0])
    panels[0].set_ylabel("relative squared error")
    handles = {line.get_label(): line for line in panels[0].get_lines()}
    names = [*(f"rank {rank}" for rank in ranks), "SVD, equal bytes"]
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=8)
    figure.draw_without_rendering()  # the places of the labels depend on the layout
    for axes, family in zip(panels, FAMILIES, strict=True):
        ends = []
        for key, joined in lines.items():
            name = " ".join(f"{letter}{key[place]}" for letter, place in varied.items() if key[place] is not None)
            end = joined[-1]
            ends.append((end["ratio"], end["relative_error"][family], name or "no palette", colours[key[0]]))
        if varied:
            _label_points(axes, ends)
    return figure


def _label_points(axes: "Axes", points: list[tuple[float, float, str, str]]) -> None:
    """Write the name of each point (x, y, name, colour) at the nearest free place around it, or not at all."""
    from matplotlib.transforms import Bbox

    taken: list[Bbox] = []
    for line in axes.get_lines():
        for across, up in axes.transData.transform(line.get_xydata()):
            taken.append(Bbox.from_bounds(across - 5, up - 5, 10, 10))
    sides = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
    places = [(7 * far * across, 9 * far * up) for far in (1, 2, 3) for across, up in sides]
    for x, y, name, colour in points:
        label = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=9, color=colour)
        for across, up in places:
            ha = ("center", "left", "right")[(across > 0) - (across < 0)]
            va = ("center", "bottom", "top")[(up > 0) - (up < 0)]
            label.set(position=(across, up), ha=ha, va=va)
            box = label.get_window_extent()
            if axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and box.count_overlaps(taken) == 0:
                taken.append(box)
                break
        else:
            label.remove()


@styled
def plan_figure(figures: dict) -> "Figure":
    """Draw the figures of `globe plan`, a row per point: times relative to the dense experts, bytes of the model."""
    points = figures["points"]
    figure, grid = new_figure(12.6, 3.7 * len(points) + 0.5, len(points), 2)
    colours = dict(zip(STRATEGIES, _SERIES, strict=False)) | {DENSE.name: GREY, AUTO: INK}
    for (times, held), point in zip(grid, points, strict=True):
        strategies = {name: found for name, found in point["strategies"].items() if "refused" not in found}
        _relative_times(times, strategies, colours)
        palette = "" if point["palette"] is None else f", palette {point['palette']}"
        sizes = f"rank {point['rank']}, {point['atoms']} atoms, support {point['support']}{palette}"
        times.set_title(f"{sizes}: gate and up {point['ratio']:.2f} of dense", loc="left", color=INK)
        _model_bytes(held, strategies, figures["outside_bytes"], colours)
    handles = {line.get_label(): line for times in grid[:, 0] for line in times.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def _relative_times(axes: "Axes", strategies: dict[str, dict], colours: dict[str, str]) -> None:
    dense = strategies[DENSE.name]["us_per_layer"]
    for name, found in strategies.items():
        relative = [us / dense[tokens] for tokens, us in found["us_per_layer"].items()]
        # auto lies on the strategy that it takes
        style: dict[str, Any] = {"linewidth": 5, "alpha": 0.2} if name == AUTO else {"linewidth": 1.6}
        axes.plot([int(tokens) for tokens in dense], relative, label=name, color=colours[name], **style)
    axes.set(yscale="log", xlabel="tokens of a call", ylabel="time of a MoE layer, dense = 1")
    axes.set_xscale("log", base=4)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.6), max(high, 1.7))
    axes.margins(x=0)
    plain_log(axes)
    beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    for text, up in (("slower than dense", 14), ("dense", 0), ("faster than dense", -14)):
        axes.annotate(text, (1, 1), (6, up), color=INK if up == 0 else SOFT, **beside)


def _model_bytes(axes: "Axes", strategies: dict[str, dict], outside: int, colours: dict[str, str]) -> None:
    for name, found in strategies.items():
        resident, peak = outside + found["resident"], outside + found["peak"]
        axes.barh(name, outside / 1e9, color=EDGE)
        axes.barh(name, found["resident"] / 1e9, left=outside / 1e9, color=colours[name])
        axes.barh(name, (peak - resident) / 1e9, left=resident / 1e9, color=colours[name], alpha=0.35)
        text = f"{format_bytes(resident)}, peak {format_bytes(peak)}"
        axes.annotate(text, (peak / 1e9, name), (5, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlim(right=1.45 * max(outside + found["peak"] for found in strategies.values()) / 1e9)  # room for the text
    axes.set_xlabel(f"GB; pale: temporaries of a call of {PEAK_TOKENS} tokens")
    axes.set_title("whole model on the device; light grey: all but the experts", loc="left", color=INK)
    axes.grid(visible=False)  # the bytes are written
