"""The tuner: what it searches, what it may run, what it writes."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from globe_kernels.ops import tuning
from globe_kernels.ops.compose_layer import PALETTE_PADDING, ComposeConfig, ComposeShape, default_compose
from globe_kernels.ops.mix import MixConfig, MixShape, default_mix
from globe_kernels.ops.palette_in import PaletteInConfig, PaletteInShape, default_palette_in
from globe_kernels.ops.tuning import TARGETS, FfnConfig, FfnShape, GemmConfig, Target, default_config, nearest, supports
from tests.benchmarks.test_benchmarks import BENCHMARKS
from tests.kernels.cases import DEVICE, needs_kernels

H100 = TARGETS["sm_90"]


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tune

    return tune


# What the entries of an op hold, and of which shape.
KINDS = {
    "moe_ffn": (FfnConfig, FfnShape),
    "dense_twin": (FfnConfig, FfnShape),
    "palette_in": (PaletteInConfig, PaletteInShape),
    "mix": (MixConfig, MixShape),
    "compose_layer": (ComposeConfig, ComposeShape),
}


def assert_whole(table: dict) -> None:
    """Every entry is about all sizes of its op, runs on the card and is faster there than the default."""
    for entry in table["entries"]:
        kind, shape = KINDS[entry["op"]]
        config = kind.from_dict(entry["config"])
        assert supports(config, entry["item_size"], TARGETS[table["architecture"]])
        assert PALETTE_PADDING % getattr(config, "block_u", 1) == 0
        assert all(size >= 1 for size in vars(shape(**entry["shape"])).values())
        assert entry["rows"] >= 1 and entry["median_us"] <= entry["default_us"]


def test_the_search_finds_the_best_of_what_the_card_can_run(tune):
    whole = default_config(512, 2, H100)
    tried = []

    def allowed(gemm):
        return supports(replace(whole, down=gemm), 2, H100)

    def time(gemm):
        tried.append(gemm)
        return abs(gemm.block_n - 300) + abs(gemm.num_stages - 3) + abs(gemm.num_warps - 4) + 1 / gemm.group_m

    best, fastest = tune.search(whole.down, tune.GEMM_AXES, allowed, time)
    # 256 columns at 128 rows need 8 warps for their accumulators
    assert best == GemmConfig(block_n=256, block_k=best.block_k, group_m=16, num_warps=8, num_stages=3)
    assert fastest == time(best)
    assert all(allowed(gemm) for gemm in tried)


@pytest.mark.parametrize(("config", "axes"), [(default_mix(64), "MIX_AXES"), (default_compose(128), "COMPOSE_AXES")])
def test_the_search_tries_every_size_that_the_card_can_run(tune, config, axes):
    """A clock that stands still leaves the default; what was tried are its neighbours, along every axis."""
    tried = []
    found = tune.search(config, getattr(tune, axes), lambda c: supports(c, 2, H100), lambda c: tried.append(c) or 1.0)
    assert found == (config, 1.0) and len(set(tried)) == len(tried) > 15
    assert all(supports(own, 2, H100) for own in tried)
    for name in vars(config):
        assert len({getattr(own, name) for own in tried}) > 1, name


def test_row_tiles_are_not_left_mostly_empty(tune):
    assert tune.row_tiles(1) == [16]
    assert tune.row_tiles(16) == [16, 32]
    assert tune.row_tiles(1024) == [16, 32, 64, 128]


@pytest.fixture
def bench(tune, monkeypatch):
    """Few candidates on a small card, and times that prefer whatever was tried last."""
    from measure import Timing

    clock = iter(range(10**6, 0, -1))

    def time_side_by_side(functions, *_, **__):
        for function in functions.values():
            function()
        return {name: Timing(float(next(clock)), 0.0, 0.0) for name in reversed(functions)}

    monkeypatch.setattr(tune, "time_side_by_side", time_side_by_side)
    monkeypatch.setattr(tune, "GEMM_AXES", ({"block_n": (32, 64), "block_k": (32,)}, {"num_stages": (2, 3)}))
    monkeypatch.setattr(tune, "MIX_AXES", ({"block_r": (16, 32), "num_warps": (4,)}, {"block_u": (16,)}))
    monkeypatch.setattr(tune, "COMPOSE_AXES", ({"block_e": (16,), "block_v": (32, 64)}, {"block_u": (16,)}))
    return tune.Bench(DEVICE, Target(99 * 1024), repeats=1)


def small_layer(tune):
    from shapes import LayerShape

    torch.manual_seed(0)
    return tune.random_layer(LayerShape(hidden=40, intermediate=24, experts=6, choices=2), 9, torch.float32, DEVICE, 13)


SHAPES = {
    "moe_ffn": FfnShape(experts=6, hidden=40, intermediate=24, rank=9),
    "dense_twin": FfnShape(experts=6, hidden=40, intermediate=24, rank=24),
    "palette_in": PaletteInShape(hidden=40, rank=9, palette=13),
    "mix": MixShape(rank=9, palette=13, top_k=2),
    "compose_layer": ComposeShape(experts=6, palette=13, values=9 * 40),
}


@needs_kernels
def test_a_whole_run(tune, bench, tmp_path):
    """Every op on a small layer, written one by one and read back."""
    path = tmp_path / "card.json"
    labels = []
    for label, entry in tune.entries(small_layer(tune), tune.OPS, [5], bench):
        assert entry["median_us"] < entry["default_us"], label
        labels.append(label)
        tune.write(path, "A card", "sm_89", [entry])
        assert len(json.loads(path.read_text())["entries"]) == len(labels)
    assert labels == [*(f"{op}, 5 tokens" for op in list(SHAPES)[:-1]), "compose_layer"]
    table = json.loads(path.read_text())
    assert table["device"] == "A card" and table["architecture"] == "sm_89"
    assert_whole(table)
    rows = {"moe_ffn": 2, "dense_twin": 2, "palette_in": 5, "mix": 5, "compose_layer": 1}
    for entry in table["entries"]:
        assert entry["shape"] == asdict(SHAPES[entry["op"]]) and entry["rows"] == rows[entry["op"]]
        assert nearest([entry], asdict(SHAPES[entry["op"]]), 7) is entry
    configs = {entry["op"]: KINDS[entry["op"]][0].from_dict(entry["config"]) for entry in table["entries"]}
    assert configs["moe_ffn"].block_m == 16 and configs["palette_in"].gemm.num_stages == 3
    assert configs["mix"].block_u == configs["compose_layer"].block_u == 16  # what was tried last


@needs_kernels
def test_an_entry_takes_the_place_of_an_earlier_one(tune, bench, tmp_path):
    path, layer = tmp_path / "card.json", small_layer(tune)
    entry = tune.tune_compose_layer(layer, bench)
    for written in (entry, {**entry, "rows": 64}, {**entry, "median_us": 1.0}):
        tune.write(path, "A card", "sm_89", [written])
    entries = json.loads(path.read_text())["entries"]
    assert [(e["rows"], e["median_us"]) for e in entries] == [(64, entry["median_us"]), (1, 1.0)]


@needs_kernels
@pytest.mark.parametrize("op", list(SHAPES))
def test_nothing_is_written_of_a_wrong_result(tune, bench, monkeypatch, op):
    for name in ("reference", "palette_in_ref", "mix_ref", "compose_layer_ref"):
        right = getattr(tune, name)
        if name != "palette_in_ref" or op == "palette_in":  # it makes what mix starts from
            monkeypatch.setattr(tune, name, lambda *case, right=right: right(*case) + 1)
    own = op if op in tune.OPS else "moe_ffn_bank_first"
    written = []
    with pytest.raises(SystemExit, match="nothing was written"):
        for label, _ in tune.entries(small_layer(tune), [own], [5], bench):
            written.append(label)
    assert written == (["palette_in, 5 tokens"] if op == "mix" else [])


@needs_kernels
@pytest.mark.parametrize("op", ["moe_ffn", "moe_ffn_bank_first", "compose_layer"])
def test_where_the_default_is_the_fastest_it_is_what_is_written(tune, bench, monkeypatch, op):
    from measure import Timing

    alone = tune.time_side_by_side

    def time_side_by_side(functions, *rest, **more):
        """Whatever is tried last is the fastest, but for the default beside it."""
        if "default" not in functions:
            return alone(functions, *rest, **more)
        return {"best": Timing(1.0, 0.0, 0.0), "default": Timing(1.0, 0.0, 0.0)}

    monkeypatch.setattr(tune, "time_side_by_side", time_side_by_side)
    defaults = {
        "moe_ffn": tuning.default_config(2, 4, bench.target),
        "palette_in": default_palette_in(5, 4, bench.target),
        "mix": default_mix(5),
        "compose_layer": default_compose(6),
    }
    found = [entry for _, entry in tune.entries(small_layer(tune), [op], [5], bench)]
    assert found and all(entry["config"] == asdict(defaults[entry["op"]]) for entry in found)
    assert all(entry["median_us"] == entry["default_us"] == 1.0 for entry in found)


def test_tokens_of_bank_first_are_those_of_a_chunk(tune, monkeypatch):
    counts = []
    monkeypatch.setattr(tune, "tune_palette_in", lambda layer, inputs, bench: counts.append(len(inputs.hidden)))
    monkeypatch.setattr(tune, "tune_mix", lambda layer, inputs, bench: counts.append(len(inputs.hidden)))
    monkeypatch.setattr(tune.random_layer.__globals__["BankFirstWeights"], "chunk_tokens", lambda self: 4)
    assert (
        len(list(tune.entries(small_layer(tune), ["moe_ffn_bank_first"], [2, 8, 16], tune.Bench(DEVICE, H100, 1)))) == 4
    )
    assert counts == [2, 2, 4, 4]


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "tune.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "measured on the card that they are for" in done.stderr


def test_tables_that_ship_are_whole():
    for path in tuning.TABLES.glob("*.json"):
        table = json.loads(path.read_text(encoding="utf-8"))
        assert path.stem == tuning.slug(table["device"])
        assert_whole(table)
