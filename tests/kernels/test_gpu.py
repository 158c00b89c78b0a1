"""What only a GPU can show: bf16 at the sizes of real models, CUDA graphs, compilation around the kernels."""

import pytest
import torch
import torch.nn.functional as F

from globe_kernels.functional import moe_ffn
from globe_kernels.ops.compose_basis import compose_basis, compose_basis_ref
from globe_kernels.ops.compose_layer import compose_layer, layer_code
from globe_kernels.ops.mixture import mixture, mixture_ref
from globe_kernels.ops.moe_ffn import ExpertWeights, moe_ffn_ref
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
