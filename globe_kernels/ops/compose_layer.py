# pyright: reportInvalidTypeForm=false
"""Compose the bases of all experts of one layer as a matrix product over its palette: each atom is read once.

    basis[e] = phi(scale[e] * sum_u value[e, u] * bank[palette[u]])

Shapes: E experts, U distinct atoms of the layer (its palette), M atoms, R rank, D hidden size. Accumulates in fp32.

`ops/compose_basis.py` gathers: it reads every atom once per expert that uses it, which suits few experts. Here a
program owns a slice of all bases, and a slice of an atom serves every expert while it is on the chip. A code multiplies
16-bit atoms as the sum of two 16-bit values: in bf16 that is 2^-17 of the largest code from the truth, and not 2^-9.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

import torch

from globe_kernels.ops.compose_basis import apply_phi, mix_atoms
from globe_kernels.ops.registration import register_op
from globe_kernels.ops.triton_import import on_its_device, tl, triton, use_triton
from globe_kernels.ops.tuning import REMEMBERED, by_rows, tuned

PALETTE_PADDING = 32  # the kernel loads rows of codes whole, 16 bytes at a time: every BLOCK_U divides this


class LayerCode(NamedTuple):
    """The codes of one layer as a dense matrix over its palette."""

    palette: torch.Tensor  # (U,) int32, the distinct atoms, ascending
    value: torch.Tensor  # (E, U padded with zeros) float32, the largest magnitude of each row is 1
    scale: torch.Tensor  # (E,) float32


def layer_code(code_index: torch.Tensor, code_value: torch.Tensor) -> LayerCode:
    """Build a LayerCode from code_index (E, C) int32 and code_value (E, C) float32; waits for the device."""
    palette, place = code_index.unique(return_inverse=True)
    padded = -(-palette.numel() // PALETTE_PADDING) * PALETTE_PADDING
    value = code_value.new_zeros(code_index.shape[0], padded)
    value.scatter_add_(1, place.view(code_index.shape), code_value)
    scale = value.abs().amax(1)
    value /= torch.where(scale > 0, scale, 1.0)[:, None]
    return LayerCode(palette.int(), value, scale)


@dataclass(frozen=True)
class ComposeConfig:
    """Tile sizes, in experts, in values of a basis, in atoms, and launch options."""

    block_e: int
    block_v: int
    block_u: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        return {
            "BLOCK_E": self.block_e,
            "BLOCK_V": self.block_v,
            "BLOCK_U": self.block_u,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def needs(self, item_size: int) -> Iterator[tuple[float, int]]:
        """The id of an atom is loaded before the atom, so two stages of the pipeline hold one tile of each; the tile of
        the result passes through the same memory."""
        stage = self.block_u * (self.block_v * item_size + self.block_e * 4 + 4)
        pipeline = max(2, self.num_stages // 2 + 1) * stage
        result = self.block_e * self.block_v
        yield result / (32 * self.num_warps), max(pipeline, result * item_size)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(**data)


@dataclass(frozen=True)
class ComposeShape:
    """The sizes that the best configuration depends on."""

    experts: int  # E
    palette: int  # U
    values: int  # of one basis, R * D


# By experts: (up to this many, configuration). A tile holds all experts of most models; a model with more experts
# visits a slice of the atoms again while it is in the L2 cache.
CONFIGS = (
    (16, ComposeConfig(block_e=16, block_v=256, block_u=32, num_warps=4, num_stages=3)),
    (64, ComposeConfig(block_e=64, block_v=128, block_u=32, num_warps=4, num_stages=3)),
    (None, ComposeConfig(block_e=128, block_v=128, block_u=32, num_warps=8, num_stages=3)),
)


def default_compose(num_experts: int) -> ComposeConfig:
    return by_rows(CONFIGS, num_experts)


@lru_cache(REMEMBERED)
def choose_compose(shape: ComposeShape, item_size: int, device: torch.device) -> ComposeConfig:
    return tuned(default_compose(shape.experts), "compose_layer", shape, 1, item_size, device)


@triton.jit
def dot_codes(
    code,  # (rows, atoms) float32
    values,  # (atoms, columns)
    acc,  # (rows, columns) float32
):
    """Return acc + code @ values, with codes in full precision beside 16-bit values too."""
    if values.dtype == tl.float32:
        acc = tl.dot(code, values, acc, input_precision="ieee")
    else:
        high = code.to(values.dtype)
        acc = tl.dot(high, values, acc)
        acc = tl.dot((code - high.to(tl.float32)).to(values.dtype), values, acc)
    return acc


@triton.jit
def _compose_layer_kernel(
    palette_ptr,  # (U,) int32
    value_ptr,  # (E, padded) float32
    scale_ptr,  # (E,) float32
    bank_ptr,  # (M, num_values)
    out_ptr,  # (E, num_values), rows of `row_stride` values
    num_experts,
    num_atoms,  # U
    padded,  # a multiple of BLOCK_U
    num_values,  # R * D
    row_stride,
    PHI: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Grid: (cdiv(E, BLOCK_E) * cdiv(R * D, BLOCK_V),). One program owns BLOCK_V values of BLOCK_E experts.

    Blocks of experts vary fastest, so that they share slices of the atoms in the L2 cache.
    """
    expert_blocks = tl.cdiv(num_experts, BLOCK_E)
    experts = tl.program_id(0) % expert_blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    values = tl.program_id(0) // expert_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    expert_mask, value_mask = experts < num_experts, values < num_values
    acc = tl.zeros((BLOCK_E, BLOCK_V), dtype=tl.float32)
    for start in range(0, num_atoms, BLOCK_U):
        places = start + tl.arange(0, BLOCK_U)
        used = places < num_atoms
        atom = tl.load(palette_ptr + places, mask=used, other=0).to(tl.int64)
        atoms = tl.load(
            bank_ptr + atom[:, None] * num_values + values[None, :], mask=used[:, None] & value_mask[None, :], other=0.0
        )
        code = tl.load(value_ptr + experts[:, None] * padded + places[None, :], mask=expert_mask[:, None], other=0.0)
        acc = dot_codes(code, atoms, acc)
    scale = tl.load(scale_ptr + experts, mask=expert_mask, other=0.0)
    basis = apply_phi(acc * scale[:, None], PHI)
    out = out_ptr + experts.to(tl.int64)[:, None] * row_stride + values[None, :]
    tl.store(out, basis.to(out_ptr.dtype.element_ty), mask=expert_mask[:, None] & value_mask[None, :])


def launch_compose_layer(
    code: LayerCode, bank: torch.Tensor, phi: str, out: torch.Tensor, config: ComposeConfig
) -> torch.Tensor:
    """Launch the kernel on contiguous inputs in `config`, into `out` (E, R, D), contiguous in an expert."""
    num_experts, padded = code.value.shape
    num_values = bank.shape[1] * bank.shape[2]
    grid = (triton.cdiv(num_experts, config.block_e) * triton.cdiv(num_values, config.block_v),)
    _compose_layer_kernel[grid](
        *code,
        bank,
        out,
        num_experts,
        code.palette.numel(),
        padded,
        num_values,
        out.stride(0),
        PHI=phi,
        **config.launch(),
    )
    return out


def _run(codes: list[torch.Tensor], banks: list[torch.Tensor], phi: str, out_dtype: torch.dtype) -> torch.Tensor:
    out = fake_bases(codes, banks, phi, out_dtype)
    compose_bases_into(out, (LayerCode(*codes[:3]), LayerCode(*codes[3:])), (banks[0], banks[1]), phi)
    return out


def fake_bases(codes: list[torch.Tensor], banks: list[torch.Tensor], phi: str, out_dtype: torch.dtype) -> torch.Tensor:
    """Return an empty (E, 2R, D), as `compose_bases` fills it."""
    num_experts, (_, rank, width) = codes[1].shape[0], banks[0].shape
    return banks[0].new_empty(num_experts, 2 * rank, width, dtype=out_dtype)


# (E, 2R, D) in out_dtype, gate rows first: the bases of a layer, as ExpertWeights takes them. codes: the LayerCode of
# gate, then of up; banks: (M, R, D) of gate, then of up.
compose_bases = register_op(
    "compose_bases(Tensor[] codes, Tensor[] banks, str phi, ScalarType out_dtype) -> Tensor", _run, fake_bases
)


@on_its_device
def compose_bases_into(
    out: torch.Tensor, codes: tuple[LayerCode, LayerCode], banks: tuple[torch.Tensor, torch.Tensor], phi: str
) -> None:
    """Fill `out` (E, 2R, D), gate rows first, from codes and banks of gate and up."""
    for half, code, bank in zip(out.chunk(2, dim=1), codes, banks, strict=True):
        compose_family(code, bank, phi, half)


def compose_family(code: LayerCode, bank: torch.Tensor, phi: str, out: torch.Tensor) -> torch.Tensor:
    """Fill `out` (E, R, D), contiguous in an expert: by the kernel on a GPU, else by the reference."""
    code = LayerCode(*(tensor.contiguous() for tensor in code))
    if use_triton(bank):
        shape = ComposeShape(out.shape[0], code.palette.numel(), out.shape[1] * out.shape[2])
        config = choose_compose(shape, bank.element_size(), bank.device)
        return launch_compose_layer(code, bank.contiguous(), phi, out, config)
    return compose_layer_ref(code, bank, phi, out)


def compose_layer_ref(code: LayerCode, bank: torch.Tensor, phi: str, out: torch.Tensor) -> torch.Tensor:
    """Fill `out` as `launch_compose_layer` does."""
    value = code.value[:, : code.palette.numel()] * code.scale[:, None]
    mix_atoms(value, code.palette, bank.flatten(1), phi, out.view(value.shape[0], -1))
    return out
