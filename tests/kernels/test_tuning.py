"""Which configuration a call gets: defaults that every card can run, the nearest entry of a table, one warning."""

import json
import warnings
from dataclasses import asdict, replace

import pytest
import torch

from globe_kernels.ops import tuning
from globe_kernels.ops.tuning import (
    CARDS,
    DEFAULTS,
    SMALLEST_CARD,
    Card,
    FfnConfig,
    FfnShape,
    choose,
    default_config,
    fit_to,
    load_table,
    nearest,
    supports,
)

QWEN = FfnShape(experts=128, hidden=2048, intermediate=768, rank=384)
H100 = CARDS["sm_90"]


@pytest.mark.parametrize("card", [*CARDS.values(), SMALLEST_CARD], ids=str)
@pytest.mark.parametrize("item_size", [2, 4])
def test_every_card_runs_every_default(card, item_size):
    for _, config in DEFAULTS:
        fitted = fit_to(config, item_size, card)
        assert supports(fitted, item_size, card)
        assert fitted.block_m == config.block_m
        for _, gemm, _ in fitted.stages():
            assert gemm.num_stages >= 2 and gemm.block_k >= 16 and gemm.block_n >= 16


def test_a_card_that_is_large_enough_gets_the_default_unchanged():
    for _, config in DEFAULTS:
        assert fit_to(config, 2, H100) == config


def test_what_a_card_cannot_run():
    config = DEFAULTS[-1][1]
    assert supports(config, 2, H100)
    assert not supports(config, 2, Card(64 * 1024, accumulators=128))  # shared memory
    wide = replace(config, gate_up=replace(config.gate_up, block_n=256))
    assert not supports(wide, 2, H100)  # registers


def test_the_row_tile_follows_the_rows_per_expert():
    cpu = torch.device("cpu")
    assert [choose(QWEN, rows, 2, cpu).block_m for rows in (8, 512, 8192, 2**17)] == [16, 16, 64, 128]


def entry(shape: FfnShape, rows: int, block_n: int, triton: str = "3.6.0", op: str = "moe_ffn") -> dict:
    config = default_config(16, 2, H100)
    config = replace(config, down=replace(config.down, block_n=block_n))
    facts = {"op": op, "shape": asdict(shape), "rows_per_expert": rows, "item_size": 2, "triton": triton}
    return {**facts, "config": asdict(config)}


def test_the_nearest_entry_is_of_the_nearest_shape_then_of_the_nearest_rows():
    other = replace(QWEN, rank=576)
    entries = [entry(other, 4, 16), entry(QWEN, 1, 32), entry(QWEN, 8, 64), entry(QWEN, 64, 128)]
    found = nearest(entries, QWEN, 6, 2, H100)
    assert found is entries[2]
    assert FfnConfig.from_dict(found["config"]).down.block_n == 64
    assert nearest(entries, replace(QWEN, rank=600), 6, 2, H100) is entries[0]


def test_an_entry_that_says_nothing_about_a_call_is_not_used():
    entries = [entry(QWEN, 4, 64)]
    assert nearest(entries, replace(QWEN, hidden=2048 * 3), 4, 2, H100) is None  # further than a factor of two
    assert nearest(entries, QWEN, 4, 4, H100) is None  # another item size
    assert nearest(entries, QWEN, 4, 2, Card(16 * 1024)) is None  # more shared memory than the card has
    assert nearest(entries, replace(QWEN, hidden=None, intermediate=None), 4, 2, H100) is entries[0]  # a single stage


@pytest.fixture
def h100(monkeypatch, tmp_path):
    """A card with a table of its own, as far as `choose` can tell."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setattr(tuning, "card_of", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    caches = (load_table, choose, tuning._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "nvidia-h100-80gb-hbm3.json"
    for cache in caches:
        cache.cache_clear()


def chosen(rows: int = 512, shape: FfnShape = QWEN):
    """(configuration, warnings) of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = choose(shape, rows, 2, torch.device("cuda"))
    return config, [str(warning.message) for warning in caught]


def test_a_card_without_a_table_warns_once_and_runs_the_defaults(h100):
    config, caught = chosen()
    assert config == default_config(4, 2, H100)
    assert len(caught) == 1 and "configurations that suit any card are used" in caught[0]
    assert "benchmarks/tune.py" in caught[0]
    assert chosen(rows=64)[1] == []


def test_a_tuned_shape_is_used_in_silence(h100):
    own = entry(QWEN, 4, 32, tuning.triton.__version__)
    h100.write_text(json.dumps({"entries": [entry(QWEN, 4, 128, op="dense_twin"), own]}))
    config, caught = chosen()
    assert config.down.block_n == 32 and caught == []


@pytest.mark.parametrize(
    ("shape", "version", "sentence"),
    [(replace(QWEN, rank=400), None, "rank=384"), (QWEN, "1.0.0", "with Triton 1.0.0 are used")],
    ids=["another shape", "another Triton"],
)
def test_a_near_entry_is_used_with_a_warning(h100, shape, version, sentence):
    h100.write_text(json.dumps({"entries": [entry(QWEN, 4, 32, version or tuning.triton.__version__)]}))
    config, caught = chosen(shape=shape)
    assert config.down.block_n == 32
    assert len(caught) == 1 and sentence in caught[0]


def test_sizes_that_run_slowly_are_named_once(h100):
    odd = replace(QWEN, rank=100)
    h100.write_text(json.dumps({"entries": [entry(odd, 4, 32, tuning.triton.__version__)]}))
    _, caught = chosen(shape=odd)
    assert len(caught) == 1 and "{'rank': 100}: not multiples of 16" in caught[0]
    assert chosen(rows=64, shape=odd)[1] == []
