"""Keep the ledger of measurements: one JSON object a line, under benchmarks/results/<device>/."""

import datetime
import json
import math
import subprocess
from pathlib import Path

import torch

from globe_kernels.ops.tuning import slug

RESULTS = Path(__file__).resolve().parent / "results"

_TEXTS = ("op", "provider", "model", "device", "commit", "torch", "triton", "date")
_POSITIVE = ("median_us", "gb_per_s", "tflop_per_s", "copy_gb_per_s", "matmul_tflop_per_s")
_NOT_NEGATIVE = ("relative_error",)
_MODEL = (
    ("median_us", "tokens_per_s", "ratio_to_dense", "predicted_us", "resident_bytes", "planned_bytes"),
    _NOT_NEGATIVE,
)
# what is no kernel alone: fields that are positive, and fields that are not negative, by op; their rows have settings
_OTHER = {
    "fit": (("seconds", "bytes"), ("gate_error", "up_error")),
    "model_prefill": _MODEL,
    "model_decode": _MODEL,
    "cache_curve": (("median_us", "tokens_per_s", "ratio_to_composed"), ("hit_rate", "warm_hit_rate")),
}
# what a run writes itself does not change what the next one measures
_MEASURED = (":(top)", ":(top,exclude)benchmarks/results", ":(top,exclude)README.md")


def conditions(device: str) -> dict[str, str]:
    """Return the facts about the run that every row has."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    changed = _git("status", "--porcelain", *_MEASURED)
    return {
        "device": device,
        "commit": _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else ""),
        "torch": torch.__version__,
        "triton": triton_version,
        "clocks": _clocks() if device != "cpu" else "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _clocks() -> str:
    """Multiprocessor and memory clock in MHz, as the card has them at the end of a run."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def append(op: str, device: str, rows: list[dict]) -> Path:
    """Append rows to the ledger of `op` on `device`; return its path."""
    path = RESULTS / slug(device) / f"{op}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return path


def read_all(results: Path = RESULTS) -> list[dict]:
    """Return every row of every device. Raises SystemExit that names the first damaged line."""
    rows = []
    for path in sorted(results.rglob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                raise SystemExit(f"ledger: line {number} of {path} is not JSON; remove it or restore it.") from None
            if damaged := _damaged(row):
                raise SystemExit(f"ledger: line {number} of {path} lacks a sound {damaged}; remove it or restore it.")
            rows.append(row)
    return rows


def _damaged(row: object) -> str:
    """Names of the fields that are missing or of no use; empty for a sound row."""
    if not isinstance(row, dict):
        return "object"
    shape = row.get("shape")
    op = str(row.get("op"))
    positive, not_negative = _OTHER.get(op, (_POSITIVE, _NOT_NEGATIVE))
    if op == "fit" and "kept" in row:  # experts were dropped, so the weights have no error
        positive, not_negative = (*positive, "kept"), ()
    sound = {name: isinstance(row.get(name), str) for name in ((*_TEXTS, "settings") if op in _OTHER else _TEXTS)}
    sound |= {name: _number(row.get(name)) > 0 for name in positive}
    sound |= {name: _number(row.get(name)) >= 0 for name in not_negative}
    sound["shape"] = isinstance(shape, dict)
    if isinstance(shape, dict):
        varied = ["tokens"] if op.startswith(("moe_ffn", "model")) else ["share"] if op == "cache_curve" else []
        sound |= {f"shape.{name}": _number(shape.get(name)) > 0 for name in varied}
    return ", ".join(name for name, is_sound in sound.items() if not is_sound)


def _number(value: object) -> float:
    """Return the number; NaN, which no comparison accepts, when it is not finite."""
    return value if isinstance(value, int | float) and math.isfinite(value) else math.nan
