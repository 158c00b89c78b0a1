import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from globe_kernels.ops import batched_spd_solve as module
from globe_kernels.ops.batched_spd_solve import (
    LARGEST,
    Faster,
    Solved,
    batched_spd_solve,
    batched_spd_solve_ref,
    launch_batched_spd_solve,
    load_extension,
    uses_extension,
)
from globe_kernels.testing import assert_close
from tests.kernels.cases import DEVICE

CSRC = Path(__file__).resolve().parents[3] / "csrc"
DTYPES = [torch.float32, torch.float64]
# of systems with a condition number below 100
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-14}


def random_case(systems: int, k: int, q: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(k)
    factor = torch.randn(systems, k, 4 * k + 4, generator=generator, dtype=torch.float64)
    rhs = torch.randn(systems, k, q, generator=generator, dtype=torch.float64)
    return (factor @ factor.mT).to(DEVICE, dtype), rhs.to(DEVICE, dtype)


def degenerate_case(dtype: torch.dtype):
    """Eight systems of order 33: 1 has a negative pivot, 2 is zero, 3 holds a NaN, 4 an infinity, 6 is negative."""
    gram, rhs = random_case(8, 33, 5, dtype)
    gram[1, 17, 17] *= -1
    gram[2] = 0
    gram[3, 20, 7] = gram[3, 7, 20] = torch.nan
    gram[4, 31, 30] = gram[4, 30, 31] = torch.inf
    gram[6] *= -1
    return gram, rhs


def expected(gram: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(gram.double(), rhs.double())


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """Solves on the CPU by the lines that the kernel runs, a thread for every lane; a data race is a failure."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("csrc")
    binary = folder / "host"
    build = ["g++", "-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-pthread", CSRC / "host.cpp"]
    racing = subprocess.run([*build, "-fsanitize=thread", "-o", binary], capture_output=True, check=False)
    # the sanitizer is a package of its own, and does not start on every kernel
    if racing.returncode or subprocess.run([binary, "shared"], capture_output=True, check=False).returncode:
        subprocess.run([*build, "-o", binary], check=True)

    def solve(gram: torch.Tensor, rhs: torch.Tensor) -> Solved:
        systems, k, q = rhs.shape
        (folder / "input").write_bytes(gram.numpy().tobytes() + rhs.numpy().tobytes())
        sizes = [f"f{8 * gram.itemsize}", str(systems), str(k), str(q)]
        command = [binary, *sizes, folder / "input", folder / "output"]
        # lanes that a race has led apart would wait for each other
        subprocess.run(command, check=True, timeout=120, env={"TSAN_OPTIONS": "halt_on_error=1"})
        data = bytearray((folder / "output").read_bytes())
        solution, info = data[: rhs.nbytes], data[rhs.nbytes :]
        return Solved(
            torch.frombuffer(solution, dtype=rhs.dtype).view(rhs.shape) if solution else torch.empty_like(rhs),
            torch.frombuffer(info, dtype=torch.int32),
        )

    return solve


needs_extension = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and load_extension()), reason="needs a GPU and the CUDA extension"
    ),
]


@pytest.fixture(params=["reference", pytest.param("kernel", marks=needs_extension), "host"])
def solve(request):
    if request.param == "host":
        on_host = request.getfixturevalue("host")
        return lambda gram, rhs: on_host(gram.cpu(), rhs.cpu())
    return {"reference": batched_spd_solve_ref, "kernel": launch_batched_spd_solve}[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("systems, k, q", [(9, 1, 3), (1, 2, 1), (30, 12, 1), (3, 31, 9), (3, 33, 4), (1, 128, 6)])
def test_parity(solve, systems, k, q, dtype):
    gram, rhs = random_case(systems, min(k, LARGEST[dtype]), q, dtype)
    solution, info = solve(gram, rhs)
    assert_close(solution.to(DEVICE), expected(gram, rhs), rms=LIMIT[dtype], peak=LIMIT[dtype])
    assert info.dtype == torch.int32 and not info.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_system_does_not_touch_the_others(solve, dtype):
    gram, rhs = degenerate_case(dtype)
    solution, info = (tensor.cpu() for tensor in solve(gram, rhs))
    assert info[[1, 2, 3, 4, 6]].ne(0).all()
    good = [0, 5, 7]
    assert not info[good].any()
    assert_close(solution[good].to(DEVICE), expected(gram[good], rhs[good]), rms=LIMIT[dtype], peak=LIMIT[dtype])


def test_a_nan_on_the_right_stays_in_its_column(solve):
    gram, rhs = random_case(3, 12, 3)
    rhs[1, 4, 2] = torch.nan
    solution, info = solve(gram, rhs)
    assert not info.any()
    assert solution.isnan().sum() == solution[1, :, 2].isnan().sum() > 0


@pytest.mark.parametrize("systems, k, q", [(0, 4, 2), (3, 4, 0), (0, 1, 0)])
def test_nothing_to_solve(request, solve, systems, k, q):
    if systems == 0 and "host" in request.node.name:
        pytest.skip("the kernel is not launched")
    solution, info = solve(*random_case(systems, k, q))
    assert solution.shape == (systems, k, q) and info.shape == (systems,) and not info.any()


@pytest.mark.parametrize("run", [batched_spd_solve, pytest.param(launch_batched_spd_solve, marks=needs_extension)])
def test_layouts(run):
    gram, rhs = random_case(4, 12, 3)
    expected_solution, _ = run(gram, rhs)
    wide = torch.zeros(12, 4, 25, device=DEVICE)
    wide[:, :, 1::2] = gram.permute(1, 0, 2)
    shifted = torch.zeros(gram.numel() + 1, device=DEVICE)[1:].view_as(gram).copy_(gram)  # no row starts on 16 bytes
    for other_gram in (wide[:, :, 1::2].permute(1, 0, 2), shifted):
        solution, _ = run(other_gram, rhs.mT.contiguous().mT)
        assert torch.equal(solution, expected_solution)


def test_only_the_lower_triangle_is_read(solve):
    gram, rhs = random_case(3, 13, 2)
    upper = torch.ones(13, 13, dtype=torch.bool, device=DEVICE).triu(1)
    for found, wanted in zip(solve(gram.masked_fill(upper, torch.nan), rhs), solve(gram, rhs), strict=True):
        assert torch.equal(found, wanted)


def test_the_same_bits_every_time(solve):
    gram, rhs = random_case(8, 33, 5)
    assert torch.equal(solve(gram, rhs).solution, solve(gram, rhs).solution)


def test_orders_beyond_the_kernel():
    gram, rhs = random_case(2, 200, 3, torch.float64)
    assert_close(batched_spd_solve(gram, rhs).solution, expected(gram, rhs), rms=1e-13, peak=1e-13)


def test_the_extension_is_used_where_it_was_measured_to_be_faster(monkeypatch):
    """Nowhere so far."""
    assert not module.FASTER and not uses_extension(12, 1, 6144, torch.float32)
    monkeypatch.setattr(module, "FASTER", (Faster(torch.float32, k=12, q=8, systems=1000),))
    assert uses_extension(12, 8, 1000, torch.float32)
    for sizes in ((13, 8, 1000), (12, 9, 1000), (12, 8, 999)):
        assert not uses_extension(*sizes, torch.float32)
    for dtype in (torch.float64, torch.bfloat16):
        assert not uses_extension(12, 8, 1000, dtype)
    assert not uses_extension(500, 8, 1000, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and load_extension()), reason="needs a GPU and the CUDA extension")
def test_nobody_waits_for_the_device():
    case = degenerate_case(torch.float32)
    launch_batched_spd_solve(*case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch_batched_spd_solve(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("systems, k", [(600_000, 12), (66_000, 33)])
@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and load_extension()), reason="needs a GPU and the CUDA extension")
def test_more_systems_than_a_grid_has_blocks(systems, k):
    gram, rhs = random_case(1, k, 1)
    solution, info = launch_batched_spd_solve(gram.repeat(systems, 1, 1), rhs.repeat(systems, 1, 1))
    assert not info.any() and (solution == solution[:1]).all()
    assert_close(solution[-1:], expected(gram, rhs), rms=1e-5, peak=1e-5)


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_a_build_without_cuda_is_refused_in_one_sentence():
    command, environment = [sys.executable, "setup.py", "--version"], {**os.environ, "GLOBE_BUILD_CUDA": "1"}
    done = subprocess.run(command, cwd=CSRC.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("GLOBE_BUILD_CUDA=1 needs nvcc and a CUDA build of torch;")
    assert done.stderr.count("\n") == 1


def test_the_check_of_the_compiled_kernels(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(CSRC))
    import check

    row = check.Row("sm_80", "float", 16, registers=94, spills=0, shared_bytes=11264)
    monkeypatch.setattr(check, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(check, "compile_all", lambda _: iter([row]))
    check.main()
    assert "| sm_80 | float | 16 | 94 | 0 | 11264 |" in capsys.readouterr().out
    monkeypatch.setattr(check, "compile_all", lambda _: iter([row, row._replace(spills=8)]))
    with pytest.raises(SystemExit, match="1 of 2 kernels spill"):
        check.main()
    monkeypatch.setattr(check, "find_nvcc", lambda: None)
    capsys.readouterr()
    check.main()
    assert "no nvcc" in capsys.readouterr().out
