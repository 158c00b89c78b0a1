"""Print the figures of a command for a person: lines and tables on stdout."""

from pathlib import Path

from globe_fit.cli.console import gigabytes, megabytes, print_table
from globe_fit.plan.fitting import per_rank
from globe_fit.sizes import left_dense_note
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.patching import PEAK_TOKENS
from globe_kernels.strategies import STRATEGIES
from globe_kernels.units import format_count


def print_estimate(figures: dict) -> None:
    """Print the figures of `globe fit --dry-run`."""
    dense, disk = figures["bytes"]["dense_experts"], figures["bytes"]["globe_on_disk"]
    print(
        f"rank {figures['rank']}, {figures['atoms']} atoms per family: {megabytes(dense)} of gate and up experts -> "
        f"{megabytes(disk)} on disk"
    )
    print(
        f"peak memory{per_rank(figures['ranks'])} {megabytes(figures['peak_bytes'])} (solver "
        f"{megabytes(figures['solver_bytes'])}, a block of experts {megabytes(figures['block_bytes'])}, factors "
        f"{megabytes(figures['factor_bytes'])}"
        + (f", metric {megabytes(figures['calibration_bytes'])}" if figures["calibration_bytes"] else "")
        + (f", all experts of a family {megabytes(figures['kept_bytes'])}" if figures["kept_bytes"] else "")
        + f"); about {figures['seconds']:.0f} s"
    )
    if figures["run_bytes"]:
        print(f"before the fit the model runs over the text in at most {megabytes(figures['run_bytes'])}")


def print_plan(figures: dict) -> None:
    """Print the figures of `globe plan`."""
    machine, (inner, width) = figures["machine"], figures["shape"]
    print(
        f"{figures['model']} ({figures['model_type']}): {figures['layers']} MoE layers of {figures['experts']} experts "
        f"of {inner} x {width}, {figures['choices']} per token; {gigabytes(figures['outside_bytes'])} of other weights"
        f", {figures['kv_bytes_per_token']} bytes of KV cache per token"
    )
    print(
        f"Predictions, not measurements: {machine['name']} copies {machine['copy_gb_per_s']:g} GB/s, "
        f"multiplies at {machine['matmul_tflop_per_s']:g} TFLOP/s, takes {machine['launch_us']:g} us per launch, has "
        f"{machine['memory_gb']:g} GB ({machine['origin']}); routing is uniform"
    )
    for point in figures["points"]:
        _print_planned(point, machine["name"])


def _print_planned(point: dict, machine: str) -> None:
    disk = point["bytes_on_disk"]
    palette = f"{point['mean_palette']:.0f} atoms in a layer" + ("" if point["palettes_known"] else ", expected")
    print(
        f"\nrank {point['rank']}, {point['atoms']} atoms per family ({palette}), support {point['support']}, phi "
        f"{point['phi']}, scope {point['scope']}: gate and up {point['ratio']:.3f} of dense; at most "
        f"{gigabytes(point['budget'])} of experts on the device"
    )
    strategies = {name: found for name, found in point["strategies"].items() if "refused" not in found}
    header = ["", "on disk", "resident", "host", "peak, T = 4096", "fits", "batch at 4096", "context at batch 1"]
    rows = []
    for name, found in strategies.items():
        size = disk[name if name in disk else "globe"]
        held = [gigabytes(value) for value in (size, found["resident"], found["host"], found["peak"])]
        rows.append([name, *held, "yes" if found["fits"] else "no", str(found["batch"]), str(found["kv_tokens"])])
    print_table(f"Bytes of the experts, and room for the KV cache on {point['cards']} x {machine}", header, rows)
    tokens = list(strategies["dense"]["tokens_per_s"])
    rows = [
        [name, *(f"{found['us_per_layer'][count]:.0f} / {found['tokens_per_s'][count]:.1f}" for count in tokens)]
        for name, found in strategies.items()
    ]
    if "auto" in strategies:
        rows.append(["auto takes", *(strategies["auto"]["path"][count] for count in tokens)])
    print_table("us per MoE layer / tokens/s of all layers", ["", *(f"T = {count}" for count in tokens)], rows)
    for name, found in point["strategies"].items():
        if "refused" in found:
            print(f"{name}: {found['refused']}")
    if point["why_not_composed"]:
        print(f"{point['why_not_composed']}.")


def print_fit(figures: dict, out: Path, advice: str) -> None:
    """Print the errors of a fit beside the baselines."""
    families = figures["families"]
    rows = [
        [name, *(f"{families[family][key]:.4f}" for family in FAMILIES)]
        for name, key in (
            ("GloBE", "relative_error"),
            (f"SVD, equal bytes (rank {families['gate']['svd_equal_bytes_rank']})", "svd_equal_bytes"),
            (f"lower bound of rank {figures['rank']}", "rank_bound"),
            ("GloBE, in the metric of the text", "calibrated_error"),
        )
        if families["gate"][key] is not None
    ]
    print_table("Relative squared error", ["", *FAMILIES], rows)
    dense, disk = figures["bytes"]["dense_experts"], figures["bytes"]["globe_on_disk"]
    print(f"{megabytes(dense)} of gate and up experts -> {megabytes(disk)} on disk ({disk / dense:.3f}) in {out}")
    print(advice)


def print_sweep(title: str, rows: list[dict], rows_file: Path, plot: Path | None) -> None:
    """Print the points of a sweep, and where its rows and its plot are."""
    measured = "perplexity" in rows[0]
    header = ["", "on disk", "ratio", "error", "SVD, equal bytes", "lower bound of the rank", "palette", "seconds"]
    if measured:
        header += [f"perplexity ({rows[0]['dense_perplexity']:.3f} dense)", "KL(dense || this)", "top-1 agreement"]
    table = []
    for row in rows:
        if row.get("S_cache") is not None:
            continue
        errors = (_pair(row[name], "{:.4f}") for name in ("relative_error", "svd_equal_bytes", "rank_bound"))
        cells = [row["point"] + ("" if row["completed"] else ", diverged"), *_size(row), *errors]
        cells += [_pair(row["largest_palette"], "{}"), f"{row['seconds']:.1f}"]
        if measured:
            cells += [f"{row['perplexity']:.3f}", f"{row['kl']:.5f}", f"{row['top1']:.2%}"]
        table.append(cells)
    print_table(title, header, table)
    if cached := [row for row in rows if row.get("S_cache") is not None]:
        lines = [
            [row["point"], megabytes(row["S_cache"]), str(row["slots"]), f"{row['hit_rate']:.1%}"]
            + [f"{row['tokens_per_s']:.1f}"]
            for row in cached
        ]
        print_table("token by token with a cache", ["", "S_cache", "bases", "hits", "tokens/s"], lines)
    print(f"rows in {rows_file}, " + ("no plot without matplotlib" if plot is None else f"plot in {plot}"))


def print_sweep_estimate(title: str, rows: list[dict]) -> None:
    """Print the figures of `globe sweep --dry-run`."""
    table = [[row["point"], *_size(row), "finished" if row["finished"] else f"{row['seconds']:.0f}"] for row in rows]
    print_table(title, ["", "on disk", "ratio", "seconds"], table)
    total = sum(row["bytes"]["globe_on_disk"] for row in rows)
    print(f"{megabytes(total)} on disk and about {sum(row['seconds'] for row in rows):.0f} s in all")


def _size(row: dict) -> list[str]:
    return [megabytes(row["bytes"]["globe_on_disk"]), f"{row['ratio']:.3f}"]


def _pair(values: dict, form: str) -> str:
    return " / ".join(form.format(values[family]) for family in FAMILIES)


def print_evaluation(figures: dict, text: Path | None) -> None:
    """Print the models, a row per model for the text, and a row per metric for the tasks of lm-eval."""
    models = list(figures["labels"])
    print("\n".join(figures["labels"].values()))
    if text is not None:
        columns = {
            "perplexity": ("perplexity", "{:.3f}"),
            "kl": ("KL(dense || this)", "{:.5f}"),
            "top1": ("top-1 agreement", "{:.2%}"),
            "tokens_per_s": ("tokens/s", "{:.0f}"),
        }
        shown = [key for key in columns if key in figures[models[0]]]
        rows = [[name, *(columns[key][1].format(figures[name][key]) for key in shown)] for name in models]
        title = f"{text.name}, {format_count(figures['tokens'])} tokens"
        print_table(title, ["", *(columns[key][0] for key in shown)], rows)
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


def _score(scores: dict[str, float | None], metric: str) -> str:
    name, comma, variant = metric.partition(",")
    value, error = scores[metric], scores.get(f"{name}_stderr{comma}{variant}")
    return "-" if value is None else f"{value:.4f}" + ("" if error is None else f" +- {error:.4f}")


def print_inspection(figures: dict) -> None:
    """Print the figures of `globe inspect`."""
    inner, width = figures["shape"]
    print(
        f"{figures['base']} ({figures['model_type']}): {figures['experts']} experts of {inner} x {width} in "
        f"{figures['layers']} layers; rank {figures['rank']}, {figures['atoms']} atoms per family, support "
        f"{figures['support']}, phi {figures['phi']}, scope {figures['scope']}, {figures['dtype']}"
    )
    if figures["left_dense"]:
        print(left_dense_note(figures["shape"], figures["left_dense"]))
    dense, disk = figures["bytes"]["dense_experts"], figures["bytes"]["globe_on_disk"]
    print(f"{megabytes(dense)} of gate and up experts -> {megabytes(disk)} on disk ({disk / dense:.3f})")
    rows = figures["bytes"]["peak_rows"]
    for strategy, size in figures["bytes"]["resident"].items():
        pool = " and its pool" if STRATEGIES[strategy].takes_pool else ""
        peak = megabytes(figures["bytes"]["peak"][strategy])
        print(f"  {strategy}: {megabytes(size)}{pool} resident, {peak} at the peak of a call with {rows} routed rows")
    families = figures["families"]
    spread = ("support", "atom_use")
    rows = [
        [name.replace("_", " "), *(_cell(families[family][name], name in spread) for family in FAMILIES)]
        for name in ("relative_error", "svd_equal_bytes", "rank_bound", *spread, "dead_atoms", "largest_palette")
    ]
    layers = families["gate"]["relative_error_by_layer"]
    rows += [
        [f"error of layer {layer}", *(_cell(families[f]["relative_error_by_layer"][layer]) for f in FAMILIES)]
        for layer in layers
    ]
    rows += [
        [f"95 % rank, layer {layer}", *(str(families[f]["effective_rank_95"][layer]) for f in FAMILIES)]
        for layer in families["gate"]["effective_rank_95"]
    ]
    print_table("Families", ["", *FAMILIES], rows)


def _cell(value, spread: bool = False) -> str:
    if spread:
        return f"{value['min']} / {value['median']} / {value['max']}"
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def print_demo(figures: dict) -> None:
    """Print the three models of the demo side by side."""
    error, baseline = figures["relative_error"], figures["baseline"]
    perplexity, kl, top1 = figures["perplexity"], figures["kl"], figures["top1"]
    sizes, speed = figures["bytes"], figures["tokens_per_s"]
    rows = [
        *(
            [f"relative error, {family}", "0", f"{error[family]:.4f}", f"{baseline['svd'][family]:.4f}"]
            for family in FAMILIES
        ),
        *(
            [f"  lower bound of the rank, {family}", "", f"{baseline['rank_bound'][family]:.4f}", ""]
            for family in FAMILIES
        ),
        ["perplexity, held-out text", *(f"{perplexity[name]:.3f}" for name in ("dense", "globe", "svd"))],
        ["KL(dense || compressed)", "0", f"{kl['globe']:.5f}", f"{kl['svd']:.5f}"],
        ["top-1 agreement with dense", "100 %", f"{100 * top1['globe']:.2f} %", f"{100 * top1['svd']:.2f} %"],
        ["gate and up on disk", megabytes(sizes["dense_experts"]), megabytes(sizes["globe_on_disk"]), "as GloBE"],
        ["gate and up resident", megabytes(sizes["dense_experts"]), megabytes(sizes["resident"]), ""],
        [f"at peak, T = {PEAK_TOKENS} (predicted)", megabytes(sizes["dense_peak"]), megabytes(sizes["peak"]), ""],
        ["tokens/s", f"{speed['dense']:.0f}", f"{speed['globe']:.0f}", ""],
    ]
    print_table("GloBE on the shipped model", ["", "dense", "GloBE", "SVD, equal bytes"], rows)
    print(f"The GloBE model ran by {' and '.join(figures['paths'])}, as globe_kernels.explain(model, tokens) says.")
    texts = figures["continuation"]
    for name in ("dense", "globe", "svd"):
        print(f"\n{name}: {texts['prompt']}|{texts[name].rstrip()}")
