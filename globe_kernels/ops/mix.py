# pyright: reportInvalidTypeForm=false
"""Mix of `bank_first`: turn the products of a token with the atoms into its products with the bases of its experts.

    h[t * K + k, f] = scale_f[e] * sum_u value_f[e, u] z_f[t, u]        e = top_k_index[t, k], f in gate, up

Shapes: T tokens, K experts per token, S = T * K routed rows in the order of tokens and choices, E experts, U atoms of a
family's palette, R rank; z_f (T, U, R), h (S, 2R) with gate first. Codes are a LayerCode (ops/compose_layer.py): value
(E, U padded) and scale (E,), float32. Accumulates in fp32, and 16-bit z meets codes in full precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch

from globe_kernels.ops.compose_layer import dot_codes
from globe_kernels.ops.triton_import import tl, triton
from globe_kernels.ops.tuning import REMEMBERED, by_rows, tuned

# value and scale of gate, value and scale of up
Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_CHOICES = 32  # experts per token: the most that `needs` counts with


@dataclass(frozen=True)
class MixConfig:
    """Tile sizes, in atoms, which divide the padding of codes, and in values of the rank."""

    block_u: int
    block_r: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        return {
            "BLOCK_U": self.block_u,
            "BLOCK_R": self.block_r,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def needs(self, item_size: int) -> Iterator[tuple[float, int]]:
        """Count for up to 32 choices. Each family has its pipeline, and all stages but the last hold its tiles."""
        stage = self.block_u * (self.block_r * item_size + _CHOICES * 4)
        yield _CHOICES * self.block_r / (32 * self.num_warps), (2 * self.num_stages - 1) * stage

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(**data)


@dataclass(frozen=True)
class MixShape:
    """The sizes that the best configuration depends on."""

    rank: int  # R
    palette: int  # U, of the family that has more
    top_k: int  # K


# By tokens: (up to this many, configuration). With few tokens more programs, with many less reading of codes beside z.
# A palette is one or two tiles of atoms: several programs on a multiprocessor hide the loads, not pipeline stages.
CONFIGS = (
    (32, MixConfig(block_u=32, block_r=64, num_warps=4, num_stages=2)),
    (None, MixConfig(block_u=32, block_r=128, num_warps=4, num_stages=2)),
)


def default_mix(num_tokens: int) -> MixConfig:
    return by_rows(CONFIGS, num_tokens)


@lru_cache(REMEMBERED)
def choose_mix(shape: MixShape, num_tokens: int, item_size: int, device: torch.device) -> MixConfig:
    return tuned(default_mix(num_tokens), "mix", shape, num_tokens, item_size, device)


@triton.jit
def _mix_family(
    z_ptr,  # (T, U, R)
    value_ptr,  # (E, padded) float32
    scale_ptr,  # (E,) float32
    out_ptr,  # (S, 2R), from the family's first column on
    token,
    experts,  # (K_PAD,) int64
    routed,  # (K_PAD,)
    ranks,  # (BLOCK_R,)
    num_atoms,  # U
    padded,  # a multiple of BLOCK_U
    top_k,
    rank,  # R
    K_PAD: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Mix BLOCK_R columns of one family for all choices of one token."""
    rank_mask = ranks < rank
    acc = tl.zeros((K_PAD, BLOCK_R), dtype=tl.float32)
    for start in range(0, num_atoms, BLOCK_U):
        atoms = start + tl.arange(0, BLOCK_U)
        z = tl.load(
            z_ptr + (token * num_atoms + atoms)[:, None] * rank + ranks[None, :],
            mask=(atoms < num_atoms)[:, None] & rank_mask[None, :],
            other=0.0,
        )
        code = tl.load(value_ptr + experts[:, None] * padded + atoms[None, :], mask=routed[:, None], other=0.0)
        acc = dot_codes(code, z, acc)
    acc *= tl.load(scale_ptr + experts, mask=routed, other=0.0)[:, None]
    rows = token * top_k + tl.arange(0, K_PAD)
    out = out_ptr + rows[:, None] * (2 * rank) + ranks[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=routed[:, None] & rank_mask[None, :])


@triton.jit(do_not_specialize=["gate_atoms", "up_atoms"])
def _mix_kernel(
    gate_z_ptr,  # (T, U of gate, R)
    up_z_ptr,  # (T, U of up, R)
    index_ptr,  # (T, K)
    gate_value_ptr,  # (E, gate_padded) float32
    gate_scale_ptr,  # (E,) float32
    up_value_ptr,  # (E, up_padded) float32
    up_scale_ptr,  # (E,) float32
    out_ptr,  # (S, 2R)
    gate_atoms,
    up_atoms,
    gate_padded,
    up_padded,
    num_experts,
    top_k,
    rank,  # R
    K_PAD: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid: (T * cdiv(R, BLOCK_R), 2). One program owns BLOCK_R values of one family, for all choices of one token.

    So z, by far the largest operand, is read once, whatever K; rows of codes come from the L2 cache. Fewer choices than
    a tile of the tensor cores has rows leave some of them idle, which costs nothing next to the reading. Rows of ids
    that name no expert are not written.
    """
    blocks = tl.cdiv(rank, BLOCK_R)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    ranks = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    choices = tl.arange(0, K_PAD)
    experts = tl.load(index_ptr + token * top_k + choices, mask=choices < top_k, other=0).to(tl.int64)
    routed = (choices < top_k) & (experts >= 0) & (experts < num_experts)
    # fmt: off
    if tl.program_id(1) == 0:
        _mix_family(gate_z_ptr, gate_value_ptr, gate_scale_ptr, out_ptr, token, experts, routed, ranks,
                    gate_atoms, gate_padded, top_k, rank, K_PAD, BLOCK_U, BLOCK_R)
    else:
        _mix_family(up_z_ptr, up_value_ptr, up_scale_ptr, out_ptr + rank, token, experts, routed, ranks,
                    up_atoms, up_padded, top_k, rank, K_PAD, BLOCK_U, BLOCK_R)
    # fmt: on


def launch_mix(
    z: tuple[torch.Tensor, torch.Tensor],  # of gate and of up, (T, U, R) each
    top_k_index: torch.Tensor,  # (T, K)
    codes: Codes,
    out: torch.Tensor,  # (S, 2R)
    config: MixConfig,
) -> None:
    """Launch the kernel on contiguous inputs in `config`, into `out`."""
    (num_tokens, gate_atoms, rank), up_atoms = z[0].shape, z[1].shape[1]
    num_experts, top_k = codes[0].shape[0], top_k_index.shape[1]
    grid = (num_tokens * triton.cdiv(rank, config.block_r), 2)
    _mix_kernel[grid](
        *z,
        top_k_index,
        *codes,
        out,
        gate_atoms,
        up_atoms,
        codes[0].shape[1],
        codes[2].shape[1],
        num_experts,
        top_k,
        rank,
        K_PAD=max(16, triton.next_power_of_2(top_k)),
        **config.launch(),
    )


def mix_ref(z: tuple[torch.Tensor, torch.Tensor], top_k_index: torch.Tensor, codes: Codes) -> torch.Tensor:
    """Compute what `launch_mix` computes; rows of ids that name no expert are zero."""
    routed = (top_k_index >= 0) & (top_k_index < codes[0].shape[0])
    expert = torch.where(routed, top_k_index, 0).long()
    mixed = []
    for product, value, scale in zip(z, codes[::2], codes[1::2], strict=True):
        code = value[expert, : product.shape[1]] * (scale[expert] * routed)[..., None]
        dtype = torch.promote_types(product.dtype, code.dtype)
        mixed.append(torch.bmm(code.to(dtype), product.to(dtype)).to(product.dtype))
    return torch.cat(mixed, dim=2).flatten(0, 1)
