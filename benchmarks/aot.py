"""Compile every shipped kernel configuration ahead of time, without a GPU, and hold it to its limits.

    python benchmarks/aot.py [--target sm_80 --target gfx942] [--json]

For each kernel, configuration and target: registers, spills, shared memory, and the number of HGMMA (wgmma)
instructions. Exit code 1 when a kernel spills, needs more shared memory than the card has, or, as a grouped GEMM with
row tiles of 64 or more on sm_90, was not lowered to wgmma.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from globe_kernels.ops import (
    cache_lookup,
    compose_basis,
    compose_layer,
    compose_slots,
    down,
    gate_up,
    gate_up_backward,
    low_rank_in,
    mix,
    mixture,
    palette_in,
    project_back,
    routing,
)
from globe_kernels.ops.activations import parse_activation
from globe_kernels.ops.compose_layer import ComposeConfig
from globe_kernels.ops.mix import MixConfig
from globe_kernels.ops.palette_in import PaletteInConfig
from globe_kernels.ops.tuning import DEFAULTS, TABLES, TARGETS, AnyLaunches, FfnConfig, GemmConfig, fit_gemm, fit_to

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INT = (
    "palette_ptr",
    "atom_ptr",
    "end_ptr",
    "order_ptr",
    "starts_ptr",
    "tile_expert_ptr",
    "tile_first_ptr",
    "totals_ptr",
    "block_counts_ptr",
    "places_ptr",
    "slots_ptr",
    "slot_of_ptr",
    "owner_ptr",
    "referenced_ptr",
    "miss_expert_ptr",
    "miss_slot_ptr",
    "gate_index_ptr",
    "up_index_ptr",
)
_LONG = ("pinned_ptr", "uses_ptr", "registers_ptr")
_FLOAT = ("value_ptr", "scale_ptr", "row_weight_ptr", "partial_ptr")
# multiples of 16, as the addresses of torch are: others run, but slower
_ALIGNED = (
    "depth",
    "num_columns",
    "row_stride",
    "out_stride",
    "num_values",
    "padded",
    "gate_padded",
    "up_padded",
    "width",
    "rank",
)


@dataclass(frozen=True)
class Case:
    """One kernel with the values of its constexprs."""

    kernel: Any
    config: str
    constexprs: dict[str, Any]
    options: dict[str, int]
    needs_wgmma: bool = False
    values: str = "*bf16"  # what is not of a fixed type

    def signature(self) -> dict[str, str]:
        """Types by name: code indices, plans and slots are int32, ids and counters int64, weights of codes and rows
        fp32, others `values`."""
        types = {}
        for name in self.kernel.arg_names:
            if name in self.constexprs:
                types[name] = "constexpr"
            elif not name.endswith("_ptr"):
                types[name] = "i32"
            elif name == "entry_ptr":
                types[name] = "*i64"
            elif name in _INT:
                types[name] = "*i32"
            elif name == "index_ptr":
                types[name] = "*i32" if "PHI" in self.constexprs else "*i64"
            elif name in _LONG:
                types[name] = "*i64"
            elif name.endswith(_FLOAT) or name == "out_ptr" and self.constexprs.get("ATOMIC"):
                types[name] = "*fp32"
            else:
                types[name] = self.values
        return types


@dataclass(frozen=True)
class Row:
    """The compiler's result for one case."""

    kernel: str
    config: str
    target: str
    triton: str
    registers: int
    spills: int  # bytes per thread
    shared_bytes: int
    shared_limit: int
    hgmma: int
    needs_hgmma: bool

    def problem(self) -> str:
        """Name the limit that the case breaks; empty when it breaks none."""
        if self.spills:
            return f"{self.spills} bytes of spills"
        if self.shared_bytes > self.shared_limit:
            return f"{self.shared_bytes} bytes of shared memory, the limit is {self.shared_limit}"
        if self.needs_hgmma and not self.hgmma:
            return "no wgmma"
        return ""


# The variants of each stage: (what the label says, constexprs; a bias that is None is one)
_NO_BIAS = {"gate_bias_ptr": None, "up_bias_ptr": None}


def _constexprs(activation: str) -> dict[str, str | float]:
    return parse_activation(activation).constexprs


_Variants = dict[str, tuple[Any, list[tuple[str, dict[str, Any]]]]]
_VARIANTS: _Variants = {
    "low_rank_in": (low_rank_in._low_rank_in_kernel, [("", {"slots_ptr": None}), ("pool", {})]),
    "gate_up": (
        gate_up._gate_up_kernel,
        [
            ("silu", {"GATHER": False, **_constexprs("silu"), **_NO_BIAS}),
            ("gelu", {"GATHER": False, **_constexprs("gelu"), **_NO_BIAS}),
            ("clamped silu", {"GATHER": False, **_constexprs("clamped_silu"), **_NO_BIAS}),
            ("capped silu", {"GATHER": False, **_constexprs("capped_silu"), **_NO_BIAS}),
            ("softcapped silu", {"GATHER": False, **_constexprs("softcapped_silu"), **_NO_BIAS}),
            ("clamped swiglu, biases", {"GATHER": False, **_constexprs("clamped_swiglu")}),
            ("gather, silu", {"GATHER": True, **_constexprs("silu"), **_NO_BIAS}),
            ("gather, biases", {"GATHER": True, **_constexprs("clamped_swiglu")}),
        ],
    ),
    "down": (
        down._down_kernel,
        [
            ("", {"ATOMIC": False, "bias_ptr": None}),
            ("bias", {"ATOMIC": False}),
            ("atomic", {"ATOMIC": True, "bias_ptr": None}),
        ],
    ),
}

# Of the backward, by the stage whose configuration they take.
_BACKWARD: _Variants = {
    "low_rank_in": (project_back._project_back_kernel, [("gather", {"GATHER": True, "SCATTER": False})]),
    "gate_up": (
        gate_up_backward._gate_up_backward_kernel,
        [
            ("silu", {**_constexprs("silu"), **_NO_BIAS}),
            ("gelu", {**_constexprs("gelu"), **_NO_BIAS}),
            ("gelu tanh", {**_constexprs("gelu_pytorch_tanh"), **_NO_BIAS}),
            ("clamped silu", {**_constexprs("clamped_silu"), **_NO_BIAS}),
            ("softcapped silu", {**_constexprs("softcapped_silu"), **_NO_BIAS}),
            ("clamped swiglu, biases", _constexprs("clamped_swiglu")),
        ],
    ),
    "down": (
        project_back._project_back_kernel,
        [("", {"GATHER": False, "SCATTER": False}), ("scatter", {"GATHER": False, "SCATTER": True})],
    ),
}


def _gemm_cases(config: FfnConfig) -> Iterator[Case]:
    for stage, gemm, _ in config.stages():
        kernel, variants = _VARIANTS[stage]
        for variant, constexprs in variants:
            own = down.atomic_config(gemm) if variant == "atomic" else gemm
            yield from _tile_cases(kernel, variant, constexprs, config.block_m, own)
        kernel, variants = _BACKWARD[stage]
        for variant, constexprs in variants:
            own = gate_up_backward.backward_config(gemm) if stage == "gate_up" else gemm
            yield from _tile_cases(kernel, variant, constexprs, config.block_m, own)


def _tile_cases(
    kernel: Any, variant: str, constexprs: dict[str, Any], block_m: int, gemm: GemmConfig
) -> Iterator[Case]:
    """Yield a GEMM whose depth fills its tiles, and a GEMM whose depth does not."""
    options = {"num_warps": gemm.num_warps, "num_stages": gemm.num_stages}
    launch = {name: value for name, value in gemm.launch().items() if name not in options}
    for even in (True, False):
        tile = f"{block_m}x{gemm.block_n}x{gemm.block_k} w{gemm.num_warps} s{gemm.num_stages}"
        label = ", ".join(part for part in (tile, variant, "" if even else "ragged K") if part)
        shape = {"BLOCK_M": block_m, "EVEN_K": even, **launch}
        yield Case(kernel, label, {**constexprs, **shape}, options, needs_wgmma=block_m >= 64)


def _sized_case(
    kernel: Any, label: str, constexprs: dict[str, Any], config: MixConfig | ComposeConfig, needs_wgmma: bool = False
) -> Case:
    """Make the case of a launch whose configuration has only constexprs and options."""
    launch = config.launch()
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
    tile = "x".join(str(size) for size in launch.values())
    label = f"{tile} w{config.num_warps} s{config.num_stages}{label}"
    return Case(kernel, label, {**constexprs, **launch}, options, needs_wgmma)


def tuned_configs(architecture: str, kind: type[AnyLaunches], *ops: str) -> Iterator[AnyLaunches]:
    """Yield the entries of the tables of cards of this architecture for `ops` and 16-bit values."""
    for path in sorted(TABLES.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["architecture"] == architecture:
            for entry in table["entries"]:
                if entry["op"] in ops and entry["item_size"] == 2:
                    yield kind.from_dict(entry["config"])


def _tuned_cases(architecture: str) -> Iterator[Case]:
    """Yield the kernels that tables can hold, in tuned and in default configurations."""
    target = TARGETS[architecture]
    ffn = [fit_to(config, 2, target) for _, config in DEFAULTS]
    for config in dict.fromkeys([*ffn, *tuned_configs(architecture, FfnConfig, "moe_ffn", "dense_twin")]):
        yield from _gemm_cases(config)
    first = [replace(config, gemm=fit_gemm(config.gemm, config.block_m, 2, target)) for _, config in palette_in.CONFIGS]
    for config in dict.fromkeys([*first, *tuned_configs(architecture, PaletteInConfig, "palette_in")]):
        yield from _tile_cases(palette_in._palette_in_kernel, "", {}, config.block_m, config.gemm)
    mixes = [config for _, config in mix.CONFIGS]
    for config in dict.fromkeys([*mixes, *tuned_configs(architecture, MixConfig, "mix")]):
        yield _sized_case(mix._mix_kernel, "", {"K_PAD": 16}, config)
    composes = [config for _, config in compose_layer.CONFIGS]
    for config in dict.fromkeys([*composes, *tuned_configs(architecture, ComposeConfig, "compose_layer")]):
        for phi in ("identity", "silu", "tanh"):
            kernel, wide = compose_layer._compose_layer_kernel, config.block_e >= 64
            yield _sized_case(kernel, f", {phi}", {"PHI": phi}, config, needs_wgmma=wide)


def cases(architecture: str) -> Iterator[Case]:
    """Yield every kernel in every configuration that a card of this architecture gets."""
    yield from _tuned_cases(architecture)
    for phi in ("identity", "silu", "tanh"):
        constexprs = {"PHI": phi, "BLOCK": compose_basis._BLOCK}
        yield Case(compose_basis._compose_basis_kernel, phi, constexprs, {"num_warps": compose_basis._WARPS})
        for experts in (8, 128, 512):
            constexprs = {"PHI": phi, "BLOCK": compose_slots._BLOCK, "W_PAD": experts}
            options = {"num_warps": compose_slots._WARPS}
            yield Case(compose_slots._compose_slots_kernel, f"{phi}, {experts} experts", constexprs, options)
    constexprs = {"PHI": "identity", "BLOCK": compose_basis._BLOCK}
    options = {"num_warps": compose_basis._WARPS}
    yield Case(compose_basis._compose_basis_kernel, "identity, fp32", constexprs, options, values="*fp32")
    for label, bank in (("bank and codes", {}), ("codes", {"bank_gradient_ptr": None})):
        options = {"num_warps": mixture._WARPS}
        constexprs = {"BLOCK": mixture._BLOCK, **bank}
        yield Case(mixture._mixture_backward_kernel, label, constexprs, options, values="*fp32")
    yield Case(down._sum_choices_kernel, "", {"BLOCK": down._SUM_BLOCK}, {"num_warps": down._SUM_WARPS})
    for experts in (8, 128, 256, 512):
        padded = {"E_PAD": experts, "BLOCK": routing._BLOCK}
        tiles = {"BLOCK_M": 16, "TILE_BLOCK": routing._TILE_BLOCK}
        label = f"{experts} experts"
        wide = {"num_warps": routing.warps(experts)}
        yield Case(routing._plan_in_one_block_kernel, label, {**padded, **tiles}, wide)
        yield Case(routing._count_kernel, label, padded, {"num_warps": 4})
        yield Case(routing._tiles_kernel, label, {"E_PAD": experts, **tiles}, wide)
        for slots in (16, 256, 8192):
            constexprs = {"E_PAD": experts, "BLOCK": min(slots, cache_lookup._BLOCK)}
            options = {"num_warps": cache_lookup._WARPS}
            yield Case(cache_lookup._cache_lookup_kernel, f"{label}, {slots} slots", constexprs, options)
    yield Case(routing._scatter_kernel, "", {"BLOCK": routing._BLOCK}, {"num_warps": 4})
    yield Case(routing._places_kernel, "", {"BLOCK": routing._PLACES_BLOCK}, {"num_warps": 4})


def compile_case(case: Case, architecture: str) -> Row:
    """Compile one case and read the machine code."""
    signature = case.signature()
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in _ALIGNED
    }
    source = ASTSource(case.kernel, signature, case.constexprs, aligned)
    compiled = triton.compile(source, target=_target(architecture), options=case.options)
    registers, spills, hgmma = (_amd if architecture.startswith("gfx") else _nvidia)(compiled.asm)
    return Row(
        kernel=case.kernel.fn.__name__.strip("_"),
        config=case.config,
        target=architecture,
        triton=triton.__version__,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        shared_limit=TARGETS[architecture].shared_bytes,
        hgmma=hgmma,
        needs_hgmma=case.needs_wgmma and architecture == "sm_90",
    )


def _target(architecture: str) -> GPUTarget:
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def _nvidia(asm: dict[str, Any]) -> tuple[int, int, int]:
    """Return (registers, bytes of stack, HGMMA instructions)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        machine_code = _tool("cuobjdump", "--dump-sass", file.name)
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    return registers, stack, machine_code.count("HGMMA")


def _amd(asm: dict[str, Any]) -> tuple[int, int, int]:
    """Return (vector registers, bytes of spilled registers, 0)."""
    registers, spilled = (
        int(re.findall(rf"\.{name}:\s+(\d+)", asm["amdgcn"])[0]) for name in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, 4 * spilled, 0


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def _compile_share(architecture: str, share: int, shares: int) -> list[tuple[int, Row]]:
    """Compile every `shares`-th case from `share` on, with its number: kernels cannot be sent to another process."""
    numbered = list(enumerate(cases(architecture)))[share::shares]
    return [(number, compile_case(case, architecture)) for number, case in numbered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="sm_80 and sm_90 by default")
    parser.add_argument("--json", action="store_true", help="a list of objects on stdout, nothing else")
    args = parser.parse_args()
    workers = os.cpu_count() or 1
    rows: list[Row] = []
    with ProcessPoolExecutor(workers) as pool:
        for architecture in args.target or ("sm_80", "sm_90"):
            shares = [pool.submit(_compile_share, architecture, share, workers) for share in range(workers)]
            rows += [row for _, row in sorted((pair for share in shares for pair in share.result()), key=itemgetter(0))]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(f"{'kernel':26}{'configuration':46}{'target':8}{'regs':>6}{'spills':>8}{'shared':>9}{'HGMMA':>7}")
        for row in rows:
            print(
                f"{row.kernel:26}{row.config:46}{row.target:8}{row.registers:6}{row.spills:8}{row.shared_bytes:9}"
                f"{row.hgmma:7}  {row.problem()}"
            )
        print(f"{len(rows)} kernels compiled with Triton {triton.__version__}")
    problems = [row for row in rows if row.problem()]
    for row in problems:
        print(f"aot: {row.kernel} {row.config} on {row.target}: {row.problem()}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
