"""Calibrate a fit: collect statistics of the inputs of the experts over a text, and make a metric of them."""
