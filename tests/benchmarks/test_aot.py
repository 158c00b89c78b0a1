import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.cases import needs_kernels

ROOT = Path(__file__).resolve().parent.parent.parent


@needs_kernels
def test_one_target_compiles_within_its_limits():
    """The checks of `make check` cover sm_80 and sm_90; here the report itself."""
    script = """
from benchmarks.aot import Case, compile_case, cases
from globe_kernels.ops import gate_up, low_rank_in
chosen = next(case for case in cases("sm_90") if case.needs_wgmma)
row = compile_case(chosen, "sm_90")
assert row.hgmma > 0 and row.registers > 32 and 0 < row.shared_bytes <= row.shared_limit, row
assert not row.problem(), row
spilling = Case(
    low_rank_in._low_rank_in_kernel,
    "too many registers",
    {"EVEN_K": True, "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 1},
    {"num_warps": 4, "num_stages": 3},
)
assert "spills" in compile_case(spilling, "sm_80").problem()
"""
    run(script)


@needs_kernels
def test_tuned_configurations_of_every_op_are_cases(tmp_path):
    script = f"""
import json
from dataclasses import asdict, replace
from pathlib import Path
from benchmarks import aot
from globe_kernels.ops import compose_layer, mix, palette_in, tuning

ffn = replace(tuning.DEFAULTS[0][1], block_m=32)
first, mixed, composed = (module.CONFIGS[0][1] for module in (palette_in, mix, compose_layer))
tuned = {{
    "moe_ffn": ffn,
    "dense_twin": replace(ffn, block_m=64),
    "palette_in": replace(first, block_m=64),
    "mix": replace(mixed, num_stages=1),
    "compose_layer": replace(composed, num_stages=5),
}}
defaults = list(aot.cases("sm_90"))
entries = [{{"op": op, "item_size": 2, "config": asdict(config)}} for op, config in tuned.items()]
entries.append({{**entries[-1], "item_size": 4, "config": asdict(replace(composed, num_stages=7))}})
table = {{"device": "A card", "architecture": "sm_90", "entries": entries}}
aot.TABLES = Path({str(tmp_path)!r})
(aot.TABLES / "a-card.json").write_text(json.dumps(table))
assert list(aot.cases("sm_80")) != defaults and len(list(aot.cases("sm_80"))) == len(defaults)
known = [(case.kernel, case.config) for case in defaults]
new = [case for case in aot.cases("sm_90") if (case.kernel, case.config) not in known]
found = {{(case.kernel.fn.__name__, case.constexprs.get("BLOCK_M"), case.options["num_stages"]) for case in new}}
assert found == {{
    ("_low_rank_in_kernel", 32, 4), ("_gate_up_kernel", 32, 4), ("_down_kernel", 32, 4),
    ("_low_rank_in_kernel", 64, 4), ("_gate_up_kernel", 64, 4), ("_down_kernel", 64, 4),
    ("_gate_up_backward_kernel", 32, 4), ("_project_back_kernel", 32, 4),
    ("_gate_up_backward_kernel", 64, 4), ("_project_back_kernel", 64, 4),
    ("_palette_in_kernel", 64, 4), ("_mix_kernel", None, 1), ("_compose_layer_kernel", None, 5),
}}, found
"""
    run(script)


def run(script: str) -> None:
    """In a process of its own: the kernels of this one are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=environment, timeout=300)
