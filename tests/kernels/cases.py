"""Where kernels run in these tests, the routings they must survive, the layer they must compute, and a machine."""

import pytest
import torch
import torch.nn.functional as F

from globe_kernels.ops.moe_ffn import FromRank
from globe_kernels.ops.triton_import import HAS_TRITON
from globe_kernels.ops.tuning import FfnConfig, GemmConfig
from globe_kernels.strategies.cost import Machine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# On a CPU the kernels run in Triton's interpreter (tests/conftest.py turns it on), in fp32 and fp16: its bf16
# arithmetic works on the bits as integers.
needs_kernels = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
KERNEL_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

# about one; the entry of machines.json changes when benchmarks/machine.py measures a card
H100 = Machine("h100", "H100", 3000, 800, 2.0, 80, 2, "assumed; not measured by this project")

E = 5
ROUTINGS = {
    "ragged tails, expert 3 empty": torch.tensor([[0, 1], [4, 0], [1, 2], [0, 2], [2, 4], [4, 1], [0, 4]]),
    "one token": torch.tensor([[3, 1]]),
    "all on one expert": torch.full((21, 1), 2),
    "K = E": torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(2)) for _ in range(4)]),
    "sentinels, a token with nothing else": torch.tensor([[0, E], [E, E + 3], [E, 1], [-1, 2]]),
    "full tiles, many blocks": torch.arange(160).view(80, 2) % E,
}


def same_tiles(block_m: int, block_n: int, block_k: int, group_m: int) -> FfnConfig:
    """The same tile in every stage."""
    gemm = GemmConfig(block_n, block_k, group_m, num_warps=4, num_stages=2)
    return FfnConfig(block_m, gemm, gemm, gemm)


def silu_gated(gate, up):
    return F.silu(gate) * up


def token_by_token(hidden, index, scale, bases, w: FromRank, join=silu_gated, experts=E) -> torch.Tensor:
    """Independent of the ops: in fp64, from the bases (E, R, D) of gate and of up by way of dense matrices."""
    biases = (w.gate_bias, w.up_bias, w.down_bias)
    gate_bias, up_bias, down_bias = (
        torch.zeros(experts, 1, device=DEVICE) if b is None else b.double() for b in biases
    )
    adapters = (w.gate_adapter, w.up_adapter)
    gate, up = (adapter.double() @ basis.double() for adapter, basis in zip(adapters, bases, strict=True))
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for token, x in enumerate(hidden.double()):
        for choice, expert in enumerate(index[token].tolist()):
            if 0 <= expert < experts:
                y = join(gate[expert] @ x + gate_bias[expert], up[expert] @ x + up_bias[expert])
                out[token] += scale[token, choice].double() * (w.down_proj[expert].double() @ y + down_bias[expert])
    return out


def transposed_in_memory(tensor):
    """The same values, no longer contiguous where there is more than one dimension."""
    return tensor if tensor is None or tensor.ndim == 1 else tensor.mT.contiguous().mT
