"""Sources and compiler flags of the kernels. `setup.py` reads it too, so it imports only the standard library."""

import hashlib
import platform
from collections.abc import Iterable
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.c", "blocks.c", "adam.c", "tiers.c", "logs.c"))
HEADER = Path(__file__).with_name("common.h")
# -ffp-contract=off: the same bits with and without fused multiply-add.
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
         "-fPIC")  # fmt: skip
OPENMP, WITHOUT_OPENMP = ("-fopenmp",), ("-Wno-unknown-pragmas",)  # Apple's clang has no OpenMP: one thread
LEVELS: dict[str, tuple[str, ...]] = {"default": ()}
"""Flags of the libraries in a wheel, by torch's name of the processor's capability, the best last."""
if platform.machine() in ("x86_64", "AMD64"):  # elsewhere vectors are in the baseline (aarch64: NEON)
    LEVELS["avx2"] = ("-mavx2", "-mbmi2")
    LEVELS["avx512"] = (*LEVELS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")


def digest(sources: Iterable[Path]) -> str:
    """Identifies a library that was built from other sources."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in (*sources, HEADER))).hexdigest()[:24]
