import json
from pathlib import Path

import pytest

from tests.fit.conftest import noise
from tests.kernels.conftest import poison_empty

__all__ = ["noise", "poison_empty"]

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture(scope="session")
def ffn_rows(warm_python) -> list[dict]:
    """The rows of `benchmarks/ffn.py` on this CPU, measured once."""
    done = warm_python.run(BENCHMARKS / "ffn.py", "--cpu", "--json", "--tokens", "4", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
