"""Whole training steps against float64 and each other; the kernels missing, hard to build, or built twice at once."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import reference as ref
from conftest import tiny
from dqrm import kernels
from dqrm.config import ModelConfig
from dqrm.kernels import build
from dqrm.models.dlrm import DLRM
from dqrm.training.step import TrainStep
from training.test_bf16 import MODELS, error, make_batch
from training.test_bf16 import build as make_model

NATIVE = pytest.mark.skipif(not kernels.native(), reason="the kernels cannot be built here")
SMALL = ModelConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1))


@pytest.fixture(params=[pytest.param("native", marks=NATIVE), "plain"])
def path(request, monkeypatch):
    """In compiled code, or as on a machine without a compiler."""
    if request.param == "plain":
        monkeypatch.setattr("dqrm.kernels.library", lambda: None)
    return request.param


# ---- against float64


@pytest.mark.parametrize("name", MODELS)
def test_a_step_moves_every_parameter_as_float64_autograd_says(path, name):
    model = make_model(name, precision="fp32")
    step, batch = TrainStep(model, tiny()), make_batch(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = step.forward(batch)
    _, exact_loss, gradients = ref.dlrm(model, batch.dense, batch.ids, batch.bags, batch.labels)
    assert float(loss.detach()) == pytest.approx(float(exact_loss), rel=1e-6)
    step.backward(loss)
    step.update(0.5)
    for parameter_name, parameter in model.named_parameters():
        assert error(parameter.grad, gradients[parameter_name]) < 1e-5, parameter_name
        expected = before[parameter_name].double() - 0.5 * gradients[parameter_name]
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-6, msg=parameter_name)


def losses_of_20_steps(name="bags", precision="fp32", **options):
    torch.manual_seed(0)
    model = make_model(name, precision=precision, **options)
    step = TrainStep(model, tiny(period=3))
    losses = [float(step(make_batch(model, 128, seed), 0.1)) for seed in range(20)]
    return losses, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"precision": "bf16", "table_dtype": torch.bfloat16}], ids=["fp32", "bf16"])
def test_two_runs_are_the_same_bit_for_bit(path, options):
    one, two = losses_of_20_steps(**options), losses_of_20_steps(**options)
    assert one[0] == two[0]
    assert one[0][-1] < one[0][0]
    for a, b in zip(one[1], two[1]):
        assert torch.equal(a, b)


# ---- without the kernels, in processes of their own

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


# ---- what a module of layers promises besides speed


def small_batch():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10).view(5, 2) % 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_cast_to_another_dtype_still_predicts(path, dtype):
    model, (dense, ids) = DLRM(3, [7, 9], config=SMALL).eval(), small_batch()
    expected = model(dense, ids)
    found = model.to(dtype)(dense.to(dtype), ids)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)


def test_autocast_trains(path):
    model, (dense, ids) = DLRM(3, [7, 9], config=SMALL), small_batch()
    expected = model(dense, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(dense, ids)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    found.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_hooks_of_the_layers_are_called(path):
    model, seen = DLRM(3, [7, 9], config=SMALL), []
    for layer in [*model.bottom, *model.top]:
        layer.register_forward_hook(lambda layer, *_: seen.append(layer))
    model(*small_batch())
    assert seen == [*model.bottom, *model.top]


def test_a_layer_put_in_place_of_another_is_used(path):
    model = DLRM(3, [7, 9], config=SMALL)
    model.top[2] = torch.nn.Linear(8, 1)
    with torch.no_grad():
        model.top[2].weight.zero_()
        model.top[2].bias.fill_(3)
    out = model(*small_batch())
    assert out.shape == (5,)
    assert (out == 3).all()
