# pyright: reportInvalidTypeForm=false
"""S1 of `bank_first`: project every token on every atom of the layer's palette, of one family.

    z[t, u] = bank[palette[u]] x[t]

Shapes: T tokens, U atoms of the palette, M atoms of the bank, R rank, D hidden size. Accumulates in fp32.

A plain GEMM of N = U * R columns. An atom is R rows of the one resident bank, found through its id: nothing is copied.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import torch

from globe_kernels.ops.grouped import accumulate, tile_of_program
from globe_kernels.ops.triton_import import tl, triton
from globe_kernels.ops.tuning import REMEMBERED, GemmConfig, Target, by_rows, fit_gemm, target_of, tuned


@dataclass(frozen=True)
class PaletteInConfig:
    """One launch: the rows of a tile and the GEMM."""

    block_m: int
    gemm: GemmConfig

    def needs(self, item_size: int) -> Iterator[tuple[float, int]]:
        yield self.gemm.accumulators(self.block_m, 1), self.gemm.shared_bytes(self.block_m, item_size)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(data["block_m"], GemmConfig(**data["gemm"]))


@dataclass(frozen=True)
class PaletteInShape:
    """The sizes that the best configuration depends on."""

    hidden: int  # D
    rank: int  # R
    palette: int  # U


# By tokens: (up to this many, configuration). Up to about 256 tokens the launch is bound by reading the atoms: it takes
# row tiles that hold the tokens, and column tiles narrow enough for every multiprocessor to have one. Beyond that it is
# bound by arithmetic and takes the widest tile that registers hold. On sm_90 tiles from 64 rows are wgmma.
CONFIGS = (
    (16, PaletteInConfig(16, GemmConfig(64, 128, group_m=1, num_warps=4, num_stages=4))),
    (32, PaletteInConfig(32, GemmConfig(64, 128, group_m=1, num_warps=4, num_stages=4))),
    (64, PaletteInConfig(64, GemmConfig(128, 64, group_m=1, num_warps=4, num_stages=4))),
    (256, PaletteInConfig(128, GemmConfig(128, 64, group_m=2, num_warps=8, num_stages=3))),
    (None, PaletteInConfig(128, GemmConfig(256, 64, group_m=8, num_warps=8, num_stages=4))),
)


def default_palette_in(num_tokens: int, item_size: int, target: Target) -> PaletteInConfig:
    """Return a configuration that no card was measured for, cut to fit `target`."""
    config = by_rows(CONFIGS, num_tokens)
    return replace(config, gemm=fit_gemm(config.gemm, config.block_m, item_size, target))


@lru_cache(REMEMBERED)
def choose_palette_in(shape: PaletteInShape, num_tokens: int, item_size: int, device: torch.device) -> PaletteInConfig:
    default = default_palette_in(num_tokens, item_size, target_of(device))
    return tuned(default, "palette_in", shape, num_tokens, item_size, device)


@triton.jit(do_not_specialize=["num_tokens"])
def _palette_in_kernel(
    x_ptr,  # (T, D)
    palette_ptr,  # (U,) int32
    bank_ptr,  # (M, R, D)
    out_ptr,  # (T, U * R)
    num_tokens,
    num_columns,  # U * R
    rank,  # R
    depth,  # D
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (cdiv(T, BLOCK_M) * cdiv(U * R, BLOCK_N),). One program owns BLOCK_M tokens and BLOCK_N columns."""
    tile, columns = tile_of_program(tl.cdiv(num_tokens, BLOCK_M), num_columns, BLOCK_N, GROUP_M)
    tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token_mask, column_mask = tokens < num_tokens, columns < num_columns
    tokens = tokens.to(tl.int64)[:, None]
    atom = tl.load(palette_ptr + columns // rank, mask=column_mask, other=0).to(tl.int64)
    acc = accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
        x_ptr + tokens * depth,
        token_mask[:, None],
        bank_ptr + (atom * rank + columns % rank)[None, :] * depth,
        column_mask[None, :],
        depth,
        EVEN_K,
        BLOCK_K,
    )
    out = out_ptr + tokens * num_columns + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=token_mask[:, None] & column_mask[None, :])


def launch_palette_in(
    x: torch.Tensor, palette: torch.Tensor, bank: torch.Tensor, config: PaletteInConfig
) -> torch.Tensor:
    """Launch the kernel on contiguous inputs in `config`; return z (T, U, R)."""
    num_tokens, (_, rank, depth) = x.shape[0], bank.shape
    out = x.new_empty(num_tokens, palette.numel(), rank)
    columns = palette.numel() * rank
    grid = (triton.cdiv(num_tokens, config.block_m) * triton.cdiv(columns, config.gemm.block_n),)
    _palette_in_kernel[grid](
        x,
        palette,
        bank,
        out,
        num_tokens,
        columns,
        rank,
        depth,
        EVEN_K=depth % config.gemm.block_k == 0,
        BLOCK_M=config.block_m,
        **config.gemm.launch(),
    )
    return out


def palette_in_ref(x: torch.Tensor, palette: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Compute what `launch_palette_in` computes, one product per atom; waits for the device."""
    z = x.new_empty(x.shape[0], palette.numel(), bank.shape[1])
    for place, atom in enumerate(palette.tolist()):
        torch.mm(x, bank[atom].T, out=z[:, place])
    return z
