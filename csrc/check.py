"""Compile the CUDA kernels for sm_80 and sm_90, without a GPU and without a CUDA build of torch.

    python csrc/check.py

Prints registers, spills and shared memory of each kernel as a table. The exit code is 1 when a kernel spills or does
not compile, and 0 where nvcc is missing.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
TARGETS = ("sm_80", "sm_90")
_INSTANCES = """
#include "batched_spd_solve.cuh"
template cudaError_t globe::spd::launch(const globe::spd::Systems<float> &, cudaStream_t);
template cudaError_t globe::spd::launch(const globe::spd::Systems<double> &, cudaStream_t);
"""
_TYPES = {"f": "float", "d": "double"}
_KERNEL = re.compile(  # in the log of ptxas, by its mangled name
    r"entry function '\w+?I(f|d)Li(\d+)E.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


class Row(NamedTuple):
    """The resources of a compiled kernel."""

    target: str
    dtype: str
    width: int  # lanes per system, which is the largest k as well
    registers: int
    spills: int  # bytes per thread, written and read
    shared_bytes: int  # of a block, at the largest k


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _run(*command: str | Path) -> str:
    """Return the output of a command on both streams. Raises SystemExit with the output when the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"csrc: {' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def compile_all(nvcc: str) -> Iterator[Row]:
    """Compile every kernel for every target."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "instances.cu").write_text(_INSTANCES)
        _run("g++", "-std=c++20", "-Wno-unknown-pragmas", "-pthread", FOLDER / "host.cpp", "-o", folder / "host")
        lines = (line.split() for line in _run(folder / "host", "shared").splitlines())
        shared = {(dtype, int(width)): int(size) for dtype, width, size in lines}
        for target in TARGETS:
            log = _run(
                *(nvcc, "-std=c++20", "-O3", "-cubin", f"-arch={target}", "-Xptxas", "-v", f"-I{FOLDER}"),
                *(folder / "instances.cu", "-o", folder / "cubin"),
            )
            kernels = {
                (_TYPES[letter], int(width)): (int(registers), int(stores) + int(loads))
                for letter, width, stores, loads, registers in _KERNEL.findall(log)
            }
            if kernels.keys() != shared.keys():
                sys.exit(f"csrc: the log of nvcc does not name the kernels {', '.join(map(str, shared))}:\n{log}")
            yield from (Row(target, *kernel, *kernels[kernel], size) for kernel, size in shared.items())


def main() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        print("csrc: no nvcc on PATH or in /usr/local/cuda/bin, so the CUDA kernels were not compiled.")
        return
    rows = list(compile_all(nvcc))
    print("| target | type | lanes, largest k | registers | spills | shared bytes of a block |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    if spilling := [row for row in rows if row.spills]:
        sys.exit(f"csrc: {len(spilling)} of {len(rows)} kernels spill registers; see the column spills.")


if __name__ == "__main__":
    main()
