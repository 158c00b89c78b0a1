"""Every kernel once on a small case with ragged tiles, for compute-sanitizer to watch:

compute-sanitizer --error-exitcode 1 python benchmarks/sanitize.py
"""

import torch
from providers import dense_twin, globe, random_inputs, random_layer, reference
from shapes import LayerShape

from globe_kernels.ops.compose_basis import compose_basis
from globe_kernels.testing import assert_close


def main() -> None:
    torch.manual_seed(0)
    layer = random_layer(LayerShape(hidden=176, intermediate=80, experts=9, choices=3), 48, torch.bfloat16, "cuda")
    for tokens in (1, 30, 200, 1500):
        inputs = random_inputs(layer.shape, tokens, torch.bfloat16, "cuda")
        inputs.index[0, 0] = layer.shape.experts  # a sentinel
        expected = reference(layer, random_without_sentinels(inputs, layer.shape.experts))
        for build in (globe, dense_twin):
            assert_close(build(layer)(inputs), expected, rms=2e-2, peak=5e-2)
    index = torch.randint(7, (9, 3), device="cuda", dtype=torch.int32)
    value, bank = torch.randn(9, 3, device="cuda"), torch.randn(7, 48, 176, device="cuda").bfloat16()
    for phi in ("identity", "silu", "tanh"):
        assert torch.isfinite(compose_basis(index, value, bank, phi, torch.bfloat16)).all()
    torch.cuda.synchronize()
    print("sanitize: every kernel ran")


def random_without_sentinels(inputs, experts: int):
    """The same inputs with sentinels turned into choices of weight zero, which the reference understands."""
    sentinel = inputs.index >= experts
    return type(inputs)(inputs.hidden, inputs.index.masked_fill(sentinel, 0), inputs.weights.masked_fill(sentinel, 0))


if __name__ == "__main__":
    main()
