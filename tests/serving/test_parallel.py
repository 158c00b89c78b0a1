"""Two processes share the experts of the shipped model, and a compiled engine runs them: the same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.engine import Generated, engine, generate, require_same

ROOT = Path(__file__).parents[2]
TOLERANCE = 5e-5  # of a log-probability in fp32
BIND = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # a core for each process


@pytest.fixture(scope="module")
def in_one_process(shipped) -> list[Generated]:
    with engine(shipped.globe) as llm:
        return generate(llm)


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True, "strategy": "scratch"},
        {"enforce_eager": False},
    ],
    ids=["tensor parallel", "expert parallel", "compiled"],
)
def test_other_ways_to_run(shipped, in_one_process, options, record_property):
    command = [sys.executable, "-m", "tests.serving.engine", str(shipped.globe), json.dumps(options)]
    environment = os.environ | (BIND if "tensor_parallel_size" in options else {})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [Generated(**each) for each in json.loads(done.stdout.strip().splitlines()[-1])]
    record_property("largest", require_same(found, in_one_process, TOLERANCE))
