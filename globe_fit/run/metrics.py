"""The table of all metrics of a fit: name, unit, better direction, meaning.

The records of the metric stream and the families of fit_report.json use only these names.
"""

from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

_Count = Annotated[int, range(2**60)]


class Histogram(TypedDict):
    """Counts of values in bins, between edges."""

    counts: list[_Count]
    edges: list[float]


class SpotCheck(TypedDict):
    """A comparison of one expert as stored with the raw expert."""

    layer: _Count
    expert: _Count
    relative_error: float
    number: list[_Count]
    spectrum_dense: list[float]
    spectrum_stored: list[float]
    angles_degrees: list[float]


@dataclass(frozen=True)
class MetricRow:
    """A row of the table."""

    unit: str
    better: str  # "lower", "higher" or "" for a fact
    meaning: str
    kind: Any = float | None  # of its values, as globe_kernels.format.typed takes kinds


_HISTOGRAM = "counts and edges of equal bins"

METRICS = {
    "step": MetricRow("", "", "passes over all experts so far", _Count),
    "family": MetricRow("", "", "gate or up", str),
    # reconstruction
    "relative_error": MetricRow(
        "",
        "lower",
        "squared error over energy; in a record: of the normalised weights, in a report: of the raw weights",
    ),
    "calibrated_error": MetricRow("", "lower", "relative error in the metric of the calibration text"),
    "relative_error_by_layer": MetricRow(
        "", "lower", "relative error per layer, of the stored factors on the raw weights", dict[int, float | None]
    ),
    "mse": MetricRow("weight^2", "lower", "squared Frobenius error over the number of weights, in raw weights"),
    "svd_equal_bytes": MetricRow("", "lower", "relative error of the truncated SVD of every expert, in the same bytes"),
    "svd_equal_bytes_rank": MetricRow("", "", "rank of the truncated SVD in the same bytes"),
    "rank_bound": MetricRow(
        "", "lower", "relative error of the truncated SVD at the rank of the fit: no fit is below it"
    ),
    "energy_at_rank": MetricRow(
        "", "higher", "share of the energy of sampled experts in their R largest singular values"
    ),
    "energy_captured": MetricRow(
        "", "higher", "share of the energy of sampled experts in the row space of their composed bases"
    ),
    "effective_rank_dense": MetricRow("", "", "singular values that hold 95 % of the energy of a sampled expert, mean"),
    "effective_rank_fit": MetricRow("", "", "effective_rank_dense of the projections on the composed bases"),
    "spot_checks": MetricRow(
        "", "", "sampled experts as stored: error, spectra, angles of the top singular vectors", list[SpotCheck]
    ),
    "energy": MetricRow("weight^2", "", "squared Frobenius norm of the raw weights"),
    "mean": MetricRow("weight", "", "mean of the raw weights"),
    "scale": MetricRow("weight", "", "standard deviation of the raw weights"),
    "mean_energy_left": MetricRow("", "lower", "squared mean of the residual over the squared mean of the weights"),
    # sparsity
    "support_min": MetricRow("atoms", "lower", "smallest number of non-zero codes of an expert"),
    "support_median": MetricRow("atoms", "lower", "median number of non-zero codes of an expert"),
    "support_max": MetricRow("atoms", "lower", "largest number of non-zero codes of an expert"),
    "support_mean": MetricRow("atoms", "lower", "mean number of non-zero codes of an expert"),
    "support_histogram": MetricRow("experts", "", f"experts by the size of their support; {_HISTOGRAM}", Histogram),
    "support_overlap": MetricRow("", "", "Jaccard overlap of the supports of gate and up, mean over the experts"),
    "code_entropy": MetricRow(
        "", "", "entropy of the |codes| of an expert, mean; 1: its atoms weigh the same, 0: a single atom"
    ),
    "small_codes": MetricRow("", "", "share of the non-zero codes below 1 % of the largest code of their expert"),
    "atom_use_min": MetricRow("experts", "", "experts that use the least used atom"),
    "atom_use_median": MetricRow("experts", "", "experts that use an atom, median"),
    "atom_use_max": MetricRow("experts", "", "experts that use the most used atom"),
    "atom_use_histogram": MetricRow(
        "atoms", "", f"atoms by the number of experts that use them; {_HISTOGRAM}", Histogram
    ),
    "dead_atoms": MetricRow("atoms", "lower", "atoms that no expert uses"),
    "largest_palette": MetricRow("atoms", "lower", "atoms that one layer uses, largest over the layers"),
    "palette_sizes": MetricRow("atoms", "lower", "atoms that each layer uses", dict[int, _Count]),
    # stability
    "atom_norm_min": MetricRow("weight/scale", "", "smallest Frobenius norm of an atom"),
    "atom_norm_median": MetricRow("weight/scale", "", "median Frobenius norm of an atom"),
    "atom_norm_max": MetricRow("weight/scale", "", "largest Frobenius norm of an atom"),
    "coherence_max": MetricRow("", "lower", "|cosine| of the two atoms that are most alike"),
    "coherence_mean": MetricRow("", "lower", "|cosine| of two atoms, mean over all pairs"),
    "coherence_histogram": MetricRow("pairs", "", f"pairs of atoms by |cosine|; {_HISTOGRAM}", Histogram),
    "codes_condition": MetricRow("", "lower", "condition number of codes^T codes over the atoms in use"),
    "gram_condition": MetricRow("", "lower", "condition number of basis basis^T, largest of the sampled experts"),
    "regularised": MetricRow(
        "blocks", "lower", "blocks whose adapters needed a larger ridge, since this process began the family"
    ),
    # run time
    "seconds": MetricRow("s", "lower", "in the solver since the family began, without the time to measure"),
    "step_seconds": MetricRow("s", "lower", "seconds of the last pass over all experts"),
    "experts_per_second": MetricRow("1/s", "higher", "experts over the seconds of the last pass"),
    "read_gb_per_second": MetricRow(
        "GB/s", "higher", "weights in fp32, as the solver gets them, over the seconds of the last pass"
    ),
    "peak_host_bytes": MetricRow("B", "lower", "highest resident memory of the process so far"),
    "peak_device_bytes": MetricRow("B", "lower", "highest memory that torch allocated on the GPU so far"),
    "cycle_gain": MetricRow("", "", "share by which the last cycle of steps lowered the error"),
    "temperature": MetricRow("", "", "T of the codes entmax(z / T)"),
    "dictionary_condition": MetricRow(
        "", "lower", "condition number of the Gram matrix of the codes in use, sum a a^T"
    ),
    "ridge_raised": MetricRow(
        "", "lower", "Cholesky factorisations of alternating steps so far that needed more ridge"
    ),
}


def check_names(record: dict) -> dict:
    """Return the record. Raises KeyError for a name that the table does not have."""
    for name in record:
        if name not in METRICS:
            raise KeyError(f"metric {name!r} is not in globe_fit.run.metrics.METRICS")
    return record
