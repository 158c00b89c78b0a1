"""Print the figures of a command for a person: sentences and tables on stdout."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import median_low

from globe_fit.cli.console import print_table, show_table
from globe_fit.plan.fitting import per_rank
from globe_fit.plan.footprint import quantized_note
from globe_fit.plan.serving import CONTEXT
from globe_fit.result import error_table, sizes_table
from globe_fit.run.display import write
from globe_fit.run.reports import healed_on
from globe_fit.sizes import left_dense_note
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.patching import PEAK_TOKENS
from globe_kernels.strategies import STRATEGIES
from globe_kernels.units import format_bytes, format_count, format_seconds, in_one_unit, three_digits

_PAIR = " / ".join(FAMILIES)


def print_sizes(sizes: dict) -> None:
    """Print the bytes of gate and up and of the whole model, dense and as GloBE, as far as they are known."""
    show_table(sizes_table(sizes))
    _say_what_sizes_mean([sizes])


def _say_what_sizes_mean(sizes: Sequence[dict]) -> None:
    if note := quantized_note(sizes[0]):
        write(note)
    if _are_known("peak", sizes):
        held = ", ".join(dict.fromkeys(name for found in sizes for name in found["strategies"]))
        write(f"The peak is of calls with up to {PEAK_TOKENS} tokens; auto holds the tensors of {held}.")
    else:
        write("The whole model is not counted: its other sizes are not recorded here.")


def _are_known(name: str, sizes: Sequence[dict]) -> bool:
    return all(found[name] for found in sizes)


def _ratio(found: dict) -> str:
    return f"{found['globe'] / found['dense']:.3f}"


def print_estimate(figures: dict) -> None:
    """Print the figures of `globe fit --dry-run`."""
    write(f"Rank {figures['rank']}, {figures['atoms']} atoms per family.")
    print_sizes(figures["sizes"])
    parts = {
        "solver": "solver_bytes",
        "block of experts": "block_bytes",
        "metric": "calibration_bytes",
        "all experts of a family": "kept_bytes",
        "host memory": "host_bytes",
    }
    rows = [[name, format_bytes(figures[key])] for name, key in parts.items() if figures[key]]
    rows.append(["peak", format_bytes(figures["peak_bytes"])])
    print_table(f"Memory of the fit{per_rank(figures['ranks'])}", ["", "bytes"], rows)
    write(f"The directory of the fit takes {format_bytes(figures['disk_bytes'])} at its peak, with its snapshots.")
    if figures["run_bytes"]:
        write(f"Before the fit the model runs over the text in at most {format_bytes(figures['run_bytes'])}.")
    if "healing_bytes" in figures:
        write(
            f"Healing after the fit takes {format_bytes(figures['healing_bytes'])} beside the factors at its peak, and "
            f"{format_bytes(figures['healing_disk_bytes'])} more on disk."
        )
    _print_machine(figures["on"], figures["ranks"])
    write(figures["verdict"])


def _print_machine(figures: dict, ranks: int) -> None:
    machine, each = figures["machine"], per_rank(ranks)
    write(
        f"On {machine} the fit takes {format_bytes(figures['device_bytes'])} of {format_bytes(figures['memory_bytes'])}"
        f"{each}, and {format_bytes(figures['host_bytes'])} of host memory"
        + (" beside its libraries." if figures["fits"] else "; it does not fit, so give fewer atoms or more ranks.")
    )
    if figures["work"] is None:
        return
    rows = [
        [stage, three_digits(found["flops"] / 1e9), three_digits(found["bytes"] / 1e9)]
        for stage, found in figures["work"].items()
    ]
    totals = [sum(found[key] for found in figures["work"].values()) / 1e9 for key in ("flops", "bytes")]
    rows.append(["all", *map(three_digits, totals)])
    print_table(f"Work of a step of a family{each}, counted", ["", "GFLOP", "GB"], rows)
    write(f"At its peak rates {machine} takes {format_seconds(figures['step_seconds'])} for a step of a family.")


def print_times(figures: dict) -> None:
    """Print what a block of experts took here."""
    if figures["seconds"] is None:
        write("The memory that is free here does not hold the atoms of one expert, so nothing was timed.")
        return
    write(
        f"Here a step of a family takes about {format_seconds(figures['step_seconds'])} and the fit "
        f"{format_seconds(figures['seconds'])}, by a block of {figures['experts']} experts that was timed."
    )


def print_plan(figures: dict) -> None:
    """Print the figures of `globe plan`."""
    machine, (inner, width) = figures["machine"], figures["shape"]
    write(
        f"{figures['model']} ({figures['model_type']}): {figures['layers']} MoE layers of {figures['experts']} experts "
        f"of {inner} x {width}, {figures['choices']} per token; {format_bytes(figures['outside_bytes'])} of other "
        f"weights, {format_bytes(figures['kv_bytes_per_token'])} of KV cache per token."
    )
    write(
        f"Predictions, not measurements: {machine['name']} copies {machine['copy_gb_per_s']:g} GB/s, "
        f"multiplies at {machine['matmul_tflop_per_s']:g} TFLOP/s, takes {machine['launch_us']:g} us per launch, has "
        f"{machine['memory_gb']:g} GB ({machine['origin']}); routing is uniform, weights have "
        f"{8 * figures['item_size']} bits."
    )
    for point in figures["points"]:
        _print_planned(point, machine["name"])


def _print_planned(point: dict, machine: str) -> None:
    disk = point["bytes_on_disk"]
    palette = f"{point['mean_palette']:.0f} atoms in a layer" + ("" if point["palettes_known"] else ", expected")
    write(
        f"\nRank {point['rank']}, {point['atoms']} atoms per family ({palette}), support {point['support']}, phi "
        f"{point['phi']}, scope {point['scope']}: gate and up {point['ratio']:.3f} of dense; at most "
        f"{format_bytes(point['budget'])} of experts on the device."
    )
    print_sizes(point["sizes"])
    if bank := point["strategies"]["auto"].get("host"):
        write(f"Beside these bytes, auto keeps {format_bytes(bank)} of the bank in host memory.")
    strategies = {name: found for name, found in point["strategies"].items() if "refused" not in found}
    figures = list(strategies.values())
    sizes = {
        "on disk": [disk[name if name in disk else "globe"] for name in strategies],
        "resident": [found["resident"] for found in figures],
        "in host memory": [found["host"] for found in figures],
        f"peak, T = {PEAK_TOKENS}": [found["peak"] for found in figures],
    }
    unit, numbers = in_one_unit([size for row in sizes.values() for size in row])
    count = len(strategies)
    rows = [[f"{label}, {unit}", *numbers[number * count : (number + 1) * count]] for number, label in enumerate(sizes)]
    rows += [
        ["within the budget", *("yes" if found["fits"] else "no" for found in figures)],
        [f"sequences of {format_count(CONTEXT)}", *(format_count(found["batch"]) for found in figures)],
        [
            "longest, k tokens",
            *(three_digits(found["kv_tokens"] / 1000) if found["kv_tokens"] else "0" for found in figures),
        ],
    ]
    title = f"Experts, and room for the KV cache on {point['cards']} x {machine}"
    print_table(title, ["", *strategies], rows)
    tokens = list(strategies["dense"]["tokens_per_s"])
    for title, key in (("us per MoE layer", "us_per_layer"), ("tokens/s of all layers", "tokens_per_s")):
        rows = [[f"T = {count}", *(three_digits(found[key][count]) for found in figures)] for count in tokens]
        print_table(title, ["", *strategies], rows)
    if "auto" in strategies:
        path = strategies["auto"]["path"]
        taken = (f"{name} at T = {', '.join(at)}" for name, at in groupby(tokens, path.__getitem__))
        write(f"auto takes {'; '.join(taken)}.")
    for name, found in point["strategies"].items():
        if "refused" in found:
            write(f"{name}: {found['refused']}")
    if point["why_not_composed"]:
        write(f"{point['why_not_composed']}.")
    write(point["verdict"])


def print_fit(figures: dict, out: Path, advice: str) -> None:
    """Print the errors of a fit beside the baselines, and its bytes."""
    write(f"The checkpoint is in {out}.")
    show_table(error_table(figures["families"], figures["rank"]))
    print_sizes(figures["sizes"])
    write(f"\n{advice}")


def print_sweep(title: str, rows: list[dict], rows_file: Path, plot: Path | None) -> None:
    """Print the points of a sweep, and where its rows and its plot are."""
    write(f"{title}.")
    points = [row for row in rows if row.get("S_cache") is None]
    print_table("Bytes", *_size_columns(points))
    _say_what_sizes_mean([row["sizes"] for row in points])
    errors = {"GloBE": "relative_error", "SVD, equal bytes": "svd_equal_bytes", "bound of the rank": "rank_bound"}
    print_table(
        f"Relative squared error, {_PAIR}",
        ["", *errors],
        [[row["point"], *(_pair(row[key], "{:.4f}") for key in errors.values())] for row in points],
    )
    table = [
        [row["point"], _pair(row["largest_palette"], "{}")]
        + [format_seconds(row["seconds"]) if row["completed"] else "diverged"]
        for row in points
    ]
    header = ["", "palette", "fit"]
    if "perplexity" in points[0]:
        found = [_quality(row) for row in points]
        header += found[0]
        table = [[*cells, *quality.values()] for cells, quality in zip(table, found, strict=True)]
        dense = _quality({"perplexity": points[0]["dense_perplexity"], "kl": 0.0, "top1": 1.0})
        table = [["dense", "", "", *dense.values()], *table]
    print_table(f"Largest palette of a layer ({_PAIR}), time of the fit, quality", header, table)
    if cached := [row for row in rows if row.get("S_cache") is not None]:
        lines = [
            [row["point"], format_bytes(row["S_cache"]), format_count(row["slots"]), f"{100 * row['hit_rate']:.1f} %"]
            + [three_digits(row["tokens_per_s"])]
            for row in cached
        ]
        print_table("Token by token with a cache", ["", "cache", "bases", "hits", "tokens/s"], lines)
    without = "no plot" if find_spec("matplotlib") else "no plot without matplotlib"
    write(f"\nRows in {rows_file}, " + (f"{without}." if plot is None else f"plot in {plot}."))


def print_sweep_estimate(title: str, rows: list[dict], disk_bytes: int) -> None:
    """Print the figures of `globe sweep --dry-run`."""
    write(f"{title}.")
    header, table = _size_columns(rows)
    times = ["", *("finished" if row["finished"] else _about(row["seconds"]) for row in rows)]
    print_table("Bytes and time", [*header, "fit"], [[*cells, time] for cells, time in zip(table, times, strict=True)])
    _say_what_sizes_mean([row["sizes"] for row in rows])
    total = sum(row["bytes"]["globe_on_disk"] for row in rows)
    write(
        f"\nAll points take {format_bytes(total)} on disk. The fits that are left take at most "
        f"{format_bytes(disk_bytes)} more meanwhile, with their snapshots, and about "
        f"{_about(None if any(row['seconds'] is None for row in rows) else sum(row['seconds'] for row in rows))}."
    )


def _about(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else format_seconds(seconds)


def _size_columns(points: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Lay out the bytes of the points of a sweep below the bytes of the dense model: (header, rows)."""
    sizes = [row["sizes"] for row in points]
    columns = [["", "dense", *(row["point"] for row in points)]]
    for name, label in (("gate_up", "gate and up\non disk"), ("model", "whole model\non disk")):
        if _are_known(name, sizes):
            unit, numbers = in_one_unit([sizes[0][name]["dense"], *(found[name]["globe"] for found in sizes)])
            columns += [[f"{label}, {unit}", *numbers], ["ratio", "1", *(_ratio(found[name]) for found in sizes)]]
    for name, label in (("resident", "memory,\nratio"), ("peak", "peak,\nratio")):
        if _are_known(name, sizes):
            columns.append([label, "1", *(_ratio(found[name]) for found in sizes)])
    header, *rows = (list(cells) for cells in zip(*columns, strict=True))
    return header, rows


def _pair(values: dict, form: str) -> str:
    return " / ".join(form.format(values[family]) for family in FAMILIES)


_QUALITY: dict[str, tuple[str, Callable[[float], str]]] = {
    "perplexity": ("perplexity", "{:.3f}".format),
    "kl": ("KL to dense", "{:.5f}".format),
    "top1": ("same top-1", lambda share: f"{100 * share:.2f} %"),
    "router_agreement": ("same experts", lambda share: f"{100 * share:.2f} %"),
    "tokens_per_s": ("tokens/s", format_count),
}


def _quality(figures: dict) -> dict[str, str]:
    """Write the figures of an evaluation that are there: {name of the column: number}."""
    return {
        title: write_number(figures[key])
        for key, (title, write_number) in _QUALITY.items()
        if figures.get(key) is not None
    }


def print_evaluation(figures: dict, text: Path | None) -> None:
    """Print the models, a row per model for the text, and a row per metric for the tasks of lm-eval."""
    labels, models = figures["labels"], list(figures["labels"])
    for label in labels.values():
        write(label)
    if text is not None:
        columns = {name: _quality(figures[name]) for name in models}
        rows = [[labels[name].partition(":")[0], *columns[name].values()] for name in models]
        title = f"{text.name}, {format_count(figures['tokens'])} tokens"
        print_table(title, ["", *columns[models[0]]], rows)
    if "lm_eval" in figures:
        scores = figures["lm_eval"]
        rows = [
            [
                f"{task}, {metric}",
                str(found.get("samples", "")),
                *(_score(scores[name][task], metric) for name in models),
            ]
            for task, found in scores[models[0]].items()
            for metric in found
            if metric != "samples" and "_stderr" not in metric
        ]
        print_table("lm-eval, with standard errors", ["", "examples", *models], rows)


def print_export(figures: dict) -> None:
    """Print the figures of `globe export`."""
    write(f"{format_bytes(figures['bytes'])} of weights in {figures['out']}.")
    if "sizes" in figures:
        print_sizes(figures["sizes"])


def _score(scores: dict[str, float | None], metric: str) -> str:
    name, comma, variant = metric.partition(",")
    value, error = scores[metric], scores.get(f"{name}_stderr{comma}{variant}")
    return "-" if value is None else f"{value:.4f}" + ("" if error is None else f" +- {error:.4f}")


def print_heal(figures: dict) -> None:
    """Print the figures of `globe heal`."""
    _print_healing(figures["healing"], all_layers=True)
    write(f"The checkpoint is in {figures['out']}.")


def _print_healing(healing: dict, all_layers: bool) -> None:
    """Print on which text a checkpoint was healed, and the errors before and after; of the layers a summary, or all."""
    layers = healing["layers"]
    write(healed_on(healing))
    names = ("before", "after")
    rows = [[layer, *(_error(found[name]) for name in names)] for layer, found in layers.items()]
    if not all_layers:
        known = [[found[name] for found in layers.values() if found[name] is not None] for name in names]
        rows = [[pick.__name__, *(_error(pick(values, default=None)) for values in known)] for pick in (min, max)]
    print_table("Relative squared error of the outputs of a layer, on tokens held out", ["", *names], rows)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def print_inspection(figures: dict, all_layers: bool = False) -> None:
    """Print the figures of `globe inspect`; of the layers a summary, or every layer."""
    inner, width = figures["shape"]
    write(
        f"{figures['base']} ({figures['model_type']}): {format_count(figures['experts'])} experts of {inner} x {width} "
        f"in {figures['layers']} layers; rank {figures['rank']}, {figures['atoms']} atoms per family, support "
        f"{figures['support']}, phi {figures['phi']}, scope {figures['scope']}, {figures['dtype']}."
    )
    if figures["left_dense"]:
        write(left_dense_note(figures["shape"], figures["left_dense"]))
    print_sizes(figures["sizes"])
    held, peak = figures["bytes"]["resident"], figures["bytes"]["peak"]
    without_pool = {name for name, strategy in STRATEGIES.items() if strategy.takes_pool}
    labels = {name: f"{name}, without its pool" if name in without_pool else name for name in held}
    rows = [[label, format_bytes(held[name]), format_bytes(peak[name])] for name, label in labels.items()]
    routed = format_count(figures["bytes"]["peak_rows"])
    title = f"Gate and up by strategy; the peak is of a call with {routed} routed rows"
    print_table(title, ["", "in memory", "at the peak"], rows)
    if figures["healing"] is not None:
        _print_healing(figures["healing"], all_layers)
    families = figures["families"]
    names = {
        "relative error": "relative_error",
        "SVD, equal bytes": "svd_equal_bytes",
        "lower bound of the rank": "rank_bound",
        "dead atoms": "dead_atoms",
        "largest palette of a layer": "largest_palette",
    }
    rows = [[label, *(_cell(families[family][key]) for family in FAMILIES)] for label, key in names.items()]
    print_table("Families", ["", *FAMILIES], rows)
    spreads = {
        "error of a layer": "relative_error_by_layer",
        "95 % rank of a layer": "effective_rank_95",
        "atoms of an expert": "support",
        "experts of an atom": "atom_use",
    }
    rows = [
        [f"{label}, {family}", *(_cell(pick(values)) for pick in (min, median_low, max))]
        for label, key in spreads.items()
        for family in FAMILIES
        if (values := list(families[family][key].values()))
    ]
    print_table("Spread over the layers, experts and atoms", ["", "min", "median", "max"], rows)
    if all_layers:
        _print_layers(families)


def _print_layers(families: dict) -> None:
    """Print the error of every layer, and the 95 % rank of the layers of which it was sampled."""
    columns = {"error": "relative_error_by_layer", "95 % rank": "effective_rank_95"}
    layers = dict.fromkeys(layer for key in columns.values() for layer in families[FAMILIES[0]][key])
    rows = [
        [layer, *(_cell(families[family][key].get(layer)) for key in columns.values() for family in FAMILIES)]
        for layer in layers
    ]
    print_table("Layers", ["", *(f"{label},\n{family}" for label in columns for family in FAMILIES)], rows)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else format_count(value)


def print_demo(figures: dict) -> None:
    """Print the models of the demo side by side."""
    error, baseline = figures["relative_error"], figures["baseline"]
    perplexity, kl, top1 = figures["perplexity"], figures["kl"], figures["top1"]
    sizes, speed = figures["bytes"], figures["tokens_per_s"]
    others = ("svd", "int8", "int4_g32")
    compressed = ("globe", *others)

    def errors(family: str) -> list[str]:
        return [f"{value:.5f}" for value in (error[family], *(baseline[name][family] for name in others))]

    def in_bytes(*names: str) -> list[str]:
        return [format_bytes(sizes[name]) for name in names]

    rows = [
        *([f"relative error, {family}", "0", *errors(family)] for family in FAMILIES),
        *(
            [f"  lower bound of the rank, {family}", "", f"{baseline['rank_bound'][family]:.5f}", *[""] * len(others)]
            for family in FAMILIES
        ),
        ["perplexity, held-out text", *(f"{perplexity[name]:.3f}" for name in ("dense", *compressed))],
        ["KL to dense", "0", *(f"{kl[name]:.5f}" for name in compressed)],
        ["same top-1 token as dense", "100 %", *(f"{100 * top1[name]:.2f} %" for name in compressed)],
        ["tokens/s", format_count(speed["dense"]), format_count(speed["globe"]), *[""] * len(others)],
    ]
    for label, dense, globe, of_others in (
        ("gate and up on disk", "dense_experts", "globe_on_disk", ["as GloBE", *in_bytes("int8", "int4_g32")]),
        ("gate and up in memory", "dense_experts", "resident", [""] * len(others)),
        (f"gate and up at the peak, T = {PEAK_TOKENS}", "dense_peak", "peak", [""] * len(others)),
    ):
        rows.append([label, *in_bytes(dense, globe), *of_others])
    write("The model that ships with GloBE, compressed and measured.")
    print_table("", ["", "dense", "GloBE", "SVD,\nequal bytes", "int8", "int4,\ngroups of 32"], rows)
    print_sizes(figures["sizes"])
    paths = " and ".join(figures["paths"])
    write(f"\nThe GloBE model ran by {paths}, as globe_kernels.explain(model, tokens) says.")
    texts = figures["continuation"]
    for name in ("dense", "globe", "svd"):
        write(f"\n{name}: {texts['prompt']}|{texts[name].rstrip()}")
