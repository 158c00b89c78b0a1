"""Measure models on the tasks of lm-eval, the evaluation harness of EleutherAI."""

import difflib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from globe_fit.data.model import load_tokenizer, predictor
from globe_fit.measure.evaluate import called
from globe_kernels.errors import GlobeError, RequestError

_RESAMPLES = 1000  # of the examples, for the standard error of a perplexity, which they give to 2 %
_ALONE = "DISABLE_MULTIPROC"  # of lm-eval: its resampling forks, and a process with the threads of torch must not fork

OnRun = Callable[[str, str], None]  # a task begins on a model: their names
Scores = dict[str, float | None]  # metrics, the standard error of each as METRIC_stderr, the number of examples


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval with their data. `parts` holds for a name its group, or its tasks."""

    manager: Any
    parts: dict[str, list]


def load_tasks(names: Sequence[str], task_dir: str | Path | None = None) -> Tasks:
    """Load tasks, groups or tags of lm-eval by name; tasks in YAML files of `task_dir` win over tasks of lm-eval.

    Raises RequestError without lm-eval, for an unknown name, for a missing folder and for a task that `run_tasks`
    cannot run, GlobeError when a task cannot be loaded.
    """
    try:
        with _silence():
            from lm_eval import tasks
            from lm_eval.models import huggingface  # noqa: F401  # needs accelerate
    except ModuleNotFoundError as error:
        package = (error.name or "lm_eval").partition(".")[0].replace("_", "-")
        raise RequestError(
            f"{package} is not installed; run `pip install lm-eval accelerate`, or evaluate without --lm-eval."
        ) from error
    if task_dir is not None and not Path(task_dir).is_dir():
        raise RequestError(f"{task_dir} is not a folder; give a folder with YAML files of lm-eval tasks.")
    with _silence():
        # lm-eval has thousands of files of tasks; to read them takes seconds, which tasks of the folder do not need
        manager = tasks.TaskManager(include_path=task_dir, include_defaults=False)
        if not {*names} <= {*manager.all_subtasks}:
            manager = tasks.TaskManager(include_path=task_dir)
        for name in names:
            if name not in manager.task_index:
                raise RequestError(_unknown(name, manager.all_tasks))
        return Tasks(manager, {name: _load(manager, name) for name in names})


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known)
    return (
        f"lm-eval has no task {name!r}; "
        + (f"close names are {', '.join(close)}; " if close else "")
        + "list its tasks with `lm-eval ls tasks`, and name the folder of other tasks with --lm-eval-tasks."
    )


def _load(manager: Any, name: str) -> list:
    try:
        found = manager.load([name])
    except Exception as error:  # data sets, metrics and the code of a task may raise any exception
        raise GlobeError(
            f"lm-eval cannot load the task {name} ({' '.join(str(error).split())}); a data set that is not on this "
            "machine needs a network the first time."
        ) from error
    for part, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise RequestError(
                f"The task {part} needs images or sound, or runs code that the model writes; leave it out."
            )
    groups = found.get("groups", {})
    return [groups[name]] if name in groups else [*found["tasks"].values()]


def run_tasks(
    models: Mapping[str, nn.Module],
    tokenizer_dir: str | Path,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    bars: bool = False,
    on_run: OnRun | None = None,
) -> dict[str, dict[str, Scores]]:
    """Run tasks on every model and return {model: {task: scores}}, with the seeds that lm-eval has by default.

    `limit` is the number of examples of a task, from its first on; None takes all. A score that is not a finite number
    is None. Nothing is printed, except for the progress bars of lm-eval on stderr with `bars`. Raises RequestError when
    the tokenizer has neither a token for the beginning of a text nor for its end, GlobeError when a model gives NaN.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer: Any = load_tokenizer(tokenizer_dir)
    if tokenizer.bos_token is None and tokenizer.eos_token is None:
        raise RequestError(
            f"The tokenizer in {tokenizer_dir} has no bos_token and no eos_token, and lm-eval needs one of them; name "
            "one in tokenizer_config.json."
        )
    with _silence():
        wrapped = {
            name: HFLM(pretrained=predictor(model), tokenizer=tokenizer, batch_size=batch_size)  # type: ignore[arg-type]
            for name, model in models.items()
        }
    run: Any = simple_evaluate  # a decorator hides its signature from type checkers
    scores: dict[str, dict[str, Scores]] = {name: {} for name in models}
    for task, parts in tasks.parts.items():
        for name, harness in wrapped.items():
            if on_run is not None:
                on_run(task, name)
            with _silence(bars), _refusing_nan(predictor(models[name]), name):
                outcome = run(
                    harness,
                    tasks=parts,
                    task_manager=tasks.manager,
                    limit=limit,
                    bootstrap_iters=_RESAMPLES,
                    log_samples=False,
                )
            for found, values in outcome["results"].items():
                scores[name][found] = _scores(values, outcome["n-samples"].get(found))
    return scores


def _scores(values: Mapping[str, Any], samples: Mapping[str, int] | None) -> Scores:
    """Return the metrics of a task; lm-eval names a metric "name,filter", and the filter none says nothing."""
    metrics = {name.removesuffix(",none"): value for name, value in values.items() if "," in name}
    known = {name: isinstance(value, Real) and math.isfinite(value) for name, value in metrics.items()}
    scores: Scores = {name: float(value) if known[name] else None for name, value in metrics.items()}
    return scores if samples is None else scores | {"samples": samples["effective"]}


@contextmanager
def _refusing_nan(model: nn.Module, name: str) -> Iterator[None]:
    """Raise GlobeError at a call of `model` that gives NaN: NaN is no score, but the choice among NaN has one."""

    def check(_: nn.Module, given: Any, outputs: Any) -> None:
        if outputs.logits.amax().isnan():
            raise GlobeError(f"{called(name)} gives NaN as logits; restore its files.")

    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _silence(bars: bool = False) -> Iterator[None]:
    """Drop the lines that lm-eval and its libraries print and log, and without `bars` their progress bars."""
    logged = logging.root.manager.disable
    with ExitStack() as stack:
        nothing = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(nothing))
        if _ALONE not in os.environ:
            os.environ[_ALONE] = "1"
            stack.callback(os.environ.pop, _ALONE)
        if not bars:
            stack.enter_context(redirect_stderr(nothing))
        logging.disable()
        stack.callback(logging.disable, logged)
        yield
