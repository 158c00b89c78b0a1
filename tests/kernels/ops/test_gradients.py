"""First derivatives of every layer op: against finite differences and torch, kernels against the reference."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from globe_kernels.errors import RequestError
from globe_kernels.functional import moe_ffn, moe_ffn_bank_first, moe_ffn_cached, moe_ffn_scratch
from globe_kernels.model.cache import BasisCache
from globe_kernels.ops.activations import gated_activation, gated_slopes
from globe_kernels.ops.compose_layer import compose_bases, layer_code
from globe_kernels.ops.compose_slots import Mixtures
from globe_kernels.ops.counters import call_counts
from globe_kernels.ops.moe_ffn import ExpertWeights, FromRank
from globe_kernels.ops.moe_ffn import moe_ffn as moe_ffn_op
from globe_kernels.ops.moe_ffn_backward import launch_moe_ffn_backward, moe_ffn_backward, moe_ffn_backward_ref
from globe_kernels.ops.moe_ffn_bank_first import BankFirstWeights
from globe_kernels.ops.moe_ffn_bank_first import moe_ffn_bank_first as moe_ffn_bank_first_op
from globe_kernels.ops.moe_ffn_cached import CachedWeights
from globe_kernels.ops.moe_ffn_cached import moe_ffn_cached as moe_ffn_cached_op
from globe_kernels.ops.moe_ffn_scratch import ScratchWeights
from globe_kernels.ops.moe_ffn_scratch import moe_ffn_scratch as moe_ffn_scratch_op
from globe_kernels.ops.project_back import launch_project_back, project_back_ref
from globe_kernels.ops.routing import launch_routing_plan
from globe_kernels.testing import assert_close
from tests.kernels.cases import DEVICE, KERNEL_DTYPES, ROUTINGS, E, needs_kernels, same_tiles, token_by_token

P, D, R, M, C = 12, 20, 7, 6, 3
SPECS = [
    "silu",
    "swish",
    "gelu",
    "gelu_pytorch_tanh",
    "relu",
    "clamped_swiglu(limit=2)",
    "clamped_silu(limit=2)",
    "capped_silu(limit=1.5)",
    "softcapped_silu(alpha=1.5, limit=2)",
]
RAGGED = "ragged tails, expert 3 empty"


class Layer:
    """The same layer for every op. `run` takes (hidden, index, scale)."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = True, phi: str = "identity"):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE, dtype)

        self.banks = (draw(M, R, D), draw(M, R, D))
        sparse = []
        for _ in range(2):
            index = torch.stack([torch.randperm(M, generator=generator)[:C] for _ in range(E)])
            sparse += [index.int().to(DEVICE), torch.randn(E, C, generator=generator).to(DEVICE)]
        biases = (draw(E, P), draw(E, P), draw(E, D)) if bias else ()
        self.from_rank = FromRank(draw(E, P, R), draw(E, P, R), draw(E, D, P), *biases)
        self.codes = (layer_code(*sparse[:2]), layer_code(*sparse[2:]))
        self.flat_codes = [*self.codes[0], *self.codes[1]]
        self.mixtures = Mixtures(*self.banks, *sparse)
        self.phi = phi
        self.basis = compose_bases(self.flat_codes, list(self.banks), phi, dtype)
        self.cache = BasisCache({0: E}, 2, R, D, dtype, DEVICE)

    def run(self, op: str, routed: tuple, activation: str) -> torch.Tensor:
        if op == "moe_ffn":
            return moe_ffn(*routed, ExpertWeights(self.basis, self.from_rank), activation)
        if op == "moe_ffn_scratch":
            basis = self.basis.clone()
            weights = ScratchWeights(basis, self.codes, self.banks, self.phi, self.from_rank)
            out = moe_ffn_scratch(*routed, weights, activation)
            basis.fill_(float("nan"))  # the next layer has the buffer now
            return out
        if op == "moe_ffn_bank_first":
            weights = BankFirstWeights(*self.banks, *self.codes[0], *self.codes[1], self.from_rank)
            return moe_ffn_bank_first(*routed, weights, activation)
        weights = CachedWeights(self.mixtures, self.from_rank)
        out = moe_ffn_cached(*routed, weights, self.cache, 0, self.phi, activation)
        self.cache.pool.fill_(float("nan"))
        self.cache.clear()
        return out

    def arguments(self, op: str) -> tuple:
        """What the op of torch takes beside (hidden, index, scale)."""
        from_rank = list(self.from_rank)
        return {
            "moe_ffn": ([self.basis, *from_rank], "silu", True),
            "moe_ffn_scratch": (self.basis, self.flat_codes, list(self.banks), from_rank, self.phi, "silu", True),
            "moe_ffn_bank_first": ([*self.banks, *self.flat_codes], from_rank, "silu", True),
            "moe_ffn_cached": (self.cache.number, list(self.mixtures), from_rank, 0, self.phi, "silu", True),
        }[op]


OPS = {
    "moe_ffn": moe_ffn_op,
    "moe_ffn_scratch": moe_ffn_scratch_op,
    "moe_ffn_bank_first": moe_ffn_bank_first_op,
    "moe_ffn_cached": moe_ffn_cached_op,
}


def inputs(routing: str = RAGGED, dtype: torch.dtype = torch.float32, grad: bool = True, size: float = 1.0):
    index = ROUTINGS[routing]
    generator = torch.Generator().manual_seed(3)
    hidden = size * torch.randn(index.shape[0], D, generator=generator, dtype=torch.float64)
    scale = torch.rand(index.shape, generator=generator, dtype=torch.float64)
    tensors = [tensor.to(DEVICE, dtype).requires_grad_(grad) for tensor in (hidden, scale)]
    return tensors[0], index.to(DEVICE), tensors[1]


def gradients(out: torch.Tensor, routed: tuple) -> tuple[torch.Tensor, ...]:
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
    return torch.autograd.grad(out, (routed[0], routed[2]), seed)


def of_torch(layer: Layer, routed: tuple, activation: str) -> tuple[torch.Tensor, ...]:
    """By autograd through dense matrices, token by token, in fp64."""
    join = gated_activation(activation)
    return gradients(token_by_token(*routed, layer.basis.chunk(2, dim=1), layer.from_rank, join), routed)


@pytest.mark.parametrize("activation", SPECS)
def test_slopes_are_those_of_torch(activation):
    gate, up = 3 * torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gate[:2], up[:2] = torch.tensor([30.0, -30.0]), torch.tensor([-30.0, 30.0])
    expected = torch.autograd.grad(
        gated_activation(activation)(gate.requires_grad_(), up.requires_grad_()).sum(), (gate, up)
    )
    for found, slope in zip(gated_slopes(activation)(gate.detach(), up.detach()), expected, strict=True):
        assert_close(found, slope, rms=1e-14, peak=1e-13)


# An activation has the biases or has none, whichever activation it is.
ACTIVATIONS = pytest.mark.parametrize(("activation", "bias"), [*((spec, True) for spec in SPECS), (SPECS[0], False)])


@ACTIVATIONS
def test_finite_differences(activation, bias):
    layer = Layer(torch.float64, bias)
    hidden, index, scale = inputs("sentinels, a token with nothing else", torch.float64, size=2)
    assert torch.autograd.gradcheck(
        lambda *x: layer.run("moe_ffn", (x[0], index, x[1]), activation), (hidden, scale), atol=1e-7, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("op", "phi"), [(op, phi) for op in OPS for phi in ("identity", "tanh") if phi != "tanh" or "bank" not in op]
)
def test_finite_differences_of_every_op(op, phi):
    layer = Layer(torch.float64, phi=phi)
    hidden, index, scale = inputs("sentinels, a token with nothing else", torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: layer.run(op, (x[0], index, x[1]), "silu"), (hidden, scale), atol=1e-7, rtol=1e-6
    )


LIMITS = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


# The reference takes the same way for every routing, so that half precision needs one of them; a GPU has kernels there.
@pytest.mark.parametrize(
    ("routing", "dtype"),
    [
        (name, dtype)
        for name in ROUTINGS
        for dtype in LIMITS
        if DEVICE == "cuda" or name == RAGGED or dtype.itemsize > 2
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_parity_with_torch(routing, op, dtype):
    layer, routed = Layer(dtype), inputs(routing, dtype)
    found, expected = gradients(layer.run(op, routed, "silu"), routed), of_torch(layer, routed, "silu")
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, rms=LIMITS[dtype], peak=2 * LIMITS[dtype])


TILES = {
    "tiles smaller than the matrices": same_tiles(16, 16, 16, group_m=2),
    "tiles larger than the matrices": same_tiles(32, 32, 64, group_m=1),
}


def kernel_case(layer: Layer, routed: tuple) -> tuple:
    hidden, index, scale = (tensor.detach() for tensor in routed)
    gradient = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4)).to(hidden)
    return gradient, hidden, index, scale, layer.basis, layer.from_rank.adapters, layer.from_rank.down


@needs_kernels
# The interpreter rounds as the dtype says, whatever the tiles; a GPU takes other instructions.
@pytest.mark.parametrize(
    ("tiles", "dtype"),
    [
        (name, dtype)
        for name in TILES
        for dtype in KERNEL_DTYPES
        if DEVICE == "cuda" or "small" in name or dtype.itemsize > 2
    ],
    ids=str,
)
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_parity_of_the_kernels(routing, tiles, dtype):
    layer, routed = Layer(dtype), inputs(routing, dtype)
    found = launch_moe_ffn_backward(*kernel_case(layer, routed), "silu", TILES[tiles])
    for gradient, expected in zip(found, of_torch(layer, routed, "silu"), strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, expected, rms=LIMITS[dtype], peak=2 * LIMITS[dtype])


@needs_kernels
@ACTIVATIONS
def test_activations_of_the_kernels(activation, bias):
    layer, routed = Layer(bias=bias), inputs(size=5)
    found = launch_moe_ffn_backward(*kernel_case(layer, routed), activation, TILES["tiles larger than the matrices"])
    for gradient, expected in zip(found, of_torch(layer, routed, activation), strict=True):
        assert_close(gradient, expected, rms=2e-6, peak=4e-6)


@needs_kernels
@pytest.mark.parametrize("in_order_of_tokens", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_products_with_transposed_weights(by_token, in_order_of_tokens):
    index, weight = ROUTINGS[RAGGED].to(DEVICE), Layer().from_rank.down_proj
    tokens, routed = index.shape[0], index.numel()
    rows = torch.randn(tokens if by_token else routed, 2 * D, device=DEVICE)[:, D:]
    options = {"by_token": by_token, "in_order_of_tokens": in_order_of_tokens}
    plan = launch_routing_plan(index, E, 16)
    out = torch.zeros(routed, 3 * P, device=DEVICE)
    launch_project_back(rows, plan, weight, TILES["tiles smaller than the matrices"].down, out[:, P:-P], **options)
    assert not out[:, :P].any() and not out[:, -P:].any()
    place = torch.arange(routed, device=DEVICE)
    target = plan.order.long() if in_order_of_tokens else place
    expected = torch.zeros(routed, P, dtype=torch.float64, device=DEVICE)
    for row, choice in enumerate(plan.order.tolist()):
        source = rows[choice // 2] if by_token else rows[row]
        expected[target[row]] = source.double() @ weight[index.flatten()[choice]].double()
    assert_close(out[:, P:-P], expected, rms=2e-6, peak=4e-6)
    assert_close(project_back_ref(rows, plan, weight, torch.zeros_like(expected), **options), expected, 2e-6, 4e-6)


BACKWARDS = [
    pytest.param(moe_ffn_backward_ref, id="reference"),
    pytest.param(
        lambda *case: launch_moe_ffn_backward(*case, TILES["tiles larger than the matrices"]),
        id="kernels",
        marks=needs_kernels,
    ),
]


@pytest.mark.parametrize("run", BACKWARDS)
def test_a_sentinel_has_no_gradient_whatever_its_weight(run):
    index = torch.tensor([[1, E], [-7, 2], [2**31, E]], device=DEVICE)
    scale = torch.tensor([[0.5, float("nan")], [float("inf"), 0.7], [float("nan")] * 2], device=DEVICE)
    layer, hidden = Layer(), torch.randn(3, D, device=DEVICE)
    x, weight = run(*kernel_case(layer, (hidden, index, scale)), "silu")
    routed = (hidden.requires_grad_(), index, torch.where(torch.isfinite(scale), scale, 0.0).requires_grad_())
    for found, expected in zip((x, weight), of_torch(layer, routed, "silu"), strict=True):
        assert_close(found, expected, rms=2e-6, peak=4e-6)
    assert not x[2].any() and not weight[2].any() and weight[0, 1] == weight[1, 0] == 0


@pytest.mark.parametrize("run", BACKWARDS)
def test_no_tokens(run):
    empty = torch.zeros(0, 2, device=DEVICE)
    x, weight = run(*kernel_case(Layer(), (torch.zeros(0, D, device=DEVICE), empty.long(), empty)), "silu")
    assert x.shape == (0, D) and weight.shape == (0, 2)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    layer = Layer()  # owns the cache that the op finds by its number
    torch.library.opcheck(OPS[op], (*inputs(), *layer.arguments(op)))


def test_opcheck_of_the_backward():
    layer, routed = Layer(), inputs(grad=False)
    weights = ExpertWeights(layer.basis, layer.from_rank).to_list()
    torch.library.opcheck(moe_ffn_backward, (torch.randn_like(routed[0]), *routed, weights, "silu"))


@pytest.mark.parametrize("op", OPS)
def test_compiles_into_one_graph_with_its_backward(op):
    layer, routed = Layer(), inputs()
    arguments, name = layer.arguments(op), "moe_ffn_backward_ref" if DEVICE == "cpu" else "moe_ffn_backward"

    def loss(hidden, index, scale):
        return OPS[op](hidden.sin(), index, scale.exp(), *arguments)

    before = call_counts().get(name, 0)
    found = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager")(*routed), routed)
    assert call_counts()[name] == before + 1
    for gradient, expected in zip(found, gradients(loss(*routed), routed), strict=True):
        assert_close(gradient, expected, rms=1e-6, peak=2e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_gradient_checkpointing(op, use_reentrant):
    layer, routed = Layer(), inputs()
    expected = gradients(layer.run(op, routed, "silu"), routed)
    out = checkpoint(lambda *routed: layer.run(op, routed, "silu"), *routed, use_reentrant=use_reentrant)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out))
    for found, gradient in zip((routed[0].grad, routed[2].grad), expected, strict=True):
        assert torch.equal(found, gradient)


def test_a_gradient_of_one_alone():
    layer, routed = Layer(), inputs()
    both = gradients(layer.run("moe_ffn", routed, "silu"), routed)
    for place, expected in zip((0, 2), both, strict=True):
        one = [tensor.detach().requires_grad_(number == place) for number, tensor in enumerate(routed)]
        out = layer.run("moe_ffn", one, "silu")
        (found,) = torch.autograd.grad(
            out, one[place], torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("op", OPS)
def test_a_factor_that_requires_a_gradient_is_refused(op):
    for name in ("gate_adapter", "down_proj", "down_bias"):
        layer = Layer()
        getattr(layer.from_rank, name).requires_grad_()
        with pytest.raises(
            RequestError, match=f"globe::{op} requires a gradient, and only hidden and top_k_weights can"
        ):
            layer.run(op, inputs(grad=False), "silu")
        with torch.no_grad():
            assert layer.run(op, inputs(), "silu").abs().max() > 0


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_are_refused(op):
    layer, routed = Layer(), inputs()
    (first, _) = torch.autograd.grad(layer.run(op, routed, "silu").sum(), (routed[0], routed[2]), create_graph=True)
    with pytest.raises(RuntimeError, match="globe::moe_ffn_backward has no gradient; GloBE experts pass first deriv"):
        first.square().sum().backward()
