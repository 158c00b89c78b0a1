"""Every metric of the fit, once: name, unit, which way is better, meaning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    unit: str
    better: str  # "lower", "higher" or "" for a fact
    meaning: str


METRICS = {
    "step": Metric("", "", "passes over all experts so far"),
    "family": Metric("", "", "gate or up"),
    "relative_error": Metric("", "lower", "squared error of the normalised weights over their energy"),
    "support_median": Metric("atoms", "lower", "median number of non-zero codes of an expert"),
    "seconds": Metric("s", "lower", "since the start of the family's fit"),
    "temperature": Metric("", "", "T of the codes entmax(z / T)"),
    "dictionary_condition": Metric("", "lower", "condition number of the Gram matrix of the codes in use, sum a a^T"),
    "ridge_raised": Metric("", "lower", "Cholesky factorisations of alternating steps so far that needed more ridge"),
}


def check_names(record: dict) -> dict:
    """The record itself. Raises KeyError for a name that the table does not have."""
    for name in record:
        if name not in METRICS:
            raise KeyError(f"metric {name!r} is not in globe_fit.metrics.METRICS")
    return record
