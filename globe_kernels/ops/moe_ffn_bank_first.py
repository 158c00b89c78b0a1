"""Run the experts of one layer straight from the bank, with nothing composed: for phi = identity.

For token t, routed row s = (t, choice k) with expert e = top_k_index[t, k], and f in gate, up:

    S1    z_f[t, u] = bank_f[palette_f[u]] hidden[t]                                 (ops/palette_in.py)
    mix   h_f[s] = scale_f[e] * sum_u value_f[e, u] z_f[t, u]                        (ops/mix.py)
    S2    y[s] = act(adapter_gate[e] h_gate[s] + bias_gate[e], adapter_up[e] h_up[s] + bias_up[e])   (ops/gate_up.py)
    S3    out[t] = sum_k top_k_weights[t, k] * (down[e] y[s] + bias_down[e])         (ops/down.py)

Shapes: T tokens, K experts per token, S = T * K, E experts, P intermediate size, D hidden size, R rank, M atoms of a
bank, U atoms of a palette. `act` joins gate and up (ops/activations.py); biases are optional. A choice whose id names
no expert contributes nothing. Deterministic, unless told otherwise.

Every token meets U atoms instead of the bases of its K experts. That reads fewer bytes than composed bases or dense
experts as soon as more than U experts are active, and takes U / K times the arithmetic: for more tokens than a step of
decoding has, composed bases are faster. z has U / K times the values of h, so tokens go through S1 and mix in chunks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from globe_kernels.ops.compose_layer import compose_bases
from globe_kernels.ops.counters import count_call
from globe_kernels.ops.down import down_ref, launch_down
from globe_kernels.ops.gate_up import gate_up_ref, launch_gate_up
from globe_kernels.ops.mix import Codes, MixConfig, MixShape, choose_mix, launch_mix, mix_ref
from globe_kernels.ops.moe_ffn import FromRank, differentiate, fake_like_hidden
from globe_kernels.ops.palette_in import (
    PaletteInConfig,
    PaletteInShape,
    choose_palette_in,
    launch_palette_in,
    palette_in_ref,
)
from globe_kernels.ops.registration import register_op
from globe_kernels.ops.routing import launch_routing_plan, routing_plan_ref
from globe_kernels.ops.triton_import import use_triton
from globe_kernels.ops.tuning import FfnConfig, FfnShape, choose

WORKSPACE_BYTES = 256 * 2**20  # z of both families, for the tokens of one chunk
_TILE = 128  # tokens: no chunk but the last ends within a tile of S1


class BankFirstWeights(NamedTuple):
    """All weights of the experts of one layer, on one device.

    Palettes and codes come from a LayerCode; all other tensors have one dtype.
    """

    gate_bank: torch.Tensor  # (M, R, D)
    up_bank: torch.Tensor  # (M, R, D)
    gate_palette: torch.Tensor  # (U,) int32
    gate_value: torch.Tensor  # (E, U padded) float32
    gate_scale: torch.Tensor  # (E,) float32
    up_palette: torch.Tensor  # (U,) int32, of another U than gate's in general
    up_value: torch.Tensor  # (E, U padded) float32
    up_scale: torch.Tensor  # (E,) float32
    from_rank: FromRank

    def contiguous(self) -> "BankFirstWeights":
        return BankFirstWeights(*(part.contiguous() for part in self))  # pyright: ignore[reportArgumentType]

    @property
    def mixtures(self) -> tuple[torch.Tensor, ...]:
        """Banks, palettes and codes, in the order in which the op takes them."""
        return self[:-1]

    @property
    def shape(self) -> FfnShape:
        return self.from_rank.shape

    @property
    def rank(self) -> int:
        return self.gate_bank.shape[1]

    @property
    def codes(self) -> Codes:
        return self.gate_value, self.gate_scale, self.up_value, self.up_scale

    def chunk_tokens(self) -> int:
        """Return as many tokens as the workspace has room for."""
        atoms = self.gate_palette.numel() + self.up_palette.numel()
        room = max(1, WORKSPACE_BYTES // (atoms * self.rank * self.gate_bank.element_size()))
        return room - room % _TILE or room

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        step = self.chunk_tokens()
        yield from (slice(start, start + step) for start in range(0, num_tokens, step))


@dataclass(frozen=True)
class BankFirstConfig:
    """The launches of one layer; of `ffn` the row tile, gate_up and down."""

    palette_in: PaletteInConfig
    mix: MixConfig
    ffn: FfnConfig


def choose_bank_first(w: BankFirstWeights, top_k_index: torch.Tensor) -> BankFirstConfig:
    item_size, device = w.gate_bank.element_size(), w.gate_bank.device
    (tokens, top_k), palette = top_k_index.shape, max(w.gate_palette.numel(), w.up_palette.numel())
    call = (min(tokens, w.chunk_tokens()), item_size, device)
    return BankFirstConfig(
        choose_palette_in(PaletteInShape(w.gate_bank.shape[2], w.rank, palette), *call),
        choose_mix(MixShape(w.rank, palette, top_k), *call),
        choose(w.shape, top_k_index.numel(), item_size, device),
    )


def _run(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    mixtures: list[torch.Tensor],
    from_rank: list[torch.Tensor | None],
    activation: str,
    deterministic: bool,
) -> torch.Tensor:
    w = BankFirstWeights(*mixtures, FromRank(*from_rank))  # pyright: ignore[reportCallIssue, reportArgumentType]
    if not use_triton(hidden):
        count_call("moe_ffn_bank_first_ref")
        return moe_ffn_bank_first_ref(hidden, top_k_index, top_k_weights, w, activation)
    count_call("moe_ffn_bank_first")
    config = choose_bank_first(w, top_k_index)
    routing = (top_k_index.contiguous(), top_k_weights.contiguous())
    return launch_moe_ffn_bank_first(hidden.contiguous(), *routing, w.contiguous(), activation, config, deterministic)


def _backward(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    mixtures: list[torch.Tensor],
    from_rank: list[torch.Tensor | None],
    activation: str,
) -> dict[str, torch.Tensor]:
    banks, codes = mixtures[:2], mixtures[2:]
    basis = compose_bases(codes, banks, "identity", hidden.dtype)
    return differentiate(gradient, hidden, top_k_index, top_k_weights, [basis, *from_rank], activation)


# (T, D) in the dtype of hidden (T, D): kernels on a GPU, the reference elsewhere. top_k_index and top_k_weights (T, K);
# mixtures: BankFirstWeights.mixtures, from_rank: FromRank; all but codes and palettes in the dtype of hidden.
# globe_kernels.functional checks the shapes.
moe_ffn_bank_first = register_op(
    "moe_ffn_bank_first(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor[] mixtures, "
    "Tensor?[] from_rank, str activation, bool deterministic) -> Tensor",
    _run,
    fake_like_hidden,
    _backward,
)


def launch_moe_ffn_bank_first(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    w: BankFirstWeights,
    activation: str,
    config: BankFirstConfig,
    deterministic: bool = True,
) -> torch.Tensor:
    """Launch the kernels on contiguous inputs in `config`, without waiting for the device."""
    num_tokens = hidden.shape[0]
    if num_tokens == 0:
        return torch.empty_like(hidden)
    top_k = top_k_index.shape[1]
    h = hidden.new_empty(num_tokens * top_k, 2 * w.rank)
    for part in w.chunks(num_tokens):
        rows = h.view(num_tokens, top_k, 2 * w.rank)[part]
        _launch_mixed(hidden[part], top_k_index[part], w, config, rows)
    plan = launch_routing_plan(top_k_index, w.shape.experts, config.ffn.block_m)
    y = launch_gate_up(h, plan, w.from_rank.adapters, activation, config.ffn.gate_up, gather=1)
    return launch_down(y, plan, w.from_rank.down, (top_k_index, top_k_weights), config.ffn.down, deterministic)


def _launch_mixed(
    hidden: torch.Tensor, top_k_index: torch.Tensor, w: BankFirstWeights, config: BankFirstConfig, out: torch.Tensor
) -> None:
    """Run S1 and mix for one chunk: a function, so that the next chunk gets the memory of z of this chunk."""
    gate = launch_palette_in(hidden, w.gate_palette, w.gate_bank, config.palette_in)
    up = launch_palette_in(hidden, w.up_palette, w.up_bank, config.palette_in)
    launch_mix((gate, up), top_k_index, w.codes, out, config.mix)


def moe_ffn_bank_first_ref(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    w: BankFirstWeights,
    activation: str,
) -> torch.Tensor:
    """Run the references of the stages."""
    h = hidden.new_empty(top_k_index.numel(), 2 * w.rank)
    rows = h.view(-1, top_k_index.shape[1], 2 * w.rank)
    for part in w.chunks(hidden.shape[0]):
        gate = palette_in_ref(hidden[part], w.gate_palette, w.gate_bank)
        up = palette_in_ref(hidden[part], w.up_palette, w.up_bank)
        rows[part] = mix_ref((gate, up), top_k_index[part], w.codes).view_as(rows[part])
    plan = routing_plan_ref(top_k_index, w.shape.experts, block_m=16)
    y = gate_up_ref(h, plan, w.from_rank.adapters, activation, gather=1)
    return down_ref(y, plan, w.from_rank.down, top_k_weights)
