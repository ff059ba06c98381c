"""Shared by all tests: few threads, which tests are quick, and small datasets that are made once."""

import contextlib
import gc
import os
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from dqrm.config import Config, ModelConfig, OptimizerConfig, TrainingConfig
from dqrm.quant.config import QATConfig
from kernel_helpers import NATIVE, on
from selection import quick

torch.set_num_threads(1)  # pytest-xdist may run tests in parallel
os.environ["OMP_NUM_THREADS"] = "1"  # and the processes that they start, too
os.fsync = lambda file: None  # the tests kill processes, not machines, and disks can be slow


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark most of a large product of parameters `product`; run what takes longest first."""
    functions = defaultdict(list)
    for item in items:
        by_hand = item.get_closest_marker("slow") is not None
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and not by_hand:
            functions[item.parent, item.originalname].append(item)
    for cases in functions.values():
        for case in set(cases) - set(quick(cases)):
            case.add_marker(pytest.mark.product)
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("distributed", "long")])


def pytest_collection_finish() -> None:
    """Thousands of tests and all that they import are no garbage: looking through them takes 0.1 s or more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=[pytest.param("native", marks=NATIVE), "plain"])
def path(request: pytest.FixtureRequest):
    """In compiled code, or as on a machine without a compiler."""
    with on(request.param):
        yield request.param


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory):
    """A generated log of 2,000 lines in Criteo's layout, prepared: 13 dense columns, 26 tables."""
    from dqrm.data.config import PrepareConfig
    from dqrm.data.prepare import prepare
    from dqrm.data.synthetic import generate
    from dqrm.data.synthetic_config import GenerateConfig

    folder = tmp_path_factory.mktemp("generated")
    generate(folder / "log.txt", GenerateConfig(rows=2000))
    return prepare([folder / "log.txt"], folder / "data", PrepareConfig(layout="criteo-kaggle"))


@pytest.fixture(scope="session")
def bags_data(tmp_path_factory: pytest.TempPathFactory):
    """A small table with a multi-valued column and a column of strings, no dense column."""
    import numpy as np
    import polars as pl

    from dqrm.data.config import PrepareConfig
    from dqrm.data.prepare import prepare

    folder = tmp_path_factory.mktemp("bags")
    random = np.random.default_rng(0)
    tags = [[f"t{tag}" for tag in random.integers(0, 9, count)] for count in random.integers(0, 4, 400)]
    users = random.integers(0, 30, 400)
    pl.DataFrame({"label": (users % 2).astype(int), "user": users.astype(str), "tags": tags}).write_parquet(
        folder / "log.parquet"
    )
    config = PrepareConfig(layout="table", label="label", categorical=("user", "tags"), multi=("tags",))
    return prepare([folder / "log.parquet"], folder / "data", config)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory):
    """A function that copies small stand-ins for the files that the documentation names into a folder."""
    from shipped_helpers import make_stand_ins

    made = tmp_path_factory.mktemp("stand-ins")
    with contextlib.chdir(made):
        make_stand_ins()
    return lambda folder: Path(shutil.copytree(made, folder, dirs_exist_ok=True))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a given size."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def mount(kilobytes):
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        try:
            if subprocess.run(command, check=False, capture_output=True).returncode:
                pytest.skip("mounting a small file system is not permitted here")
        except FileNotFoundError:
            pytest.skip("there is no mount command here")
        mounted.append(folder)
        return folder

    yield mount
    for path in mounted:
        # Lazily: files that an error has met may still be mapped.
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def tiny(bits: int = 4, *, optimizer: str = "sgd", period: int = 3, table_l2: float = 0.0, **training) -> Config:
    """A small DLRM that trains in a second by plain SGD; keyword arguments are fields of TrainingConfig."""
    given = {"epochs": 2, "batch_size": 64, "device": "cpu", "patience": 0, "callbacks": (), **training}
    return Config(
        model=ModelConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1)),
        quantization=QATConfig(bits=bits, scale_period=period),
        optimizer=OptimizerConfig(optimizer=optimizer, learning_rate=0.1, table_l2=table_l2, warmup_steps=0),
        training=TrainingConfig(**given),
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    from safetensors.torch import load_file

    return {
        f"{file.name}/{name}": t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()
    }


_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
              "--disable-sync", "--no-first-run",
              "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    """Chromium, headless."""
    if _CHROMIUM is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: dqrm[dev]")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=_CHROMIUM, args=_ARGUMENTS)
        yield opened
        opened.close()
