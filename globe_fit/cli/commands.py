"""The work of each `globe` command; `globe_fit.cli.app` declares the commands and imports this file when one runs."""

import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging

from globe_fit.cli.demo import run_demo
from globe_fit.cli.plots import plan_figure, save_png
from globe_fit.cli.report.page import write_report
from globe_fit.cli.sweep import ROWS_NAME, Sweep, is_sweep, plan_points, read_cache_bytes, read_lists, write_rows
from globe_fit.cli.tables import (
    print_demo,
    print_estimate,
    print_evaluation,
    print_export,
    print_fit,
    print_heal,
    print_inspection,
    print_plan,
    print_sweep,
    print_sweep_estimate,
    print_times,
)
from globe_fit.compression import compress
from globe_fit.config import AUTO, FitConfig, resolve_device
from globe_fit.data.model import load_model, shared_copy, token_windows
from globe_fit.data.source import ExpertSource
from globe_fit.export import export_dense, export_globe
from globe_fit.healing.checkpoint import heal as heal_checkpoint
from globe_fit.healing.healing import healing_bytes, healing_disk_bytes
from globe_fit.measure.evaluate import evaluate, record_evaluation
from globe_fit.measure.harness import load_tasks, run_tasks
from globe_fit.measure.inspection import inspect_checkpoint
from globe_fit.plan.fitting import plan_fit
from globe_fit.plan.footprint import footprint
from globe_fit.plan.presets import verdict, with_preset
from globe_fit.plan.serving import Planner, plan_all, read_model
from globe_fit.plan.timing import times
from globe_fit.plan.work import on_machine
from globe_fit.run.display import say, show_progress
from globe_fit.run.distributed import end_with_the_others, leads, leave, ranks_in_all
from globe_fit.sizes import left_dense_note, resolve_sizes
from globe_kernels.errors import GlobeError, GlobeWarning, RequestError, one_line, printable, tolerating, warn
from globe_kernels.format.checkpoint import DTYPES, BaseModel, GlobeCheckpoint
from globe_kernels.format.directories import (
    holds_checkpoint,
    holds_export,
    holds_model,
    is_earlier_export,
    not_a_model,
    refuse_swapped,
    require_place,
)
from globe_kernels.format.files import repository_of
from globe_kernels.format.hub import at_revision, local_directory
from globe_kernels.format.json_text import to_json
from globe_kernels.format.names import DTYPE_NAMES
from globe_kernels.format.writing import only_writer, replacing_file
from globe_kernels.model.patching import patch
from globe_kernels.strategies.budget import palettes_of
from globe_kernels.strategies.cost import machine_named
from globe_kernels.units import parse_bytes


def _show(figures: dict, as_json: bool, print_tables: Callable[[dict], None], *, on_disk: Path | None = None) -> None:
    """Print the figures of a command, for a program or for a person.

    A stdout that fails is a warning where the work of the command is `on_disk`, and otherwise a GlobeError; a pipe that
    nobody reads any more is neither.
    """
    try:
        if as_json:
            print(to_json(figures, indent=2))
        else:
            print_tables(figures)
        sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            return
        sentence = f"The figures cannot be printed ({error})"
        if on_disk is None:
            raise GlobeError(f"{sentence}; give stdout a place that takes them, and run the command again.") from error
        warn(f"{sentence}; the work of the command is complete in {on_disk}.")


def _local(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the directory of a model or a checkpoint, from the Hub if it is an id there."""
    tell = say if leads() else (lambda sentence: None)
    return local_directory(at_revision(model, revision), weights=weights, say=tell)


def _command() -> str:
    """Return the command of this process, as a person repeats it."""
    return shlex.join(["globe", *sys.argv[1:]])


def _say_left_dense(base: BaseModel) -> None:
    if base.left_dense:
        say(left_dense_note((base.intermediate_size, base.hidden_size), base.left_dense))


def _plan(
    model: str,
    base: str | None,
    revision: str | None,
    preset: str | None,
    machine: str,
    memory_budget: str | None,
    cache_bytes: str | None,
    plot: Path | None,
    as_json: bool,
    phi: str | None,
    scope: str | None,
    **sizes: str | None,
) -> None:
    limits = (None if size is None else parse_bytes(size) for size in (memory_budget, cache_bytes))
    settings = {"phi": phi, "scope": scope}
    # of a checkpoint the plan reads the tensors too
    found = _local(model, None if base else revision, weights=base is not None)
    base_dir = None if base is None else _local(base, revision, weights=False)
    figures = plan_all(found, base_dir, machine_named(machine), settings, read_lists(sizes), *limits, preset=preset)
    if plot is not None:
        figure = plan_figure(figures)
        with replacing_file(plot) as path:
            save_png(figure, f"{figures['model']} on {machine}, predicted", str(path))
    _show(figures, as_json, print_plan)


def _fit(
    model_dir: str,
    out: Path,
    revision: str | None,
    preset: str | None,
    machine: str,
    config: Path | None,
    calibrate: str | None,
    no_calibrate: bool,
    heal: bool,
    dry_run: bool,
    memory_limit: str | None,
    restart: bool,
    snapshot_minutes: float,
    wandb: str | None,
    as_json: bool,
    **settings: str | float | None,
) -> None:
    refuse_swapped(Path(model_dir), out, holds_model, f"globe fit {out} -o {model_dir}")
    wanted = FitConfig.from_options(config, settings)
    if no_calibrate and calibrate is not None:
        raise RequestError("--calibrate and --no-calibrate are both given; give one of them.")
    text = None if no_calibrate else calibrate or AUTO
    found = _local(model_dir, revision)
    planner = Planner(read_model(found), machine_named(machine), None, None)
    if preset is not None:
        wanted = with_preset(planner, preset, wanted)
    speed = verdict(planner, planner.plan(resolve_sizes(planner.model.base, wanted)))
    if dry_run:
        planned = plan_fit(found, out, wanted, calibrate=text, memory_limit=memory_limit)
        planned.require_room(out)
        figures = planned.figures() | {"on": on_machine(planned, planner.machine), "verdict": speed}
        if heal and planned.calibrated:
            figures["healing_bytes"] = healing_bytes(planned.source, planned.sizes)
            figures["healing_disk_bytes"] = healing_disk_bytes(planned.source, planned.sizes)
        if leads():
            _say_left_dense(planned.source.base)
            if planned.note is not None:
                say(planned.note)
            if not as_json:  # before anything is allocated
                _show(figures, as_json, print_estimate)
        timed = times(planned)  # by all ranks together
        if leads():
            _show(figures | timed if as_json else timed, as_json, print_times)
        return
    with show_progress(as_json or not leads()) as shown:
        shown.tell(speed)
        result = compress(
            found,
            out,
            wanted,
            calibrate=text,
            heal=heal,
            memory_limit=memory_limit,
            resume=not restart,
            snapshot_minutes=snapshot_minutes,
            wandb_project=wandb,
            progress=shown,
            command=_command(),
        )
    if not leads():
        return
    checkpoint = GlobeCheckpoint(out, verify=False)
    figures = {
        **result.report,
        "verdict": speed,
        "rank": checkpoint.config.rank,
        "atoms": checkpoint.config.num_atoms,
        "bytes": {"dense_experts": checkpoint.config.base.dense_bytes, "globe_on_disk": checkpoint.bytes_on_disk},
    }
    _show(figures, as_json, lambda _: print_fit(figures, out, result.status.advice), on_disk=out)
    if not result.status.completed:
        raise GlobeError(f"{result.status.advice} The checkpoint is in {out}.")


def _heal(
    globe_dir: Path,
    base: str,
    revision: str | None,
    text: str | None,
    device: str | None,
    memory_limit: str | None,
    restart: bool,
    as_json: bool,
) -> None:
    refuse_swapped(globe_dir, Path(base), holds_checkpoint, f"globe heal {base} --base {globe_dir}")
    with show_progress(as_json) as shown:
        result = heal_checkpoint(
            globe_dir,
            _local(base, revision),
            text=text,
            device=device or "auto",
            memory_limit=memory_limit,
            resume=not restart,
            progress=shown,
        )
    figures = {**result.report, "out": str(globe_dir), "healing": result.config.provenance["healing"]}
    _show(figures, as_json, print_heal, on_disk=globe_dir)


def _sweep(
    model_dir: str,
    out: Path,
    revision: str | None,
    steps: int | None,
    seed: int | None,
    device: str | None,
    config: Path | None,
    text: Path | None,
    s_cache: str | None,
    dry_run: bool,
    restart: bool,
    snapshot_minutes: float,
    as_json: bool,
    **sizes: str | None,
) -> None:
    refuse_swapped(Path(model_dir), out, holds_model, f"globe sweep {out} -o {model_dir}")
    settings = FitConfig.from_options(config, {"steps": steps, "seed": seed, "device": device})
    caches = read_cache_bytes(s_cache)
    if caches and text is None:
        raise RequestError("--s-cache measures caches on a text and there is no text; give a text with --text.")
    source = ExpertSource(_local(model_dir, revision))
    points = plan_points(source, settings, read_lists(sizes))
    _say_left_dense(source.base)
    windows = None if text is None else token_windows(source.model_dir, text)
    require_place(out, is_sweep, "sweep")
    with only_writer(out):
        runs = Sweep(source, points, out, restart=restart, minutes=snapshot_minutes)
        title = f"{len(points)} points on {source.base.name}"
        if dry_run:
            rows = runs.estimate()
            seconds = None if any(row["seconds"] is None for row in rows) else sum(row["seconds"] for row in rows)
            figures = {"points": rows, "seconds": seconds, "disk_bytes": runs.disk_bytes}
            _show(figures, as_json, lambda found: print_sweep_estimate(title, rows, found["disk_bytes"]))
            return
        with show_progress(as_json) as shown:
            rows = runs.run(shown)
            plot = write_rows(rows, out)
            if windows is not None:
                rows = runs.measure(rows, windows, caches, shown)
                write_rows(rows, out)
        figures = {"points": rows, "plot": None if plot is None else str(plot)}
        _show(figures, as_json, lambda _: print_sweep(title, rows, out / ROWS_NAME, plot), on_disk=out)
        if diverged := sorted({row["point"] for row in rows if not row["completed"]}):
            raise GlobeError(
                f"{', '.join(diverged)} diverged and the best state of each is kept; lower the lr and fit them with "
                "--restart."
            )


def _export(
    globe_dir: str, base: str, out: Path, revision: str | None, dense: bool, dtype: str | None, as_json: bool
) -> None:
    if dtype is not None and DTYPE_NAMES.get(dtype, dtype) not in DTYPES:
        raise RequestError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPE_NAMES)}.")
    refuse_swapped(Path(globe_dir), Path(base), holds_checkpoint, f"globe export {base} --base {globe_dir}")
    cast = None if dtype is None else DTYPES[DTYPE_NAMES.get(dtype, dtype)]
    checkpoint = GlobeCheckpoint(_local(globe_dir))
    source = ExpertSource(_local(base, revision))
    write = export_dense if dense else export_globe
    with show_progress(as_json) as shown:
        shown.begin("export", 1)
        write(checkpoint, source, out, dtype=cast, on_tensor=lambda done, total: shown.advance(done / total))
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    figures = {"out": str(out), "format": "dense" if dense else "globe", "bytes": size}
    if not dense:
        figures["sizes"] = footprint(checkpoint.config, source.facts, palettes=palettes_of(checkpoint))
    _show(figures, as_json, print_export, on_disk=out)


def _eval(
    model: str,
    text: Path | None,
    base: str | None,
    revision: str | None,
    lm_eval: str | None,
    lm_eval_tasks: Path | None,
    lm_eval_limit: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    if base is not None:
        refuse_swapped(Path(model), Path(base), holds_checkpoint, f"globe eval {base} --base {model}")
    if lm_eval is None and (lm_eval_tasks or lm_eval_limit):
        raise RequestError("--lm-eval-tasks and --lm-eval-limit need tasks; name the tasks with --lm-eval TASKS.")
    names = [name for word in (lm_eval or "").split(",") if (name := word.strip())]
    if lm_eval is not None and not names:
        raise RequestError("--lm-eval names no task; name tasks separated by commas, such as arc_easy,hellaswag.")
    if text is None and lm_eval is None:
        raise RequestError("globe eval has nothing to measure on; give --text FILE, --lm-eval TASKS, or both.")
    found = _local(model, None if base else revision)
    is_checkpoint = holds_checkpoint(found)
    if is_checkpoint and base is None:
        raise RequestError(f"{model} is a GloBE checkpoint without the rest of its model; give --base MODEL_DIR.")
    base_dir = None if base is None else _local(base, revision)
    whole = base_dir or found
    if not holds_model(whole) or (base_dir is not None and holds_export(base_dir)):
        raise not_a_model(whole)
    windows = None if text is None else token_windows(whole, text)
    tasks = load_tasks(names, lm_eval_tasks) if names else None
    target = resolve_device(device or "auto")
    checkpoint = GlobeCheckpoint(found, verify=False) if is_checkpoint else None  # patch reads and verifies the weights
    models, labels, strategies = {}, {}, ()
    if base_dir is not None:
        models["dense"], labels["dense"] = load_model(base_dir, target), f"dense: {base}"
    if is_checkpoint:
        models["globe"] = shared_copy(models["dense"])
        strategies = patch(models["globe"], found).strategies
        labels["globe"] = f"GloBE: checkpoint {model} in {base}, by {' and '.join(strategies)}"
    else:
        name = "globe" if base is not None else "model"
        models[name], labels[name] = load_model(found, target), f"{_kind(found)}: {model}"
    figures: dict[str, Any] = {"labels": labels}
    if windows is not None:
        with show_progress(as_json) as shown:
            shown.begin("eval", 1)
            quality = evaluate(models, windows, on_batch=lambda done, total: shown.advance(done / total))
        figures |= {name: asdict(value) for name, value in quality.items()} | {"tokens": windows.numel()}
        if base is None:  # no model to compare with
            figures["model"] = {key: figures["model"][key] for key in ("perplexity", "tokens_per_s", "timed_batches")}
    if tasks is not None:
        figures["lm_eval"] = run_tasks(
            models,
            whole,
            tasks,
            limit=lm_eval_limit,
            bars=sys.stderr.isatty() and not as_json,
            on_run=lambda task, name: None if as_json else say(f"lm-eval runs {task} on the model {name}"),
        )
    _show(figures, as_json, lambda _: print_evaluation(figures, text))
    if checkpoint is not None and text is not None and repository_of(found) is None:  # the cache of the Hub is not ours
        machine = {"device": target, "threads": torch.get_num_threads(), "strategies": list(strategies)}
        kept = {"text": text.name, "tokens": figures["tokens"], "command": _command(), **machine}
        with tolerating("Keeping the evaluation", f"the report of {model} will not have these figures"):
            record_evaluation(checkpoint, kept | {name: figures[name] for name in models})


def _kind(model: Path) -> str:
    if holds_export(model):
        return "GloBE, an export"
    return "dense, reconstructed from GloBE" if is_earlier_export(model) else "dense"


def _inspect(globe_dir: str, verify: bool, layers: bool, as_json: bool) -> None:
    checkpoint = GlobeCheckpoint(_local(globe_dir), verify=verify)  # figures alone need no hashes
    if verify:
        checkpoint.verify()
    _show(inspect_checkpoint(checkpoint), as_json, lambda figures: print_inspection(figures, layers))


def _report(globe_dir: str, out: Path | None, base: str | None, revision: str | None, png: bool, as_json: bool) -> None:
    found = _local(globe_dir)
    if out is None and repository_of(found) is not None:
        raise RequestError(f"{globe_dir} comes from the Hub, whose cache takes no page; give a file with -o.")
    figures = write_report(found, out, base=None if base is None else _local(base, revision), png=png)
    page = Path(figures["html"])
    _show(
        figures, as_json, lambda written: print(printable("\n".join([written["html"], *written["png"]]))), on_disk=page
    )


def _demo(out: Path | None, as_json: bool) -> None:
    with show_progress(as_json) as shown:
        figures = run_demo(out, shown)
    _show(figures, as_json, print_demo)


_COMMANDS = {
    "plan": _plan,
    "fit": _fit,
    "heal": _heal,
    "sweep": _sweep,
    "export": _export,
    "eval": _eval,
    "inspect": _inspect,
    "report": _report,
    "demo": _demo,
}


@contextmanager
def _saying_warnings() -> Iterator[None]:
    """Print the sentence of each GlobeWarning inside once, as a sentence of the command."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if not issubclass(category, GlobeWarning):
            usual(one_line(str(message)), category, *rest)
        elif leads() and str(message) not in said:
            said.add(str(message))
            say(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", GlobeWarning)
        usual, warnings.showwarning = warnings.showwarning, show
        yield


def run(command: str, options: dict[str, Any]) -> None:
    """Do the work of a command. `options` are the parameters of its function here."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    getLogger("accelerate").setLevel(ERROR)  # accelerate warns of offloading, which the user asked for
    end_with_the_others()
    if ranks_in_all() > 1 and command != "fit":
        raise RequestError("Under torchrun only globe fit runs; run the other commands without torchrun.")
    if sys.stderr.isatty():
        enable_progress_bars()  # of downloads, which the line above took away too
    with _saying_warnings():
        _COMMANDS[command](**options)
    leave()
