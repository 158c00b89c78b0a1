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
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=environment, timeout=300)
