"""Every metric of the fit, once: name, unit, which way is better, meaning.

The records of the metric stream and the families of fit_report.json use these names and no others.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    unit: str
    better: str  # "lower", "higher" or "" for a fact
    meaning: str


_HISTOGRAM = "counts and edges of equal bins"

METRICS = {
    "step": Metric("", "", "passes over all experts so far"),
    "family": Metric("", "", "gate or up"),
    # reconstruction
    "relative_error": Metric(
        "",
        "lower",
        "squared error over energy: in a record as the solver sees it, in a report of the raw weights",
    ),
    "calibrated_error": Metric("", "lower", "relative error in the metric of the calibration text"),
    "relative_error_by_layer": Metric("", "lower", "the same per layer, of the stored factors on the raw weights"),
    "mse": Metric("weight^2", "lower", "squared Frobenius error over the number of weights, in raw weights"),
    "svd_equal_bytes": Metric("", "lower", "relative error of the truncated SVD of every expert, in the same bytes"),
    "svd_equal_bytes_rank": Metric("", "", "rank of that SVD"),
    "rank_bound": Metric("", "lower", "relative error of the truncated SVD at the rank of the fit: no fit is below it"),
    "energy_at_rank": Metric("", "higher", "share of the energy of sampled experts in their R largest singular values"),
    "energy_captured": Metric("", "higher", "share of it in the row space of their composed bases"),
    "effective_rank_dense": Metric("", "", "singular values that hold 95 % of a sampled expert's energy, mean"),
    "effective_rank_fit": Metric("", "", "the same of what their composed bases hold of them"),
    "spot_checks": Metric("", "", "sampled experts as stored: error, spectra, angles of the top singular vectors"),
    "energy": Metric("weight^2", "", "squared Frobenius norm of the raw weights"),
    "mean": Metric("weight", "", "mean of the raw weights"),
    "scale": Metric("weight", "", "standard deviation of the raw weights"),
    "mean_energy_left": Metric("", "lower", "squared mean of the residual over the squared mean of the weights"),
    # sparsity
    "support_min": Metric("atoms", "lower", "smallest number of non-zero codes of an expert"),
    "support_median": Metric("atoms", "lower", "median number of non-zero codes of an expert"),
    "support_max": Metric("atoms", "lower", "largest number of non-zero codes of an expert"),
    "support_mean": Metric("atoms", "lower", "mean number of non-zero codes of an expert"),
    "support_histogram": Metric("experts", "", f"experts by the size of their support; {_HISTOGRAM}"),
    "support_overlap": Metric("", "", "Jaccard overlap of the supports of gate and up, mean over the experts"),
    "code_entropy": Metric(
        "", "", "entropy of an expert's |codes|, mean; 1: its atoms weigh the same, 0: a single one"
    ),
    "small_codes": Metric("", "", "share of the non-zero codes below 1 % of the largest of their expert"),
    "atom_use_min": Metric("experts", "", "experts that use the least used atom"),
    "atom_use_median": Metric("experts", "", "experts that use an atom, median"),
    "atom_use_max": Metric("experts", "", "experts that use the most used atom"),
    "atom_use_histogram": Metric("atoms", "", f"atoms by how many experts use them; {_HISTOGRAM}"),
    "dead_atoms": Metric("atoms", "lower", "atoms that no expert uses"),
    "largest_palette": Metric("atoms", "lower", "atoms that one layer uses, largest over the layers"),
    "palette_sizes": Metric("atoms", "lower", "atoms that each layer uses"),
    # stability
    "atom_norm_min": Metric("weight/scale", "", "smallest Frobenius norm of an atom"),
    "atom_norm_median": Metric("weight/scale", "", "median Frobenius norm of an atom"),
    "atom_norm_max": Metric("weight/scale", "", "largest Frobenius norm of an atom"),
    "coherence_max": Metric("", "lower", "|cosine| of the two atoms that are most alike"),
    "coherence_mean": Metric("", "lower", "|cosine| of two atoms, mean over all pairs"),
    "coherence_histogram": Metric("pairs", "", f"pairs of atoms by |cosine|; {_HISTOGRAM}"),
    "codes_condition": Metric("", "lower", "condition number of codes^T codes over the atoms in use"),
    "gram_condition": Metric("", "lower", "condition number of basis basis^T, largest of the sampled experts"),
    "regularised": Metric("blocks", "lower", "blocks whose adapters needed a larger ridge, since this run began"),
    # run time
    "seconds": Metric("s", "lower", "in the solver since the start of the family's fit, without the time of measuring"),
    "step_seconds": Metric("s", "lower", "of the last pass over all experts"),
    "experts_per_second": Metric("1/s", "higher", "experts over the seconds of the last pass"),
    "read_gb_per_second": Metric("GB/s", "higher", "weights, as the fp32 that the solver gets, over the same seconds"),
    "peak_host_bytes": Metric("B", "lower", "highest resident memory of the process so far"),
    "peak_device_bytes": Metric("B", "lower", "highest memory that torch allocated on the GPU so far"),
    "temperature": Metric("", "", "T of the codes entmax(z / T)"),
    "dictionary_condition": Metric("", "lower", "condition number of the Gram matrix of the codes in use, sum a a^T"),
    "ridge_raised": Metric("", "lower", "Cholesky factorisations of alternating steps so far that needed more ridge"),
}


def check_names(record: dict) -> dict:
    """The record itself. Raises KeyError for a name that the table does not have."""
    for name in record:
        if name not in METRICS:
            raise KeyError(f"metric {name!r} is not in globe_fit.run.metrics.METRICS")
    return record
