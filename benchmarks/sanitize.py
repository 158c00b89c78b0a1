"""Run every kernel once on a small case with ragged tiles, for compute-sanitizer to watch:

compute-sanitizer --error-exitcode 1 python benchmarks/sanitize.py
"""

import torch
from providers import dense_twin, globe, globe_atomic, globe_bank_first, random_inputs, random_layer, reference
from shapes import LayerShape

from globe_kernels.functional import moe_ffn, moe_ffn_cached
from globe_kernels.model.cache import BasisCache
from globe_kernels.ops.batched_spd_solve import batched_spd_solve_ref, launch_batched_spd_solve, load_extension
from globe_kernels.ops.compose_basis import compose_basis_ref, launch_compose_basis
from globe_kernels.ops.compose_layer import compose_family, layer_code
from globe_kernels.ops.compose_slots import Mixtures
from globe_kernels.ops.mixture import mixture, mixture_ref
from globe_kernels.ops.moe_ffn import FromRank, moe_ffn_ref
from globe_kernels.ops.moe_ffn_backward import moe_ffn_backward, moe_ffn_backward_ref
from globe_kernels.ops.moe_ffn_cached import CachedWeights
from globe_kernels.testing import assert_close

SHAPE = LayerShape(hidden=176, intermediate=80, experts=9, choices=3)
RANK = 48


def run(device: str, dtype: torch.dtype, tokens: tuple[int, ...] = (1, 30, 200, 1500)) -> None:
    """Raises AssertionError when a result is wrong."""
    torch.manual_seed(0)
    layer = random_layer(SHAPE, RANK, dtype, device)
    biases = [torch.randn(9, size, device=device).to(dtype) for size in (80, 80, 176)]
    with_biases = layer.weights._replace(from_rank=FromRank(*layer.weights.from_rank[:3], *biases))
    for count in tokens:
        inputs = random_inputs(SHAPE, count, dtype, device)
        inputs.index[0, 0] = SHAPE.experts  # a sentinel
        expected = reference(layer, without_sentinels(inputs))
        for build in (globe, globe_atomic, globe_bank_first, dense_twin):
            assert_close(build(layer)(inputs), expected, rms=2e-2, peak=5e-2)
        case = (inputs.hidden, inputs.index, inputs.weights, with_biases, "clamped_swiglu")
        assert_close(moe_ffn(*case), moe_ffn_ref(*case), rms=2e-2, peak=5e-2)
        case, w = (torch.randn_like(inputs.hidden), *case[:3]), with_biases
        found = moe_ffn_backward(*case, w.to_list(), "clamped_swiglu")
        factors = (w.basis, w.from_rank.adapters, w.from_rank.down)
        for one, other in zip(found, moe_ffn_backward_ref(*case, *factors, "clamped_swiglu"), strict=True):
            assert_close(one, other, rms=2e-2, peak=5e-2)
    index = torch.randint(7, (9, 3), device=device, dtype=torch.int32)
    value, bank = torch.randn(9, 3, device=device), torch.randn(7, RANK, 176, device=device).to(dtype)
    if device == "cuda" and load_extension():
        for k in (1, 12, 31, 50, 101):
            gram, rhs = torch.randn(9, k, 2 * k, device=device), torch.randn(9, k, 5, device=device)
            gram = gram @ gram.mT
            solved = launch_batched_spd_solve(gram, rhs).solution
            assert_close(solved, batched_spd_solve_ref(gram, rhs).solution, rms=1e-4, peak=1e-4)
    gather = launch_compose_basis if device == "cuda" else compose_basis_ref
    for phi in ("identity", "silu", "tanh"):
        composed = compose_basis_ref(index, value, bank, phi, torch.float32)
        assert_close(gather(index, value, bank, phi, dtype), composed, rms=4e-3, peak=8e-3)
        whole = compose_family(layer_code(index, value), bank, phi, torch.empty_like(composed, dtype=dtype))
        assert_close(whole, composed, rms=4e-3, peak=8e-3)
    cached = CachedWeights(Mixtures(bank, bank, index, value, index, value), layer.weights.from_rank)
    half = gather(index, value, bank, "tanh", dtype)
    composed = layer.weights._replace(basis=torch.cat([half, half], 1))
    for slots in (1, 4, 9):
        cache = BasisCache({0: 9}, slots, RANK, 176, dtype, device)
        for count in (1, 30, 1):
            inputs = random_inputs(SHAPE, count, dtype, device)
            case = (inputs.hidden, inputs.index, inputs.weights)
            out = moe_ffn_cached(*case, cached, cache, 0, "tanh", "silu")
            assert_close(out, moe_ffn(*case, composed, "silu"), rms=2e-2, peak=5e-2)
    case, gradient = (index, value, bank.float()), torch.randn(9, RANK, 176, device=device)
    results = []
    for op in (mixture, mixture_ref):
        found, backward = op(*case)
        bank_gradient = torch.zeros_like(case[2])
        results.append((found, backward(gradient, bank_gradient), bank_gradient))
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, rms=1e-5, peak=1e-5)


def without_sentinels(inputs):
    """Turn sentinels into experts of weight zero, which the reference understands."""
    sentinel = inputs.index >= SHAPE.experts
    return type(inputs)(inputs.hidden, inputs.index.masked_fill(sentinel, 0), inputs.weights.masked_fill(sentinel, 0))


if __name__ == "__main__":
    run("cuda", torch.bfloat16)
    torch.cuda.synchronize()
    print("sanitize: every kernel ran")
