"""Compare results with tolerances that a wrong answer cannot meet."""

import torch


def relative_errors(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return (rms, peak), relative to the rms and the peak of `expected`; an all-zero `actual` scores 1 and 1."""
    difference = (actual.double() - expected.double()).abs()
    reference = expected.double().abs()
    rms = (difference.square().mean().sqrt() / reference.square().mean().sqrt()).item()
    return rms, (difference.max() / reference.max()).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rms: float, peak: float) -> None:
    """Fail when shapes differ, a value is not finite, or a relative error exceeds its limit."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), "NaN or infinity in the result"
    found_rms, found_peak = relative_errors(actual, expected)
    assert found_rms <= rms, f"relative rms {found_rms:.3g}, limit {rms:g}"
    assert found_peak <= peak, f"relative peak {found_peak:.3g}, limit {peak:g}"
