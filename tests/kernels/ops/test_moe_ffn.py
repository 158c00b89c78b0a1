"""The whole FFN and its three stages: references against token-by-token fp64, kernels against the references."""

import pytest
import torch
import torch.nn.functional as F

from globe_kernels.errors import RequestError
from globe_kernels.functional import moe_ffn
from globe_kernels.ops.activations import GATED_ACTIVATIONS, gated_activation, parse_activation
from globe_kernels.ops.counters import call_counts
from globe_kernels.ops.moe_ffn import ExpertWeights, FromRank, launch_moe_ffn
from globe_kernels.ops.moe_ffn import moe_ffn as moe_ffn_op
from globe_kernels.testing import assert_close
from tests.kernels.cases import (
    DEVICE,
    KERNEL_DTYPES,
    ROUTINGS,
    E,
    needs_kernels,
    same_tiles,
    silu_gated,
    token_by_token,
    transposed_in_memory,
)

P, D, R = 12, 20, 7
# at about twice what torch itself errs in the same dtype
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
TILES = {
    "tiles smaller than the matrices": same_tiles(16, 16, 16, group_m=2),
    "tiles larger than the matrices": same_tiles(32, 32, 64, group_m=1),
}


def weights(
    dtype: torch.dtype = torch.float32, inner: int = P, width: int = D, rank: int = R, bias: bool = False
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE, dtype)

    basis, *factors = draw(E, 2 * rank, width), draw(E, inner, rank), draw(E, inner, rank), draw(E, width, inner)
    biases = (draw(E, inner), draw(E, inner), draw(E, width)) if bias else ()
    return ExpertWeights(basis, FromRank(*factors, *biases))


def inputs(routing: str, dtype: torch.dtype = torch.float32, width: int = D):
    index = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(index.shape[0], width, generator=generator)
    scale = torch.rand(index.shape, generator=generator)
    return hidden.to(DEVICE, dtype), index.to(DEVICE), scale.to(DEVICE)


def by_token(hidden, index, scale, w: ExpertWeights, join=silu_gated) -> torch.Tensor:
    return token_by_token(hidden, index, scale, w.basis.chunk(2, dim=1), w.from_rank, join)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_parity_with_dense_experts(routing, dtype):
    case, w = inputs(routing, dtype), weights(dtype)
    out = moe_ffn(*case, w, "silu")
    assert out.dtype == dtype
    assert_close(out, by_token(*case, w), rms=LIMITS[dtype], peak=2 * LIMITS[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("tiles", list(TILES))
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_parity_of_the_kernels(routing, tiles, dtype):
    case, w = inputs(routing, dtype), weights(dtype)
    out = launch_moe_ffn(*case, w, "silu", TILES[tiles])
    assert out.dtype == dtype
    assert_close(out, by_token(*case, w), rms=LIMITS[dtype], peak=2 * LIMITS[dtype])


@needs_kernels
@pytest.mark.parametrize(
    ("inner", "width", "rank"),
    [(32, 48, 16), (16, 64, 32), (33, 47, 17), (1, 2, 1)],
    ids=["multiples of 16", "a rank of the intermediate size and more", "primes", "nothing to multiply"],
)
def test_parity_of_the_kernels_over_sizes(inner, width, rank):
    case = inputs("ragged tails, expert 3 empty", width=width)
    w = weights(inner=inner, width=width, rank=rank)
    out = launch_moe_ffn(*case, w, "silu", TILES["tiles smaller than the matrices"])
    assert_close(out, by_token(*case, w), rms=2e-6, peak=4e-6)


def clamped_swiglu(gate, up, alpha=1.702, limit=7):
    """As GPT-OSS has it."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate / (1 + torch.exp(-alpha * gate))


def clamped_silu(gate, up, limit=10):
    """As DeepSeek-V4 has it."""
    return silu_gated(gate.clamp(max=limit), up.clamp(-limit, limit))


GATED = {
    "silu": silu_gated,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_pytorch_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu": lambda gate, up: F.relu(gate) * up,
    "clamped_swiglu": clamped_swiglu,
    "clamped_swiglu(alpha=1.25, limit=3)": lambda gate, up: clamped_swiglu(gate, up, 1.25, 3),
    "clamped_silu": clamped_silu,
    "clamped_silu(limit=2.5)": lambda gate, up: clamped_silu(gate, up, 2.5),
    "capped_silu(limit=2.5)": lambda gate, up: F.silu(gate).clamp(max=2.5) * up.clamp(-2.5, 2.5),
    "softcapped_silu": lambda gate, up: 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * 25 * torch.tanh(up / 25),
}
RUNNERS = [
    pytest.param(moe_ffn, id="reference"),
    pytest.param(
        lambda *case: launch_moe_ffn(*case, TILES["tiles larger than the matrices"]), id="kernels", marks=needs_kernels
    ),
]


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
@pytest.mark.parametrize("activation", list(GATED))
def test_activations(activation, bias, run):
    (hidden, index, scale), w = inputs("ragged tails, expert 3 empty"), weights(bias=bias)
    hidden = 10 * hidden  # some values of gate and of up lie past the clamp
    expected = by_token(hidden, index, scale, w, GATED[activation])
    assert_close(run(hidden, index, scale, w, activation), expected, rms=2e-6, peak=4e-6)


@pytest.mark.parametrize("activation", list(GATED_ACTIVATIONS))
def test_a_spec_names_all_settings(activation):
    spec = parse_activation(activation).spec
    assert parse_activation(spec) == parse_activation(activation)
    assert parse_activation(spec).spec == spec
    gate, up = 20 * torch.randn(2, 100)
    assert torch.equal(gated_activation(spec)(gate, up), GATED_ACTIVATIONS[activation](gate, up))
    assert parse_activation("clamped_swiglu(limit=5)").spec == "clamped_swiglu(alpha=1.702, limit=5.0)"


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("tanh", "the activation 'tanh'; GloBE has silu, swish"),
        ("clamped_silu(limit=10", r"the activation 'clamped_silu\(limit=10'; GloBE has"),
        ("clamped_silu(alpha=1)", "has 'alpha=1' and clamped_silu takes limit=a positive number"),
        ("clamped_swiglu(limit=-1)", "has 'limit=-1' and clamped_swiglu takes alpha=a positive number, limit=a pos"),
        ("clamped_swiglu(7)", "has '7' and clamped_swiglu takes"),
        ("clamped_silu(limit=seven)", "has 'limit=seven'"),
        ("clamped_silu(limit=inf)", "has 'limit=inf'"),
        ("silu(limit=7)", "has 'limit=7' and silu takes no setting"),
    ],
)
def test_a_bad_spec_is_refused(spec, sentence):
    with pytest.raises(RequestError, match=sentence):
        moe_ffn(*inputs("one token"), weights(), spec)


@needs_kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("tiles", list(TILES))
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_atomic_sums_of_the_kernels(routing, tiles, dtype):
    case, w = inputs(routing, dtype), weights(dtype, bias=True)
    out = launch_moe_ffn(*case, w, "silu", TILES[tiles], deterministic=False)
    assert out.dtype == dtype
    assert_close(out, by_token(*case, w), rms=LIMITS[dtype], peak=2 * LIMITS[dtype])


@needs_kernels
def test_the_kernels_are_deterministic():
    case, w = inputs("full tiles, many blocks"), weights()
    first, second = (launch_moe_ffn(*case, w, "silu", next(iter(TILES.values()))) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("run", RUNNERS)
def test_no_tokens(run):
    hidden = torch.randn(0, D, device=DEVICE)
    empty = torch.zeros(0, 2, device=DEVICE)
    assert run(hidden, empty.long(), empty, weights(), "silu").shape == (0, D)


@pytest.mark.parametrize("run", RUNNERS)
def test_a_sentinel_adds_nothing_whatever_its_weight(run):
    index = torch.tensor([[1, E], [0, 2]], device=DEVICE)
    hidden = torch.randn(2, D, device=DEVICE)
    scale = torch.tensor([[0.5, float("nan")], [0.3, 0.7]], device=DEVICE)
    out = run(hidden, index, scale, weights(), "silu")
    assert_close(out, by_token(hidden, index, scale, weights()), rms=2e-6, peak=4e-6)


@pytest.mark.parametrize("run", RUNNERS)
def test_large_values_saturate_as_they_do_in_torch(run):
    hidden, index, scale = inputs("ragged tails, expert 3 empty")
    out = run(1e6 * hidden, index, scale, weights(), "silu")
    assert_close(out, by_token(1e6 * hidden, index, scale, weights()), rms=1e-5, peak=1e-5)


def test_large_values_stay_finite_in_bf16():
    hidden = torch.full((2, D), 1e4, dtype=torch.bfloat16, device=DEVICE)
    index, scale = torch.tensor([[0, 1], [2, 3]], device=DEVICE), torch.rand(2, 2, device=DEVICE)
    out = moe_ffn(hidden, index, scale, weights(torch.bfloat16), "silu")
    assert torch.isfinite(out).all()
    assert out.abs().max() > 0


def test_strides_and_index_dtype_do_not_matter():
    hidden, index, scale = inputs("ragged tails, expert 3 empty")
    expected, w = moe_ffn(hidden, index, scale, weights(), "silu"), weights()
    from_rank = FromRank(*map(transposed_in_memory, w.from_rank))
    strided = moe_ffn(
        hidden.T.contiguous().T,
        index.int().T.contiguous().T,
        scale.repeat(1, 2)[:, :2],
        ExpertWeights(transposed_in_memory(w.basis), from_rank),
        "silu",
    )
    assert_close(strided, expected, rms=1e-6, peak=2e-6)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
def test_opcheck(bias):
    w = weights(bias=bias)
    torch.library.opcheck(moe_ffn_op, (*inputs("one token"), w.to_list(), "silu", True))


def test_compiles_into_one_graph():
    case, w = inputs("ragged tails, expert 3 empty"), weights()
    compiled = torch.compile(moe_ffn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case, w, "silu"), moe_ffn(*case, w, "silu"))


def test_counts_its_calls():
    name = "moe_ffn" if DEVICE == "cuda" else "moe_ffn_ref"
    before = call_counts().get(name, 0)
    moe_ffn(*inputs("one token"), weights(), "silu")
    assert call_counts()[name] == before + 1


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
