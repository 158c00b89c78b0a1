"""How long work tells how far it is, whoever listens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from globe_fit.config import FitConfig
from globe_fit.data.source import ExpertSource
from globe_fit.fitting import OnStep, fit
from globe_fit.result import FitResult
from globe_fit.run.distributed import ALONE, Ranks
from globe_fit.run.snapshots import Snapshots
from globe_kernels.format.architectures import FAMILIES

if TYPE_CHECKING:
    from globe_fit.calibration.metric import Calibration


@dataclass(frozen=True)
class Stage:
    """Receives progress: `begin` opens a stage with its number of steps, `advance` tells how many are done."""

    begin: Callable[[str, int], None]
    advance: Callable[[float], None]


def fit_with_progress(
    source: ExpertSource,
    config: FitConfig,
    stage: Stage,
    snapshots: Snapshots | None = None,
    calibration: "Calibration | None" = None,
    log: OnStep | None = None,
    ranks: Ranks = ALONE,
    name: str = "fit",
) -> FitResult:
    """`fit`, as one stage of all steps of both families; `log` gets the record of each step."""
    passes = config.steps + 1
    stage.begin(name, passes * len(FAMILIES))

    def on_step(record: dict) -> None:
        stage.advance(record["step"] + 1 + passes * FAMILIES.index(record["family"]))
        if log is not None:
            log(record)

    return fit(source, config, on_step=on_step, snapshots=snapshots, calibration=calibration, ranks=ranks)
