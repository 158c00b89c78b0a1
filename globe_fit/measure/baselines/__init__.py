"""Compress experts as others do, to measure a fit against: truncated SVD, rounding, GPTQ, pruning of experts."""
