"""What only a GPU can show: bf16 at the sizes of real models, CUDA graphs, compilation around the kernels."""

import pytest
import torch
import torch.nn.functional as F

from globe_kernels.functional import moe_ffn, moe_ffn_bank_first, moe_ffn_cached
from globe_kernels.model.cache import BasisCache
from globe_kernels.model.scratch import ScratchBuffers
from globe_kernels.ops.cache_lookup import cache_lookup_ref, launch_cache_lookup
from globe_kernels.ops.compose_basis import compose_basis_ref, launch_compose_basis
from globe_kernels.ops.compose_layer import compose_bases_into, compose_family, layer_code
from globe_kernels.ops.compose_slots import Mixtures
from globe_kernels.ops.mixture import mixture, mixture_ref
from globe_kernels.ops.moe_ffn import ExpertWeights, FromRank, moe_ffn_ref
from globe_kernels.ops.moe_ffn_backward import moe_ffn_backward_ref
from globe_kernels.ops.moe_ffn_bank_first import WORKSPACE_BYTES, BankFirstWeights, moe_ffn_bank_first_ref
from globe_kernels.ops.moe_ffn_cached import CachedWeights
from globe_kernels.testing import assert_close, relative_errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# experts, choices, hidden, intermediate, rank
MODELS = {
    "Qwen3-30B-A3B": (128, 8, 2048, 768, 384),
    "Qwen3-30B-A3B, rank 576": (128, 8, 2048, 768, 576),
    "DeepSeek-V2-Lite": (64, 6, 2048, 1408, 576),
    "Mixtral-8x7B": (8, 2, 4096, 14336, 1024),
    "GPT-OSS-20B": (32, 4, 2880, 2880, 720),
}


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).to(dtype)


def layer(model: str, bias: bool = False) -> ExpertWeights:
    experts, _, hidden, inner, rank = MODELS[model]
    basis, *adapters = draw(experts, 2 * rank, hidden), draw(experts, inner, rank), draw(experts, inner, rank)
    biases = (draw(experts, inner), draw(experts, inner), draw(experts, hidden)) if bias else ()
    return ExpertWeights(basis, FromRank(*adapters, draw(experts, hidden, inner), *biases))


def in_fp32(weights: FromRank) -> FromRank:
    return FromRank(*(t if t is None else t.float() for t in weights))


def routed(model: str, tokens: int):
    experts, top_k, hidden, *_ = MODELS[model]
    weights, index = torch.randn(tokens, experts, device="cuda").softmax(-1).topk(top_k)
    return draw(tokens, hidden) * hidden**0.5, index, weights.bfloat16()


@pytest.mark.parametrize("tokens", [1, 3, 64, 700])
@pytest.mark.parametrize("model", list(MODELS))
def test_error_at_real_sizes_is_that_of_torch(model, tokens):
    torch.manual_seed(0)
    bias = model.startswith("GPT")
    activation = "clamped_swiglu" if bias else "silu"
    w, case = layer(model, bias), routed(model, tokens)
    out = moe_ffn(*case, w, activation)
    eager = moe_ffn_ref(*case, w, activation)
    hidden, index, scale = case
    full = ExpertWeights(w.basis.float(), in_fp32(w.from_rank))
    exact = moe_ffn_ref(hidden.float(), index, scale, full, activation)
    found, torchs = relative_errors(out, exact), relative_errors(eager, exact)
    assert found[0] <= 1.5 * torchs[0] and found[1] <= 2 * torchs[1]
    assert_close(out, exact, rms=1.5e-2, peak=3e-2)


@pytest.mark.parametrize("tokens", [1, 64, 700])
@pytest.mark.parametrize("model", list(MODELS))
def test_error_of_gradients_at_real_sizes_is_that_of_torch(model, tokens):
    torch.manual_seed(0)
    bias = model.startswith("GPT")
    activation = "clamped_swiglu" if bias else "silu"
    w, (hidden, index, scale) = layer(model, bias), routed(model, tokens)
    gradient = torch.randn_like(hidden)

    def by_torch(dtype: torch.dtype):
        weights = FromRank(*(t if t is None else t.to(dtype) for t in w.from_rank))
        factors = (w.basis.to(dtype), weights.adapters, weights.down)
        return moe_ffn_backward_ref(gradient.to(dtype), hidden.to(dtype), index, scale, *factors, activation)

    found = torch.autograd.grad(
        moe_ffn(hidden.requires_grad_(), index, scale.requires_grad_(), w, activation), (hidden, scale), gradient
    )
    for one, eager, exact in zip(found, by_torch(torch.bfloat16), by_torch(torch.float32), strict=True):
        errors, torchs = relative_errors(one, exact), relative_errors(eager, exact)
        assert errors[0] <= 1.5 * torchs[0] and errors[1] <= 2 * torchs[1]
        assert_close(one, exact, rms=2e-2, peak=4e-2)


@pytest.mark.parametrize("tokens", [1, 8, 200])
def test_a_cuda_graph_replays_on_new_inputs(tokens):
    torch.manual_seed(0)
    w, (hidden, index, scale) = layer("Qwen3-30B-A3B"), routed("Qwen3-30B-A3B", tokens)
    for _ in range(2):  # compiles before capture
        moe_ffn(hidden, index, scale, w, "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_ffn(hidden, index, scale, w, "silu")
    for _ in range(3):
        for kept, new in zip((hidden, index, scale), routed("Qwen3-30B-A3B", tokens), strict=True):
            kept.copy_(new)
        graph.replay()
        assert torch.equal(out, moe_ffn(hidden, index, scale, w, "silu"))
        assert out.abs().max() > 0


def test_no_kernel_waits_for_the_device():
    w, case = layer("Qwen3-30B-A3B"), routed("Qwen3-30B-A3B", 300)
    moe_ffn(*case, w, "silu")
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_ffn(*case, w, "silu")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_new_number_of_tokens_compiles_nothing():
    from globe_kernels.ops import down, gate_up, low_rank_in

    w = layer("Qwen3-30B-A3B")
    kernels = (low_rank_in._low_rank_in_kernel, gate_up._gate_up_kernel, down._down_kernel)
    moe_ffn(*routed("Qwen3-30B-A3B", 33), w, "silu")
    before = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    for tokens in (32, 34, 47, 48):  # multiples of 16 and others, in one bucket of rows per expert
        moe_ffn(*routed("Qwen3-30B-A3B", tokens), w, "silu")
    assert [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels] == before


def test_compiled_by_inductor_around_the_op():
    torch.manual_seed(0)
    w, case = layer("Qwen3-30B-A3B"), routed("Qwen3-30B-A3B", 16)

    def block(hidden, index, scale):
        return F.rms_norm(hidden, hidden.shape[-1:]) + moe_ffn(hidden, index, scale, w, "silu")

    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        out = compiled(*case)
    assert_close(out, block(*case), rms=1e-2, peak=2e-2)


@pytest.mark.parametrize("atoms", [24, 700], ids=["palette", "no palette"])
def test_composing_a_layer_at_real_sizes(atoms):
    torch.manual_seed(0)
    bank = draw(atoms, 384, 2048)
    index = torch.rand(128, atoms, device="cuda").topk(12).indices.int()
    value = torch.randn(128, 12, device="cuda")
    exact = compose_basis_ref(index, value, bank, "identity", torch.float32)
    code = layer_code(index, value)
    for basis in (
        compose_family(code, bank, "identity", torch.empty_like(exact, dtype=torch.bfloat16)),
        launch_compose_basis(index, value, bank, "identity", torch.bfloat16),
    ):
        assert_close(basis, exact, rms=2.5e-3, peak=4e-3)
    # the result is not rounded here: only the split of the codes is
    assert_close(compose_family(code, bank, "identity", torch.empty_like(exact)), exact, rms=2e-5, peak=2e-5)


def test_rows_past_int32():
    """400,000 tokens of 8 choices: the rows of S3 alone have 6.5e9 values."""
    if torch.cuda.mem_get_info()[0] < 25e9:
        pytest.skip("needs 25 GB of free memory")
    torch.manual_seed(0)
    experts, top_k, hidden, inner, rank = 16, 8, 2048, 64, 32
    w = ExpertWeights(
        draw(experts, 2 * rank, hidden),
        FromRank(draw(experts, inner, rank), draw(experts, inner, rank), draw(experts, hidden, inner)),
    )
    tokens = 400_000
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    index = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
    scale = torch.rand(tokens, top_k, device="cuda")
    out = moe_ffn(x, index, scale, w, "silu")
    last = slice(tokens - 50, tokens)
    assert_close(out[last], moe_ffn_ref(x[last], index[last], scale[last], w, "silu"), rms=1.5e-2, peak=3e-2)


def layer_on_atoms(model: str, rank: int, palette: int) -> BankFirstWeights:
    """A layer that uses `palette` atoms, 12 per expert, of a bank of three times as many."""
    experts, _, hidden, inner, _ = MODELS[model]

    def code():
        index = torch.rand(experts, palette, device="cuda").topk(12).indices.int() * 3 + 1
        return layer_code(index, torch.randn(experts, 12, device="cuda") / 12**0.5)

    banks = (draw(3 * palette, rank, hidden), draw(3 * palette, rank, hidden))
    adapters = (draw(experts, inner, rank), draw(experts, inner, rank))
    return BankFirstWeights(*banks, *code(), *code(), FromRank(*adapters, draw(experts, hidden, inner)))


# rank and palette; 3000 tokens are more than one chunk of Qwen3
ON_ATOMS = {"Qwen3-30B-A3B": (768, 32), "DeepSeek-V2-Lite": (576, 20)}


@pytest.mark.parametrize("tokens", [1, 17, 64, 200, 3000])
@pytest.mark.parametrize("model", list(ON_ATOMS))
def test_error_at_real_sizes_straight_from_the_bank(model, tokens):
    torch.manual_seed(0)
    w, case = layer_on_atoms(model, *ON_ATOMS[model]), routed(model, tokens)
    out = moe_ffn_bank_first(*case, w, "silu")
    eager = moe_ffn_bank_first_ref(*case, w, "silu")
    hidden, index, scale = case
    full = w._replace(gate_bank=w.gate_bank.float(), up_bank=w.up_bank.float(), from_rank=in_fp32(w.from_rank))
    exact = moe_ffn_bank_first_ref(hidden.float(), index, scale, full, "silu")
    found, torchs = relative_errors(out, exact), relative_errors(eager, exact)
    assert found[0] <= 1.5 * torchs[0] and found[1] <= 2 * torchs[1]
    assert_close(out, exact, rms=1.5e-2, peak=3e-2)


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_cuda_graph_straight_from_the_bank(tokens):
    torch.manual_seed(0)
    w, case = layer_on_atoms("Qwen3-30B-A3B", 768, 32), routed("Qwen3-30B-A3B", tokens)
    for _ in range(2):  # compiles before capture
        moe_ffn_bank_first(*case, w, "silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_ffn_bank_first(*case, w, "silu")
    for kept, new in zip(case, routed("Qwen3-30B-A3B", tokens), strict=True):
        kept.copy_(new)
    graph.replay()
    assert torch.equal(out, moe_ffn_bank_first(*case, w, "silu"))
    assert out.abs().max() > 0


def test_straight_from_the_bank_nothing_waits_and_memory_is_bounded():
    w = layer_on_atoms("Qwen3-30B-A3B", 768, 32)
    case = routed("Qwen3-30B-A3B", 20_000)  # z of all of them would take 2 GB
    moe_ffn_bank_first(*case, w, "silu")
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_ffn_bank_first(*case, w, "silu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rows = case[1].numel() * (2 * 768 + 768 + 2048) * 2  # h, y and the rows of S3
    assert torch.cuda.max_memory_allocated() - before < rows + case[0].nbytes + WORKSPACE_BYTES + 2**26


def test_straight_from_the_bank_a_new_number_of_tokens_compiles_nothing():
    from globe_kernels.ops import gate_up, mix, palette_in

    w = layer_on_atoms("Qwen3-30B-A3B", 768, 32)
    kernels = (palette_in._palette_in_kernel, mix._mix_kernel, gate_up._gate_up_kernel)
    moe_ffn_bank_first(*routed("Qwen3-30B-A3B", 33), w, "silu")
    before = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    for tokens in (34, 47, 48, 64):  # multiples of 16 and others, in one bucket of every stage
        moe_ffn_bank_first(*routed("Qwen3-30B-A3B", tokens), w, "silu")
    assert [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels] == before


def cached_model(model: str, slots: int) -> tuple[BasisCache, list[CachedWeights], list[ExpertWeights]]:
    """Two layers over one bank of 24 atoms: their cache, and the same layers with composed bases."""
    experts, _, hidden, inner, rank = MODELS[model]
    banks = draw(24, rank, hidden), draw(24, rank, hidden)
    cached, composed = [], []
    for _ in range(2):
        codes = [torch.rand(experts, 24, device="cuda").topk(12).indices.int() for _ in banks]
        values = [torch.randn(experts, 12, device="cuda") for _ in banks]
        rest = FromRank(draw(experts, inner, rank), draw(experts, inner, rank), draw(experts, hidden, inner))
        cached.append(CachedWeights(Mixtures(*banks, codes[0], values[0], codes[1], values[1]), rest))
        bases = [
            launch_compose_basis(code, value, bank, "tanh", torch.bfloat16)
            for code, value, bank in zip(codes, values, banks, strict=True)
        ]
        composed.append(ExpertWeights(torch.cat(bases, 1), rest))
    cache = BasisCache({0: experts, 1: experts}, slots, rank, hidden, torch.bfloat16, "cuda")
    return cache, cached, composed


def run_cached(cache: BasisCache, layers: list[CachedWeights], case) -> list[torch.Tensor]:
    """Every layer on the same inputs."""
    experts = layers[0].from_rank.shape.experts
    return [moe_ffn_cached(*case, w, cache, number * experts, "tanh", "silu") for number, w in enumerate(layers)]


@pytest.mark.parametrize("budget", ["all", "a quarter", "K"])
@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "DeepSeek-V2-Lite", "Mixtral-8x7B"])
def test_a_cache_of_any_size_computes_what_composed_bases_do(model, budget):
    torch.manual_seed(0)
    experts, top_k, *_ = MODELS[model]
    cache, layers, composed = cached_model(model, {"all": 2 * experts, "a quarter": experts // 2, "K": top_k}[budget])
    active = 0
    for tokens in (1, 3, 64, 1, 700, 1):
        case = routed(model, tokens)
        active += 2 * case[1].unique().numel()
        for out, w in zip(run_cached(cache, layers, case), composed, strict=True):
            assert_close(out, moe_ffn(*case, w, "silu"), rms=2e-3, peak=1e-2)
    stats = cache.stats()
    assert stats.hits + stats.misses == active and stats.misses >= min(stats.slots, 2 * experts)
    assert (stats.evictions == 0) == (budget == "all")
    owned = cache.owner[cache.owner >= 0].long()
    assert torch.equal(cache.slot_of[owned].sort().values, torch.arange(len(owned), device="cuda").int())


@pytest.mark.parametrize(("experts", "layers", "slots"), [(8, 32, 64), (128, 48, 1536), (512, 20, 8192)])
def test_lookups_at_real_sizes_are_those_of_the_reference(experts, layers, slots):
    torch.manual_seed(0)
    kernel, reference = (
        BasisCache(dict.fromkeys(range(layers), experts), slots, 1, 1, torch.bfloat16, "cuda").state.maps
        for _ in range(2)
    )
    popular = torch.rand(layers, experts, device="cuda") ** 4
    for step in range(400):
        layer = int(torch.randint(layers, ()))
        counts = torch.rand(experts, device="cuda") < popular[layer] * (0.3, 1.0, 1e4)[step % 3]
        starts = F.pad(counts.int().cumsum(0), (1, 0)).int()
        for number in range(-(-experts // slots)):
            found = launch_cache_lookup(starts, layer * experts, number, kernel)
            expected = cache_lookup_ref(starts, layer * experts, number, reference)
            for own, other in zip((*found, *kernel), (*expected, *reference), strict=True):
                assert torch.equal(own, other)
    assert kernel.registers[2:].min() > 0


@pytest.mark.parametrize("slots", [32, 8, 5], ids=["one pass", "as many as a token chooses", "two passes"])
def test_a_captured_cached_step_replays_on_new_routings_without_waiting(slots):
    torch.manual_seed(0)
    model = "Qwen3-30B-A3B"
    cache, layers, composed = cached_model(model, slots)
    case = routed(model, 1)
    run_cached(cache, layers, case)  # compiles before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_cached(cache, layers, case)
    cache.reset_stats()
    for _ in range(20):
        new = routed(model, 1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for kept, other in zip(case, new, strict=True):
                kept.copy_(other)
            graph.replay()
            run_cached(cache, layers, new)  # nor does it without a graph
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for out, w in zip(captured, composed, strict=True):
            assert_close(out, moe_ffn(*case, w, "silu"), rms=2e-3, peak=1e-2)
    stats = cache.stats()
    assert stats.hits + stats.misses == 20 * 4 * 8 and stats.evictions > 0
    if slots == 32:  # enough for the routing of a step, which comes twice
        assert stats.hits >= 20 * 2 * 8


def test_inductor_writes_the_pool_in_place():
    torch.manual_seed(0)
    cache, layers, composed = cached_model("Qwen3-30B-A3B", 200)
    compiled = torch.compile(lambda *case: run_cached(cache, layers, case), fullgraph=True)
    case = routed("Qwen3-30B-A3B", 1)
    compiled(*case)
    before = torch.cuda.memory_allocated()
    results = compiled(*case)
    assert torch.cuda.max_memory_allocated() - before < cache.pool.nbytes / 10
    for out, w in zip(results, composed, strict=True):
        assert_close(out, moe_ffn(*case, w, "silu"), rms=2e-3, peak=1e-2)


def test_a_new_number_of_tokens_compiles_no_kernel_of_the_cache():
    from globe_kernels.ops import cache_lookup, compose_slots

    cache, layers, _ = cached_model("Qwen3-30B-A3B", 40)
    kernels = (cache_lookup._cache_lookup_kernel, compose_slots._compose_slots_kernel)
    run_cached(cache, layers, routed("Qwen3-30B-A3B", 1))
    before = [sum(len(own[0]) for own in kernel.device_caches.values()) for kernel in kernels]
    for tokens in (2, 16, 33, 500):
        run_cached(cache, layers, routed("Qwen3-30B-A3B", tokens))
    assert [sum(len(own[0]) for own in kernel.device_caches.values()) for kernel in kernels] == before


def mixture_case(atoms: int, experts: int = 16, support: int = 12, rank: int = 768, width: int = 2048):
    """One block of experts of Qwen3-30B-A3B."""
    torch.manual_seed(0)
    index = torch.rand(experts, atoms, device="cuda").topk(support).indices.int()
    return index, torch.randn(experts, support, device="cuda"), draw(atoms, rank, width, dtype=torch.float32)


def test_a_mixture_and_its_gradients_at_real_sizes():
    index, value, bank = mixture_case(atoms=100)
    gradient = draw(16, 768, 2048, dtype=torch.float32)
    found, backward = mixture(index, value, bank)
    exact, exact_backward = mixture_ref(index, value.double(), bank.double())
    assert_close(found, exact, rms=1e-6, peak=2e-6)
    bank_gradient, exact_gradient = torch.zeros_like(bank), torch.zeros_like(bank, dtype=torch.float64)
    value_gradient = backward(gradient, bank_gradient)
    assert_close(value_gradient, exact_backward(gradient.double(), exact_gradient), rms=2e-6, peak=4e-6)
    assert_close(bank_gradient, exact_gradient, rms=1e-6, peak=2e-6)
    again = torch.zeros_like(bank)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_again = backward(gradient, again)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, bank_gradient) and torch.equal(value_again, value_gradient), "no order of sums varies"


def test_a_bank_past_int32():
    """1536 atoms of 768 x 2048 have 2.4e9 values."""
    if torch.cuda.mem_get_info()[0] < 25e9:
        pytest.skip("needs 25 GB of free memory")
    index, value, bank = mixture_case(atoms=1536, experts=2, support=3)
    index[:, 0], index[1, 1] = 1535, 1500
    gradient = draw(2, 768, 2048, dtype=torch.float32)
    found, backward = mixture(index, value, bank)
    bank_gradient = torch.zeros_like(bank)
    value_gradient = backward(gradient, bank_gradient)
    atoms = bank[index.long()].double()
    assert_close(found, torch.einsum("ec,ecrd->erd", value.double(), atoms), rms=1e-6, peak=2e-6)
    assert_close(value_gradient, torch.einsum("erd,ecrd->ec", gradient.double(), atoms), rms=2e-6, peak=4e-6)
    last = value[0, 0].double() * gradient[0].double() + value[1, 0].double() * gradient[1].double()
    assert_close(bank_gradient[1535], last, rms=1e-6, peak=2e-6)


class ScratchLayer:
    """A layer of a model whose bases are composed when it is called; experts 0 .. E - 1 of 24 shared atoms."""

    def __init__(self, layer: int, experts: int, banks: tuple[torch.Tensor, torch.Tensor]):
        (_, rank, hidden), inner = banks[0].shape, 512
        self.layer, self.banks = layer, banks
        self.basis_shape = (experts, 2 * rank, hidden)
        self.codes = tuple(
            layer_code(
                torch.rand(experts, 24, device="cuda").topk(12).indices.int(), torch.randn(experts, 12, device="cuda")
            )
            for _ in banks
        )
        self.kept = FromRank(draw(experts, inner, rank), draw(experts, inner, rank), draw(experts, hidden, inner))

    def composes_ahead(self, tokens: int) -> bool:
        return True

    def compose_into(self, out: torch.Tensor) -> None:
        compose_bases_into(out, self.codes, self.banks, "identity")

    def composed(self) -> torch.Tensor:
        out = self.banks[0].new_empty(self.basis_shape)
        self.compose_into(out)
        return out


def test_composing_a_layer_ahead_changes_nothing():
    torch.manual_seed(0)
    banks = (draw(24, 256, 1024), draw(24, 256, 1024))
    layers = [ScratchLayer(number, experts, banks) for number, experts in enumerate((64, 48, 64, 64, 16, 64))]
    ahead, (_, index, scale) = ScratchBuffers(layers, ScratchLayer.compose_into), routed("Qwen3-30B-A3B", 2048)

    def forward(run, hidden: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            own = index % layer.basis_shape[0]
            case = (hidden, own, scale)
            out = run(
                layer, hidden, lambda basis, c=case, kept=layer.kept: moe_ffn(*c, ExpertWeights(basis, kept), "silu")
            )
            hidden = F.rms_norm(hidden + out, hidden.shape[-1:])
        return hidden

    inputs = [draw(2048, 1024) * 32 for _ in range(8)]
    assert ahead.can_run(inputs[0])
    expected = [forward(lambda layer, _, experts: experts(layer.composed()), hidden) for hidden in inputs]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        # without waiting in between: the host runs ahead of the device
        found = [forward(ahead.run, hidden) for hidden in inputs]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not ahead._ahead, "nothing is held between two forwards"
    assert expected[0].abs().max() > 0
    del found
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_a_captured_step_composes_on_its_own_stream():
    banks = (draw(24, 256, 1024), draw(24, 256, 1024))
    ahead = ScratchBuffers([ScratchLayer(0, 16, banks)], ScratchLayer.compose_into)
    graph, seen = torch.cuda.CUDAGraph(), []
    x = torch.zeros(4, 1024, device="cuda")
    with torch.cuda.graph(graph):
        seen.append(ahead.can_run(x))
        x += 1
    assert seen == [False] and ahead.can_run(x)
