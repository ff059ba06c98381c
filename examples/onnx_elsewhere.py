"""Score with ONNX Runtime in a process that has numpy and onnxruntime only: `python examples/onnx_elsewhere.py`.

Exports a small model as .onnx and its vocabularies as plain JSON, then starts a second Python in which importing torch
or dqrm fails, and compares its probabilities with dqrm's own. Needs the extra dqrm[onnx].
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

import dqrm

SCORER = """
import json, sys

sys.modules["torch"] = sys.modules["dqrm"] = None  # importing them raises ImportError

import numpy as np
import onnxruntime

folder = sys.argv[1]
vocabularies = json.load(open(f"{folder}/vocabularies.json"))
rows = json.load(open(f"{folder}/rows.json"))
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
ids = [[vocabularies[name].get(row[name], 0) for name in ("user", "ad")] for row in rows]  # unseen: row 0
dense = [[np.log1p(max(row["price"], 0.0))] for row in rows]  # dense_transform log1p, the default
feeds = {"dense": np.array(dense, np.float32), "ids": np.array(ids, np.int64)}
(probabilities,) = session.run(["probability"], feeds)
print(json.dumps(probabilities.tolist()))
"""


def train_model(folder: Path) -> dqrm.Dataset:
    """A run in folder/run, on generated clicks."""
    random = np.random.default_rng(0)
    users, ads = random.integers(0, 200, 4000), random.integers(0, 30, 4000)
    clicked = random.random(4000) < 1 / (1 + np.exp(-(users % 5 - 2.0) * (ads % 3 - 1.0)))
    prices = random.exponential(10, 4000)
    log = pl.DataFrame({"clicked": clicked, "user": users.astype(str), "ad": ads.astype(str), "price": prices})
    columns = dqrm.PrepareConfig(label="clicked", categorical=("user", "ad"), dense=("price",))
    data = dqrm.prepare(log, folder / "data", columns)
    config = dqrm.Config(
        model=dqrm.ModelConfig(embedding_dim=8, bottom_mlp=(16, 8), top_mlp=(16, 1)),
        training=dqrm.TrainingConfig(epochs=2, threads=1),
    )
    dqrm.train(data, folder / "run", config)
    return data


def main() -> float:
    """Score the same rows in both processes; returns the largest difference of the probabilities."""
    rows = [{"user": str(user), "ad": str(ad), "price": 3.5 * ad} for user in (0, 7, 999) for ad in range(4)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = train_model(folder)
        dqrm.export_run(folder / "run", folder / "model.dqrm")
        dqrm.export_run(folder / "run", folder / "model.onnx")
        vocabularies = {
            column["name"]: dict(pl.read_parquet(data.path / column["vocabulary"]).select("key", "row").iter_rows())
            for column in data.info["schema"]["columns"]
        }
        (folder / "vocabularies.json").write_text(json.dumps(vocabularies))
        (folder / "rows.json").write_text(json.dumps(rows))
        done = subprocess.run([sys.executable, "-c", SCORER, temporary], capture_output=True, text=True, check=True)
        elsewhere = np.array(json.loads(done.stdout))
        here = dqrm.load(folder / "model.dqrm").score(rows)
    difference = float(np.abs(elsewhere - here).max())
    print(f"{len(rows)} rows; probabilities differ by at most {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
