"""Artifacts that the tests of the server serve."""

import pytest

import dqrm
from conftest import tiny
from dqrm.export.check import generate, logits_of

for package in ("uvicorn", "starlette", "prometheus_client"):
    pytest.importorskip(package, reason="the extra dqrm[serve] is not installed")


@pytest.fixture(scope="session")
def served(generated, tmp_path_factory):
    """Two artifacts of one schema with different weights: (first, second)."""
    folder = tmp_path_factory.mktemp("served")
    paths = []
    for seed in (1, 2):
        dqrm.train(generated, folder / f"run{seed}", tiny(max_steps=2, seed=seed, threads=1))
        dqrm.export_run(folder / f"run{seed}", folder / f"m{seed}.dqrm")
        paths.append(folder / f"m{seed}.dqrm")
    return tuple(paths)


@pytest.fixture(scope="session")
def bags_model(bags_data, tmp_path_factory):
    """An artifact with a multi-valued column and no dense one."""
    folder = tmp_path_factory.mktemp("served-bags")
    dqrm.train(bags_data, folder / "run", tiny(max_steps=2, threads=1))
    dqrm.export_run(folder / "run", folder / "bags.dqrm")
    return folder / "bags.dqrm"


@pytest.fixture(scope="session")
def expected(served):
    """A batch of random tensors, and each artifact's probabilities for it, by version."""
    opened = [dqrm.Artifact.open(path) for path in served]
    batch = generate(opened[0].content["model"], 64)
    return batch, {each.container.checksum[:12]: logits_of(each.model(), batch).sigmoid().numpy() for each in opened}
