import pytest
import torch
import torch.nn.functional as F

from globe_kernels.functional import moe_ffn
from globe_kernels.ops.counters import call_counts
from globe_kernels.ops.moe_ffn import ExpertWeights
from globe_kernels.testing import assert_close

E, P, D, R = 5, 12, 20, 7


def weights(dtype: torch.dtype = torch.float32) -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    return ExpertWeights(draw(E, R, D), draw(E, P, R), draw(E, R, D), draw(E, P, R), draw(E, D, P))


def by_token(hidden, index, scale, w: ExpertWeights, act=F.silu) -> torch.Tensor:
    """Independent of the op: token by token, in fp64, from dense matrices."""
    gate = w.gate_adapter.double() @ w.gate_basis.double()
    up = w.up_adapter.double() @ w.up_basis.double()
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, x in enumerate(hidden.double()):
        for choice, expert in enumerate(index[token].tolist()):
            if 0 <= expert < E:
                y = w.down[expert].double() @ (act(gate[expert] @ x) * (up[expert] @ x))
                out[token] += scale[token, choice].double() * y
    return out


ROUTINGS = {
    "ragged, expert 3 empty": torch.tensor([[0, 1], [4, 0], [1, 2], [0, 2], [2, 4], [4, 1], [0, 4]]),
    "one token": torch.tensor([[3, 1]]),
    "all on one expert": torch.full((6, 1), 2),
    "K = E": torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(2)) for _ in range(4)]),
    "sentinels, a token with nothing else": torch.tensor([[0, E], [E, E + 3], [E, 1], [-1, 2]]),
    "full tiles": torch.arange(128).view(64, 2) % E,
}


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_parity_with_dense_experts(routing, dtype, limit):
    index = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(index.shape[0], D, generator=generator).to(dtype)
    scale = torch.rand(index.shape, generator=generator)
    out = moe_ffn(hidden, index, scale, weights(dtype), "silu")
    assert out.dtype == dtype
    assert_close(out, by_token(hidden, index, scale, weights(dtype)), rms=limit, peak=2 * limit)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_other_activations(activation):
    act = {"gelu": F.gelu, "relu": F.relu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    index = ROUTINGS["ragged, expert 3 empty"]
    hidden, scale = torch.randn(7, D), torch.rand(7, 2)
    out = moe_ffn(hidden, index, scale, weights(), activation)
    assert_close(out, by_token(hidden, index, scale, weights(), act), rms=1e-5, peak=1e-5)


def test_no_tokens():
    out = moe_ffn(torch.randn(0, D), torch.zeros(0, 2, dtype=torch.long), torch.rand(0, 2), weights(), "silu")
    assert out.shape == (0, D)


def test_strides_and_index_dtype_do_not_matter():
    index, hidden, scale = torch.tensor([[0, 1], [3, 2], [4, 4]]), torch.randn(3, D), torch.rand(3, 2)
    expected = moe_ffn(hidden, index, scale, weights(), "silu")
    strided = moe_ffn(
        hidden.T.contiguous().T, index.int().T.contiguous().T, scale.repeat(1, 2)[:, :2], weights(), "silu"
    )
    assert torch.equal(strided, expected)


def test_a_sentinel_adds_nothing_whatever_its_weight():
    index = torch.tensor([[1, E], [0, 2]])
    hidden, scale = torch.randn(2, D), torch.tensor([[0.5, float("nan")], [0.3, 0.7]])
    out = moe_ffn(hidden, index, scale, weights(), "silu")
    assert torch.isfinite(out).all()
    assert_close(out, by_token(hidden, index, scale, weights()), rms=1e-5, peak=1e-5)


def test_large_values_stay_finite_in_bf16():
    hidden = torch.full((2, D), 1e4, dtype=torch.bfloat16)
    out = moe_ffn(hidden, torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2), weights(torch.bfloat16), "silu")
    assert torch.isfinite(out).all()
    assert out.abs().max() > 0


def test_counts_its_calls():
    before = call_counts().get("moe_ffn_ref", 0)
    moe_ffn(torch.randn(1, D), torch.tensor([[0]]), torch.rand(1, 1), weights(), "silu")
    assert call_counts()["moe_ffn_ref"] == before + 1


@pytest.mark.parametrize(
    ("hidden", "index", "scale", "sentence"),
    [
        (torch.randn(2, 3, D), torch.zeros(2, 1).long(), torch.rand(2, 1), r"\(2, 3, 20\) and \(tokens, 20\)"),
        (torch.randn(2, D + 1), torch.zeros(2, 1).long(), torch.rand(2, 1), r"\(2, 21\) and \(tokens, 20\)"),
        (torch.randn(2, D), torch.zeros(2, 1).long(), torch.rand(2, 2), r"top_k_weights \(2, 2\)"),
        (torch.randn(2, D), torch.zeros(3, 1).long(), torch.rand(3, 1), "with 2 tokens"),
        (torch.randn(2, D).half(), torch.zeros(2, 1).long(), torch.rand(2, 1), "torch.float16 and the expert weights"),
    ],
)
def test_refuses_what_does_not_fit(hidden, index, scale, sentence):
    with pytest.raises(ValueError, match=sentence):
        moe_ffn(hidden, index, scale, weights(), "silu")
