"""The `globe` command: plan, fit, sweep, export, eval, inspect, report, demo."""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from globe_fit.calibration.metric import SELF, calibrate, identity, require_text
from globe_fit.calibration.offload import plan_run
from globe_fit.cli.console import megabytes, progress
from globe_fit.cli.demo import run_demo
from globe_fit.cli.plots import plan_figure, save_png
from globe_fit.cli.progress import fit_with_progress
from globe_fit.cli.report_page import write_report
from globe_fit.cli.sweep import ROWS_NAME, Sweep, plan, read_cache_bytes, read_lists, write_rows
from globe_fit.cli.tables import (
    left_dense_note,
    per_rank,
    print_demo,
    print_estimate,
    print_fit,
    print_inspection,
    print_plan,
    print_quality,
    print_sweep,
    print_sweep_estimate,
)
from globe_fit.config import AlternatingConfig, FitConfig, VarProConfig, resolve_device
from globe_fit.data.model import load_model, shared_copy, token_windows
from globe_fit.data.source import ExpertSource
from globe_fit.export import export_dense, export_globe, save_fit
from globe_fit.fitting import open_snapshots, require_one_rank
from globe_fit.measure.evaluate import evaluate
from globe_fit.measure.inspection import inspect_checkpoint
from globe_fit.plan.fitting import estimate, estimate_seconds
from globe_fit.plan.serving import plan_all
from globe_fit.run.distributed import join
from globe_fit.run.loggers import Loggers
from globe_fit.run.snapshots import discard_snapshots
from globe_fit.sizes import resolve_sizes
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format.architectures import FAMILIES
from globe_kernels.format.checkpoint import CONFIG_NAME, DTYPES, BaseModel, GlobeCheckpoint
from globe_kernels.format.files import replacing_file, require_room
from globe_kernels.model.patching import patch
from globe_kernels.strategies.budget import parse_bytes
from globe_kernels.strategies.cost import machine_named, machines

app = typer.Typer(
    help="GloBE: one global bank of basis matrices for the experts of a Mixture-of-Experts model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# What several commands take.
ModelDir = Annotated[Path, typer.Argument(help="Local directory of a Hugging Face MoE model.")]
_STEPS = f"Steps of the solver (varpro {VarProConfig.steps}, alternating {AlternatingConfig.steps})."
Steps = Annotated[int | None, typer.Option(help=_STEPS)]
Seed = Annotated[int | None, typer.Option(help="Seed of the start (0).")]
Device = Annotated[str | None, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")]
SnapshotMinutes = Annotated[float, typer.Option(help="Between snapshots, from which a fit goes on.", min=0)]
Ratios = Annotated[str | None, typer.Option("--ratio", help="Ratios, such as 0.5,0.625.")]
Ranks = Annotated[str | None, typer.Option("--rank", help="Ranks, such as 48,64.")]
Atoms = Annotated[str | None, typer.Option("--atoms", help="Atoms of each family's bank, such as 20,34.")]
Supports = Annotated[str | None, typer.Option("--support", help="Atoms that each expert mixes, such as 6,12.")]
Palettes = Annotated[str | None, typer.Option("--palette", help="Most atoms that one layer uses, such as none,17.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]


def _print_json(figures: dict) -> None:
    print(json.dumps(figures, indent=2))


def _say_what_is_left_dense(base: BaseModel) -> None:
    if base.left_dense:
        note = left_dense_note((base.intermediate_size, base.hidden_size), base.left_dense)
        print(f"globe: {note}", file=sys.stderr)


@app.command("plan")
def plan_command(
    model: Annotated[Path, typer.Argument(help="A model's directory or config.json, or a GloBE checkpoint.")],
    ratio: Ratios = None,
    rank: Ranks = None,
    atoms: Atoms = None,
    support: Supports = None,
    palette: Palettes = None,
    phi: Annotated[str | None, typer.Option(help="identity, silu or tanh.")] = None,
    scope: Annotated[str | None, typer.Option(help="global, or layer: each layer its own atoms.")] = None,
    base: Annotated[Path | None, typer.Option(help="Of a GloBE checkpoint: the model it was fitted on.")] = None,
    machine: Annotated[str, typer.Option("--on", help=f"{', '.join(machines())}.")] = "h100",
    memory_budget: Annotated[
        str | None, typer.Option(help="What the experts may hold, such as 20GiB (as much as the dense ones).")
    ] = None,
    cache_bytes: Annotated[str | None, typer.Option(help="Size of the cache of bases, such as 4GiB.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw times and bytes into this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Predict bytes and times of every way to run a model as GloBE, from its config.json alone."""
    sizes = {"ratio": ratio, "rank": rank, "atoms": atoms, "support": support, "palette": palette}
    limits = (None if size is None else parse_bytes(size) for size in (memory_budget, cache_bytes))
    settings = {"phi": phi, "scope": scope}
    figures = plan_all(model, base, machine_named(machine), settings, read_lists(sizes), *limits)
    if plot is not None:
        figure = plan_figure(figures)
        with replacing_file(plot) as path:
            save_png(figure, f"{figures['model']} on {machine}, predicted", str(path))
    if as_json:
        _print_json(figures)
    else:
        print_plan(figures)


@app.command("fit")
def fit_command(
    model_dir: ModelDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the GloBE checkpoint.")],
    ratio: Annotated[float | None, typer.Option(help="GloBE bytes / dense gate and up bytes (0.625).")] = None,
    rank: Annotated[int | None, typer.Option(help="Inner dimension r.")] = None,
    atoms: Annotated[int | None, typer.Option(help="Atoms of each family's bank.")] = None,
    support: Annotated[int | None, typer.Option(help="Atoms that each expert mixes (12).")] = None,
    palette: Annotated[int | None, typer.Option(help="Most atoms that one layer uses (no limit).")] = None,
    phi: Annotated[str | None, typer.Option(help="identity, silu or tanh.")] = None,
    scope: Annotated[str | None, typer.Option(help="global, or layer: each layer its own atoms.")] = None,
    solver: Annotated[str | None, typer.Option(help="varpro, or alternating.")] = None,
    steps: Steps = None,
    seed: Seed = None,
    device: Device = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of the same settings; options win.")] = None,
    calibrate_on: Annotated[
        str | None,
        typer.Option("--calibrate", help="UTF-8 text: fit what the experts compute on it; self: the model writes it."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, memory and time, and stop.")] = False,
    memory_limit: Annotated[
        float | None,
        typer.Option(help="GiB; refuse a fit that needs more; --calibrate reads what is larger from disk.", min=0),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished fit in OUT.")] = False,
    snapshot_minutes: SnapshotMinutes = 5.0,
    wandb: Annotated[str | None, typer.Option(help="Send the metrics to this Weights & Biases project.")] = None,
    as_json: Json = False,
) -> None:
    """Fit a GloBE checkpoint to the gate and up experts of a model; the same command goes on after an interruption."""
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
    source = ExpertSource(model_dir)
    sizes = resolve_sizes(source.base, settings)
    ranks = join(resolve_device(settings.device))
    require_one_rank(source, settings, calibrate_on is not None, ranks)
    if ranks.leads:
        _say_what_is_left_dense(source.base)
    require_room(out, sizes.tensor_bytes)
    limit = None if memory_limit is None else memory_limit * 2**30
    if dry_run or limit is not None:
        target = resolve_device(settings.device)
        run = None if calibrate_on is None else plan_run(source, target, limit, writes=calibrate_on == SELF)
        needs = estimate(
            sizes,
            ranks.world,
            calibrated=run is not None,
            run_bytes=0 if run is None else run.peak_bytes,
            device=target,
            stored_bytes=source.stored_bytes(FAMILIES[0]),
        )
        if limit is not None and needs.least_bytes > limit:
            raise RequestError(
                f"The fit needs {needs.least_bytes / 2**30:.2f} GiB{per_rank(needs.ranks)} at its peak and the limit "
                f"is {memory_limit:g}; give a smaller ratio, fewer atoms or a smaller rank."
            )
        if dry_run:
            figures = {
                "rank": sizes.rank,
                "atoms": sizes.num_atoms,
                "bytes": {"dense_experts": source.base.dense_bytes, "globe_on_disk": sizes.tensor_bytes},
                **asdict(needs),
                "peak_bytes": needs.peak_bytes,
                "seconds": estimate_seconds(source, sizes, settings, ranks),
            }
            if ranks.leads and as_json:
                _print_json(figures)
            elif ranks.leads:
                print_estimate(figures)
            return
    if restart:
        discard_snapshots(out)
        ranks.every(0)  # before one of them writes there
    calibrated_on = None
    if calibrate_on is not None:
        require_text(calibrate_on)
        calibrated_on = identity(calibrate_on)
    snapshots = open_snapshots(out, source, settings, snapshot_minutes, calibrated_on, ranks)
    loggers = Loggers(snapshots, wandb, sizes.to_dict() | {"fit": asdict(settings)}) if ranks.leads else nullcontext()
    with loggers as log, progress(as_json or not ranks.leads) as stage:
        calibration = None
        if calibrate_on is not None:
            stage.begin("inputs", 1)
            target = resolve_device(settings.device)
            calibration = calibrate(
                source,
                calibrate_on,
                target,
                memory_limit=limit,
                snapshots=snapshots,
                on_batch=lambda done, total: stage.advance(done / total),
                say=lambda sentence: print(f"globe: {sentence}", file=sys.stderr),
            )
        result = fit_with_progress(source, settings, stage, snapshots, calibration, log, ranks)
    if not ranks.leads:
        return
    save_fit(result, source, out)
    discard_snapshots(out)
    checkpoint = GlobeCheckpoint(out)
    figures = {
        **result.report,
        "rank": sizes.rank,
        "atoms": sizes.num_atoms,
        "bytes": {"dense_experts": source.base.dense_bytes, "globe_on_disk": checkpoint.bytes_on_disk},
    }
    if as_json:
        _print_json(figures)
    else:
        print_fit(figures, out, result.status.advice)
    if not result.status.completed:
        raise GlobeError(f"{result.status.advice} It is saved in {out}.")


@app.command("sweep")
def sweep_command(
    model_dir: ModelDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the checkpoints, one inside for each point.")],
    ratio: Ratios = None,
    rank: Ranks = None,
    atoms: Atoms = None,
    support: Supports = None,
    palette: Palettes = None,
    steps: Steps = None,
    seed: Seed = None,
    device: Device = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of the settings of a fit; options win.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text: quality of every point on it.")] = None,
    s_cache: Annotated[
        str | None, typer.Option(help="Bytes of a cache, such as 1MB,4MB: what it does on the text, by point.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print points, sizes and time, and stop.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what OUT holds of these points.")] = False,
    snapshot_minutes: SnapshotMinutes = 5.0,
    as_json: Json = False,
) -> None:
    """Fit every combination of sizes; the same command goes on after an interruption."""
    lists = read_lists({"ratio": ratio, "rank": rank, "atoms": atoms, "support": support, "palette": palette})
    settings = FitConfig.from_options(config, {"steps": steps, "seed": seed, "device": device})
    caches = read_cache_bytes(s_cache)
    if caches and text is None:
        raise RequestError("--s-cache says what caches do on a text and there is none; give one with --text.")
    source = ExpertSource(model_dir)
    points = plan(source, settings, lists)
    _say_what_is_left_dense(source.base)
    windows = None if text is None else token_windows(model_dir, text)
    sweep = Sweep(source, points, out, restart=restart, minutes=snapshot_minutes)
    title = f"{len(points)} points on {source.base.name}; gate / up"
    if dry_run:
        rows = sweep.estimate()
        if as_json:
            _print_json({"points": rows, "seconds": sum(row["seconds"] for row in rows)})
        else:
            print_sweep_estimate(title, rows)
        return
    with progress(as_json) as stage:
        rows = sweep.run(stage)
        plot = write_rows(rows, out)
        if windows is not None:
            rows = sweep.measure(rows, windows, caches, stage)
            write_rows(rows, out)
    if as_json:
        _print_json({"points": rows, "plot": None if plot is None else str(plot)})
    else:
        print_sweep(title, rows)
        print(f"rows in {out / ROWS_NAME}, " + ("no plot without matplotlib" if plot is None else f"plot in {plot}"))
    if diverged := sorted({row["point"] for row in rows if not row["completed"]}):
        raise GlobeError(
            f"{', '.join(diverged)} diverged; the best state before is kept in each, lower the lr and fit them with "
            "--restart."
        )


@app.command("export")
def export_command(
    globe_dir: Annotated[Path, typer.Argument(help="Directory of a GloBE checkpoint.")],
    base: Annotated[Path, typer.Option(help="The dense model that it was fitted on.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the Hugging Face model.")],
    dense: Annotated[bool, typer.Option("--dense", help="Write the reconstructed dense model.")] = False,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; unchanged by default.")] = None,
    as_json: Json = False,
) -> None:
    """Write a model that from_pretrained loads: as GloBE, or with --dense for engines that do not know it."""
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    if dtype is not None and short.get(dtype, dtype) not in DTYPES:
        raise RequestError(f"dtype is {dtype!r}; expected one of {', '.join(short)}.")
    cast = None if dtype is None else DTYPES[short.get(dtype, dtype)]
    checkpoint, source = GlobeCheckpoint(globe_dir, verify=True), ExpertSource(base)
    write = export_dense if dense else export_globe
    with progress(as_json) as stage:
        stage.begin("export", 1)
        write(checkpoint, source, out, dtype=cast, on_tensor=lambda done, total: stage.advance(done / total))
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if as_json:
        _print_json({"out": str(out), "format": "dense" if dense else "globe", "bytes": size})
    else:
        print(f"{megabytes(size)} of weights in {out}")


@app.command("eval")
def eval_command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model, dense or GloBE, or a GloBE checkpoint.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to evaluate on.")],
    base: Annotated[Path | None, typer.Option(help="The dense model to compare with.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Perplexity and throughput of a model; with --base beside the dense one, with KL and top-1 agreement."""
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
    with progress(as_json) as stage:
        stage.begin("eval", 1)
        quality = evaluate(models, windows, on_batch=lambda done, total: stage.advance(done / total))
    figures = {name: asdict(value) for name, value in quality.items()}
    if base is None:  # nothing to compare with
        figures["model"] = {key: figures["model"][key] for key in ("perplexity", "tokens_per_s")}
    if as_json:
        _print_json(figures | {"tokens": windows.numel()})
    else:
        print_quality(f"{text.name}, {windows.numel()} tokens", figures)


@app.command("inspect")
def inspect_command(
    globe_dir: Annotated[Path, typer.Argument(help="Directory of a GloBE checkpoint.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare the sha256 of every file.")] = False,
    as_json: Json = False,
) -> None:
    """What is in a GloBE checkpoint: sizes, errors, use of the atoms."""
    figures = inspect_checkpoint(GlobeCheckpoint(globe_dir, verify=verify))
    if as_json:
        _print_json(figures)
    else:
        print_inspection(figures)


@app.command("report")
def report_command(
    globe_dir: Annotated[Path, typer.Argument(help="Directory of a GloBE checkpoint, or of an unfinished fit.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page (report.html in the directory).")] = None,
    base: Annotated[Path | None, typer.Option(help="The dense model: spectra of more experts.")] = None,
    png: Annotated[bool, typer.Option("--png", help="Every figure as a PNG file beside the page too.")] = False,
    as_json: Json = False,
) -> None:
    """One HTML page about a checkpoint, to look at: errors, curves, atoms, spectra, run time."""
    figures = write_report(globe_dir, out, base=base, png=png)
    if as_json:
        _print_json(figures)
    else:
        print("\n".join([figures["html"], *figures["png"]]))


@app.command("demo")
def demo_command(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep the checkpoint and the export here.")] = None,
    as_json: Json = False,
) -> None:
    """The whole way on the model that ships with the project, in about a minute on two CPU cores."""
    with progress(as_json) as stage:
        figures = run_demo(out, stage)
    if as_json:
        _print_json(figures)
    else:
        print_demo(figures)
