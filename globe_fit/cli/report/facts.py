"""Collect the facts of a report from the directory of a checkpoint, or of an unfinished fit."""

from dataclasses import dataclass
from pathlib import Path

from globe_fit.data.source import ExpertSource
from globe_fit.export import require_same_model
from globe_fit.measure.diagnostics import compare, palette_sizes, sampled_experts, sparsity
from globe_fit.measure.evaluate import read_evaluation
from globe_fit.measure.inspection import stored_codes
from globe_fit.plan.footprint import footprint_of
from globe_fit.result import reconstruct, slice_experts
from globe_fit.run.loggers import read_stream, records_of
from globe_fit.run.reports import read_healing, read_report
from globe_fit.run.snapshots import stream_path
from globe_kernels.format.checkpoint import GlobeCheckpoint
from globe_kernels.format.names import CONFIG_NAME, FAMILIES

_EXPERTS_OF_BASE = 5  # spectra to draw with a dense model; without it the spectra of the fit report


@dataclass(frozen=True)
class Facts:
    """The facts of a report. `families` has the newest value of every metric of each family that has begun."""

    directory: Path
    base: Path | None  # the dense model, where the user named it
    history: dict[str, list[dict]]
    families: dict[str, dict]
    # all empty while the fit is not finished
    checkpoint: GlobeCheckpoint | None
    report: dict
    sizes: dict | None
    evaluation: dict | None
    healing: dict | None
    use: dict[str, list[int]]  # experts that use each atom


def collect(directory: Path, base: Path | None) -> Facts:
    """Read the facts of `directory`; with `base`, the dense model, also the spectra of more experts.

    Raises RequestError when there is neither a checkpoint nor an unfinished fit, or when `base` is another model.
    """
    stream = stream_path(directory)
    unfinished = stream.is_file() and not (directory / CONFIG_NAME).is_file()
    checkpoint = None if unfinished else GlobeCheckpoint(directory)
    records = read_stream(stream) if checkpoint is None else records_of(checkpoint.metrics)
    history = {family: [record for record in records if record["family"] == family] for family in FAMILIES}
    history = {family: found for family, found in history.items() if found}
    newest = {family: {name: each[name] for each in found for name in each} for family, found in history.items()}
    if checkpoint is None:
        return Facts(directory, base, history, newest, None, {}, None, None, None, {})
    report, config, use = read_report(checkpoint), checkpoint.config, {}
    source = None if base is None else ExpertSource(base)
    if source is not None:
        require_same_model(config, source)
    for family in FAMILIES:
        codes = stored_codes(checkpoint, family)
        use[family] = (codes != 0).sum(0).tolist()
        newest[family] = newest.get(family, {}) | report.get("families", {}).get(family, {})
        newest[family] |= sparsity(codes, config.base) | {"palette_sizes": palette_sizes(codes, config.base)}
        if source is not None:
            newest[family]["spot_checks"] = _spot_checks(checkpoint, source, family)
    sizes, measured, healing = footprint_of(checkpoint), read_evaluation(checkpoint), read_healing(checkpoint)
    return Facts(directory, base, history, newest, checkpoint, report, sizes, measured, healing, use)


def _spot_checks(checkpoint: GlobeCheckpoint, source: ExpertSource, family: str) -> list[dict]:
    bank, found = checkpoint.bank(family), []
    for number in sampled_experts(source.base.total_experts, _EXPERTS_OF_BASE):
        layer, span = next((layer, span) for layer, span in source.layer_spans if number < span.stop)
        expert = number - span.start
        factors = slice_experts(checkpoint.layer(layer.layer, family), slice(expert, expert + 1))
        dense = source.read(layer, family, range(expert, expert + 1))[0]
        stored = reconstruct(factors, bank, checkpoint.config.phi)[0]
        found.append({"layer": layer.layer, "expert": expert, **compare(dense, stored)})
    return found
