"""Models and checkpoints that many tests read; none of them writes to these."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before globe_kernels is imported

from transformers.utils.logging import disable_progress_bar  # noqa: E402

from globe_fit import ExpertSource, FitConfig, VarProConfig, export_globe, fit, save_fit  # noqa: E402
from globe_kernels import GlobeCheckpoint  # noqa: E402
from globe_kernels.testing import tiny_model  # noqa: E402
from tests.warm import WarmPython  # noqa: E402

# Of every layout: per expert and fused, with shared experts and dense layers, transposed, interleaved, with biases.
MODEL_TYPES = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss")
# Files whose tests share something that takes seconds to make.
TOGETHER = (
    "tests/fit/run/test_distributed.py",
    "tests/integration/test_parallel.py",
    "tests/integration/test_report_in_browser.py",
    "tests/test_end_to_end.py",
)
TINY_FIT = FitConfig(ratio=0.8, support=4, varpro=VarProConfig(steps=6, warmup_steps=2))


def pytest_configure() -> None:
    disable_progress_bar()  # fixtures save models while a test captures what a command prints
    # one thread per process: with pytest-xdist the processes are the parallelism
    torch.set_num_threads(1)
    # torch looks up once which functions a device context meets: before tests/kernels/conftest.py replaces some,
    # or what a later test makes on the meta device is allocated
    with torch.device("cpu"):
        torch.empty(0)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Give a worker the whole of a file in TOGETHER, and of any other file a test at a time."""
    from xdist.scheduler import LoadScopeScheduling

    class FilesTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return path if path in TOGETHER else nodeid

    return FilesTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests begin first, so that no worker is left with one when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def warm_python():
    """Runs Python programs in forks of a process in which torch, transformers and the packages are imported."""
    python = WarmPython()
    yield python
    python.close()


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory):
    """Writes a tiny random model to disk, in 100 kB shards, once per (architecture, layout)."""
    written: dict[tuple[str, bool], Path] = {}

    def save(model_type: str, fused: bool = False) -> Path:
        if (model_type, fused) not in written:
            path = tmp_path_factory.mktemp(f"{model_type}-{'fused' if fused else 'per-expert'}")
            model = tiny_model(model_type)
            model.save_pretrained(path, max_shard_size="100KB", save_original_format=not fused)
            written[model_type, fused] = path
        return written[model_type, fused]

    return save


@pytest.fixture(scope="session")
def fit_tiny(save_tiny, tmp_path_factory):
    """(directory of the GloBE checkpoint, FitResult) of a tiny model, fitted for a few steps, once."""
    fitted: dict = {}

    def run(model_type: str = "qwen3_moe"):
        if model_type not in fitted:
            path = tmp_path_factory.mktemp(f"{model_type}-globe")
            source = ExpertSource(save_tiny(model_type))
            result = fit(source, TINY_FIT)
            save_fit(result, source, path)
            fitted[model_type] = (path, result)
        return fitted[model_type]

    return run


@pytest.fixture(scope="session")
def export_tiny(save_tiny, fit_tiny, tmp_path_factory):
    """Directory of the exported Hugging Face model of a tiny fit, once per architecture."""
    exported: dict[str, Path] = {}

    def run(model_type: str = "qwen3_moe") -> Path:
        if model_type not in exported:
            out = tmp_path_factory.mktemp(f"{model_type}-hf")
            export_globe(GlobeCheckpoint(fit_tiny(model_type)[0]), ExpertSource(save_tiny(model_type)), out)
            exported[model_type] = out
        return exported[model_type]

    return run
