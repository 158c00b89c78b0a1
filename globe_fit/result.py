"""Hold the result of a fit: factors in the dtype in which they are stored and run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape

import torch

from globe_fit.run.loggers import records_of
from globe_fit.run.reports import read_report
from globe_kernels.errors import GlobeError
from globe_kernels.format.checkpoint import Code, GlobeCheckpoint, GlobeConfig, LayerFactors, require_finite
from globe_kernels.format.names import FAMILIES, REPORT_NAME
from globe_kernels.ops.compose_basis import compose_basis_ref
from globe_kernels.table import Table, bytes_table


@dataclass(frozen=True)
class FamilyFactors:
    """Bank, codes and adapters of one family over all n experts, in host memory or in a file that is mapped."""

    bank: torch.Tensor  # (M, R, D)
    code: Code  # (n, C)
    adapter: torch.Tensor  # (n, P, R)

    def at(self, span: slice) -> LayerFactors:
        """Return the factors of the experts of `span`, a slice among all n experts."""
        return slice_experts(LayerFactors(self.adapter, self.code), span)


def slice_experts(factors: LayerFactors, span: slice) -> LayerFactors:
    """Return the factors of a slice of the experts."""
    return LayerFactors(factors.adapter[span], Code(factors.code.index[span], factors.code.value[span]))


def reconstruct(layer: LayerFactors, bank: torch.Tensor, phi: str) -> torch.Tensor:
    """Return the dense weights (E, P, D) float32 that the factors stand for, without rounding in between.

    Raises GlobeError for factors whose product is beyond float32.
    """
    basis = compose_basis_ref(layer.code.index, layer.code.value, bank, phi, torch.float32)
    dense = layer.adapter.float() @ basis
    require_finite(dense, "The product of the factors of a layer")
    return dense


@dataclass(frozen=True)
class FitStatus:
    """Whether a fit completed, and advice on the next fit."""

    completed: bool
    advice: str
    level: str = ""  # "settled", "unsettled": more steps would pay, "diverged"; empty in reports from before it existed


@dataclass(frozen=True, repr=False)
class FitResult:
    """The result of `globe_fit.fit`, of one type whatever the options.

    `report` has the errors per layer and family beside the baselines, `history` a record per logged step. Of several
    ranks only the first has the banks and the adapters. `globe_fit.export.save_fit` writes the result to disk. The
    factors of `globe_fit.fit` are in host memory, with snapshots in their files; the factors of `globe_fit.compress`
    are read from the checkpoint each time a family is asked for.
    Prints as the errors and the bytes, and shows as HTML in a notebook.
    """

    config: GlobeConfig
    families: Mapping[str, FamilyFactors]
    status: FitStatus
    history: list[dict]
    report: dict

    def _tables(self) -> list[Table]:
        tables = [error_table(self.report["families"], self.config.rank)]
        return [*tables, sizes_table(sizes)] if (sizes := self.report.get("sizes")) else tables

    def __repr__(self) -> str:
        return "\n\n".join([*map(str, self._tables()), self.status.advice])

    def _repr_html_(self) -> str:
        tables = "".join(table._repr_html_() for table in self._tables())
        return f"{tables}<p>{escape(self.status.advice)}</p>"


_SIZES = {
    "gate_up": "gate and up on disk",
    "model": "whole model on disk",
    "resident": "whole model in memory",
    "peak": "whole model at its peak, predicted",
}


def sizes_table(sizes: dict) -> Table:
    """Lay out the figures of globe_fit.plan.footprint that are known."""
    return bytes_table(
        "Bytes", {label: (found["dense"], found["globe"]) for name, label in _SIZES.items() if (found := sizes[name])}
    )


def error_table(families: dict, rank: int) -> Table:
    """Lay out the errors of the families of a fit report beside the baselines."""
    errors = {
        "GloBE": "relative_error",
        f"SVD, equal bytes (rank {families[FAMILIES[0]]['svd_equal_bytes_rank']})": "svd_equal_bytes",
        f"lower bound of rank {rank}": "rank_bound",
        "GloBE, in the metric of the text": "calibrated_error",
    }
    rows = [
        [label, *(f"{families[family][key]:.4f}" for family in FAMILIES)]
        for label, key in errors.items()
        if all(families[family].get(key) is not None for family in FAMILIES)
    ]
    return Table("Relative squared error", ["", *FAMILIES], rows)


class StoredFactors(Mapping[str, FamilyFactors]):
    """The factors of a checkpoint, which are read from disk when a family is asked for."""

    def __init__(self, checkpoint: GlobeCheckpoint):
        self._checkpoint = checkpoint

    def __getitem__(self, family: str) -> FamilyFactors:
        if family not in FAMILIES:
            raise KeyError(family)
        layers = [self._checkpoint.layer(layer, family) for layer in self._checkpoint.config.base.num_experts]
        index, value, adapter = (
            torch.cat(parts)
            for parts in zip(*((each.code.index, each.code.value, each.adapter) for each in layers), strict=True)
        )
        return FamilyFactors(self._checkpoint.bank(family), Code(index, value), adapter)

    def __iter__(self) -> Iterator[str]:
        return iter(FAMILIES)

    def __len__(self) -> int:
        return len(FAMILIES)


def stored_fit(checkpoint: GlobeCheckpoint, report: dict | None = None, history: list[dict] | None = None) -> FitResult:
    """Return the result of the fit that wrote `checkpoint`, by default with the report and the history beside it.

    Raises GlobeError when the report is missing or damaged.
    """
    report = read_report(checkpoint) if report is None else report
    if missing := {"families", "status"} - report.keys():
        raise GlobeError(f"{checkpoint.path / REPORT_NAME} has no {min(missing)}; restore the file or fit again.")
    status = FitStatus(
        **{name: report["status"][name] for name in FitStatus.__annotations__ if name in report["status"]}
    )
    history = records_of(checkpoint.metrics) if history is None else history
    return FitResult(checkpoint.config, StoredFactors(checkpoint), status, history, report)
