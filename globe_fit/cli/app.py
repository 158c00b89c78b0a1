"""The `globe` command: plan, fit, sweep, export, eval, inspect, report, demo."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from globe_fit.calibration.metric import SELF
from globe_fit.cli.console import megabytes, progress, say
from globe_fit.cli.demo import run_demo
from globe_fit.cli.plots import plan_figure, save_png
from globe_fit.cli.report_page import PAGE_NAME, write_report
from globe_fit.cli.sweep import ROWS_NAME, Sweep, plan, read_cache_bytes, read_lists, write_rows
from globe_fit.cli.tables import (
    print_demo,
    print_estimate,
    print_fit,
    print_inspection,
    print_plan,
    print_quality,
    print_sweep,
    print_sweep_estimate,
)
from globe_fit.compression import compress
from globe_fit.config import SOLVERS, AlternatingConfig, FitConfig, VarProConfig, resolve_device
from globe_fit.data.model import load_model, shared_copy, token_windows
from globe_fit.data.source import ExpertSource
from globe_fit.export import export_dense, export_globe
from globe_fit.measure.evaluate import evaluate
from globe_fit.measure.inspection import inspect_checkpoint
from globe_fit.plan.fitting import plan_fit
from globe_fit.plan.serving import plan_all
from globe_fit.run.distributed import leads
from globe_fit.run.snapshots import SNAPSHOT_MINUTES
from globe_fit.sizes import DEFAULT_RATIO, left_dense_note
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.checkpoint import CONFIG_NAME, DTYPES, PHIS, SCOPES, BaseModel, GlobeCheckpoint
from globe_kernels.format.files import replacing_file
from globe_kernels.model.patching import patch
from globe_kernels.strategies.budget import parse_bytes
from globe_kernels.strategies.cost import machine_named, machines

app = typer.Typer(
    help="GloBE: one global bank of basis matrices for the experts of a Mixture-of-Experts model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _choice(names: Iterable[str]) -> str:
    """Join names as "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}"


# Parameters that several commands share. A default in parentheses comes from the settings that own it.
ModelDir = Annotated[Path, typer.Argument(help="Local directory of a Hugging Face MoE model.")]
_STEPS = f"Steps of the solver (varpro {VarProConfig.steps}, alternating {AlternatingConfig.steps})."
Steps = Annotated[int | None, typer.Option(help=_STEPS)]
Seed = Annotated[int | None, typer.Option(help=f"Seed of the start ({FitConfig.seed}).")]
Device = Annotated[str | None, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")]
SnapshotMinutes = Annotated[float, typer.Option(help="Minutes between two snapshots of an unfinished fit.", min=0)]
Ratios = Annotated[str | None, typer.Option("--ratio", help="Ratios, such as 0.5,0.625.")]
Ranks = Annotated[str | None, typer.Option("--rank", help="Ranks, such as 48,64.")]
Atoms = Annotated[str | None, typer.Option("--atoms", help="Atoms of the bank of each family, such as 20,34.")]
Supports = Annotated[str | None, typer.Option("--support", help="Atoms that each expert mixes, such as 6,12.")]
Palettes = Annotated[str | None, typer.Option("--palette", help="Most atoms that one layer uses, such as none,17.")]
Phi = Annotated[str | None, typer.Option(help=f"{_choice(PHIS)} ({FitConfig.phi}).")]
Scope = Annotated[
    str | None, typer.Option(help=f"{_choice(SCOPES)} ({FitConfig.scope}); with layer no two layers share an atom.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _show(figures: dict, as_json: bool, print_tables: Callable[[dict], None]) -> None:
    """Print the figures of a command, for a program or for a person."""
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        print_tables(figures)


def _say_left_dense(base: BaseModel) -> None:
    if base.left_dense:
        say(left_dense_note((base.intermediate_size, base.hidden_size), base.left_dense))


@app.command("plan")
def plan_command(
    model: Annotated[Path, typer.Argument(help="Directory or config.json of a model, or a GloBE checkpoint.")],
    ratio: Ratios = None,
    rank: Ranks = None,
    atoms: Atoms = None,
    support: Supports = None,
    palette: Palettes = None,
    phi: Phi = None,
    scope: Scope = None,
    base: Annotated[Path | None, typer.Option(help="The model on which a GloBE checkpoint was fitted.")] = None,
    machine: Annotated[str, typer.Option("--on", help=f"Machine: {_choice(machines())}.")] = "h100",
    memory_budget: Annotated[
        str | None, typer.Option(help="Most bytes of the experts, such as 20GiB (the bytes of the dense experts).")
    ] = None,
    cache_bytes: Annotated[str | None, typer.Option(help="Bytes of the cache of bases, such as 4GiB.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw times and bytes into this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Predict bytes and times of every strategy that runs a model as GloBE, from its config.json alone."""
    sizes = {"ratio": ratio, "rank": rank, "atoms": atoms, "support": support, "palette": palette}
    limits = (None if size is None else parse_bytes(size) for size in (memory_budget, cache_bytes))
    settings = {"phi": phi, "scope": scope}
    figures = plan_all(model, base, machine_named(machine), settings, read_lists(sizes), *limits)
    if plot is not None:
        figure = plan_figure(figures)
        with replacing_file(plot) as path:
            save_png(figure, f"{figures['model']} on {machine}, predicted", str(path))
    _show(figures, as_json, print_plan)


@app.command("fit")
def fit_command(
    model_dir: ModelDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the GloBE checkpoint.")],
    ratio: Annotated[
        float | None, typer.Option(help=f"GloBE bytes over dense bytes, of gate and up experts ({DEFAULT_RATIO}).")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Inner dimension r.")] = None,
    atoms: Annotated[int | None, typer.Option(help="Atoms of the bank of each family.")] = None,
    support: Annotated[int | None, typer.Option(help=f"Atoms that each expert mixes ({FitConfig.support}).")] = None,
    palette: Annotated[int | None, typer.Option(help="Most atoms that one layer uses (no limit).")] = None,
    phi: Phi = None,
    scope: Scope = None,
    solver: Annotated[str | None, typer.Option(help=f"{_choice(SOLVERS)} ({FitConfig.solver}).")] = None,
    steps: Steps = None,
    seed: Seed = None,
    device: Device = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of these settings; options win.")] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(help=f"UTF-8 text: fit the outputs of the experts on it; {SELF}: the model writes the text."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, memory and time, and stop.")] = False,
    memory_limit: Annotated[
        float | None,
        typer.Option(help="GiB: refuse a fit that needs more; --calibrate reads a larger model from disk.", min=0),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished fit in OUT.")] = False,
    snapshot_minutes: SnapshotMinutes = SNAPSHOT_MINUTES,
    wandb: Annotated[str | None, typer.Option(help="Send the metrics to this Weights & Biases project.")] = None,
    as_json: Json = False,
) -> None:
    """Fit a GloBE checkpoint to the gate and up experts of a model; after an interruption repeat the command."""
    options = {
        "ratio": ratio,
        "rank": rank,
        "atoms": atoms,
        "support": support,
        "palette": palette,
        "phi": phi,
        "scope": scope,
        "solver": solver,
        "seed": seed,
        "device": device,
        "steps": steps,
    }
    settings = FitConfig.from_options(config, options)
    limit = None if memory_limit is None else memory_limit * 2**30
    if dry_run:
        planned = plan_fit(model_dir, out, settings, calibrate=calibrate, memory_limit=limit)
        figures = planned.figures()  # by all ranks together
        if leads():
            _say_left_dense(planned.source.base)
            _show(figures, as_json, print_estimate)
        return
    with progress(as_json or not leads()) as shown:
        result = compress(
            model_dir,
            out,
            settings,
            calibrate=calibrate,
            memory_limit=limit,
            resume=not restart,
            snapshot_minutes=snapshot_minutes,
            wandb_project=wandb,
            progress=shown,
        )
    if not leads():
        return
    checkpoint = GlobeCheckpoint(out)
    figures = {
        **result.report,
        "rank": checkpoint.config.rank,
        "atoms": checkpoint.config.num_atoms,
        "bytes": {"dense_experts": checkpoint.config.base.dense_bytes, "globe_on_disk": checkpoint.bytes_on_disk},
    }
    _show(figures, as_json, lambda _: print_fit(figures, out, result.status.advice))
    if not result.status.completed:
        raise GlobeError(f"{result.status.advice} The checkpoint is in {out}.")


@app.command("sweep")
def sweep_command(
    model_dir: ModelDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for a checkpoint directory of each point.")],
    ratio: Ratios = None,
    rank: Ranks = None,
    atoms: Atoms = None,
    support: Supports = None,
    palette: Palettes = None,
    steps: Steps = None,
    seed: Seed = None,
    device: Device = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of the settings of a fit; options win.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text: measure the quality of every point on it.")] = None,
    s_cache: Annotated[
        str | None, typer.Option(help="Bytes of caches, such as 1MB,4MB: measure each of them on the text.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print points, sizes and time, and stop.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard the fits of these points in OUT.")] = False,
    snapshot_minutes: SnapshotMinutes = SNAPSHOT_MINUTES,
    as_json: Json = False,
) -> None:
    """Fit every combination of sizes; after an interruption repeat the command."""
    lists = read_lists({"ratio": ratio, "rank": rank, "atoms": atoms, "support": support, "palette": palette})
    settings = FitConfig.from_options(config, {"steps": steps, "seed": seed, "device": device})
    caches = read_cache_bytes(s_cache)
    if caches and text is None:
        raise RequestError("--s-cache measures caches on a text and there is no text; give a text with --text.")
    source = ExpertSource(model_dir)
    points = plan(source, settings, lists)
    _say_left_dense(source.base)
    windows = None if text is None else token_windows(model_dir, text)
    sweep = Sweep(source, points, out, restart=restart, minutes=snapshot_minutes)
    title = f"{len(points)} points on {source.base.name}; gate / up"
    if dry_run:
        rows = sweep.estimate()
        figures = {"points": rows, "seconds": sum(row["seconds"] for row in rows)}
        _show(figures, as_json, lambda _: print_sweep_estimate(title, rows))
        return
    with progress(as_json) as shown:
        rows = sweep.run(shown)
        plot = write_rows(rows, out)
        if windows is not None:
            rows = sweep.measure(rows, windows, caches, shown)
            write_rows(rows, out)
    figures = {"points": rows, "plot": None if plot is None else str(plot)}
    _show(figures, as_json, lambda _: print_sweep(title, rows, out / ROWS_NAME, plot))
    if diverged := sorted({row["point"] for row in rows if not row["completed"]}):
        raise GlobeError(
            f"{', '.join(diverged)} diverged and the best state of each is kept; lower the lr and fit them with "
            "--restart."
        )


@app.command("export")
def export_command(
    globe_dir: Annotated[Path, typer.Argument(help="Directory of a GloBE checkpoint.")],
    base: Annotated[Path, typer.Option(help="The dense model on which it was fitted.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the Hugging Face model.")],
    dense: Annotated[bool, typer.Option("--dense", help="Write the reconstructed dense model.")] = False,
    dtype: Annotated[str | None, typer.Option(help=f"{_choice(_DTYPES)} (the dtype of the base).")] = None,
    as_json: Json = False,
) -> None:
    """Write a model that from_pretrained loads: as GloBE, or with --dense for engines that do not know GloBE."""
    if dtype is not None and _DTYPES.get(dtype, dtype) not in DTYPES:
        raise RequestError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}.")
    cast = None if dtype is None else DTYPES[_DTYPES.get(dtype, dtype)]
    checkpoint, source = GlobeCheckpoint(globe_dir, verify=True), ExpertSource(base)
    write = export_dense if dense else export_globe
    with progress(as_json) as shown:
        shown.begin("export", 1)
        write(checkpoint, source, out, dtype=cast, on_tensor=lambda done, total: shown.advance(done / total))
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    figures = {"out": str(out), "format": "dense" if dense else "globe", "bytes": size}
    _show(figures, as_json, lambda _: print(f"{megabytes(size)} of weights in {out}"))


@app.command("eval")
def eval_command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model, dense or GloBE, or a GloBE checkpoint.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to evaluate on.")],
    base: Annotated[Path | None, typer.Option(help="The dense model to compare with.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity and throughput of a model; with --base also KL and top-1 agreement with the dense model."""
    target = resolve_device(device or "auto")
    is_checkpoint = (model / CONFIG_NAME).is_file()
    if is_checkpoint and base is None:
        raise RequestError(f"{model} is a GloBE checkpoint without the rest of its model; give --base MODEL_DIR.")
    windows = token_windows(base or model, text)
    models = {}
    if base is not None:
        models["dense"] = load_model(base, target)
    if is_checkpoint:
        models["globe"] = shared_copy(models["dense"])
        patch(models["globe"], model)
    else:
        models["globe" if base is not None else "model"] = load_model(model, target)
    with progress(as_json) as shown:
        shown.begin("eval", 1)
        quality = evaluate(models, windows, on_batch=lambda done, total: shown.advance(done / total))
    figures = {name: asdict(value) for name, value in quality.items()}
    if base is None:  # no model to compare with
        figures["model"] = {key: figures["model"][key] for key in ("perplexity", "tokens_per_s")}
    title = f"{text.name}, {windows.numel()} tokens"
    _show(figures | {"tokens": windows.numel()}, as_json, lambda _: print_quality(title, figures))


@app.command("inspect")
def inspect_command(
    globe_dir: Annotated[Path, typer.Argument(help="Directory of a GloBE checkpoint.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file.")] = False,
    as_json: Json = False,
) -> None:
    """Show the sizes, the errors and the use of the atoms of a GloBE checkpoint."""
    _show(inspect_checkpoint(GlobeCheckpoint(globe_dir, verify=verify)), as_json, print_inspection)


@app.command("report")
def report_command(
    globe_dir: Annotated[Path, typer.Argument(help="Directory of a GloBE checkpoint, or of an unfinished fit.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help=f"The page ({PAGE_NAME} in the directory).")] = None,
    base: Annotated[Path | None, typer.Option(help="The dense model: draw the spectra of more experts.")] = None,
    png: Annotated[bool, typer.Option("--png", help="Write every figure as a PNG file beside the page too.")] = False,
    as_json: Json = False,
) -> None:
    """Write an HTML page about a checkpoint: errors, curves, atoms, spectra, run time."""
    figures = write_report(globe_dir, out, base=base, png=png)
    _show(figures, as_json, lambda written: print("\n".join([written["html"], *written["png"]])))


@app.command("demo")
def demo_command(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep the checkpoint and the export here.")] = None,
    as_json: Json = False,
) -> None:
    """Fit, export, load and measure the model that ships with the project, in about a minute on two CPU cores."""
    with progress(as_json) as shown:
        figures = run_demo(out, shown)
    _show(figures, as_json, print_demo)
