"""The layer straight from the bank, and its two stages: references and kernels against fp64, token by token."""

import pytest
import torch

from globe_kernels.functional import moe_ffn_bank_first
from globe_kernels.ops import moe_ffn_bank_first as module
from globe_kernels.ops.activations import gated_activation
from globe_kernels.ops.compose_layer import PALETTE_PADDING, LayerCode, layer_code
from globe_kernels.ops.counters import call_counts
from globe_kernels.ops.mix import CONFIGS as MIX_CONFIGS
from globe_kernels.ops.mix import MixConfig, MixShape, default_mix, launch_mix, mix_ref
from globe_kernels.ops.moe_ffn import FromRank
from globe_kernels.ops.moe_ffn_bank_first import (
    BankFirstConfig,
    BankFirstWeights,
    choose_bank_first,
    launch_moe_ffn_bank_first,
    moe_ffn_bank_first_ref,
)
from globe_kernels.ops.moe_ffn_bank_first import moe_ffn_bank_first as moe_ffn_bank_first_op
from globe_kernels.ops.palette_in import (
    CONFIGS,
    PaletteInConfig,
    PaletteInShape,
    default_palette_in,
    launch_palette_in,
    palette_in_ref,
)
from globe_kernels.ops.tuning import SMALLEST_TARGET, TARGETS, GemmConfig, fit_gemm
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

D, P, R = 20, 12, 7
GATE_ATOMS, UP_ATOMS, BANK, SUPPORT = 9, 35, 40, 4  # palettes: less than a tile of atoms, and a ragged second tile
# at about twice what torch itself errs in the same dtype; the whole layer rounds four times
STAGE_LIMITS = {torch.float32: (1e-6, 2e-6), torch.float16: (1e-3, 2e-3), torch.bfloat16: (8e-3, 1.6e-2)}
LIMITS = {torch.float32: (2e-6, 4e-6), torch.float16: (2e-3, 4e-3), torch.bfloat16: (1.5e-2, 3e-2)}
SMALL_IN = PaletteInConfig(16, GemmConfig(16, 16, group_m=2, num_warps=4, num_stages=2))
LARGE_IN = PaletteInConfig(32, GemmConfig(64, 64, group_m=1, num_warps=4, num_stages=2))
SMALL_MIX, LARGE_MIX = MixConfig(16, 16, num_warps=4, num_stages=2), MixConfig(32, 64, num_warps=4, num_stages=2)
TILES = {
    "tiles smaller than the matrices": BankFirstConfig(SMALL_IN, SMALL_MIX, same_tiles(16, 16, 16, group_m=2)),
    "tiles larger than the matrices": BankFirstConfig(LARGE_IN, LARGE_MIX, same_tiles(32, 32, 64, group_m=1)),
}
RAGGED = "ragged tails, expert 3 empty"


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE, dtype)


def code_of(atoms: int, seed: int = 0) -> LayerCode:
    """Codes that use `atoms` atoms of the bank, each at least once; a palette holds these atoms, not the first."""
    support = max(SUPPORT, -(-atoms // E))
    generator = torch.Generator().manual_seed(seed)
    palette = torch.randperm(BANK, generator=generator)[:atoms]
    index = palette[torch.arange(E * support).view(E, support) % atoms].int()
    code = layer_code(index.to(DEVICE), torch.randn(E, support, generator=generator).to(DEVICE))
    assert code.palette.numel() == atoms
    return code


def weights(
    dtype: torch.dtype = torch.float32, inner: int = P, width: int = D, rank: int = R, bias: bool = False
) -> BankFirstWeights:
    banks = (draw(BANK, rank, width, seed=1, dtype=dtype), draw(BANK, rank, width, seed=2, dtype=dtype))
    adapters = (draw(E, inner, rank, seed=3, dtype=dtype), draw(E, inner, rank, seed=4, dtype=dtype))
    down = draw(E, width, inner, dtype=dtype)
    biases = (draw(E, inner, dtype=dtype), draw(E, inner, seed=1, dtype=dtype), draw(E, width, dtype=dtype))
    codes = (code_of(GATE_ATOMS), code_of(UP_ATOMS, seed=1))
    return BankFirstWeights(*banks, *codes[0], *codes[1], FromRank(*adapters, down, *(biases if bias else ())))


def inputs(routing: str, dtype: torch.dtype = torch.float32, width: int = D):
    index = ROUTINGS[routing].to(DEVICE)
    scale = torch.rand(index.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return draw(index.shape[0], width, dtype=dtype) * width**0.5, index, scale


def dense_codes(value: torch.Tensor, scale: torch.Tensor, atoms: int) -> torch.Tensor:
    """(E, U) in fp64."""
    return value[:, :atoms].double() * scale.double()[:, None]


def by_token(hidden, index, scale, w: BankFirstWeights, join=silu_gated) -> torch.Tensor:
    bases = (
        torch.einsum("eu,urd->erd", dense_codes(value, factor, palette.numel()), bank.double()[palette.long()])
        for value, factor, palette, bank in (
            (w.gate_value, w.gate_scale, w.gate_palette, w.gate_bank),
            (w.up_value, w.up_scale, w.up_palette, w.up_bank),
        )
    )
    return token_by_token(hidden, index, scale, bases, w.from_rank, join)


# "op": what torch.ops.globe runs here; on a CPU the reference
PALETTE_IN = [
    pytest.param(palette_in_ref, id="reference"),
    pytest.param(lambda *case: launch_palette_in(*case, SMALL_IN), id="small tiles", marks=needs_kernels),
    pytest.param(lambda *case: launch_palette_in(*case, LARGE_IN), id="large tiles", marks=needs_kernels),
]


@pytest.mark.parametrize("run", PALETTE_IN)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "atoms", "rank", "width"),
    [(5, 3, 7, 20), (33, 2, 16, 32), (1, 1, 1, 1), (40, 5, 9, 48)],
    ids=["tiles across atoms", "full tiles", "nothing to multiply", "ragged in tokens and columns"],
)
def test_palette_in(tokens, atoms, rank, width, dtype, run):
    x, bank = draw(tokens, width, dtype=dtype), draw(2 * atoms, rank, width, dtype=dtype)
    palette = torch.arange(atoms, device=DEVICE, dtype=torch.int32).flip(0) * 2 + 1
    z = run(x, palette, bank)
    expected = torch.einsum("td,urd->tur", x.double(), bank.double()[palette.long()])
    assert z.dtype == dtype
    assert_close(z, expected, *STAGE_LIMITS[dtype])


def run_mix(config: MixConfig):
    def run(z, index, codes):
        out = z[0].new_empty(index.numel(), 2 * z[0].shape[2])
        launch_mix(z, index, codes, out, config)
        return out

    return run


MIX = [
    pytest.param(mix_ref, id="reference"),
    pytest.param(run_mix(SMALL_MIX), id="small tiles", marks=needs_kernels),
    pytest.param(run_mix(LARGE_MIX), id="large tiles", marks=needs_kernels),
]


@pytest.mark.parametrize("run", MIX)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("routing", [name for name in ROUTINGS if "many blocks" not in name])  # a program is one token
def test_mix(routing, dtype, run):
    index, codes = ROUTINGS[routing].to(DEVICE), (code_of(GATE_ATOMS), code_of(UP_ATOMS, seed=1))
    z = tuple(draw(index.shape[0], code.palette.numel(), 18, dtype=dtype) for code in codes)
    h = run(z, index, (*codes[0][1:], *codes[1][1:]))
    rows = torch.arange(index.numel(), device=DEVICE)
    ids = index.flatten()
    routed = (ids >= 0) & (ids < E)
    token, expert = rows[routed] // index.shape[1], ids[routed]
    expected = [
        torch.einsum("su,sur->sr", dense_codes(*code[1:], own.shape[1])[expert], own[token].double())
        for own, code in zip(z, codes, strict=True)
    ]
    assert h.dtype == dtype and h.shape == (index.numel(), 36)
    assert_close(h[routed], torch.cat(expected, dim=1), *STAGE_LIMITS[dtype])


@pytest.mark.parametrize("run", MIX)
def test_codes_meet_halves_in_full_precision(run):
    """What is left is the rounding of the result: z of one atom, and a code that a half cannot hold."""
    index = torch.tensor([[0, 1]], device=DEVICE)
    z = torch.ones(1, 1, 4, dtype=torch.float16, device=DEVICE)
    value = torch.zeros(E, PALETTE_PADDING, device=DEVICE)
    value[:, 0] = 1 / 3
    scale = torch.full((E,), 3.0, device=DEVICE)
    h = run((z, z), index, (value, scale, value, scale))
    assert torch.equal(h, torch.ones_like(h))


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_parity_of_the_reference(routing, dtype):
    case, w = inputs(routing, dtype), weights(dtype)
    out = moe_ffn_bank_first(*case, w, "silu")
    assert out.dtype == dtype
    assert_close(out, by_token(*case, w), *LIMITS[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("tiles", list(TILES))
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_parity_of_the_kernels(routing, tiles, dtype):
    case, w = inputs(routing, dtype), weights(dtype)
    out = launch_moe_ffn_bank_first(*case, w, "silu", TILES[tiles])
    assert out.dtype == dtype
    assert_close(out, by_token(*case, w), *LIMITS[dtype])


@needs_kernels
@pytest.mark.parametrize(
    ("inner", "width", "rank"),
    [(32, 48, 16), (33, 47, 17), (1, 2, 1)],
    ids=["multiples of 16", "primes", "nothing to multiply"],
)
def test_parity_of_the_kernels_over_sizes(inner, width, rank):
    case, w = inputs(RAGGED, width=width), weights(inner=inner, width=width, rank=rank)
    out = launch_moe_ffn_bank_first(*case, w, "silu", TILES["tiles smaller than the matrices"])
    assert_close(out, by_token(*case, w), *LIMITS[torch.float32])


RUNNERS = [
    pytest.param(moe_ffn_bank_first, id="op"),
    pytest.param(moe_ffn_bank_first_ref, id="reference"),
    pytest.param(
        lambda *case: launch_moe_ffn_bank_first(*case, TILES["tiles larger than the matrices"]),
        id="kernels",
        marks=needs_kernels,
    ),
    pytest.param(
        lambda *case: launch_moe_ffn_bank_first(*case, TILES["tiles larger than the matrices"], deterministic=False),
        id="atomic sums",
        marks=needs_kernels,
    ),
]


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
@pytest.mark.parametrize("activation", ["gelu", "clamped_silu(limit=2.5)", "clamped_swiglu"])
def test_activations(activation, bias, run):
    (hidden, index, scale), w = inputs(RAGGED), weights(bias=bias)
    hidden = 10 * hidden  # some values of gate and of up lie past the clamp
    expected = by_token(hidden, index, scale, w, gated_activation(activation))
    assert_close(run(hidden, index, scale, w, activation), expected, *LIMITS[torch.float32])


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("room", [1, 3, 10**6])
def test_chunks_of_tokens_make_no_difference(room, run, monkeypatch):
    case, w = inputs(RAGGED), weights()
    monkeypatch.setattr(module, "WORKSPACE_BYTES", room * (GATE_ATOMS + UP_ATOMS) * R * 4 + 1)
    assert w.chunk_tokens() == (room if room < 128 else room - room % 128)
    assert [len(case[0][part]) for part in w.chunks(7)] == {1: [1] * 7, 3: [3, 3, 1], 10**6: [7]}[room]
    assert_close(run(*case, w, "silu"), by_token(*case, w), *LIMITS[torch.float32])


@pytest.mark.parametrize("run", RUNNERS)
def test_no_tokens(run):
    hidden, empty = torch.randn(0, D, device=DEVICE), torch.zeros(0, 2, device=DEVICE)
    assert run(hidden, empty.long(), empty, weights(), "silu").shape == (0, D)


@pytest.mark.parametrize("run", RUNNERS)
def test_a_sentinel_adds_nothing_whatever_its_weight(run):
    index = torch.tensor([[1, E], [-7, 2], [2**31, E]], device=DEVICE)
    scale = torch.tensor([[0.5, float("nan")], [float("inf"), 0.7], [float("nan")] * 2], device=DEVICE)
    hidden = torch.randn(3, D, device=DEVICE)
    out = run(hidden, index, scale, weights(), "silu")
    assert_close(out, by_token(hidden, index, scale, weights()), *LIMITS[torch.float32])
    assert not out[2].any()


@needs_kernels
def test_the_kernels_are_deterministic():
    case, w = inputs(RAGGED), weights()
    config = TILES["tiles larger than the matrices"]
    assert torch.equal(*(launch_moe_ffn_bank_first(*case, w, "silu", config) for _ in range(2)))


def test_strides_and_index_dtype_do_not_matter():
    (hidden, index, scale), w = inputs(RAGGED), weights()
    expected = moe_ffn_bank_first(hidden, index, scale, w, "silu")
    from_rank = FromRank(*map(transposed_in_memory, w.from_rank))
    strided = BankFirstWeights(*map(transposed_in_memory, w[:-1]), from_rank)
    assert not strided.gate_bank.is_contiguous() and strided.contiguous().gate_bank.is_contiguous()
    case = (hidden.T.contiguous().T, index.int().T.contiguous().T, scale.repeat(1, 2)[:, :2])
    assert_close(moe_ffn_bank_first(*case, strided, "silu"), expected, rms=1e-6, peak=2e-6)


def test_opcheck():
    case, w = inputs("one token"), weights(bias=True)
    torch.library.opcheck(moe_ffn_bank_first_op, (*case, list(w.mixtures), list(w.from_rank), "silu", True))


def test_the_public_function_compiles_into_one_graph():
    case, w = inputs(RAGGED), weights()
    compiled = torch.compile(moe_ffn_bank_first, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case, w, "silu"), moe_ffn_bank_first(*case, w, "silu"))


def test_counts_its_calls():
    name = "moe_ffn_bank_first" if DEVICE == "cuda" else "moe_ffn_bank_first_ref"
    before = call_counts().get(name, 0)
    moe_ffn_bank_first(*inputs("one token"), weights(), "silu")
    assert call_counts()[name] == before + 1


def test_refuses_what_does_not_fit():
    (hidden, index, scale), w = inputs(RAGGED), weights()
    for wrong, sentence in (
        ((hidden[:, 1:], index, scale), r"\(7, 19\) and \(tokens, 20\)"),
        ((hidden, index[1:], scale), "with 7 tokens"),
        ((hidden.half(), index, scale), "torch.float16 and the expert weights"),
    ):
        with pytest.raises(ValueError, match=sentence):
            moe_ffn_bank_first(*wrong, w, "silu")


@pytest.mark.parametrize("target", [*TARGETS.values(), SMALLEST_TARGET], ids=str)
@pytest.mark.parametrize("item_size", [2, 4])
def test_every_card_has_a_tile_for_any_number_of_tokens(target, item_size):
    for _, config in CONFIGS:
        gemm = fit_gemm(config.gemm, config.block_m, item_size, target)
        assert gemm.shared_bytes(config.block_m, item_size) <= target.shared_bytes
        assert gemm.accumulators(config.block_m, 1) <= target.accumulators
        assert gemm.num_stages >= 2 and gemm.block_k >= 16 and gemm.block_n >= 16
    assert all(PALETTE_PADDING % config.block_u == 0 for _, config in MIX_CONFIGS)


def test_the_tiles_follow_the_tokens_of_a_chunk(monkeypatch):
    tiles = [default_palette_in(tokens, 2, SMALLEST_TARGET).block_m for tokens in (1, 17, 64, 65, 9999)]
    assert tiles == [16, 32, 64, 128, 128]
    assert default_mix(1).block_r < default_mix(4096).block_r
    w, index = weights(), torch.zeros(2000, 2, dtype=torch.int64, device=DEVICE)
    palette_in, mix = PaletteInShape(D, R, UP_ATOMS), MixShape(R, UP_ATOMS, top_k=2)
    monkeypatch.setattr(module, "choose_palette_in", lambda *call: call)
    monkeypatch.setattr(module, "choose_mix", lambda *call: call)
    config = choose_bank_first(w, index)
    assert config.palette_in == (palette_in, 2000, 4, w.gate_bank.device)
    assert config.mix == (mix, 2000, 4, w.gate_bank.device)
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 1)
    config = choose_bank_first(w, index)
    assert config.palette_in == (palette_in, 1, 4, w.gate_bank.device)
    assert config.mix == (mix, 1, 4, w.gate_bank.device)
    assert config.ffn.block_m == 128
