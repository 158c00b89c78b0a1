"""Heal a fit: train the adapters of each layer until its outputs are near the outputs of the dense layer."""
