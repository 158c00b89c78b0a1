"""The bytes on disk at the peak of a fit: the room that a fit asks for is the room that it takes."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from globe_fit import FitConfig, VarProConfig, compress
from globe_fit.config import AlternatingConfig
from globe_fit.plan.fitting import disk_bytes, plan_fit
from globe_kernels.errors import GlobeError
from globe_kernels.testing import tiny_model
from tests.integration.conftest import assert_refused

MOST = 1.3  # of the bytes that a fit takes
QUICK = ("--atoms", "12", "--support", "4", "--steps", "3", "--device", "cpu", "--snapshot-minutes", "0")
SETTINGS = {
    "varpro": FitConfig(rank=64, atoms=12, support=4, device="cpu", varpro=VarProConfig(steps=3)),
    "small bank": FitConfig(rank=100, atoms=4, support=2, device="cpu", varpro=VarProConfig(steps=3)),
    "alternating": FitConfig(
        rank=64, atoms=12, support=4, device="cpu", solver="alternating", alternating=AlternatingConfig(steps=3)
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Tensors of megabytes, beside which text is small."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 16}
    path = tmp_path_factory.mktemp("model")
    tiny_model("qwen3_moe", **sizes).bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def peak(monkeypatch):
    """Returns the most bytes below a folder so far, without its first bytes: a file is synced before its renaming."""

    def watch(folder: Path):
        sync, sizes = os.fsync, [held(folder)]

        def measured(descriptor: int) -> None:
            sizes.append(held(folder))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", measured)
        return lambda: max(sizes) - sizes[0]

    return watch


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_fit_takes_the_bytes_that_it_asks_for(model, tmp_path, peak, settings):
    config, taken = SETTINGS[settings], peak(tmp_path)
    stated = plan_fit(model, tmp_path / "out", config, calibrate=None).disk_bytes
    compress(model, tmp_path / "out", config, snapshot_minutes=0, calibrate=None)
    assert taken() <= stated <= MOST * taken()


def test_ranks_keep_their_codes_each(model):
    plan = plan_fit(model, "out", SETTINGS["varpro"], calibrate=None)
    codes = plan.sizes.base.total_experts * plan.sizes.num_atoms * (4 * 4 + 1)
    grown = disk_bytes(plan.sizes, plan.config, 3) - plan.disk_bytes
    assert 2 * codes <= grown <= 4 * 2 * codes


def test_a_sweep_takes_the_bytes_that_it_asks_for(globe, model, tmp_path, peak):
    command, taken = ("sweep", model, "-o", tmp_path / "out", "--rank", "64,32,60", *QUICK), peak(tmp_path)
    code, stdout, _ = globe(*command, "--dry-run", "--json")
    stated = json.loads(stdout)["disk_bytes"]
    assert code == 0 and stated > 0 and globe(*command)[0] == 0
    assert taken() <= stated <= MOST * taken()


def test_a_fit_without_room_is_refused_before_its_work(globe, model, tmp_path, monkeypatch):
    command = ("fit", "--no-calibrate", model, "-o", tmp_path / "out", "--rank", "64", *QUICK)
    stated = json.loads(globe(*command, "--dry-run", "--json")[1])["disk_bytes"]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, stated - 1))
    assert_refused(globe(*command), 1, "are free; free some space or give another output directory")
    assert not (tmp_path / "out").exists()

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, stated))
        with pytest.raises(GlobeError, match="stop"):
            compress(
                model, tmp_path / "out", SETTINGS["varpro"], on_step=refuse_late, snapshot_minutes=0, calibrate=None
            )
    # the snapshots that are there need no room again
    assert globe(*command)[0] == 0


def refuse_late(record: dict) -> None:
    if record["family"] == "up":
        raise GlobeError("stop.")
