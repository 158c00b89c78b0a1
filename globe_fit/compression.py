"""The verb `compress`: from the directory of a model to a GloBE checkpoint on disk."""

from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypedDict

from globe_fit.calibration.metric import calibrate as run_calibration
from globe_fit.calibration.metric import identity, require_text
from globe_fit.config import AUTO, SNAPSHOT_MINUTES, SOLVERS, FitConfig
from globe_fit.data.source import ExpertSource
from globe_fit.export import remove_figures, require_same_weights, save_fit
from globe_fit.fitting import OnStep, fit, open_snapshots
from globe_fit.healing.healing import heal_fit, healing_disk_bytes, require_memory
from globe_fit.plan.fitting import plan_fit
from globe_fit.plan.footprint import footprint_of
from globe_fit.result import FitResult, StoredFactors, stored_fit
from globe_fit.run.display import say, show_progress
from globe_fit.run.loggers import MetricStream, WandbRun
from globe_fit.run.progress import SILENT, FitStages, Progress
from globe_fit.run.reports import read_report
from globe_fit.run.snapshots import differences, discard_snapshots
from globe_fit.run.stopping import terminating
from globe_fit.sizes import left_dense_note
from globe_kernels.errors import RequestError, warn
from globe_kernels.format.checkpoint import GlobeCheckpoint, GlobeConfig
from globe_kernels.format.directories import adapter_note, holds_checkpoint, holds_unfinished_fit
from globe_kernels.format.names import CONFIG_NAME, METRICS_NAME, REPORT_NAME
from globe_kernels.format.typed import checked
from globe_kernels.format.writing import only_writer


@terminating()
def compress(
    model_dir: str | Path,
    out: str | Path,
    config: FitConfig,
    *,
    calibrate: str | Path | None = AUTO,
    heal: bool = True,
    memory_limit: float | str | None = None,
    resume: bool = True,
    on_step: OnStep | None = None,
    snapshot_minutes: float = SNAPSHOT_MINUTES,
    wandb_project: str | None = None,
    progress: Progress | bool = False,
    command: str | None = None,
) -> FitResult:
    """Fit a GloBE checkpoint to the experts of a Hugging Face MoE model and write it to the directory `out`.

    `model_dir` is the directory of the model or its id on the Hub (Org/name, Org/name@revision), `config` holds the
    sizes and the solver. One seed gives the same bytes on one machine, also after an interruption: the fit writes
    snapshots to `out`/.snapshot, and the same call continues from the last snapshot. If `out` holds the finished fit of
    the same call, this call returns its result at once; the fit of another call is refused. A fit that diverges is
    saved too, with the best state before; then `result.status.completed` is False. Under torchrun all ranks make the
    same call and the first rank writes.

    calibrate         a UTF-8 text file: minimise the error of the outputs of the experts on this text; "self": on a
                      text that the model writes; "auto": the same where the model fits into memory; None: minimise the
                      error of the weights
    heal              after a calibrated fit train the adapters of each layer on the outputs of the dense layer
                      (globe_fit.healing); of several ranks none heals
    memory_limit      bytes, or a text such as "20GB": refuse a fit that needs more; a calibrated fit reads a model
                      that is larger layer by layer from disk
    resume            False: begin again, whatever fit `out` holds; a finished fit stays until the new fit is finished
    on_step           gets the record of every step (names: globe_fit.run.metrics); a fit that continues first gives
                      the records of the steps before its snapshot. Its exception ends the fit when the step and a
                      snapshot are complete
    snapshot_minutes  time between two snapshots
    wandb_project     send the records to a new run of this Weights & Biases project; a failure is a GlobeWarning
    progress          True: show a bar on a terminal and in a notebook, lines elsewhere; an object of
                      globe_fit.run.progress gets the stages of the work and the sentences for the person who waits
    command           the command of the fit, for fit_report.json

    Raises RequestError when the request cannot be met: a directory without a known MoE model, sizes out of range, too
    little memory, a text that is missing or too short, a fit with other settings or other files in `out`. Raises
    GlobeError when the work fails: damaged files, NaN or infinity in an expert, a full disk, a fit that diverges before
    its support is fixed. Raises KeyboardInterrupt after Ctrl-C, and after SIGTERM its subclass
    globe_fit.run.stopping.Terminated, which say where the same call goes on; the snapshot is complete then. A handler
    of SIGTERM that the caller has set is called once the snapshot is complete. In another thread than the main thread
    the signals stay as they are.
    """
    if not isinstance(config, FitConfig):
        raise RequestError(
            f"config is a {type(config).__name__}; give a globe_fit.FitConfig, such as FitConfig(ratio=0.625)."
        )
    if calibrate is not None:
        require_text(calibrate)
    plan = plan_fit(model_dir, out, config, calibrate=calibrate, memory_limit=memory_limit)
    source, config, ranks, calibrate = plan.source, plan.config, plan.ranks, plan.calibrate
    heals = heal and calibrate is not None and ranks.world == 1
    if heals:
        require_memory(source, plan.sizes, plan.memory_limit)
    is_shown = progress is True and ranks.leads
    shown = progress if isinstance(progress, Progress) and ranks.leads else Progress(say=say) if is_shown else SILENT
    if source.base.left_dense:
        shown.say(left_dense_note((source.base.intermediate_size, source.base.hidden_size), source.base.left_dense))
    if plan.note is not None:
        shown.say(plan.note)
    if note := adapter_note(source.model_dir):
        warn(note)
    calibrated_on = None if calibrate is None else identity(calibrate)
    with only_writer(Path(out)) if ranks.leads else nullcontext():
        done = finished_fit(out, source, plan.sizes, config, calibrated_on, heals) if resume else None
        if done is not None:
            discard_snapshots(out)  # a kill has left a part of them
            shown.say(f"{out} holds this fit already, finished; --restart (in Python resume=False) begins again.")
            result = stored_fit(done)
            result.report["sizes"] = footprint_of(done)
            return result
        plan.require_room(out, beside=healing_disk_bytes(source, plan.sizes) if heals else 0)
        if not resume:
            discard_snapshots(out)
            ranks.every(0)  # before a rank writes there
        snapshots = open_snapshots(out, source, config, snapshot_minutes, calibrated_on, ranks, shown.say)

        with snapshots.explaining_interrupts(resume), ExitStack() as stack:
            if is_shown:
                shown = stack.enter_context(show_progress())
            stages, stream = FitStages(shown, snapshots.reached(), config.steps), None
            if ranks.leads:
                listeners = [stages.advance] if on_step is None else [stages.advance, on_step]
                if wandb_project is not None:
                    facts = plan.sizes.to_dict() | {"fit": asdict(config)}
                    listeners.append(stack.enter_context(WandbRun(wandb_project, facts)).log)
                stream = stack.enter_context(MetricStream(snapshots, listeners))
            calibration = None
            if calibrate is not None:
                shown.begin("inputs", 1)
                calibration = run_calibration(
                    source,
                    calibrate,
                    config.device,
                    memory_limit=plan.memory_limit,
                    snapshots=snapshots,
                    on_batch=lambda done, total: shown.advance(done / total),
                    say=shown.say,
                    ranks=ranks,
                )
            stages.begin()
            result = fit(source, config, on_step=stream, snapshots=snapshots, calibration=calibration, ranks=ranks)
            if heals:
                assert calibrate is not None
                result = heal_fit(
                    result,
                    source,
                    calibrate,
                    config.device,
                    snapshots=snapshots,
                    seed=config.seed,
                    calibration=calibration,
                    memory_limit=plan.memory_limit,
                    progress=shown,
                )
            elif heal and calibrate is not None:
                shown.say(
                    f"Healing runs on one rank; run `globe heal {out}` without torchrun when the fit is finished."
                )
            if ranks.leads:  # on the disk before the loggers end
                provenance = result.config.provenance | {"weights_sha256": source.weights_sha256}
                result = replace(result, config=replace(result.config, provenance=provenance))
                result.report.update(base=source.facts, command=command)
                save_fit(result, source, out)
                result = replace(result, families=StoredFactors(GlobeCheckpoint(out, verify=False)))
        if ranks.leads:
            remove_figures(out)
            if all((Path(out) / name).is_file() for name in (REPORT_NAME, METRICS_NAME)):
                discard_snapshots(out)  # otherwise the same call can write these files from them
            result.report["sizes"] = footprint_of(GlobeCheckpoint(out, verify=False))  # just written
        return result


def finished_fit(
    out: str | Path,
    source: ExpertSource,
    sizes: GlobeConfig,
    config: FitConfig,
    calibrated_on: str | None = None,
    heals: bool = False,
) -> GlobeCheckpoint | None:
    """Open the checkpoint in `out` if it is the finished fit of this request; None when `out` holds no checkpoint.

    A fit that is to begin again has snapshots beside the checkpoint that it replaces: it is not finished.
    Raises RequestError, with the settings that differ, when it is the fit of another request or lacks its report.
    """
    if not holds_checkpoint(Path(out)) or holds_unfinished_fit(Path(out)):
        return None
    checkpoint = GlobeCheckpoint(out)
    recorded = {REPORT_NAME: "status" in read_report(checkpoint), METRICS_NAME: bool(checkpoint.metrics)}
    for name, is_there in recorded.items():
        if not is_there:
            raise RequestError(
                f"{out} holds a checkpoint without its {name}, so nothing tells whether it is this fit; give another "
                "directory, or fit over it (--restart, in Python resume=False)."
            )
    where = f"provenance in {checkpoint.path / CONFIG_NAME}"
    provenance = checked(_Provenance, checkpoint.config.provenance, where, "restore the file or fit again")
    calibration = provenance.get("calibration") or {}
    found = provenance.get("fit", {}), checkpoint.config, calibration.get("sha256") or calibration.get("text")
    found = *found, provenance.get("healing") is not None
    wanted = asdict(config), sizes, calibrated_on, heals
    if differences(_identity(*found), _identity(*wanted)):
        changes = differences(*({"ratio": each[0].get("ratio"), **_identity(*each)} for each in (found, wanted)))
        raise RequestError(
            f"{out} holds a finished fit with other settings ({changes}); give another directory, or fit over it "
            "(--restart, in Python resume=False)."
        )
    require_same_weights(checkpoint, source)
    return checkpoint


class _FitSettings(TypedDict, total=False):
    solver: str


class _Text(TypedDict, total=False):
    sha256: str | None
    text: str | None


class _Provenance(TypedDict, total=False):
    fit: _FitSettings
    calibration: _Text | None
    healing: dict | None


def _identity(settings: dict, sizes: GlobeConfig, calibrated_on: str | None, heals: bool) -> dict:
    """Collect the settings that decide the result. Ratio, rank and atoms count as the sizes that follow from them."""
    unused = {"device", "ratio", *SOLVERS} - {settings.get("solver")}
    decided = {name: value for name, value in settings.items() if name not in unused}
    resolved = {"rank": sizes.rank, "atoms": sizes.num_atoms}
    return decided | resolved | {"model": asdict(sizes.base), "calibration": calibrated_on, "healed": heals}
