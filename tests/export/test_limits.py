"""The limits of the artifact: how many bytes it takes, how much memory writing and opening it need, and full disks."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import dqrm
from conftest import tiny
from dqrm import DLRM, Artifact, Config, ExportConfig, ModelConfig, QATConfig, UserError
from dqrm.config import TrainingConfig
from dqrm.export import pipeline
from dqrm.models.base import build_tables
from dqrm.training.checkpoints import save_checkpoint
from dqrm.training.run import FORMAT_VERSION

KAGGLE = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
    2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
TERABYTE = (
    9980200, 26095, 17224, 7383, 20152, 3, 7112, 1435, 62, 9756762, 1332128, 314263, 10, 2208, 11168, 122, 4, 971, 14,
    9994101, 7267918, 9946670, 415284, 12422, 102, 36,
)  # fmt: skip
# Architecture -> table rows, embedding dim, widths of the MLPs with their inputs, the size that the paper names.
ARCHITECTURES = {
    "kaggle": (KAGGLE, 16, (13, 512, 256, 64, 16), (367, 512, 256, 1), 0.2705e9),
    "terabyte": (TERABYTE, 64, (13, 512, 256, 64), (415, 512, 512, 256, 1), 1.5725e9),
}


def crafted(folder, rows, dim, bottom, top, weights=None):
    """A run folder with one checkpoint of initial weights, as if somebody had trained it on data that is elsewhere."""
    config = Config(
        model=ModelConfig(embedding_dim=dim, bottom_mlp=bottom[1:], top_mlp=top[1:]),
        quantization=QATConfig(bits=4),
        training=TrainingConfig(device="cpu"),
    )
    data = {
        "path": "/nowhere/data", "fingerprint": "0" * 64, "dense": [f"I{n}" for n in range(bottom[0])], "split": {},
        "columns": [{"name": f"C{n}", "rows": count, "multi": False} for n, count in enumerate(rows)],
        "rows": {"train": 1, "validation": 0, "test": 0},
    }  # fmt: skip
    folder.mkdir()
    info = {"format_version": FORMAT_VERSION, "versions": {}, "config": config.to_dict(), "data": data}
    (folder / "run.json").write_text(json.dumps(info))
    tables = rows if weights is None else build_tables(rows, config.model, config.quantization, weight=weights)
    model = DLRM(bottom[0], tables, config=config.model, qat=config.quantization)
    save_checkpoint(folder / "checkpoints", 1, model, [], {"step": 1, "best": None}, set())
    return folder


def mlp_parts(bottom, top):
    """(bytes of codes, of scales, of biases) of both MLPs in INT4."""
    layers = [*pairwise(bottom), *pairwise(top)]
    outputs = sum(out for _, out in layers)
    return sum(out * math.ceil(inputs / 2) for inputs, out in layers), 4 * outputs, 4 * outputs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_bytes_of_the_papers_models(name, tmp_path):
    rows, dim, bottom, top, limit = ARCHITECTURES[name]
    scaled = [max(1, count // 1000) for count in rows]
    crafted(tmp_path / "run", scaled, dim, bottom, top)
    found = dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", ExportConfig(vocabulary="none"))
    codes, scales, biases = mlp_parts(bottom, top)
    parts = found["parts"]
    assert parts["table codes"] == sum(scaled) * dim // 2
    assert parts["table scales"] == 4 * 26
    assert (parts["MLP codes"], parts["MLP scales"], parts["biases"]) == (codes, scales, biases)
    assert parts["vocabularies"] == 0
    assert parts["header"] < 20_000
    weights = sum(parts.values()) - parts["header"] - parts["file"]
    assert (tmp_path / "m.dqrm").stat().st_size == weights + parts["header"]
    # The same formula at full size; the header grows by the digits of the row counts at most.
    full = sum(rows) * dim // 2 + 104 + codes + scales + biases + parts["header"] + 26 * 2 * 8 + 64
    assert full <= limit
    assert full / (4 * sum(rows) * dim) < 0.1254, "an eighth of FP32"
    model = dqrm.load(tmp_path / "m.dqrm", verify=True)
    assert model.tables.codes.nbytes == sum(scaled) * dim // 2


CHILD = """
import json, resource, sys, threading, time
from pathlib import Path

def status(*keys):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[key].split()[0]) * 1024 for key in keys]

import dqrm, torch
from dqrm.export.pipeline import export_run
torch.set_num_threads(1)
Path("/proc/self/clear_refs").write_text("5")
peak, stop, (start, all_of_it) = [0], threading.Event(), status("RssAnon", "VmRSS")

def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], *status("RssAnon"))
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
{work}
stop.set()
thread.join()
(high,) = status("VmHWM")
print(json.dumps({{"anonymous": peak[0] - start, "peak": high - all_of_it, **more}}))
"""


def child(work):
    """What a process of its own reports about its memory while it does some work."""
    out = subprocess.check_output(
        [sys.executable, "-c", CHILD.format(work=work)], text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run with 1.5 million rows of dim 64: 384 MB in FP32."""
    folder = tmp_path_factory.mktemp("large")
    rows = (1_400_000, 100_000)
    weights = torch.empty(sum(rows), 64)
    torch.manual_seed(0)
    weights[:1000].normal_()
    weights[1000:] = weights[:1000].repeat(1499, 1)
    crafted(folder / "run", rows, 64, (2, 8, 64), (65 + 2, 8, 1), weights)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_memory_to_export_and_to_load(large):
    table, codes = 1_500_000 * 64 * 4, 1_500_000 * 32
    work = "export_run({run!r}, {out!r}, dqrm.ExportConfig(vocabulary='none')); more = {{}}"
    found = child(work.format(run=str(large / "run"), out=str(large / "m.dqrm")))
    assert (large / "m.dqrm").stat().st_size < codes + 20_000
    assert found["peak"] < table + 200e6, found
    assert found["anonymous"] < 200e6 < table, f"a copy of a table: {found}"
    with (large / "m.dqrm").open("rb") as file:  # what was just written is mapped in large pages, whatever is read
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    work = (
        "before = status('RssAnon', 'RssFile'); model = dqrm.load({out!r})\n"
        "loaded = status('RssAnon', 'RssFile')\n"
        "ids = torch.stack([torch.randint(0, 1400000, (40,)), torch.randint(0, 100000, (40,))], 1)\n"
        "model(torch.zeros(40, 2), ids); scored = status('RssAnon', 'RssFile')\n"
        "maps = Path('/proc/self/smaps').read_text().split({out!r})[1:]\n"
        "more = {{'load': [b - a for a, b in zip(before, loaded)], 'score': [b - a for a, b in zip(before, scored)],\n"
        "         'mapped': sum(int(part.split('Rss:')[1].split()[0]) * 1024 for part in maps) if maps else None,\n"
        "         'bytes': model.tables.codes.nbytes}}"
    )
    found = child(work.format(out=str(large / "m.dqrm")))
    assert found["mapped"], "the file is not memory-mapped"
    assert found["mapped"] < 12e6, f"more than what 80 rows are on was read: {found}"
    assert found["bytes"] == codes
    assert max(found["load"]) < 10e6, found
    assert found["score"][0] < 20e6, f"tables were copied: {found}"
    assert found["anonymous"] < 60e6, found


@pytest.fixture(scope="module")
def runs(generated, tmp_path_factory):
    """Two runs on the same data, and the artifact of the first."""
    folder = tmp_path_factory.mktemp("full")
    for seed in (0, 1):
        dqrm.train(generated, folder / f"run{seed}", tiny(max_steps=3, seed=seed))
    return folder


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, and a function that resizes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    resize = ["mount", "-o", "remount,size={}k", str(folder)]
    yield folder, lambda size: subprocess.run([part.format(size) for part in resize], check=True)
    subprocess.run(["umount", str(folder)], check=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("vocabulary", ["embed", "beside"])
def test_a_full_disk_leaves_the_old_file(vocabulary, runs, disk):
    folder, resize = disk
    config = ExportConfig(vocabulary=vocabulary)
    dqrm.export_run(runs / "run0", folder / "m.dqrm", config)
    old = contents(folder)
    used = sum(-(-len(data) // 4096) * 4 for data in old.values())
    refused = 0
    for more in (0, 4, 8, 16, 32, 64, 96, 128, 160, 200, 4000):
        resize(used + more)
        said = None
        try:
            dqrm.export_run(runs / "run1", folder / "m.dqrm", config)
        except UserError as error:
            said = str(error)
        if said is not None:
            assert "space" in said
            assert "m.dqrm" in said
            assert "\n" not in said
            assert contents(folder) == old, more
            refused += 1
    assert 3 < refused < 11
    assert contents(folder).keys() == old.keys()
    assert contents(folder) != old
    assert dqrm.load(folder / "m.dqrm", verify=True)
    assert Artifact.open(folder / "m.dqrm").vocabulary(25)


def test_a_disk_that_is_full_for_the_first_export_stays_empty(runs, disk):
    folder, resize = disk
    for size in (4, 40, 100, 160):
        resize(size)
        with pytest.raises(UserError, match="space"):
            dqrm.export_run(runs / "run0", folder / "m.dqrm")
        assert contents(folder) == {}


@pytest.mark.parametrize("stage", ["workshop.flush", "workshop.os.replace", "pipeline.compare", "pipeline.sample"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_whatever_fails_leaves_the_old_file(stage, error, runs, tmp_path, monkeypatch):
    out = tmp_path / "m.dqrm"
    dqrm.export_run(runs / "run0", out)
    old = contents(tmp_path)

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"dqrm.export.{stage}", fail)
        with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
            dqrm.export_run(runs / "run1", out)
        assert contents(tmp_path) == old
    dqrm.export_run(runs / "run1", out)
    assert contents(tmp_path).keys() == old.keys()
    assert contents(tmp_path) != old


def test_a_process_that_is_killed_leaves_the_old_file_and_the_next_export_cleans_up(runs, tmp_path):
    out = tmp_path / "m.dqrm"
    dqrm.export_run(runs / "run0", out)
    old = out.read_bytes()
    code = (
        "import os, dqrm; from dqrm.export import pipeline; pipeline.compare = lambda *a: os._exit(9); "
        f"pipeline.export_run({str(runs / 'run1')!r}, {str(out)!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert out.read_bytes() == old
    dqrm.export_run(runs / "run1", out)
    assert [path.name for path in tmp_path.iterdir()] == ["m.dqrm"]
    assert out.read_bytes() != old


def test_an_export_without_vocabularies_beside_removes_those_of_the_file_it_replaces(runs, tmp_path):
    out = tmp_path / "m.dqrm"
    for vocabulary, files in (("beside", 2), ("embed", 1), ("beside", 2), ("none", 1)):
        dqrm.export_run(runs / "run0", out, ExportConfig(vocabulary=vocabulary))
        assert len(contents(tmp_path)) == files, vocabulary


def test_somebody_elses_folder_in_the_way_is_left_alone(runs, tmp_path):
    mine = tmp_path / "m.dqrm.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="partial"):
        dqrm.export_run(runs / "run0", tmp_path / "m.dqrm")
    assert (mine / "thesis.txt").read_text() == "precious"


def test_two_exports_at_once_do_not_mix(runs, tmp_path):
    code = "import sys, dqrm; dqrm.export_run(sys.argv[1], sys.argv[2]); "
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(runs / f"run{n}"), str(tmp_path / "m.dqrm")], stderr=subprocess.PIPE
        )
        for n in (0, 1)
    ]
    said = [process.communicate()[1].decode() for process in processes]
    assert any(process.returncode == 0 for process in processes)
    for process, text in zip(processes, said):
        assert process.returncode == 0 or "another process" in text, text
    assert [path.name for path in tmp_path.iterdir()] == ["m.dqrm"]
    assert dqrm.load(tmp_path / "m.dqrm", verify=True)


def test_no_run_is_changed_by_exporting_it(runs, tmp_path):
    before = {path: path.read_bytes() for path in (runs / "run0").rglob("*") if path.is_file()}
    dqrm.export_run(runs / "run0", tmp_path / "m.dqrm")
    assert {path: path.read_bytes() for path in (runs / "run0").rglob("*") if path.is_file()} == before
    assert pipeline.TOLERANCE == 1e-5
