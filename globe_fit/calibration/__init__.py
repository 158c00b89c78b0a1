"""The metric of a calibrated fit: statistics of the inputs of the experts, over a text."""
