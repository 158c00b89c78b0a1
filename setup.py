"""Everything is declared in pyproject.toml; the optional CUDA extension will be declared here."""

from setuptools import setup

setup()
