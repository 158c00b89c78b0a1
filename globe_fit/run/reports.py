"""Read the measurements that a fit has written, and refuse values that no fit writes."""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from globe_fit.run.metrics import METRICS
from globe_kernels.errors import GlobeError
from globe_kernels.format.checkpoint import GlobeCheckpoint
from globe_kernels.format.files import parse_json
from globe_kernels.format.names import CONFIG_NAME, FAMILIES, REPORT_NAME
from globe_kernels.format.typed import Bytes, Size, checked
from globe_kernels.units import format_count

_REMEDY = "restore the file or fit again"
_Metrics = TypedDict("_Metrics", {name: row.kind for name, row in METRICS.items()}, total=False)  # pyright: ignore


class _Record(TypedDict):
    """The part of a line of the metric stream that every line has."""

    step: Annotated[int, range(2**31)]
    family: Literal["gate", "up"]
    relative_error: float
    seconds: float


class _Family(TypedDict):
    relative_error: float
    svd_equal_bytes: float
    svd_equal_bytes_rank: int
    rank_bound: float


class _Families(TypedDict):
    gate: _Family
    up: _Family


class _Status(TypedDict):
    completed: bool
    advice: str
    level: NotRequired[str]  # reports of the first version have none


class _Base(TypedDict):
    """The facts about the dense model."""

    bytes: Bytes
    rest_bytes: Bytes
    disk_bytes: NotRequired[Bytes]
    top_k: Size | None
    weights_sha256: NotRequired[str]


class _HealedLayer(TypedDict):
    """Relative squared errors of the outputs of a layer on tokens held out; None where they are not finite."""

    before: float | None
    after: float | None
    steps: int


class _Healing(TypedDict):
    text: str
    sha256: str | None
    tokens: int
    seed: int
    layers: dict[str, _HealedLayer]


class _Report(TypedDict, total=False):
    families: _Families
    status: _Status
    base: _Base | None
    left_dense: dict[str, list[int]]
    support_overlap: float | None
    command: str | None


def read_report(checkpoint: GlobeCheckpoint) -> dict[str, Any]:
    """Return fit_report.json of a checkpoint, {} without one. Raises GlobeError for values that no fit writes."""
    where = str(checkpoint.path / REPORT_NAME)
    report = checked(_Report, checkpoint.report(), where, _REMEDY)
    families = {family: report["families"][family] for family in FAMILIES if "families" in report}
    for family, found in families.items():
        _require_metrics(found, f"{family} in {where}")
    if len({tuple(found.get("relative_error_by_layer", ())) for found in families.values()}) > 1:
        raise GlobeError(f"{where} has the errors of other layers for gate than for up; {_REMEDY}.")
    if base := report.get("base"):
        experts = max(checkpoint.config.base.num_experts.values())
        if base["rest_bytes"] >= base["bytes"] or (base["top_k"] or 0) > experts:
            raise GlobeError(
                f"{where} has a base of {base['bytes']} bytes, {base['rest_bytes']} of them beside gate and up, and "
                f"{base['top_k']} of {experts} experts per token, which no model has; {_REMEDY}."
            )
    return report


def read_healing(checkpoint: GlobeCheckpoint) -> dict[str, Any] | None:
    """Return how a checkpoint was healed, as its configuration says; None of a checkpoint that was not."""
    found = checkpoint.config.provenance.get("healing")
    return None if found is None else checked(_Healing, found, f"healing in {checkpoint.path / CONFIG_NAME}", _REMEDY)


def healed_on(healing: dict[str, Any]) -> str:
    """Say on which text a checkpoint was healed."""
    text = "a text that the model wrote" if healing["sha256"] is None else healing["text"]
    return f"Healed on {text}, {format_count(healing['tokens'])} tokens, seed {healing['seed']}."


def read_record(line: str) -> dict[str, Any]:
    """Return a record of the metric stream. Raises ValueError for a line that is no record."""
    record = checked(_Record, parse_json(line, finite=True), "the stream", _REMEDY)
    _require_metrics(record, "the stream")
    return record


def _require_metrics(found: dict[str, Any], where: str) -> None:
    checked(_Metrics, found, where, _REMEDY)
    for name, value in found.items():
        if isinstance(value, dict) and name.endswith("_histogram"):
            counts, edges = value["counts"], value["edges"]
            if not counts or len(edges) != len(counts) + 1 or sorted(set(edges)) != edges:
                raise GlobeError(f"{where} has a {name} whose bins do not follow each other; {_REMEDY}.")
    for check in found.get("spot_checks") or ():
        sizes = {len(check[name]) for name in ("number", "spectrum_dense", "spectrum_stored")}
        if len(sizes) > 1 or not (check["number"] and check["angles_degrees"]):
            raise GlobeError(f"{where} has a spot check with spectra of different lengths; {_REMEDY}.")
