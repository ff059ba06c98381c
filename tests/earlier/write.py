"""Writes `earlier.zip` with an earlier dqrm: `PYTHONPATH=<checkout of a046476>/src python tests/earlier/write.py`.

A dataset, a finished run, a run that was stopped in its second epoch, its artifact, predictions of the log, and what
the training that was not stopped gave: files of before there were checksums, callbacks, quantizers and other models.
"""

import json
import random
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import dqrm

OUTPUT = Path(__file__).with_name("earlier.zip")


def log(path: Path) -> None:
    draw = random.Random(0)
    lines = ["click,price,user,tags"]
    for _ in range(300):
        user, tags = draw.randrange(12), [draw.randrange(5) for _ in range(draw.randrange(3))]
        click = int(draw.random() < 0.2 + 0.5 * (user % 2))
        lines.append(f"{click},{draw.random():.3f},u{user},{'|'.join(f't{tag}' for tag in tags)}")
    path.write_text("\n".join(lines) + "\n")


def stop(what: str, done: int, total: int | None) -> None:
    """A progress callback that ends the training early in its second epoch, as Ctrl-C does."""
    if what.startswith("epoch 2") and done >= 22:
        raise KeyboardInterrupt


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        log(path / "log.csv")
        prepare = dqrm.PrepareConfig(label="click", dense=("price",), categorical=("user", "tags"), multi=("tags",))
        dqrm.prepare([path / "log.csv"], path / "data", prepare)
        config = dqrm.Config(
            model=dqrm.ModelConfig(embedding_dim=4, bottom_mlp=(4, 4), top_mlp=(4, 1)),
            quantization=dqrm.QATConfig(bits=4, scale_period=3),
            optimizer=dqrm.OptimizerConfig(optimizer="adagrad"),
            training=dqrm.TrainingConfig(epochs=2, batch_size=16, checkpoint_every=4, device="cpu", threads=1),
        )
        summary = dqrm.train(path / "data", path / "run", config)
        with suppress(KeyboardInterrupt):
            dqrm.train(path / "data", path / "stopped", config, progress=stop)
        assert not (path / "stopped" / "summary.json").exists()
        dqrm.export_run(path / "run", path / "model.dqrm")
        dqrm.predict(path / "model.dqrm", [path / "log.csv"], path / "predictions.csv", dqrm.PredictConfig())
        (path / "expected.json").write_text(json.dumps({"best": summary["best"], "test": summary["test"]}))
        with zipfile.ZipFile(OUTPUT, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(path.rglob("*")):
                if file.is_file() and file.name != ".lock":
                    content = file.read_bytes()
                    if file.suffix == ".json":  # where the dataset was, which is nowhere now
                        content = content.replace(folder.encode(), b"/earlier")
                    archive.writestr(file.relative_to(path).as_posix(), content)


if __name__ == "__main__":
    main()
