"""Figures of a fit, of a checkpoint and of a model; nothing here changes them."""
