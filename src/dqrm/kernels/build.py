"""Compiles the kernels for this machine, once, and loads them.

The library lies in the user's cache folder under a name that holds source, flags, compiler and processor: any change of
these compiles again (a few seconds). Without a compiler the package works in plain torch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch  # noqa: F401 (its OpenMP library must be loaded first, so that the kernels share its threads)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.c", "blocks.c"))
HEADER = Path(__file__).with_name("common.h")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
         "-fvisibility=hidden", "-fPIC", "-shared")  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where DQRM_NATIVE=0 says so or they cannot be built (then a warning says why)."""
    if os.environ.get("DQRM_NATIVE", "1") == "0":
        return None
    try:
        return _load()
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"the CPU kernels cannot be built ({error}); training runs in plain torch, more slowly. A C compiler "
            "(gcc or clang) makes them available, DQRM_NATIVE=0 silences this.",
            stacklevel=2,
        )
        return None


def _load() -> ctypes.CDLL:
    compiler = (
        shlex.split(os.environ.get("CC", "")) or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    )
    if not compiler:
        raise RuntimeError("no C compiler found")
    version = _run([*compiler, "--version"])
    identity = "\0".join([*(file.read_text() for file in (*SOURCES, HEADER)), *FLAGS, *compiler, version, _processor()])
    name = f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    cache: Path | None
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dqrm"
        if (cache / name).is_file():
            try:
                return ctypes.CDLL(str(cache / name))
            except OSError:  # damaged: build it again
                (cache / name).unlink()
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=cache))
    except (OSError, RuntimeError):  # no home, or a read-only one: for this process only
        cache, folder = None, Path(tempfile.mkdtemp())
    try:
        built = folder / name
        sources = [str(file) for file in SOURCES]
        try:
            _run([*compiler, *FLAGS, "-fopenmp", "-o", str(built), *sources, "-lm"])
        except RuntimeError:  # Apple's clang has no OpenMP: one thread
            _run([*compiler, *FLAGS, "-Wno-unknown-pragmas", "-o", str(built), *sources, "-lm"])
        if cache is not None:  # several processes may build at once
            built = built.replace(cache / name)
        return ctypes.CDLL(str(built))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(next((line for line in lines if "error" in line), f"{command[0]} failed"))
    return done.stdout


def _processor() -> str:
    """What -march=native depends on; a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
