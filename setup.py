"""Declare the CUDA extension, which is built only when GLOBE_BUILD_CUDA=1; pyproject.toml declares the rest.

GLOBE_BUILD_CUDA=1 pip install --no-build-isolation .
"""

import os
import sys
from pathlib import Path

from setuptools import setup


def cuda_extension() -> dict:
    """Return the arguments of `setup` that build globe_kernels._csrc from csrc/."""
    try:
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CUDAExtension
    except ImportError:
        sys.exit("GLOBE_BUILD_CUDA=1 needs torch while it builds; install torch and add --no-build-isolation to pip.")
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").is_file():
        sys.exit("GLOBE_BUILD_CUDA=1 needs nvcc and a CUDA build of torch; install both, or leave the variable out.")
    extension = CUDAExtension(
        "globe_kernels._csrc",
        ["csrc/batched_spd_solve.cu", "csrc/module.cpp"],
        depends=["csrc/batched_spd_solve.cuh"],
        extra_compile_args={
            "cxx": ["-O3", "-std=c++20"],
            "nvcc": [
                "-O3",
                "-std=c++20",
                "-gencode=arch=compute_80,code=sm_80",
                "-gencode=arch=compute_90,code=sm_90",
                "-gencode=arch=compute_90,code=compute_90",
            ],
        },
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**(cuda_extension() if os.environ.get("GLOBE_BUILD_CUDA") == "1" else {}))
