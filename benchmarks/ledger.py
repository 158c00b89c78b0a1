"""The ledger of measurements: one JSON object a line, under benchmarks/results/<device>/."""

import datetime
import json
import re
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def conditions(device: str) -> dict[str, str]:
    """What every row says of the run that made it."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": device,
        "commit": _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("status", "--porcelain") else ""),
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
    """Append rows to the ledger of `op` on `device`; returns its path."""
    path = RESULTS / re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower() / f"{op}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return path


def read_all() -> list[dict]:
    """Every row of every device."""
    return [json.loads(line) for path in sorted(RESULTS.rglob("*.jsonl")) for line in path.read_text().splitlines()]
