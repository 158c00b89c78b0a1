"""The tuner: what it searches, what it may run, what it writes."""

import json
import subprocess
import sys

import pytest
import torch

from globe_kernels.ops import tuning
from globe_kernels.ops.tuning import CARDS, Card, FfnShape, default_config, nearest, supports
from tests.kernels.cases import DEVICE, needs_kernels
from tests.kernels.test_benchmarks import BENCHMARKS

H100 = CARDS["sm_90"]


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tune

    return tune


def test_the_search_finds_the_best_of_what_the_card_can_run(tune):
    start = default_config(512, 2, H100)
    tried = []

    def time(config):
        tried.append(config)
        gemm = config.down
        return abs(gemm.block_n - 300) + abs(gemm.num_stages - 3) + abs(gemm.num_warps - 4) + 1 / gemm.group_m

    best, fastest = tune.search(start, "down", lambda c: supports(c, 2, H100), time)
    # 256 columns at 128 rows need 8 warps for their accumulators
    assert (best.down.block_n, best.down.num_warps, best.down.num_stages, best.down.group_m) == (256, 8, 3, 16)
    assert fastest == time(best)
    assert all(supports(config, 2, H100) for config in tried)
    assert best.low_rank_in == start.low_rank_in and best.gate_up == start.gate_up


def test_row_tiles_are_not_left_mostly_empty(tune):
    assert tune.row_tiles(1) == [16]
    assert tune.row_tiles(16) == [16, 32]
    assert tune.row_tiles(1024) == [16, 32, 64, 128]


@needs_kernels
@pytest.mark.parametrize("op", ["moe_ffn", "dense_twin"])
def test_a_whole_run(tune, monkeypatch, tmp_path, op):
    """On a small layer, with times that prefer whatever was tried last."""
    from measure import Timing
    from shapes import LayerShape

    clock = iter(range(10**6, 0, -1))

    def time_side_by_side(functions, *_, **__):
        for function in functions.values():
            function()
        return {name: Timing(float(next(clock)), 0.0, 0.0) for name in reversed(functions)}

    monkeypatch.setattr(tune, "time_side_by_side", time_side_by_side)
    monkeypatch.setattr(tune, "AXES", ({"block_n": (32, 64), "block_k": (32,)}, {"num_stages": (2, 3)}))
    torch.manual_seed(0)
    shape = LayerShape(hidden=40, intermediate=24, experts=6, choices=2)
    layer = tune.random_layer(shape, 9, torch.float32, DEVICE)
    inputs = tune.random_inputs(shape, 5, torch.float32, DEVICE)
    entry = tune.tune(layer, inputs, op, Card(99 * 1024), DEVICE, repeats=1)
    assert entry["shape"]["rank"] == (9 if op == "moe_ffn" else 24) and entry["rows_per_expert"] == 2
    assert entry["median_us"] < entry["default_us"]

    path = tmp_path / "card.json"
    tune.write(path, "A card", "sm_89", [entry])
    other = {**entry, "rows_per_expert": 64}
    tune.write(path, "A card", "sm_89", [other])
    tune.write(path, "A card", "sm_89", [{**entry, "median_us": 1.0}])  # takes the place of the first
    table = json.loads(path.read_text())
    assert table["device"] == "A card" and table["architecture"] == "sm_89"
    assert [e["rows_per_expert"] for e in table["entries"]] == [64, 2] and table["entries"][1]["median_us"] == 1.0
    found = nearest(table["entries"], FfnShape(**entry["shape"]), 2, 4, Card(99 * 1024))
    assert found is not None and found["rows_per_expert"] == 2
    assert tuning.FfnConfig.from_dict(found["config"]).block_m == 16


@needs_kernels
def test_nothing_is_written_of_a_wrong_result(tune, monkeypatch):
    from shapes import LayerShape

    monkeypatch.setattr(tune, "AXES", ())
    monkeypatch.setattr(tune, "reference", lambda layer, inputs: torch.ones(5, 40, dtype=torch.float64, device=DEVICE))
    torch.manual_seed(0)
    shape = LayerShape(hidden=40, intermediate=24, experts=6, choices=2)
    layer = tune.random_layer(shape, 9, torch.float32, DEVICE)
    with pytest.raises(SystemExit, match="nothing was written"):
        tune.tune(layer, tune.random_inputs(shape, 5, torch.float32, DEVICE), "moe_ffn", Card(99 * 1024), DEVICE, 1)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "tune.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "measured on the card that they are for" in done.stderr


def test_tables_that_ship_are_whole():
    for path in tuning.TABLES.glob("*.json"):
        table = json.loads(path.read_text(encoding="utf-8"))
        card = CARDS[table["architecture"]]
        assert path.stem == tuning.slug(table["device"])
        for entry in table["entries"]:
            config = tuning.FfnConfig.from_dict(entry["config"])
            assert supports(config, entry["item_size"], card)
            assert FfnShape(**entry["shape"]).rank and entry["median_us"] < entry["default_us"]
