"""All steps of a user on the model that ships with the project: fit, export, load, measure."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from globe_fit.compression import compress
from globe_fit.config import FitConfig, VarProConfig
from globe_fit.data.model import load_model, token_windows, with_experts
from globe_fit.data.source import ExpertLayer, ExpertSource
from globe_fit.export import export_globe
from globe_fit.measure.baselines.errors import relative_errors
from globe_fit.measure.baselines.rounding import FORMATS, CodeFormat, rounded
from globe_fit.measure.baselines.svd import stored_svd
from globe_fit.measure.evaluate import Quality, continue_text, evaluate
from globe_fit.run.progress import Progress
from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import GlobeCheckpoint
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.patching import peak_workspace, resident_bytes
from globe_kernels.model.targets import globe_modules
from globe_kernels.ops.counters import call_counts
from globe_kernels.strategies import DENSE

DEMO_CONFIG = FitConfig(ratio=0.625, support=12, varpro=VarProConfig(steps=300))
PROMPT = "Return a new list containing"
NEW_TOKENS = 40
ROUNDED = ("int8", "int4_g32")  # formats of plain rounding, beside GloBE


def shipped_model() -> Path:
    """Find the directory of the trained model that ships with the project, installed or in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "tiny_moe", package.parent / "examples" / "tiny_moe"):
        if (path / "config.json").is_file():
            return path
    raise RequestError("The model that ships with GloBE is not installed; install again from the source tree.")


def run_demo(out: Path | None, progress: Progress) -> dict:
    """Fit the shipped model, export, load and measure it; returns the figures under stable keys.

    `out` keeps the checkpoint (`out/globe`) and the exported model (`out/globe-hf`); None discards them.
    """
    if out is not None:
        return _run(out, progress)
    with tempfile.TemporaryDirectory(prefix="globe-demo-") as directory:
        try:
            return _run(Path(directory), progress)
        except KeyboardInterrupt as stopped:
            raise type(stopped)("interrupted; a demo without -o keeps nothing") from stopped


def _run(out: Path, progress: Progress) -> dict:
    model_dir = shipped_model()
    source = ExpertSource(model_dir)
    result = compress(model_dir, out / "globe", DEMO_CONFIG, calibrate=None, progress=progress)
    checkpoint = GlobeCheckpoint(out / "globe")
    progress.begin("export", 1)
    export_globe(checkpoint, source, out / "globe-hf", on_tensor=lambda done, total: progress.advance(done / total))

    dense = load_model(model_dir)
    compressed = load_model(out / "globe-hf")
    svd_rank = result.report["families"]["gate"]["svd_equal_bytes_rank"]
    svd = with_experts(source, lambda layer, family: stored_svd(source.read(layer, family), svd_rank))
    models = {"dense": dense, "globe": compressed, "svd": svd}
    errors = {}
    for name in ROUNDED:

        def weights(layer: ExpertLayer, family: str, codes: CodeFormat = FORMATS[name]) -> torch.Tensor:
            return rounded(source.read(layer, family), codes)

        models[name], errors[name] = with_experts(source, weights), relative_errors(source, weights)
    windows = token_windows(model_dir, model_dir / "heldout.txt")
    progress.begin("measure", 1)
    quality = evaluate(models, windows, on_batch=lambda done, total: progress.advance(done / total))
    if not any(name.startswith("moe_ffn") for name in call_counts()):
        raise AssertionError("the GloBE experts never ran")
    texts = {name: continue_text(models[name], model_dir, PROMPT, NEW_TOKENS) for name in ("dense", "globe", "svd")}
    return _figures(result.report, quality, checkpoint, compressed, texts, errors)


def _figures(
    report: dict,
    quality: dict[str, Quality],
    checkpoint: GlobeCheckpoint,
    model: nn.Module,
    texts: dict[str, str],
    rounding_errors: dict[str, dict[str, float]],
) -> dict:
    families = report["families"]
    modules, base = list(globe_modules(model).values()), checkpoint.config.base
    resident = resident_bytes(model) - sum(module.down_proj.nbytes for module in modules)
    return {
        "relative_error": {family: families[family]["relative_error"] for family in FAMILIES},
        "baseline": {
            "svd": {family: families[family]["svd_equal_bytes"] for family in FAMILIES},
            "rank_bound": {family: families[family]["rank_bound"] for family in FAMILIES},
            **rounding_errors,
        },
        "perplexity": {name: quality[name].perplexity for name in quality},
        "kl": {name: quality[name].kl for name in ("globe", "svd", *ROUNDED)},
        "top1": {name: quality[name].top1 for name in ("globe", "svd", *ROUNDED)},
        "bytes": {
            "dense_experts": base.dense_bytes,
            "globe_on_disk": checkpoint.bytes_on_disk,
            "resident": resident,
            "dense_peak": base.dense_bytes + peak_workspace(model, DENSE.name),
            "peak": resident + peak_workspace(model),
            **{name: FORMATS[name].bytes_of(base) for name in ROUNDED},
        },
        "sizes": report["sizes"],
        "paths": list(modules[0].strategies),
        "tokens_per_s": {name: quality[name].tokens_per_s for name in ("dense", "globe")},
        "continuation": {"prompt": PROMPT, **texts},
    }
