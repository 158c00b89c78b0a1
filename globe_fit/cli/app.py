"""The `globe` command as a person types it: commands, options, help. `globe_fit.cli.commands` does the work.

Imports nothing heavy, so that the help and a mistake in an option are answered at once.
"""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from globe_fit.config import (
    DEFAULT_RATIO,
    PRESETS,
    SELF,
    SMALL,
    SNAPSHOT_MINUTES,
    SOLVERS,
    AlternatingConfig,
    FitConfig,
    VarProConfig,
)
from globe_fit.run.stopping import Interrupted, interrupt_behind
from globe_kernels.format.names import DTYPE_NAMES, PHIS, SCOPES
from globe_kernels.version import __version__

app = typer.Typer(
    help="GloBE: one global bank of basis matrices for the experts of a Mixture-of-Experts model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _run(command: str, options: dict[str, Any]) -> None:
    """Import the work of the commands, which takes seconds, and do the work of one of them."""
    try:
        import_module("globe_fit.cli.commands").run(command, options)
    except (Exception, KeyboardInterrupt) as error:
        if stopped := interrupt_behind(error):
            raise Interrupted(stopped) from error
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"globe {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _without_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def _choice(names: Iterable[str]) -> str:
    """Join names as "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}"


# Parameters that several commands share. A default in parentheses comes from the settings that own it.
# Models and checkpoints are text, not paths: "./Org/name" is a directory, and "Org/name" may be on the Hub.
ModelDir = Annotated[str, typer.Argument(help="Hugging Face MoE model: a directory, or its id on the Hub.")]
GlobeDir = Annotated[str, typer.Argument(help="GloBE checkpoint: a directory, or its id on the Hub.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the dense model, if it is on the Hub.")]
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
Preset = Annotated[str | None, typer.Option(help=f"Sizes for a purpose: {_choice(PRESETS)}; {SMALL} without it.")]
Machine = Annotated[str, typer.Option("--on", help="Machine whose times are predicted, such as h100 or cpu.")]
Phi = Annotated[str | None, typer.Option(help=f"{_choice(PHIS)} ({FitConfig.phi}).")]
Scope = Annotated[
    str | None, typer.Option(help=f"{_choice(SCOPES)} ({FitConfig.scope}); with layer no two layers share an atom.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Model, as a directory, a config.json or a Hub id, or a checkpoint.")],
    ratio: Ratios = None,
    rank: Ranks = None,
    atoms: Atoms = None,
    support: Supports = None,
    palette: Palettes = None,
    phi: Phi = None,
    scope: Scope = None,
    base: Annotated[str | None, typer.Option(help="The model on which a GloBE checkpoint was fitted.")] = None,
    revision: Revision = None,
    preset: Preset = None,
    machine: Machine = "h100",
    memory_budget: Annotated[
        str | None, typer.Option(help="Most bytes of the experts, such as 20GB (the bytes of the dense experts).")
    ] = None,
    cache_bytes: Annotated[str | None, typer.Option(help="Bytes of the cache of bases, such as 4GB.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw times and bytes into this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Predict the bytes and times of a compressed model.

    Reads config.json alone, and predicts every strategy that can run the model.
    """
    _run("plan", locals())


@app.command()
def fit(
    model_dir: ModelDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the GloBE checkpoint.")],
    revision: Revision = None,
    ratio: Annotated[
        float | None, typer.Option(help=f"GloBE bytes over dense bytes, of gate and up experts ({DEFAULT_RATIO}).")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Inner dimension r.")] = None,
    atoms: Annotated[int | None, typer.Option(help="Atoms of the bank of each family.")] = None,
    support: Annotated[int | None, typer.Option(help=f"Atoms that each expert mixes ({FitConfig.support}).")] = None,
    palette: Annotated[int | None, typer.Option(help="Most atoms that one layer uses (no limit).")] = None,
    preset: Preset = None,
    machine: Machine = "h100",
    phi: Phi = None,
    scope: Scope = None,
    solver: Annotated[str | None, typer.Option(help=f"{_choice(SOLVERS)} ({FitConfig.solver}).")] = None,
    steps: Steps = None,
    seed: Seed = None,
    device: Device = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of these settings; options win.")] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(help=f"UTF-8 text to fit the outputs of the experts on; {SELF}, the default: the model writes."),
    ] = None,
    no_calibrate: Annotated[bool, typer.Option("--no-calibrate", help="Fit the weights, without a text.")] = False,
    heal: Annotated[
        bool, typer.Option("--heal/--no-heal", help="After a calibrated fit train the adapters on the dense outputs.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, memory and time, and stop.")] = False,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="Refuse a fit that needs more, such as 20GB; --calibrate reads a larger model from disk."),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again, over the fit that OUT holds.")] = False,
    snapshot_minutes: SnapshotMinutes = SNAPSHOT_MINUTES,
    wandb: Annotated[str | None, typer.Option(help="Send the metrics to this Weights & Biases project.")] = None,
    as_json: Json = False,
) -> None:
    """Fit a GloBE checkpoint to the experts of a model.

    After an interruption repeat the command: the fit goes on from its last snapshot.
    """
    _run("fit", locals())


@app.command()
def heal(
    globe_dir: Annotated[Path, typer.Argument(help="GloBE checkpoint: a directory, which gets the healed checkpoint.")],
    base: Annotated[str, typer.Option(help="The dense model on which it was fitted: a directory or a Hub id.")],
    revision: Revision = None,
    text: Annotated[
        str | None,
        typer.Option(help=f"UTF-8 text to heal on, or {SELF}: the model writes it (the text of the fit, else {SELF})."),
    ] = None,
    device: Device = None,
    memory_limit: Annotated[str | None, typer.Option(help="Refuse a healing that needs more, such as 20GB.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin an unfinished healing again.")] = False,
    as_json: Json = False,
) -> None:
    """Train the adapters of a checkpoint on the outputs of its dense model.

    The checkpoint is replaced and keeps its size. After an interruption repeat the command.
    """
    _run("heal", locals())


@app.command()
def sweep(
    model_dir: ModelDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for a checkpoint directory of each point.")],
    revision: Revision = None,
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
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again, over the fits of these points in OUT.")
    ] = False,
    snapshot_minutes: SnapshotMinutes = SNAPSHOT_MINUTES,
    as_json: Json = False,
) -> None:
    """Fit every combination of sizes.

    After an interruption repeat the command: finished points stay.
    """
    _run("sweep", locals())


@app.command()
def export(
    globe_dir: GlobeDir,
    base: Annotated[str, typer.Option(help="The dense model on which it was fitted: a directory or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the Hugging Face model.")],
    revision: Revision = None,
    dense: Annotated[bool, typer.Option("--dense", help="Write the reconstructed dense model.")] = False,
    dtype: Annotated[str | None, typer.Option(help=f"{_choice(DTYPE_NAMES)} (the dtype of the base).")] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a model that from_pretrained loads.

    The model runs from its compressed form; with --dense it is a plain model for other engines.
    """
    _run("export", locals())


@app.command()
def eval(
    model: Annotated[str, typer.Argument(help="A Hugging Face model, dense or GloBE, or a GloBE checkpoint.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to evaluate on.")] = None,
    base: Annotated[str | None, typer.Option(help="The dense model to compare with: a directory or a Hub id.")] = None,
    revision: Revision = None,
    lm_eval: Annotated[str | None, typer.Option(help="Tasks of lm-eval, such as hellaswag,arc_easy.")] = None,
    lm_eval_tasks: Annotated[Path | None, typer.Option(help="Folder with YAML files of other tasks.")] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(help="Examples of each task (all).", min=1)] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure the quality and the speed of a model.

    On a text perplexity and tokens/s; with --base also KL and top-1 agreement with the dense model. On tasks of lm-eval
    their metrics.
    """
    _run("eval", locals())


@app.command()
def inspect(
    globe_dir: GlobeDir,
    verify: Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer, not the spread alone.")] = False,
    as_json: Json = False,
) -> None:
    """Show sizes, errors and use of the atoms of a checkpoint."""
    _run("inspect", locals())


@app.command()
def report(
    globe_dir: Annotated[str, typer.Argument(help="A GloBE checkpoint, or the directory of an unfinished fit.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page (report.html in the directory).")] = None,
    base: Annotated[str | None, typer.Option(help="The dense model: draw the spectra of more experts.")] = None,
    revision: Revision = None,
    png: Annotated[bool, typer.Option("--png", help="Write every figure as a PNG file beside the page too.")] = False,
    as_json: Json = False,
) -> None:
    """Write an HTML page about a checkpoint."""
    _run("report", locals())


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep the checkpoint and the export here.")] = None,
    as_json: Json = False,
) -> None:
    """Compress and measure the model that ships with GloBE.

    Fits, exports, loads and measures, in about a minute on two CPU cores.
    """
    _run("demo", locals())
