"""The version of the distribution, and nothing else: setup reads this file."""

__version__ = "0.1.0"
