"""Bytes: what the model says is what the tensors take, and a budget chooses what it can hold."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from globe_kernels import GlobeCheckpoint, patch
from globe_kernels.errors import RequestError
from globe_kernels.format.checkpoint import BaseModel, GlobeConfig
from globe_kernels.format.names import FAMILIES
from globe_kernels.model.bank import GlobeBank
from globe_kernels.model.cache import BasisCache
from globe_kernels.ops.compose_layer import layer_code
from globe_kernels.ops.moe_ffn import ExpertWeights, FromRank, launch_moe_ffn
from globe_kernels.ops.moe_ffn_bank_first import WORKSPACE_BYTES
from globe_kernels.ops.tuning import SMALLEST_TARGET, default_config
from globe_kernels.strategies import DENSE
from globe_kernels.strategies.budget import (
    Choice,
    atoms_on_devices,
    choose_residents,
    expected_palettes,
    layer_sizes,
    palettes_of,
    resident,
    strategies_of,
    workspace,
)
from globe_kernels.strategies.cached import pool_bytes, pool_slots
from globe_kernels.strategies.composed import Composed
from globe_kernels.testing import tiny_model
from tests.kernels.cases import H100


def always(name: str):
    return lambda _: name


BASE = BaseModel("planted", "qwen3_moe", 64, 48, {0: 8, 1: 8, 3: 6})
SMALL = GlobeConfig(BASE, rank=16, num_atoms=20, support=4)
QWEN = GlobeConfig(
    BaseModel("qwen3-30b", "qwen3_moe", 2048, 768, dict.fromkeys(range(48), 128)), 768, 1535, 12, palette=32
)


def strategies_that_fit(config: GlobeConfig, budget: int, *, item_size: int) -> tuple[str, ...]:
    """The strategies whose residents are at most `budget` bytes; a pool has one slot."""
    one_slot = pool_bytes(config, 1, item_size)
    held = {
        name: resident(config, (name,), item_size=item_size, cache_bytes=one_slot) for name in strategies_of(config)
    }
    return tuple(name for name, residents in held.items() if residents.total <= budget)


def choose(config: GlobeConfig, budget: int | None = None, strategy: str = "auto", **options) -> Choice:
    sizes = layer_sizes(config, 0, 8, item_size=2)
    return choose_residents(config, sizes, H100, budget, strategy, **options)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_patched_model_takes_what_the_model_says(fit_tiny, save_tiny, model_type):
    path, _ = fit_tiny(model_type)
    config, model = GlobeCheckpoint(path).config, tiny_model(model_type)
    report = patch(model, path, strategy="composed")
    assert report.bytes_before == resident(config, (DENSE.name,), item_size=4).total
    composed = resident(config, ("composed",), item_size=4)
    # on a CPU the bank that is parked in host memory is on the device of the model
    assert report.bytes_after == composed.total + composed.host
    assert sum(composed.parts.values()) == composed.total and composed.bases > 0 == composed.bank


def test_palette_codes_and_bank_are_what_would_be_built(fit_tiny):
    checkpoint = GlobeCheckpoint(fit_tiny()[0])
    config, palettes = checkpoint.config, palettes_of(checkpoint)
    codes = [layer_code(*vars(checkpoint.code(layer, f)).values()) for layer in palettes for f in FAMILIES]
    built = sum(tensor.nbytes for code in codes for tensor in code)
    found = resident(config, ("bank_first", "scratch"), item_size=4, palettes=palettes)
    assert found.palette_codes == built
    assert found.bank == sum(atoms.nbytes for atoms in GlobeBank(config).to(torch.float32).parameters())
    assert found.host == found.bases == found.pool == 0


@pytest.mark.parametrize("item_size", [2, 4])
def test_the_pool_is_what_would_be_built(item_size):
    slots, experts = 5, BASE.total_experts
    dtype = {2: torch.float16, 4: torch.float32}[item_size]
    cache = BasisCache(BASE.num_experts, slots, SMALL.rank, BASE.hidden_size, dtype)
    built = sum(tensor.nbytes for tensor in cache.state)
    assert pool_bytes(SMALL, slots, item_size) == built
    assert pool_slots(SMALL, built, item_size) == slots == pool_slots(SMALL, built + 1, item_size)
    assert pool_slots(SMALL, built - 1, item_size) == slots - 1
    assert pool_slots(SMALL, 10 * built, item_size) == experts, "no more slots than experts"
    assert pool_slots(SMALL, 0, item_size) == 0
    assert resident(SMALL, ("cached",), item_size=item_size, cache_bytes=built + 7).pool == built


class _Allocated(TorchDispatchMode):
    """Counts the bytes of the floating tensors that are allocated for results."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        names = ("aten::empty.memory_format", "aten::new_empty")
        if func.name() in names and out.is_floating_point():
            self.bytes += out.nbytes
        return out


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the launcher allocates in the interpreter")
def test_the_workspace_is_what_a_call_allocates():
    tokens, top_k, item = 5, 2, 4
    experts, width, inner = 8, BASE.hidden_size, BASE.intermediate_size
    shapes = ((2 * SMALL.rank, width), (inner, SMALL.rank), (inner, SMALL.rank), (width, inner))
    basis, *others = (torch.randn(experts, *shape) / 8 for shape in shapes)
    weights = ExpertWeights(basis, FromRank(*others))
    index = torch.arange(tokens * top_k).view(tokens, top_k) % experts
    x, routing_weights = torch.randn(tokens, width), torch.rand(tokens, top_k)
    with _Allocated() as allocated:
        launch_moe_ffn(x, index, routing_weights, weights, "silu", default_config(2, item, SMALLEST_TARGET))
    assert allocated.bytes == workspace(SMALL, always("composed"), tokens, top_k, item)


def test_cards_hold_the_atoms_of_their_layers():
    palettes = {layer: {"gate": 30.0, "up": 20.5} for layer in range(10)}
    config = replace(QWEN, num_atoms=100)
    assert atoms_on_devices(config, palettes, 1) is None
    # three, three and four layers: 90, 90 and all 100 atoms of gate; 63, 63 and 84 of up
    assert atoms_on_devices(config, palettes, 3) == 90 + 90 + 100 + 63 + 63 + 84
    one = resident(QWEN, ("cached",), item_size=2)
    three = resident(QWEN, ("cached",), item_size=2, bank_atoms=3 * QWEN.num_atoms)
    assert three.bank * 2 == one.bank * 3 and three.codes * 2 == one.codes * 3
    assert (one.host, three.host) == (0, one.bank)


def test_the_workspace_of_a_long_prefill_is_bounded_in_z():
    few, many = (workspace(QWEN, always("bank_first"), tokens, 8, 2) for tokens in (64, 65536))
    z_of_token = 2 * 32 * 768 * 2
    rows = {tokens: workspace(QWEN, always("composed"), tokens, 8, 2) for tokens in (64, 65536)}
    assert few - rows[64] == 64 * z_of_token
    assert 0 <= WORKSPACE_BYTES - (many - rows[65536]) < z_of_token
    bases = 128 * 2 * 768 * 2048 * 2
    scratch, on_cpu = (workspace(QWEN, always("scratch"), 64, 8, 2, on_gpu=on_gpu) for on_gpu in (True, False))
    assert scratch == rows[64] + 2 * bases, "one layer runs, the next is composed"
    assert on_cpu == rows[64] + bases
    mixed = workspace(QWEN, lambda count: "bank_first" if count <= 16 else "scratch", 64, 8, 2)
    assert mixed == max(scratch, workspace(QWEN, always("bank_first"), 16, 8, 2)), "a call runs by one of them"


def test_expected_palettes():
    palettes = expected_palettes(replace(SMALL, num_atoms=22))
    assert palettes[0]["gate"] == pytest.approx(22 * (1 - (1 - 4 / 22) ** 8))
    assert expected_palettes(replace(SMALL, palette=5))[0]["up"] == pytest.approx(5, abs=1e-3)
    own = expected_palettes(replace(SMALL, scope="layer", num_atoms=22))
    assert 7 < own[0]["gate"] <= 8 and 5 < own[3]["gate"] <= 6, "at most the layer's share of the atoms"
    assert expected_palettes(replace(SMALL, support=20))[0]["gate"] == 20


def test_composed_where_it_saves_and_nowhere_else():
    low = replace(QWEN, rank=384, num_atoms=5375)
    assert choose(low) == Choice(("composed",), 0)
    assert choose(low, 2**36) == Choice(("composed", "bank_first"), 0), "the bank too, for decoding in batches"
    assert choose(replace(low, phi="tanh"), 2**36) == Choice(("composed",), 0)
    wastes = Composed().wastes
    assert wastes(low) is None and wastes(replace(QWEN, rank=558)) is None
    sentence = wastes(QWEN)
    assert sentence is not None and "holds 4.33 M values" in sentence and "the dense matrices 3.15 M" in sentence
    assert "composed" not in choose(QWEN).strategies
    assert "composed" not in choose(QWEN, 2**50).strategies
    assert choose(QWEN, strategy="composed") == Choice(("composed",), 0), "asked for by name"


def test_auto_holds_what_some_call_uses_and_never_more_than_the_budget():
    dense = resident(QWEN, (DENSE.name,), item_size=2).total
    assert choose(QWEN).strategies == ("bank_first", "scratch"), (
        "at uniform routing few bases would be found in a cache"
    )
    least = resident(QWEN, ("bank_first",), item_size=2).total
    assert choose(QWEN, least) == Choice(("bank_first", "scratch"), 0)
    assert choose(QWEN) == Choice(("bank_first", "scratch"), 0), "a cache of half of what is saved would not pay"
    whole = choose(QWEN, 2**37)
    assert "cached" in whole.strategies and pool_slots(QWEN, whole.cache_bytes, 2) == 6144
    for budget in (least, least + 2**30, dense, 2**36, 2**37):
        choice = choose(QWEN, budget)
        found = resident(QWEN, choice.strategies, item_size=2, cache_bytes=choice.cache_bytes).total
        assert found <= budget
    asked = choose(QWEN, cache_bytes=2**30)
    assert "cached" in asked.strategies and 2**30 - 2 * 768 * 2048 * 2 - 16 < asked.cache_bytes <= 2**30


def test_without_identity_something_is_composed():
    tanh = replace(QWEN, phi="tanh")
    usual = choose(tanh)
    dense, least = (resident(tanh, (name,), item_size=2).total for name in (DENSE.name, "scratch"))
    assert usual.strategies == ("cached", "scratch")
    assert 0.4 * (dense - least) < usual.cache_bytes <= (dense - least) / 2
    assert choose(tanh, least) == Choice(("scratch",), 0)
    with pytest.raises(RequestError, match="smallest arrangement of this checkpoint holds"):
        choose(tanh, least - 1)
    with pytest.raises(RequestError, match="bank_first needs phi identity and this checkpoint has phi tanh; use comp"):
        choose(tanh, strategy="bank_first")


@pytest.mark.parametrize("strategy", ["composed", "bank_first", "cached", "scratch", "auto"])
def test_a_budget_that_is_too_small(strategy):
    with pytest.raises(RequestError, match=r"The memory budget is 1.07 GB and .* GB of experts; give a larger"):
        choose(QWEN, 2**30, strategy)
    assert strategies_that_fit(QWEN, 2**30, item_size=2) == ()


def test_what_fits():
    gib = 2**30
    assert strategies_that_fit(QWEN, 41 * gib, item_size=2) == ("bank_first", "cached", "scratch")
    assert strategies_that_fit(QWEN, 70 * gib, item_size=2) == ("composed", "bank_first", "cached", "scratch")
    assert strategies_that_fit(replace(QWEN, phi="silu"), 41 * gib, item_size=2) == ("cached", "scratch")


def test_a_cache_of_its_own_size():
    choice = choose(QWEN, strategy="cached", cache_bytes=2**30)
    assert choice.strategies == ("cached",) and pool_slots(QWEN, choice.cache_bytes, 2) == 170
    pool = choice.pool(QWEN, 2, miss_rate=0.1)
    assert pool is not None and (pool.slots, pool.experts, pool.miss_rate) == (170, 6144, 0.1)
    assert Choice(("composed",), 0).pool(QWEN, 2) is None
    with pytest.raises(RequestError, match="The cache is given 100 B and one basis of this checkpoint takes"):
        choose(QWEN, strategy="cached", cache_bytes=100)
    with pytest.raises(RequestError, match="strategy 'fast' is not known; expected one of auto, composed"):
        choose(QWEN, strategy="fast")
