"""Let writers and readers of one directory race: python -m tests.races --seconds 600.

Two writers take turns, or are refused, and write one of two fits; readers open the directory all the time and compare
configuration, report, metric stream and tensors with the fit that the configuration names. A mixture, a traceback or an
error of a reader is a finding. With --export the directory is an export: from_pretrained opens the weights later than
the configuration, so they may be gone, which is no finding.
"""

import argparse
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from globe_fit import ExpertSource, FitConfig, VarProConfig, compress, export_globe, save_fit
from globe_fit.result import stored_fit
from globe_kernels import GlobeCheckpoint, GlobeError, RequestError
from globe_kernels.testing import tiny_model

_SEEDS = (0, 1)


def main() -> int:
    """Race and print the counts of what happened; returns 1 when there is a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.races", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--export", action="store_true", help="race for an export in place of a checkpoint")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        counts = race(Path(folder), given.seconds, given.writers, given.readers, export=given.export)
    print(", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    return 1 if counts.keys() - {"written", "refused", "read", "replaced while it was read"} else 0


def race(folder: Path, seconds: float, writers: int, readers: int, *, export: bool = False) -> Counter:
    """Return {outcome: count} of processes that write and read one directory in `folder` for some seconds."""
    tiny_model("qwen3_moe").save_pretrained(folder / "model")
    for seed in _SEEDS:
        config = FitConfig(ratio=0.8, support=4, seed=seed, varpro=VarProConfig(steps=1, warmup_steps=0))
        compress(folder / "model", folder / f"fit{seed}", config, calibrate=None)
    write, read = (_write_export, _read_export) if export else (_write_checkpoint, _read_checkpoint)
    write(folder, 0)
    context, until = get_context("fork"), time.time() + seconds
    counts = context.Queue()
    jobs = [(write, number) for number in range(writers)] + [(read, number) for number in range(readers)]
    processes = [context.Process(target=_loop, args=(counts, until, folder, *job)) for job in jobs]
    for process in processes:
        process.start()
    total = sum((counts.get() for _ in processes), Counter())
    for process in processes:
        process.join()
    return total


def _loop(counts, until: float, folder: Path, act: Callable[[Path, int], str], number: int) -> None:
    found: Counter = Counter()
    while time.time() < until:
        number += 1
        try:
            found[act(folder, number)] += 1
        except BaseException as error:
            traceback.print_exc()
            found[f"{act.__name__} {type(error).__name__}"] += 1
    counts.put(found)


def _write_checkpoint(folder: Path, number: int) -> str:
    fit = GlobeCheckpoint(folder / f"fit{_SEEDS[number % 2]}")
    try:
        save_fit(stored_fit(fit), ExpertSource(folder / "model"), folder / "shared")
    except RequestError:
        return "refused"
    return "written"


def _read_checkpoint(folder: Path, number: int) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a report of another fit
        found = GlobeCheckpoint(folder / "shared")
    expected = GlobeCheckpoint(folder / f"fit{found.config.provenance['seed']}")
    same = found.config == expected.config and found.report() == expected.report()
    # the stored fit writes the records again: the same numbers, perhaps other spaces
    streams = ([json.loads(line) for line in each.metrics.splitlines()] for each in (found, expected))
    same = same and next(streams) == next(streams)
    for family in ("gate", "up"):
        same = same and torch.equal(found.bank(family), expected.bank(family))
        for layer in found.config.base.num_experts:
            here, there = found.layer(layer, family), expected.layer(layer, family)
            same = same and torch.equal(here.adapter, there.adapter) and torch.equal(here.code.value, there.code.value)
    return "read" if same else "a mixture"


def _write_export(folder: Path, number: int) -> str:
    fit = GlobeCheckpoint(folder / f"fit{_SEEDS[number % 2]}")
    try:
        export_globe(fit, ExpertSource(folder / "model"), folder / "shared")
    except RequestError:
        return "refused"
    return "written"


def _read_export(folder: Path, number: int) -> str:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder / "shared", dtype=torch.float32)
    except (FileNotFoundError, RuntimeError, GlobeError) as error:  # of safetensors, of torch, of GloBE
        if not any(words in str(error) for words in ("No such file", "is gone: another export took its place")):
            raise
        return "replaced while it was read"
    seed = model.config.quantization_config.globe.provenance["seed"]
    expected = GlobeCheckpoint(folder / f"fit{seed}")
    return "read" if torch.equal(model.globe_bank.up.detach(), expected.bank("up").float()) else "a mixture"


if __name__ == "__main__":
    sys.exit(main())
