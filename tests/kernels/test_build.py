"""The kernels missing, hard to build, built twice at once or in a wheel; and input that must not crash them."""

import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dqrm.kernels import build
from dqrm.kernels.flags import LEVELS
from kernel_helpers import NATIVE
from kernels.test_fused_step import losses_of_20_steps

TRAIN = """
import sys
sys.path.insert(0, {tests!r})
from kernels.test_fused_step import losses_of_20_steps
from dqrm import kernels
print("native", kernels.native())
print("losses", *losses_of_20_steps()[0])
"""
LOAD = "from dqrm.kernels.build import library; print('native', library() is not None)"


def start(code, remove=(), **environment):
    known = {name: value for name, value in os.environ.items() if name not in remove}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**known, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def finish(process):
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]
    return out, errors


@NATIVE
def test_without_kernels_training_gives_the_same_losses():
    code = TRAIN.format(tests=str(Path(__file__).parents[1]))
    out, errors = finish(start(code, CC="/nonexistent/cc"))
    assert "native False" in out
    assert errors.count("the CPU kernels cannot be built") == 1
    losses = [float(word) for word in re.search("losses (.*)", out)[1].split()]
    np.testing.assert_allclose(losses, losses_of_20_steps()[0], rtol=1e-5)


@NATIVE
def test_processes_that_build_at_once_all_get_their_kernels(tmp_path):
    processes = [start(LOAD, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    for process in processes:
        out, errors = finish(process)
        assert "native True" in out
        assert "cannot be built" not in errors
    (found,) = (tmp_path / "dqrm").iterdir()
    assert re.fullmatch(r"kernels-[0-9a-f]{24}\.so", found.name)


# ---- the build, on a source that compiles at once


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small source in place of the kernels, and a cache of its own."""
    file = tmp_path / "source.c"
    file.write_text("int dqrm_one(void) { return 1; }\n")
    monkeypatch.setattr(build, "SOURCES", (file,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("DQRM_NATIVE", raising=False)
    return file


def built(source):
    """The files in the cache, after loading once."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library.__wrapped__() is not None
    return sorted(source.parent.glob("cache/dqrm/*"))


@NATIVE
def test_another_source_makes_another_file_and_the_same_one_is_kept(source, monkeypatch):
    (first,) = built(source)
    made = first.stat().st_mtime_ns
    assert built(source) == [first]
    assert first.stat().st_mtime_ns == made
    source.write_text(source.read_text() + "/* changed */\n")
    assert len(built(source)) == 2
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    assert len(built(source)) == 3
    monkeypatch.setattr(build, "_processor", lambda: "another")
    assert len(built(source)) == 4


@NATIVE
def test_a_source_that_does_not_compile_is_said_once_with_its_error(source):
    source.write_text("int dqrm_one(void) { return undeclared; }\n")
    with pytest.warns(UserWarning, match="cannot be built.*undeclared") as said:
        assert build.library.__wrapped__() is None
    assert len(said) == 1
    assert list(source.parent.glob("cache/dqrm/*")) == []


@NATIVE
@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_damaged_file_in_the_cache_is_built_again(source, content, monkeypatch):
    (good,) = built(source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / "other"))  # a path that this process has not loaded yet
    file = source.parent / "other" / "dqrm" / good.name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    built(source)
    assert file.stat().st_size == good.stat().st_size


@NATIVE
def test_the_compiler_may_come_with_arguments(source, monkeypatch):
    """CC is a command for make and for Python's own builds: 'ccache gcc', 'gcc -m64'."""
    monkeypatch.setenv("CC", "cc -pipe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library.__wrapped__() is not None


@NATIVE
def test_without_a_cache_folder_it_compiles_for_this_process_and_leaves_nothing(source, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library.__wrapped__() is not None
    assert list((tmp_path / "temporary").iterdir()) == []


@NATIVE
def test_without_a_home_it_works(source, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", no_home)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        build.library.__wrapped__()
    assert len(said) <= 1


@pytest.mark.parametrize(
    ("environment", "said"), [({"DQRM_NATIVE": "0"}, 0), ({"PATH": ""}, 1), ({"CC": "/nonexistent/cc"}, 1)]
)
def test_without_a_compiler_there_are_no_kernels_and_one_warning(source, monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert build.library.__wrapped__() is None
    assert ["cannot be built" in str(warning.message) for warning in found] == [True] * said


# ---- in a wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package from a wheel, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    root = Path(__file__).parents[2]
    shutil.copytree(root / "src", folder / "source" / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "."]
    done = subprocess.run(
        [*command, "-w", str(folder)], cwd=folder / "source", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    assert re.fullmatch(r"dqrm-[\d.]+-py3-none-[a-z0-9_]+\.whl", wheel.name)
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


OUTPUTS = """
import hashlib, sys, warnings
sys.path.insert(0, {site!r})
warnings.simplefilter("error")
import torch, dqrm
torch.backends.cpu.get_cpu_capability = lambda: {level!r}  # not torch's own: its random numbers depend on it
from dqrm import kernels
from dqrm.kernels import build
assert dqrm.__file__.startswith({site!r}), dqrm.__file__
sys.path.insert(0, {tests!r})
from kernels.test_operations import CASES
digests = dict()
for function, point, _ in (param.values for param in CASES[::7]):
    digest = digests.setdefault(function.__name__, hashlib.sha256())
    for out in function(*point) or ():
        if out is not None:
            digest.update(torch.where(out.isnan(), 0, out).flatten().contiguous().view(torch.uint8).numpy().tobytes())
print("native", kernels.native(), build.library()._name, torch.get_num_threads())
print("digests", *(name + digest.hexdigest()[:8] for name, digest in digests.items()))
"""


def outputs(installed, tmp_path, level="AVX2", **environment):
    code = OUTPUTS.format(site=str(installed), tests=str(Path(__file__).parents[1]), level=level)
    return finish(start(code, XDG_CACHE_HOME=str(tmp_path / "none"), **environment))[0]


@pytest.mark.slow
@NATIVE
def test_a_wheel_has_kernels_for_machines_without_a_compiler_and_all_have_the_same_bits(installed, tmp_path):
    compiled = outputs(installed, tmp_path)
    assert str(tmp_path / "none") in compiled
    has = [*LEVELS].index(torch.backends.cpu.get_cpu_capability().lower())
    for level, way in zip([*LEVELS][: has + 1], ({"CC": "/no/cc"}, {"PATH": ""}, {"DQRM_NATIVE": "wheel"})):
        shipped = outputs(installed, tmp_path / "other", level.upper(), OMP_NUM_THREADS="2", **way)
        assert f"native True {installed}/dqrm/kernels/_{level}.so" in shipped
        assert shipped.split("digests")[1] == compiled.split("digests")[1]
    assert not (tmp_path / "other").exists()
    (installed / "dqrm" / "kernels" / "common.h").open("a").write("/* changed */\n")
    code = "import sys; sys.path.insert(0, {site!r}); from dqrm import kernels; print('native', kernels.native())"
    out, _ = finish(start(code.format(site=str(installed)), DQRM_NATIVE="wheel"))
    assert "native False" in out


# ---- input that must not crash them


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@NATIVE
def test_what_the_kernels_cannot_take_is_refused_and_never_crashes():
    """As plain torch refuses it; in a process of its own, since a wrong write ends it."""
    code = """
import torch
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.kernels import add_rows
collection = QuantEmbeddingBagCollection([6], 3, bits=32)
calls = {
    "bf16 values": lambda: add_rows(torch.zeros(4, 2), torch.tensor([0, 1]), torch.ones(2, 2, dtype=torch.bfloat16)),
    "other width": lambda: add_rows(torch.zeros(4, 99999), torch.zeros(9, dtype=torch.int64), torch.ones(9, 1)),
    "row outside": lambda: add_rows(torch.zeros(4, 2), torch.tensor([0, 1 << 40]), torch.ones(2, 2)),
    "other device": lambda: collection(torch.zeros(4, 1, dtype=torch.int64, device="meta")),
}
narrow = add_rows(torch.zeros(50, 4), torch.arange(9, 49, dtype=torch.int32), torch.ones(40, 4))
assert narrow[9:49].eq(1).all() and narrow.sum() == 160
for name, call in calls.items():
    try:
        call()
        print("taken:", name, flush=True)
    except Exception:
        print("refused:", name, flush=True)
"""
    status, out, _ = run_python(code)
    assert "taken" not in out, out
    assert status == 0, out


@NATIVE
def test_a_traced_model_computes_and_does_not_replay_memory():
    """torch.jit.trace (torch's older ONNX exporter uses it) cannot see into a kernel."""
    code = """
import torch
from dqrm.config import ModelConfig
from dqrm.models.dlrm import DLRM
model = DLRM(3, [7, 9], config=ModelConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1))).eval()
model(torch.randn(5, 3), torch.randint(7, (5, 2)))
traced = torch.jit.trace(model, (torch.randn(5, 3), torch.randint(7, (5, 2))), check_trace=False)
dense, ids = torch.randn(5, 3), torch.randint(7, (5, 2))
torch.testing.assert_close(traced(dense, ids), model(dense, ids))
"""
    status, _, error = run_python(code)
    assert status == 0, error[-500:]
