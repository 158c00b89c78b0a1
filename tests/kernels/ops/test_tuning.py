"""Which configuration a call gets: defaults that every card can run, the nearest entry of a table, one warning."""

import json
import warnings
from dataclasses import asdict, replace

import pytest
import torch

from globe_kernels.ops import palette_in, tuning
from globe_kernels.ops.compose_layer import CONFIGS as COMPOSE_CONFIGS
from globe_kernels.ops.compose_layer import ComposeShape, choose_compose, default_compose
from globe_kernels.ops.mix import CONFIGS as MIX_CONFIGS
from globe_kernels.ops.mix import MixShape, choose_mix, default_mix
from globe_kernels.ops.palette_in import PaletteInShape, choose_palette_in, default_palette_in
from globe_kernels.ops.tuning import (
    DEFAULTS,
    SMALLEST_TARGET,
    TARGETS,
    FfnConfig,
    FfnShape,
    Target,
    choose,
    default_config,
    fit_to,
    load_table,
    nearest,
    supports,
)

QWEN = FfnShape(experts=128, hidden=2048, intermediate=768, rank=384)
H100 = TARGETS["sm_90"]


@pytest.mark.parametrize("target", [*TARGETS.values(), SMALLEST_TARGET], ids=str)
@pytest.mark.parametrize("item_size", [2, 4])
def test_every_card_runs_every_default(target, item_size):
    for _, config in DEFAULTS:
        fitted = fit_to(config, item_size, target)
        assert supports(fitted, item_size, target)
        assert fitted.block_m == config.block_m
        for _, gemm, _ in fitted.stages():
            assert gemm.num_stages >= 2 and gemm.block_k >= 16 and gemm.block_n >= 16


@pytest.mark.parametrize("target", [*TARGETS.values(), SMALLEST_TARGET], ids=str)
def test_every_card_runs_the_defaults_of_bank_first_and_of_the_composition(target):
    first = (default_palette_in(tokens, 2, target) for tokens in (1, 32, 64, 256, 4096))
    fixed = (config for _, config in (*MIX_CONFIGS, *COMPOSE_CONFIGS))
    assert all(supports(config, 2, target) for config in (*first, *fixed))


def test_a_card_that_is_large_enough_gets_the_default_unchanged():
    for _, config in DEFAULTS:
        assert fit_to(config, 2, H100) == config


def test_what_a_card_cannot_run():
    config = DEFAULTS[-1][1]
    assert supports(config, 2, H100)
    assert not supports(config, 2, Target(64 * 1024, accumulators=128))  # shared memory
    wide = replace(config, gate_up=replace(config.gate_up, block_n=256))
    assert not supports(wide, 2, H100)  # registers
    for config, tile in ((default_mix(64), "block_r"), (default_compose(128), "block_v")):
        larger = replace(config, **{tile: 16 * getattr(config, tile)})
        assert not supports(larger, 2, replace(H100, shared_bytes=2**40))
        deeper = replace(config, num_stages=32)
        assert not supports(deeper, 2, H100) and supports(deeper, 2, replace(H100, shared_bytes=2**40))


def test_the_row_tile_follows_the_rows_per_expert():
    cpu = torch.device("cpu")
    assert [choose(QWEN, rows, 2, cpu).block_m for rows in (8, 512, 8192, 2**17)] == [16, 16, 64, 128]


def table_entry(op: str, shape, rows: int, config, triton: str | None = None) -> dict:
    version = triton or tuning.triton.__version__
    facts = {"op": op, "shape": asdict(shape), "rows": rows, "item_size": 2, "triton": version}
    return {**facts, "config": asdict(config)}


def entry(shape: FfnShape, rows: int, block_n: int, triton: str | None = "3.6.0", op: str = "moe_ffn") -> dict:
    config = default_config(16, 2, H100)
    return table_entry(op, shape, rows, replace(config, down=replace(config.down, block_n=block_n)), triton)


def test_the_nearest_entry_is_of_the_nearest_shape_then_of_the_nearest_rows():
    other = replace(QWEN, rank=576)
    entries = [entry(other, 4, 16), entry(QWEN, 1, 32), entry(QWEN, 8, 64), entry(QWEN, 64, 128)]
    found = nearest(entries, asdict(QWEN), 6)
    assert found is entries[2]
    assert FfnConfig.from_dict(found["config"]).down.block_n == 64
    assert nearest(entries, asdict(replace(QWEN, rank=600)), 6) is entries[0]
    assert nearest(entries, asdict(QWEN), 0) is entries[1]  # a call without tokens


def test_an_entry_that_says_nothing_about_a_call_is_not_used():
    entries = [entry(QWEN, 4, 64)]
    assert nearest(entries, asdict(replace(QWEN, hidden=2048 * 3)), 4) is None  # further than a factor of two


@pytest.fixture
def h100(monkeypatch, tmp_path):
    """A card with a table of its own, as far as the choices can tell."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setattr(tuning, "_WARNED", set())
    for module in (tuning, palette_in):
        monkeypatch.setattr(module, "target_of", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    caches = (load_table, choose, choose_palette_in, choose_mix, choose_compose)
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
    own = entry(QWEN, 4, 32, triton=None)
    h100.write_text(json.dumps({"entries": [entry(QWEN, 4, 128, op="dense_twin"), own]}))
    config, caught = chosen()
    assert config.down.block_n == 32 and caught == []


@pytest.mark.parametrize(
    ("shape", "version", "sentence"),
    [(replace(QWEN, rank=400), None, "rank=384"), (QWEN, "1.0.0", "and Triton 1.0.0 are used")],
    ids=["another shape", "another Triton"],
)
def test_a_near_entry_is_used_with_a_warning(h100, shape, version, sentence):
    h100.write_text(json.dumps({"entries": [entry(QWEN, 4, 32, version)]}))
    config, caught = chosen(shape=shape)
    assert config.down.block_n == 32
    assert len(caught) == 1 and sentence in caught[0]


def test_sizes_that_run_slowly_are_named_once(h100):
    odd = replace(QWEN, rank=100)
    h100.write_text(json.dumps({"entries": [entry(odd, 4, 32, None)]}))
    _, caught = chosen(shape=odd)
    assert len(caught) == 1 and "{'rank': 100}: not multiples of 16" in caught[0]
    assert chosen(rows=64, shape=odd)[1] == []


CUDA = torch.device("cuda")
# What an entry of a table may be about: (shape, choice, default, a configuration told apart by a size)
STAGES = {
    "palette_in": (
        PaletteInShape(hidden=2048, rank=768, palette=32),
        lambda shape, tokens, item_size=2: choose_palette_in(shape, tokens, item_size, CUDA),
        lambda tokens: default_palette_in(tokens, 2, H100),
        lambda config, size: replace(config, gemm=replace(config.gemm, group_m=size)),
    ),
    "mix": (
        MixShape(rank=768, palette=32, top_k=8),
        lambda shape, tokens, item_size=2: choose_mix(shape, tokens, item_size, CUDA),
        default_mix,
        lambda config, size: replace(config, block_r=16 * size),
    ),
    "compose_layer": (
        ComposeShape(experts=128, palette=32, values=768 * 2048),
        lambda shape, tokens, item_size=2: choose_compose(shape, item_size, CUDA),
        lambda tokens: default_compose(128),
        lambda config, size: replace(config, block_v=16 * size),
    ),
}


@pytest.mark.parametrize("op", list(STAGES))
def test_stages_of_bank_first_and_the_composition_take_the_nearest_entry(h100, op):
    shape, chosen_for, default, sized = STAGES[op]
    config, other = default(64), replace(shape, palette=48)
    entries = [
        table_entry(op, shape, 1, sized(config, 1)),
        table_entry(op, shape, 64, sized(config, 2)),
        table_entry(op, other, 64, sized(config, 3)),
        table_entry("moe_ffn", shape, 64, sized(config, 4)),
        {**table_entry(op, shape, 64, sized(config, 5)), "item_size": 4},
    ]
    if op == "compose_layer":
        del entries[1]  # it has no tokens
    h100.write_text(json.dumps({"entries": entries}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few, many = (chosen_for(shape, tokens) for tokens in (2, 100))
    assert few == sized(config, 1)
    assert many == (few if op == "compose_layer" else sized(config, 2))
    assert chosen_for(shape, 64, item_size=4) == sized(config, 5)
    with pytest.warns(UserWarning, match=f"no configurations of {op}"):
        assert chosen_for(replace(shape, palette=44), 100) == sized(config, 3)
    assert chosen_for(replace(shape, palette=100), 100) == default(100)  # further than a factor of two


@pytest.mark.parametrize("op", list(STAGES))
def test_an_entry_that_the_card_cannot_run_is_not_used(h100, op, monkeypatch):
    shape, chosen_for, default, sized = STAGES[op]
    deep = sized(default(64), 2)
    deep = replace(deep, gemm=replace(deep.gemm, num_stages=64)) if op == "palette_in" else replace(deep, num_stages=64)
    h100.write_text(json.dumps({"entries": [table_entry(op, shape, 64, deep)]}))
    with pytest.warns(UserWarning, match="configurations that suit any card are used"):
        assert chosen_for(shape, 64) == default(64)
    monkeypatch.setattr(tuning, "target_of", lambda device: replace(H100, shared_bytes=2**40))
    for choice in (choose_palette_in, choose_mix, choose_compose):
        choice.cache_clear()
    assert chosen_for(shape, 64) == deep


def test_an_entry_that_the_card_has_no_memory_for_is_not_used(h100, monkeypatch):
    h100.write_text(json.dumps({"entries": [entry(QWEN, 4, 32, None)]}))
    monkeypatch.setattr(tuning, "target_of", lambda device: Target(16 * 1024))
    config, caught = chosen()
    assert config == default_config(4, 2, Target(16 * 1024)) and len(caught) == 1


def test_a_card_without_a_table_warns_once_for_all_its_stages(h100):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for shape, chosen_for, default, _ in STAGES.values():
            for own, tokens in ((shape, 1), (shape, 4096), (replace(shape, palette=64), 1)):
                assert chosen_for(own, tokens) == default(tokens)
        choose(QWEN, 512, 2, CUDA)
    assert len(caught) == 1 and "benchmarks/tune.py" in str(caught[0].message)


@pytest.mark.filterwarnings("ignore:GloBE has no configurations")
def test_a_choice_is_looked_up_once(h100, monkeypatch):
    h100.write_text(json.dumps({"entries": []}))
    for shape, chosen_for, _, _ in STAGES.values():
        first = chosen_for(shape, 7)
        with monkeypatch.context() as patch:
            patch.setattr(tuning, "load_table", None)
            assert chosen_for(replace(shape), 7) is first
