"""What only a GPU can show: bf16 at the sizes of real models, CUDA graphs, compilation around the kernels."""

import pytest
import torch
import torch.nn.functional as F

from globe_kernels.functional import moe_ffn, moe_ffn_bank_first
from globe_kernels.ops.compose_basis import compose_basis, compose_basis_ref
from globe_kernels.ops.compose_layer import compose_layer, layer_code
from globe_kernels.ops.moe_ffn import ExpertWeights, moe_ffn_ref
from globe_kernels.ops.moe_ffn_bank_first import WORKSPACE_BYTES, BankFirstWeights, moe_ffn_bank_first_ref
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
    factors = (draw(experts, 2 * rank, hidden), draw(experts, inner, rank), draw(experts, inner, rank))
    biases = (draw(experts, inner), draw(experts, inner), draw(experts, hidden)) if bias else ()
    return ExpertWeights(*factors, draw(experts, hidden, inner), *biases)


def routed(model: str, tokens: int):
    experts, choices, hidden, *_ = MODELS[model]
    weights, index = torch.randn(tokens, experts, device="cuda").softmax(-1).topk(choices)
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
    exact = moe_ffn_ref(
        hidden.float(), index, scale, ExpertWeights(*(t if t is None else t.float() for t in w)), activation
    )
    found, torchs = relative_errors(out, exact), relative_errors(eager, exact)
    assert found[0] <= 1.5 * torchs[0] and found[1] <= 2 * torchs[1]
    assert_close(out, exact, rms=1.5e-2, peak=3e-2)


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
    for basis in (
        compose_layer(*layer_code(index, value), bank, "identity", torch.bfloat16),
        compose_basis(index, value, bank, "identity", torch.bfloat16),
    ):
        assert_close(basis, exact, rms=2.5e-3, peak=4e-3)
    # without the rounding of the result, what is left is that of the split codes
    assert_close(compose_layer(*layer_code(index, value), bank, "identity", torch.float32), exact, rms=2e-5, peak=2e-5)


def test_rows_past_int32():
    """400,000 tokens of 8 choices: the rows of S3 alone have 6.5e9 values."""
    if torch.cuda.mem_get_info()[0] < 25e9:
        pytest.skip("needs 25 GB of free memory")
    torch.manual_seed(0)
    experts, choices, hidden, inner, rank = 16, 8, 2048, 64, 32
    w = ExpertWeights(
        draw(experts, 2 * rank, hidden),
        draw(experts, inner, rank),
        draw(experts, inner, rank),
        draw(experts, hidden, inner),
    )
    tokens = 400_000
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    index = torch.rand(tokens, experts, device="cuda").topk(choices).indices
    scale = torch.rand(tokens, choices, device="cuda")
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
    return BankFirstWeights(*banks, *code(), *code(), *adapters, draw(experts, hidden, inner))


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
    full = BankFirstWeights(*(t.float() if t is not None and t.is_floating_point() else t for t in w))
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
    torch.cuda.reset_peak_memory_stats()
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
