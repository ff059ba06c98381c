"""Compiles the kernels for this machine, once, and loads them; without a compiler, loads those of the wheel.

Compiled kernels are kept in the user's cache folder under a name that depends on source, flags, compiler and processor:
any change of these compiles again (a few seconds). A wheel has libraries for several levels of processors, with equal
results. With neither the package works in plain torch.
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

import torch  # its OpenMP library must be loaded first, so that the kernels share its threads

from dqrm.kernels.flags import FLAGS, LEVELS, OPENMP, SOURCES, WITHOUT_OPENMP, digest

_NATIVE = ("-march=native", "-shared")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with a warning that says why, if they are not available.

    The environment variable DQRM_NATIVE selects: 0 for none, `wheel` for those of the wheel; otherwise they are
    compiled for this machine, and those of the wheel are used if that fails.
    """
    choice = os.environ.get("DQRM_NATIVE", "1")
    if choice == "0":
        return None
    try:
        if choice == "wheel":
            raise RuntimeError("DQRM_NATIVE is 'wheel', but this installation has no library for this processor")
        return _compiled()
    except (OSError, RuntimeError) as error:
        shipped = _shipped()
        if shipped is None:
            warnings.warn(
                f"the CPU kernels cannot be built ({error}); training runs in plain torch and preparing in polars, "
                "more slowly. A C compiler (gcc or clang) makes them available, DQRM_NATIVE=0 silences this.",
                stacklevel=2,
            )
        return shipped


def _shipped() -> ctypes.CDLL | None:
    """The wheel's library for the highest level that this processor supports, if it was built from these sources."""
    ability = torch.backends.cpu.get_cpu_capability().lower()
    levels = list(LEVELS)
    for level in reversed(levels[: levels.index(ability) + 1 if ability in levels else 1]):
        try:
            loaded = ctypes.CDLL(str(Path(__file__).with_name(f"_{level}.so")))
        except OSError:
            continue
        loaded.dqrm_source.restype = ctypes.c_char_p
        if loaded.dqrm_source() == digest(SOURCES).encode():
            return loaded
    return None


def _compiled() -> ctypes.CDLL:
    compiler = (
        shlex.split(os.environ.get("CC", "")) or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    )
    if not compiler:
        raise RuntimeError("no C compiler found")
    version = _run([*compiler, "--version"])
    identity = "\0".join([digest(SOURCES), *FLAGS, *_NATIVE, *compiler, version, _processor()])
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
            _run([*compiler, *FLAGS, *_NATIVE, *OPENMP, "-o", str(built), *sources, "-lm"])
        except RuntimeError:
            _run([*compiler, *FLAGS, *_NATIVE, *WITHOUT_OPENMP, "-o", str(built), *sources, "-lm"])
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
    """What -march=native depends on; a home folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
