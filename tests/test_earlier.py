"""A dataset, runs and an artifact of an earlier dqrm (`tests/earlier/write.py`) open, train, resume and score as then.

They have no checksums, and run.json lacks what has been added to the configuration since.
"""

import json
import shutil
import zipfile
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import dqrm
from conftest import tiny
from dqrm.errors import NotVerified
from dqrm.info import describe

pytestmark = pytest.mark.filterwarnings("ignore::dqrm.errors.NotVerified")


@pytest.fixture
def earlier(tmp_path):
    with zipfile.ZipFile(Path(__file__).with_name("earlier") / "earlier.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


def probabilities(file: Path) -> torch.Tensor:
    return torch.tensor(pl.read_csv(file)["probability"].to_list(), dtype=torch.float64)


def test_a_dataset_opens_and_trains(earlier):
    data = dqrm.Dataset(earlier / "data")
    with pytest.warns(NotVerified, match="written without checksums"):
        assert describe(str(data.path), verify=True)["verified"] is False
    assert data.rows == {"train": 240, "validation": 30, "test": 30}
    summary = dqrm.train(data, earlier / "new", tiny(max_steps=3))
    assert summary["steps"] == 3


def test_preparing_the_same_log_gives_the_same_arrays(earlier):
    config = dqrm.PrepareConfig(label="click", dense=("price",), categorical=("user", "tags"), multi=("tags",))
    dqrm.prepare([earlier / "log.csv"], earlier / "again", config)
    arrays = [file for file in (earlier / "data").rglob("*") if file.suffix not in (".json", ".parquet", "")]
    assert len(arrays) == 15
    for file in arrays:
        assert (earlier / "again" / file.relative_to(earlier / "data")).read_bytes() == file.read_bytes(), file.name


def test_a_run_evaluates_to_its_figures(earlier):
    expected = json.loads((earlier / "expected.json").read_text())
    model, _ = dqrm.Run.open(earlier / "run").load_model()
    for split, metrics in (("validation", expected["best"]["metrics"]), ("test", expected["test"])):
        measured = dqrm.evaluate(model, earlier / "data", split)
        for name, value in metrics.items():
            assert measured[name] == pytest.approx(value, rel=1e-5), (split, name)


def test_a_run_that_was_stopped_resumes_to_the_same_weights(earlier):
    dqrm.resume(earlier / "stopped", earlier / "data")
    state, expected = (
        load_file(earlier / name / "checkpoints" / "step-000000030" / "weights.safetensors")
        for name in ("stopped", "run")
    )
    renamed = {name.replace(".weight_fake_quantizer.", "."): value for name, value in state.items()}
    assert set(expected) <= set(renamed)
    for name, value in expected.items():
        torch.testing.assert_close(renamed[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_finished_run_and_its_best_checkpoint_export_as_then(earlier):
    dqrm.export_run(earlier / "run", earlier / "again.dqrm", dqrm.ExportConfig(data=str(earlier / "data")))
    old, new = (load_file(earlier / f"{name}.dqrm") for name in ("model", "again"))
    assert torch.equal(old["tables.codes"], new["tables.codes"])
    dqrm.predict(earlier / "again.dqrm", [earlier / "log.csv"], earlier / "again.csv")
    torch.testing.assert_close(
        probabilities(earlier / "again.csv"), probabilities(earlier / "predictions.csv"), rtol=0, atol=1e-6
    )


def test_an_artifact_predicts_what_it_did(earlier):
    dqrm.predict(earlier / "model.dqrm", [earlier / "log.csv"], earlier / "now.csv")
    now = probabilities(earlier / "now.csv")
    assert now.std() > 0.05
    torch.testing.assert_close(now, probabilities(earlier / "predictions.csv"), rtol=0, atol=1e-6)
    assert describe(str(earlier / "model.dqrm"), verify=True)["verified"] is True
    shutil.rmtree(earlier / "run")  # the file needs nothing else
    row = {"price": 0.5, "user": "u1", "tags": "t1|t2"}
    assert dqrm.load(earlier / "model.dqrm").score([row]).shape == (1,)
