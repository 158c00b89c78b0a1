"""Turn the ledger into tables and rooflines: a section of README.md, and per device a page and a plot of each model.

    python benchmarks/report.py                    writes them: README.md, benchmarks/results/<device>/
    python benchmarks/report.py --check            exit code 1 when the files differ from the ledger

Of each (device, op, model, shape, provider, seed) the newest row counts. README.md shows the model and the rank of the
newest layer measured on each device; the page of the device shows everything. Without such a layer README.md has no
section: its two markers follow each other.
"""

import argparse
import json
import math
import os
import statistics
from pathlib import Path

from ledger import RESULTS, read_all

from globe_kernels.ops.tuning import slug

_BEGIN, _END = "<!-- ledger:begin -->", "<!-- ledger:end -->"
_README_LINES = 149
_HEADING = "## Speed"
_LEGEND = (
    "`make report` writes this from the rows that the benchmarks record. Above 1, a ratio says that GloBE is faster. "
    "`dense_twin` runs the kernels of GloBE on the dense weights. The same run measured copy and matmul. The error is "
    "the relative rms error of GloBE; the benchmark checks it before it times anything."
)
_MARKERS = "osD^vP*X"
_STRATEGIES = {"globe": "composed", "globe_bank_first": "bank_first"}  # of the providers that get a line each

Line = tuple[dict, dict[str, str]]  # a row that says of which run the line is, and its cells by column


def _run(row: dict) -> tuple[str, str]:
    return row["date"], row["commit"]


def latest(rows: list[dict]) -> list[dict]:
    """Keep the newest row of each measurement; the oldest of them comes first."""
    keys = ("device", "op", "model", "shape", "provider")

    def measurement(row: dict) -> str:
        return json.dumps([*(row[name] for name in keys), row.get("seed", 0)], sort_keys=True)

    newest = {measurement(row): row for row in sorted(rows, key=_run)}
    return sorted(newest.values(), key=_run)


def grouped(rows: list[dict]) -> list[list[dict]]:
    """Split the rows into tables: the rows of a table differ only in tokens, share of a cache and provider."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row["op"], row["model"], _layer(row)], sort_keys=True), []).append(row)
    return sorted(groups.values(), key=lambda group: (not _is_ffn(group[0]), group[0]["op"], group[0]["model"]))


def _is_ffn(row: dict) -> bool:
    """Whether a row measures a whole layer, called directly or replayed as a CUDA graph."""
    return row["op"].startswith("moe_ffn")


def _on_page_only(row: dict) -> bool:
    """Whether README.md leaves a row out: it has no room for fits and caches, and on a CPU no kernel ran."""
    return row["op"] in ("fit", "cache_curve") or (row["op"].startswith("model_") and row["device"] == "cpu")


def _layer(row: dict) -> dict:
    return {name: value for name, value in row["shape"].items() if name not in ("tokens", "share")}


def _layer_text(row: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in _layer(row).items())


def _percent_of_copy(row: dict) -> str:
    return f"{100 * row['gb_per_s'] / row['copy_gb_per_s']:.0f}"


def _ffn_lines(rows: list[dict]) -> list[Line]:
    """Compare GloBE with the other providers of its run: a line per number of tokens and strategy."""
    lines = []
    globe_rows = [row for row in rows if row["provider"] in _STRATEGIES]
    for globe in sorted(globe_rows, key=lambda row: (row["shape"]["tokens"], row["provider"])):
        same = [row for row in rows if row["shape"] == globe["shape"] and _run(row) == _run(globe)]
        dense = {row["provider"]: row["median_us"] for row in same if not row["provider"].startswith("globe")}
        best = min(dense, key=dense.__getitem__, default="")
        us, twin = globe["median_us"], dense.get("dense_twin")
        cells = {
            "tokens": str(globe["shape"]["tokens"]),
            "strategy": _STRATEGIES[globe["provider"]],
            "best other, us": f"{best} {dense[best]:.1f}" if best else "-",
            "twin, us": f"{twin:.1f}" if twin else "-",
            "GloBE, us": f"{us:.1f}",
            "vs best": f"{dense[best] / us:.2f}x" if best else "-",
            "vs twin": f"{twin / us:.2f}x" if twin else "-",
            "% copy": _percent_of_copy(globe),
            "% matmul": f"{100 * globe['tflop_per_s'] / globe['matmul_tflop_per_s']:.0f}",
            "error": f"{globe['relative_error']:.1e}",
        }
        lines.append((globe, cells))
    return lines


_FIT_COLUMNS = {
    "error, gate": ("gate_error", ".4f"),
    "error, up": ("up_error", ".4f"),
    "s": ("seconds", ".1f"),
    "s to MoBE's, gate": ("gate_seconds_to_mobe", ".1f"),
    "s to MoBE's, up": ("up_seconds_to_mobe", ".1f"),
    "bytes": ("bytes", ".0f"),
    "of experts": ("share_of_experts", ".3f"),
    "perplexity": ("perplexity", ".2f"),
    "KL": ("kl", ".5f"),
    "top-1": ("top1", ".3f"),
    "perplexity, text 2": ("perplexity2", ".2f"),
    "KL, text 2": ("kl2", ".5f"),
}
_FIT_OPTIONAL = ("of experts", "perplexity, text 2", "KL, text 2")  # columns that a table without such figures lacks


def _fit_lines(rows: list[dict]) -> list[Line]:
    """Take a line per method; of several seeds the mean and the standard deviation, over runs of the same settings.

    A dash stands for a quality without a measurement, an error out of reach, and the errors of dropped experts.
    """
    methods: dict[str, list[dict]] = {}
    for row in rows:
        methods.setdefault(row["provider"], []).append(row)
    lines = []
    for provider, found in methods.items():
        newest = max(found, key=_run)
        alike = [row for row in found if row["settings"] == newest["settings"]]
        name = provider if len(alike) == 1 else f"{provider}, {len(alike)} seeds"
        figures = {title: _spread(alike, *column) for title, column in _FIT_COLUMNS.items()}
        lines.append((newest, {"method": name, **figures}))
    empty = {title for title in _FIT_OPTIONAL if all(cells[title] == "-" for _, cells in lines)}
    return [(row, {title: text for title, text in cells.items() if title not in empty}) for row, cells in lines]


def _spread(rows: list[dict], name: str, form: str) -> str:
    """Write the mean over the rows that have a figure, and its standard deviation where they differ."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return "-"
    mean = _written(statistics.fmean(values), form)
    return mean if min(values) == max(values) else f"{mean} ± {_written(statistics.stdev(values), form)}"


def _written(value: float, form: str) -> str:
    """Write a number; with an exponent where it would be all zeros."""
    text = format(value, form)
    return format(value, ".1e") if value and not float(text) else text


def _model_cells(row: dict) -> dict[str, str]:
    """Name the cells of a whole model; the prediction is the time of all its layers of experts."""
    return {
        "tokens": str(row["shape"]["tokens"]),
        "strategy": " ".join(filter(None, (row["provider"], row.get("implementation"), row.get("graph") and "graph"))),
        "tokens/s": f"{row['tokens_per_s']:.0f}",
        "vs dense": f"{row['ratio_to_dense']:.2f}x",
        "us": f"{row['median_us']:.0f}",
        "experts predicted, us": f"{row['predicted_us']:.0f}",
        "resident, MB": f"{row['resident_bytes'] / 1e6:.2f}",
        "planned, MB": f"{row['planned_bytes'] / 1e6:.2f}",
        "hits": f"{row['hit_rate']:.2f}" if "hit_rate" in row else "-",
        "error": f"{row['relative_error']:.1e}",
    }


def _curve_cells(row: dict) -> dict[str, str]:
    """Name the cells of one routing and one size of the cache."""
    return {
        "routing": row["provider"],
        "slots, % of bases": f"{row['shape']['share']:g}",
        "hits": f"{row['hit_rate']:.3f}",
        "hits, warmed": f"{row['warm_hit_rate']:.3f}",
        "us": f"{row['median_us']:.0f}",
        "tokens/s": f"{row['tokens_per_s']:.0f}",
        "vs composed": f"{row['ratio_to_composed']:.2f}x",
    }


def _other_cells(row: dict) -> dict[str, str]:
    return {
        **({"tokens": str(row["shape"]["tokens"])} if "tokens" in row["shape"] else {}),
        "provider": row["provider"],
        "us": f"{row['median_us']:.1f}",
        "GB/s": f"{row['gb_per_s']:.0f}",
        "% copy": _percent_of_copy(row),
        "error": f"{row['relative_error']:.1e}",
    }


_CELLS = {"model_prefill": _model_cells, "model_decode": _model_cells, "cache_curve": _curve_cells}


def _lines(rows: list[dict]) -> list[Line]:
    """Compare GloBE or fits where the rows allow it, else take a line per row; few tokens come first."""
    if rows[0]["op"] == "fit":
        return _fit_lines(rows)
    compared = _ffn_lines(rows) if _is_ffn(rows[0]) else []
    cells = _CELLS.get(rows[0]["op"], _other_cells)
    return compared or [(row, cells(row)) for row in sorted(rows, key=lambda row: row["shape"].get("tokens", 0))]


def table(rows: list[dict]) -> list[str]:
    """Write one table in Markdown, with the conditions of its runs."""
    first = rows[0]
    lines = _lines(rows)
    runs = {_run(row): row for row, _ in lines}
    if len(runs) > 1:
        lines = [(row, {**cells, "run": row["date"]}) for row, cells in lines]
    header = lines[0][1].keys()
    values = (cells.values() for _, cells in lines)
    return [
        f"`{first['op']}`, {first['model']}: {_layer_text(first)}",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *values)),
        "",
        *(
            f"{row['device']}, torch {row['torch']}, triton {row['triton']}, commit {row['commit']}, {row['date']}: "
            + (
                f"{row['settings']}."
                if "settings" in row
                else f"copy {row['copy_gb_per_s']:.0f} GB/s, matmul {row['matmul_tflop_per_s']:.2f} TFLOP/s."
            )
            for row in runs.values()
        ),
        "",
    ]


def page(device: str, groups: list[list[dict]], plots: list[str]) -> str:
    """Write the page of a device: every table and every plot."""
    images = [line for name in plots for line in (f"![{name}]({name})", "")]
    tables = [line for rows in groups for line in table(rows)]
    return "\n".join([f"# {device}", "", _LEGEND, "", *images, *tables])


def block(devices: dict[str, list[list[dict]]], links: dict[str, str], room: int) -> str:
    """Write the section of README.md, empty without a device; it leaves out a table that exceeds `room` lines."""
    if not devices:
        return ""
    lines = [_HEADING, "", _LEGEND, ""]
    room -= len(lines) + 2 * len(devices) - 1  # the last blank line ends the one before it
    for device, groups in devices.items():
        lines += [f"**{device}** ([all tables and rooflines]({links[device]}))", ""]
        newest = max((row for rows in groups for row in rows), key=lambda row: (_is_ffn(row), _run(row)))
        for rows in groups:
            lines_of_table = table(rows)
            if _subject(rows[0]) == _subject(newest) and len(lines_of_table) <= room:
                room -= len(lines_of_table)
                lines += lines_of_table
    return "\n".join(lines)


def _subject(row: dict) -> tuple:
    return row["model"], row["shape"].get("rank")


def draw(path: Path, rows: list[dict]) -> None:
    """Draw the roofline of one layer: the rate of each provider, below the ceilings of each run (newest run: solid)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("report: no matplotlib; install it, then `make report`. Nothing was written.") from None

    def intensity(row: dict) -> float:
        return 1e3 * row["tflop_per_s"] / row["gb_per_s"]  # both are per median_us, which cancels

    rows = sorted(rows, key=lambda row: row["shape"]["tokens"])
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s")
    roofs = sorted({(*_run(row), row["copy_gb_per_s"], row["matmul_tflop_per_s"]) for row in rows})
    for roof in roofs:
        *_, copy, matmul = roof
        ridge = 1e3 * matmul / copy
        low, high = min(*map(intensity, rows), ridge) / 2, max(*map(intensity, rows), ridge) * 2
        label = f"copy {copy:.0f} GB/s,\nmatmul {matmul:.2f} TFLOP/s"
        style = "-" if roof == roofs[-1] else ":"
        axes.plot([low, ridge, high], [low * copy / 1e3, matmul, matmul], style, color="0.4", label=label)
    for number, provider in enumerate(sorted({row["provider"] for row in rows})):
        series = [row for row in rows if row["provider"] == provider]
        axes.plot(
            [intensity(row) for row in series],
            [row["tflop_per_s"] for row in series],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=7,
            markerfacecolor=None if provider == "globe" else "none",  # points that coincide stay visible
            linewidth=0.8,
            label=provider,
        )
    _label_tokens(axes, {row["shape"]["tokens"]: intensity(row) for row in rows})
    newest = max(rows, key=_run)
    title = f"{newest['device']}, {newest['model']}: {_layer_text(newest)}\ncommit {newest['commit']}, {newest['date']}"
    figure.suptitle(title, fontsize=11)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)


def _label_tokens(axes, places: dict[int, float]) -> None:
    """Draw a guide per number of tokens and label it above the plot; labels that would touch take further rows."""
    axes.annotate("tokens", (0, 1), (0, 3), "axes fraction", textcoords="offset points", fontsize=8)
    ends: list[float] = []  # of the last label in each row
    left, right = (math.log10(end) for end in axes.get_xlim())
    for tokens, x in places.items():
        at, half = (math.log10(x) - left) / (right - left), 0.006 * (len(str(tokens)) + 1)
        row = next((number for number, end in enumerate(ends) if end < at - half), len(ends))
        ends[row : row + 1] = [at + half]
        axes.axvline(x, color="0.85", linewidth=0.8, zorder=0)
        axes.annotate(
            str(tokens),
            (x, 1),
            (0, 3 + 11 * row),
            axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=RESULTS.parent.parent / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    head, begin, rest = args.readme.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not end:
        raise SystemExit(f"report: {args.readme} has no {_BEGIN} followed by {_END}; put them where the tables belong.")

    rows = latest(read_all(args.results))
    names = dict.fromkeys(row["device"] for row in reversed(rows))  # the device of the newest run first
    devices = {name: grouped([row for row in rows if row["device"] == name]) for name in names}
    texts: dict[Path, str] = {}
    plots: dict[Path, list[dict]] = {}
    links = {}
    for device, groups in devices.items():
        folder = args.results / slug(device)
        ffn = sorted((group for group in groups if group[0]["op"] == "moe_ffn"), key=lambda group: _run(group[-1]))
        device_plots = {f"roofline-{slug(group[0]['model'])}.png": group for group in ffn}
        plots |= {folder / name: group for name, group in device_plots.items()}
        texts[folder / "README.md"] = page(device, groups, list(device_plots))
        links[device] = Path(os.path.relpath(folder / "README.md", args.readme.parent)).as_posix()
    room = _README_LINES - len(f"{head}{begin}\n{end}{tail}".splitlines())
    timed = {device: [rows for rows in groups if not _on_page_only(rows[0])] for device, groups in devices.items()}
    timed = {device: groups for device, groups in timed.items() if groups}
    texts[args.readme] = f"{head}{begin}\n{block(timed, links, room)}{end}{tail}"

    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if args.check:
        if stale := stale + [path for path in plots if not path.is_file()]:
            raise SystemExit(f"report: {stale[0]} differs from the ledger; `make report` writes it again.")
        return
    for path, group in plots.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(path, group)
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[path], encoding="utf-8")
    print(f"report: {len(rows)} rows of {len(devices)} devices; wrote", *(stale + list(plots) or ["nothing new"]))


if __name__ == "__main__":
    main()
