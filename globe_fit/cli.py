"""The `globe` command: fit, export, eval, inspect, report, demo."""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from globe_fit.calibration import calibrate
from globe_fit.config import FitConfig, resolve_device, resolve_sizes
from globe_fit.console import megabytes, print_table, progress
from globe_fit.demo import run_demo
from globe_fit.distributed import join
from globe_fit.estimate import Estimate, estimate, estimate_seconds
from globe_fit.evaluate import evaluate, load_model, token_windows
from globe_fit.export import export_dense, export_globe, save_fit
from globe_fit.inspection import inspect_checkpoint
from globe_fit.loggers import Loggers
from globe_fit.offload import plan_run
from globe_fit.progress import fit_with_progress
from globe_fit.report import write_report
from globe_fit.snapshots import discard_snapshots
from globe_fit.solver import open_snapshots, require_one_rank
from globe_fit.source import ExpertSource
from globe_kernels.checkpoint import CONFIG_NAME, DTYPES, GlobeCheckpoint, GlobeConfig
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.families import FAMILIES
from globe_kernels.files import require_room
from globe_kernels.patching import patch

app = typer.Typer(
    help="GloBE: one global bank of basis matrices for the experts of a Mixture-of-Experts model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]


def _print_json(figures: dict) -> None:
    print(json.dumps(figures, indent=2))


@app.command("fit")
def fit_command(
    model_dir: Annotated[Path, typer.Argument(help="Local directory of a Hugging Face MoE model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the GloBE checkpoint.")],
    ratio: Annotated[float | None, typer.Option(help="GloBE bytes / dense gate and up bytes (0.625).")] = None,
    rank: Annotated[int | None, typer.Option(help="Inner dimension r.")] = None,
    atoms: Annotated[int | None, typer.Option(help="Atoms of each family's bank.")] = None,
    support: Annotated[int | None, typer.Option(help="Atoms that each expert mixes (12).")] = None,
    palette: Annotated[int | None, typer.Option(help="Most atoms that one layer uses (no limit).")] = None,
    phi: Annotated[str | None, typer.Option(help="identity, silu or tanh.")] = None,
    scope: Annotated[str | None, typer.Option(help="global, or layer: each layer its own atoms.")] = None,
    solver: Annotated[str | None, typer.Option(help="varpro, or alternating.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the solver (varpro 500, alternating 50).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the start (0).")] = None,
    device: Annotated[str | None, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of the same settings; options win.")] = None,
    calibrate_on: Annotated[
        Path | None, typer.Option("--calibrate", help="UTF-8 text: fit what the experts compute on it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, memory and time, and stop.")] = False,
    memory_limit: Annotated[
        float | None,
        typer.Option(help="GiB; refuse a fit that needs more; --calibrate reads what is larger from disk.", min=0),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished fit in OUT.")] = False,
    snapshot_minutes: Annotated[float, typer.Option(help="Between snapshots, from which a fit goes on.", min=0)] = 5.0,
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
    require_room(out, sizes.tensor_bytes)
    limit = None if memory_limit is None else memory_limit * 2**30
    if dry_run or limit is not None:
        run = None if calibrate_on is None else plan_run(source, resolve_device(settings.device), limit)
        needs = estimate(sizes, ranks.world, run)
        if limit is not None and needs.peak_bytes > limit:
            raise RequestError(
                f"The fit needs {needs.peak_bytes / 2**30:.2f} GiB{_per_rank(needs)} at its peak and the limit is "
                f"{memory_limit:g}; give a smaller ratio, fewer atoms or a smaller rank."
            )
        if dry_run:
            seconds = estimate_seconds(source, sizes, settings, ranks)
            if ranks.leads:
                _print_estimate(sizes, source, needs, seconds, as_json)
            return
    if restart:
        discard_snapshots(out)
        ranks.every(0)  # before one of them writes there
    if calibrate_on is not None and not calibrate_on.is_file():
        raise RequestError(f"{calibrate_on} is not a file; give a text file to calibrate on.")
    snapshots = open_snapshots(out, source, settings, snapshot_minutes, calibrate_on, ranks)
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
        _print_fit(figures, out, result.status.advice)
    if not result.status.completed:
        raise GlobeError(f"{result.status.advice} It is saved in {out}.")


def _per_rank(needs: Estimate) -> str:
    return "" if needs.ranks == 1 else f" on each of {needs.ranks} ranks"


def _print_estimate(sizes: GlobeConfig, source: ExpertSource, needs: Estimate, seconds: float, as_json: bool) -> None:
    figures = {
        "rank": sizes.rank,
        "atoms": sizes.num_atoms,
        "bytes": {"dense_experts": source.base.dense_bytes, "globe_on_disk": sizes.tensor_bytes},
        **asdict(needs),
        "peak_bytes": needs.peak_bytes,
        "seconds": seconds,
    }
    if as_json:
        _print_json(figures)
        return
    print(
        f"rank {sizes.rank}, {sizes.num_atoms} atoms per family: {megabytes(source.base.dense_bytes)} of gate and up "
        f"experts -> {megabytes(sizes.tensor_bytes)} on disk"
    )
    print(
        f"peak memory{_per_rank(needs)} {megabytes(needs.peak_bytes)} (solver {megabytes(needs.solver_bytes)}, a block "
        f"of experts {megabytes(needs.block_bytes)}, factors {megabytes(needs.factor_bytes)}"
        + (f", metric {megabytes(needs.calibration_bytes)}" if needs.calibration_bytes else "")
        + f"); about {seconds:.0f} s"
    )
    if needs.run_bytes:
        print(f"before that the model runs over the text in at most {megabytes(needs.run_bytes)}")


def _print_fit(figures: dict, out: Path, advice: str) -> None:
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
    device: Annotated[str | None, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = None,
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
        assert base is not None
        models["globe"] = load_model(base, target)
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
        _print_quality(f"{text.name}, {windows.numel()} tokens", figures)


def _print_quality(title: str, figures: dict[str, dict[str, float]]) -> None:
    columns = {
        "perplexity": ("perplexity", "{:.3f}"),
        "kl": ("KL(first || this)", "{:.5f}"),
        "top1": ("top-1 agreement", "{:.2%}"),
        "tokens_per_s": ("tokens/s", "{:.0f}"),
    }
    shown = [key for key in columns if key in next(iter(figures.values()))]
    rows = [[name, *(columns[key][1].format(value[key]) for key in shown)] for name, value in figures.items()]
    print_table(title, ["", *(columns[key][0] for key in shown)], rows)


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
        return
    inner, width = figures["shape"]
    print(
        f"{figures['base']} ({figures['model_type']}): {figures['experts']} experts of {inner} x {width} in "
        f"{figures['layers']} layers; rank {figures['rank']}, {figures['atoms']} atoms per family, support "
        f"{figures['support']}, phi {figures['phi']}, scope {figures['scope']}, {figures['dtype']}"
    )
    dense, disk = figures["bytes"]["dense_experts"], figures["bytes"]["globe_on_disk"]
    print(f"{megabytes(dense)} of gate and up experts -> {megabytes(disk)} on disk ({disk / dense:.3f})")
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


def _cell(value, spread: bool = False) -> str:
    if spread:
        return f"{value['min']} / {value['median']} / {value['max']}"
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


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
        return
    _print_demo(figures)


def _print_demo(figures: dict) -> None:
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
        ["gate and up at peak (computed)", megabytes(sizes["dense_experts"]), megabytes(sizes["peak"]), ""],
        ["tokens/s", f"{speed['dense']:.0f}", f"{speed['globe']:.0f}", ""],
    ]
    print_table("GloBE on the shipped model", ["", "dense", "GloBE", "SVD, equal bytes"], rows)
    if sizes["resident"] > sizes["dense_experts"]:
        print(
            "Resident: the strategy `composed` holds every composed basis beside the adapters. At this rank that is "
            "more than the dense experts; the saving is on disk."
        )
    texts = figures["continuation"]
    for name in ("dense", "globe", "svd"):
        print(f"\n{name}: {texts['prompt']}|{texts[name].rstrip()}")
