"""That TorchRec, FBGEMM and torch go together is checked at import, with one sentence that says what to install."""

import importlib
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from cli_helpers import command
from dqrm.errors import UserError


@pytest.fixture
def pairing(monkeypatch):
    """The module as it is imported by itself, and a function that says which releases are installed."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("dqrm.torchrec")}
    package = type(sys)("dqrm.torchrec")  # its __init__ runs the check
    package.__path__ = [str(next(iter(importlib.import_module("dqrm").__path__))) + "/torchrec"]
    monkeypatch.setitem(sys.modules, "dqrm.torchrec", package)
    module = importlib.import_module("dqrm.torchrec.pairing")

    def installed(**releases):
        def version(name):
            if name.replace("-", "_") not in releases:
                raise PackageNotFoundError(name)
            return releases[name.replace("-", "_")]

        monkeypatch.setattr(module, "version", version)
        return module

    yield installed
    for name in [name for name in sys.modules if name.startswith("dqrm.torchrec")]:
        del sys.modules[name]
    sys.modules.update(before)


PAIR = (
    "with torch 2.13.0+cpu install the pair fbgemm-gpu-cpu 1.8 and torchrec 1.9.2: pip install 'dqrm[torchrec]' "
    "'fbgemm-gpu-cpu==1.8.*' && pip install --no-deps torchrec==1.9.2"
)


@pytest.mark.parametrize(
    ("releases", "sentence"),
    [
        ({}, "dqrm.torchrec needs torchrec and FBGEMM, not installed here"),
        ({"torchrec": "1.9.2"}, "dqrm.torchrec needs FBGEMM, not installed here"),
        ({"fbgemm_gpu_cpu": "1.8.0"}, "dqrm.torchrec needs torchrec, not installed here"),
        (
            {"torchrec": "1.9.2", "fbgemm_gpu_cpu": "1.9.0"},
            "fbgemm-gpu-cpu is 1.9.0, which is built for torch 2.14, but torch is 2.13.0+cpu",
        ),
        (
            {"torchrec": "1.9.2", "fbgemm_gpu_cpu": "1.8.0", "fbgemm_gpu": "1.7.0"},
            "fbgemm-gpu is 1.7.0, which is built for torch 2.12, but torch is 2.13.0+cpu",
        ),
    ],
)
def test_what_is_missing_or_does_not_match(pairing, releases, sentence):
    with pytest.raises(UserError) as error:
        pairing(torch="2.13.0+cpu", **releases).check()
    assert str(error.value) == f"{sentence}; {PAIR}"


@pytest.mark.parametrize(("torch", "series"), [("2.13.0+cpu", "1.8"), ("2.14.1", "1.9"), ("2.9.1", "1.4")])
def test_each_torch_has_its_fbgemm(pairing, torch, series):
    assert pairing().fbgemm_for(torch) == series


@pytest.mark.parametrize("error", [ImportError("libfoo.so: undefined symbol\nmore"), AttributeError("no fbgemm::x")])
def test_what_cannot_be_imported(pairing, monkeypatch, error):
    module = pairing(torch="2.13.0+cpu", torchrec="1.9.2", fbgemm_gpu_cpu="1.8.0")

    def fails(name):
        raise error

    monkeypatch.setattr(module, "import_module", fails)
    with pytest.raises(UserError) as said:
        module.check()
    assert str(said.value) == f"torchrec 1.9.2 cannot be imported ({str(error).splitlines()[0]}); {PAIR}"


def test_the_bench_refuses_without_the_extra(capsys):
    if importlib.util.find_spec("torchrec"):
        pytest.skip("TorchRec is installed here")
    code, out, said = command(capsys, "bench", "sharded", "--steps", "1")
    assert (code, out) == (2, "")
    assert said.startswith("dqrm: dqrm.torchrec needs torchrec and FBGEMM, not installed here; with torch ")
    assert len(said.strip().splitlines()) == 1
