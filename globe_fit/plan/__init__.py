"""Predictions before the work: bytes and seconds of a fit, bytes and times of a compressed model."""
