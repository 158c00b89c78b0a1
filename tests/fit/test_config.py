from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from globe_fit.config import AlternatingConfig, CodingConfig, EntmaxConfig, FitConfig, VarProConfig, resolve_device
from globe_fit.sizes import globe_bytes, resolve_sizes
from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import BaseModel

ROOT = Path(__file__).resolve().parent.parent.parent


def base(inner: int = 768, width: int = 2048, layers: int = 48, experts: int = 128) -> BaseModel:
    return BaseModel("planned", "qwen3_moe", width, inner, dict.fromkeys(range(layers), experts))


def test_qwen3_30b_gets_full_rank_and_a_quarter_of_an_atom_per_expert():
    sizes = resolve_sizes(base(), FitConfig(ratio=0.625))
    assert sizes.rank == 768
    assert 6144 // 4 - 1 <= sizes.num_atoms <= 6144 // 4  # the codes take the bytes of less than one atom
    assert sizes.tensor_bytes <= 0.625 * sizes.base.dense_bytes


def test_experts_wider_than_the_hidden_size_get_a_rank_that_fits():
    mixtral = base(inner=14336, width=4096, layers=32, experts=8)
    sizes = resolve_sizes(mixtral, FitConfig(ratio=0.625))
    assert 1 <= sizes.rank < 4096 and sizes.support <= sizes.num_atoms <= 256


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0.05, 1.4),
    inner=st.sampled_from([16, 48, 64, 96]),
    layers=st.integers(1, 6),
    support=st.integers(1, 12),
    rank=st.one_of(st.none(), st.integers(1, 16)),
)
def test_a_ratio_is_met_as_closely_as_one_atom_allows_or_refused(ratio, inner, layers, support, rank):
    model = base(inner, 64, layers, experts=8)
    try:
        sizes = resolve_sizes(model, FitConfig(ratio=ratio, support=support, rank=rank))
    except RequestError:
        return
    budget = ratio * model.dense_bytes
    assert sizes.tensor_bytes == globe_bytes(model, sizes.rank, sizes.num_atoms, support)
    assert sizes.tensor_bytes <= budget
    assert support <= sizes.num_atoms <= model.total_experts
    if sizes.num_atoms < model.total_experts:
        assert globe_bytes(model, sizes.rank, sizes.num_atoms + 1, support) > budget


def test_rank_follows_from_atoms():
    sizes = resolve_sizes(base(), FitConfig(ratio=0.5, atoms=1024))
    assert sizes.num_atoms == 1024
    assert globe_bytes(sizes.base, sizes.rank + 1, 1024, 12) > 0.5 * sizes.base.dense_bytes >= sizes.tensor_bytes


def test_rank_and_atoms_need_no_ratio():
    sizes = resolve_sizes(base(), FitConfig(rank=384, atoms=100))
    assert (sizes.rank, sizes.num_atoms) == (384, 100)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (FitConfig(ratio=0.0001), r"ratio 0.0001 cannot be reached .* from 0\.\d+ to 1\.\d+"),
        (FitConfig(ratio=1.9), "ratio 1.9 cannot be reached"),
        (FitConfig(ratio=0.2, rank=768), r"support 12, rank 768; give a ratio from 0\.37"),
        (FitConfig(rank=769), "rank is 769 and the experts of planned are 768 x 2048; give a rank of at most 768"),
        (FitConfig(atoms=6145), "atoms is 6145 and planned has 6144 experts"),
        (FitConfig(atoms=8, rank=4), "support is 12 and the bank has 8 atoms"),
        (FitConfig(support=6145), "support is 6145 and planned has 6144 experts"),
        (FitConfig(rank=768, atoms=96, scope="layer"), "give a layer only 2 atoms and support is 12"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_had(config, sentence):
    with pytest.raises(RequestError, match=sentence):
        resolve_sizes(base(), config)


def test_the_printed_range_can_be_reached():
    with pytest.raises(RequestError) as caught:
        resolve_sizes(base(), FitConfig(ratio=1.99))
    low, high = str(caught.value).rstrip(".").split("from ")[1].split(" to ")
    for ratio in (float(low), float(high)):
        resolve_sizes(base(), FitConfig(ratio=ratio))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"phi": "relu"}, "phi is 'relu'; expected one of identity, silu, tanh"),
        ({"scope": "all"}, "scope is 'all'"),
        ({"support": 0}, "support is 0; expected a whole number of at least 1"),
        ({"support": 4.5}, "support is 4.5; expected a whole number"),
        ({"rank": True}, "rank is True; expected a whole number"),
        ({"ratio": "0.5"}, "ratio is '0.5'; expected a number of at least 0"),
        ({"ratio": float("nan")}, "ratio is nan; expected a number"),
        ({"ratio": 62.5}, r"ratio is 62.5 and a ratio is a share of the dense bytes; did you mean 0.625\?"),
        ({"seed": 10**30}, "expected a whole number from 0 to"),
        ({"solver": "adam"}, "solver is 'adam'; expected one of varpro, alternating"),
        (
            {"solver": "alternating", "phi": "tanh"},
            "phi is tanh and the steps of the alternating solver .*; give phi identity, or",
        ),
        ({"ratio": 0.5, "rank": 3, "atoms": 4}, "give at most two of them"),
    ],
    ids=str,
)
def test_settings_that_are_never_right(settings, sentence):
    with pytest.raises(RequestError, match=sentence):
        FitConfig(**settings)


@pytest.mark.parametrize("name", ["tpu9", "meta", "mps", "cuda:x"])
def test_devices_that_are_not_supported(name):
    with pytest.raises(RequestError, match=f"device is '{name}'; expected auto, cpu or cuda"):
        resolve_device(name)


def test_options_override_the_file(tmp_path):
    file = tmp_path / "fit.toml"
    file.write_text("ratio = 0.5\nsupport = 6\n[varpro]\nlr = 0.7\nsteps = 9\n")
    config = FitConfig.from_options(file, {"support": 8, "seed": None, "steps": 3})
    assert config == FitConfig(ratio=0.5, support=8, varpro=VarProConfig(lr=0.7, steps=3))


def test_each_solver_has_its_table(tmp_path):
    file = tmp_path / "fit.toml"
    file.write_text(
        'solver = "alternating"\n[varpro]\nsteps = 9\n[alternating]\ndictionary = "mod"\n'
        '[alternating.coding]\nmethod = "entmax"\n[alternating.entmax]\nalpha = 2\n'
    )
    config = FitConfig.from_options(file, {"steps": 3})
    coding, entmax = CodingConfig(method="entmax"), EntmaxConfig(alpha=2)
    expected = AlternatingConfig(steps=3, dictionary="mod", coding=coding, entmax=entmax)
    assert config == FitConfig(solver="alternating", alternating=expected, varpro=VarProConfig(steps=9))
    assert config.steps == 3
    assert FitConfig.from_options(file, {"steps": 3, "solver": "varpro"}).steps == 3


def test_the_literal_recipe_is_a_valid_file():
    config = FitConfig.from_options(ROOT / "benchmarks" / "literal.toml", {})
    assert config.solver == "alternating" and config.alternating.targets == "svd" and config.steps == 25


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ratoi = 1", "unknown setting 'ratoi'; expected atoms, device"),
        ("[varpro]\nlearning_rate = 1", "unknown setting 'learning_rate'"),
        ("ratio =", "not a readable TOML file"),
        ('support = "many"', "support is 'many'; expected a whole number"),
        ("varpro = 3", "varpro in .* is 3; expected a table"),
        ('[varpro]\nlr = "a"', "lr is 'a'; expected a number"),
        ("[varpro]\nfirst_cycle = 0", "first_cycle is 0; expected a whole number of at least 1"),
        ("[varpro]\nplateau = 2.0", "plateau is 2.0; expected a number from 0 to 1"),
        ("[alternating]\ncoding = 1", r"alternating.coding in .* is 1; expected a table, \[alternating.coding\]"),
        ("[alternating.coding]\nmethods = 1", "unknown setting 'methods'; expected initial, l1, method, prune"),
        ("[alternating]\ndictionary = 'svd'", "dictionary is 'svd'; expected one of exact, atoms, mod"),
        ("[varpro]\nsteps = -1", "steps is -1; expected a whole number of at least 0"),
    ],
)
def test_a_file_with_a_mistake(tmp_path, text, sentence):
    file = tmp_path / "fit.toml"
    file.write_text(text)
    with pytest.raises(RequestError, match=sentence):
        FitConfig.from_options(file, {})
