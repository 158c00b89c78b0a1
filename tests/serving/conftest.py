"""Exports for the real engine, which the environment of `make vllm` has; elsewhere nothing here is collected."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from globe_fit import ExpertSource, FitConfig, VarProConfig, export_dense, export_globe, fit, save_fit
from globe_kernels import GlobeCheckpoint

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]


TINY_MOE = Path(__file__).parents[2] / "examples" / "tiny_moe"


class Exports(NamedTuple):
    """A checkpoint and its two exports."""

    checkpoint: Path
    globe: Path
    dense: Path


@pytest.fixture(scope="session")
def export_both(tmp_path_factory):
    """Writes both exports of a checkpoint; options are those of export_globe and export_dense."""

    def export(checkpoint: Path, base: Path, **options: Any) -> Exports:
        folder = tmp_path_factory.mktemp("exports")
        exports, opened, source = (
            Exports(checkpoint, folder / "globe", folder / "dense"),
            GlobeCheckpoint(checkpoint),
            ExpertSource(base),
        )
        export_globe(opened, source, exports.globe, **options)
        export_dense(opened, source, exports.dense, **options)
        return exports

    return export


@pytest.fixture(scope="session")
def shipped(tmp_path_factory, export_both) -> Exports:
    """The exports of a short fit of the model that ships with GloBE."""
    out, source = tmp_path_factory.mktemp("shipped") / "checkpoint", ExpertSource(TINY_MOE)
    result = fit(source, FitConfig(ratio=0.625, varpro=VarProConfig(steps=30)))
    save_fit(result, source, out)
    return export_both(out, TINY_MOE)
