"""The folder for browsers: its files, what is refused, and where onnxruntime-web comes from."""

import hashlib
import json
import re
import shutil
import tarfile

import pytest
import torch

import dqrm
import web_helpers as helpers
from cli_helpers import command
from dqrm.artifact.file import Artifact
from dqrm.errors import UserError
from dqrm.export.check import generate, logits_of
from dqrm.export.formats import format_of, score_file, web, web_runtime

pytest.importorskip("onnx", reason="the extra dqrm[onnx] is not installed")
pytest.importorskip("onnxruntime", reason="the extra dqrm[onnx] is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return helpers.trained(tmp_path_factory.mktemp("web"))


@pytest.fixture(scope="module")
def artifact(run):
    dqrm.export_run(run, run.parent / "m.dqrm")
    return run.parent / "m.dqrm"


@pytest.fixture
def package(tmp_path, monkeypatch):
    return helpers.fake_runtime(tmp_path / "package", monkeypatch)


def exported(source, output, package, **more):
    return dqrm.export_run(source, f"{output}/", dqrm.ExportConfig(onnxruntime_web=str(package), **more))


def test_a_folder_holds_model_vocabularies_runtime_and_page(run, package, tmp_path, capsys):
    code, out, err = command(capsys, "export", run, "-o", f"{tmp_path}/web/", "--onnxruntime-web", package, "--json")
    assert code == 0, err
    result, folder = json.loads(out), tmp_path / "web"
    spec = json.loads((folder / "model.json").read_text())
    names = {path.name for path in folder.iterdir()}
    assert names == {*spec["files"], "model.json", *(path.name for path in web.PAGE.iterdir())}
    for name, file in spec["files"].items():
        content = (folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
    assert result["bytes"] == sum(path.stat().st_size for path in folder.iterdir()) == result["parts"]["file"]
    assert sum(size for part, size in result["parts"].items() if part != "file") == result["bytes"]
    assert result["largest_difference"] < 1e-6
    assert [column["name"] for column in spec["columns"]] == ["price", "age", "user", "ad", "site", "hour", "tags"]
    tags = next(column["examples"] for column in spec["columns"] if column["name"] == "tags")
    assert re.fullmatch(r"t\d\|t\d", tags[0])
    assert "memory" in result["notes"][0]
    assert not list(tmp_path.glob("*.partial"))


def test_the_graph_is_small_and_the_tables_are_beside_it(artifact, package, tmp_path):
    exported(artifact, tmp_path / "web", package)
    opened = Artifact.open(artifact)
    assert (tmp_path / "web/model.onnx.data").stat().st_size == opened.sizes()["table codes"]
    assert opened.model().tables.codes.numpy().tobytes() not in (tmp_path / "web/model.onnx").read_bytes()
    batch = generate(opened.content["model"], 40)
    found = score_file(tmp_path / "web")(batch)
    torch.testing.assert_close(found.sigmoid(), logits_of(opened.model(), batch).sigmoid(), rtol=0, atol=1e-6)
    assert format_of(tmp_path / "web") is format_of(f"{tmp_path}/new/")


def test_nothing_of_the_page_asks_another_server():
    for path in web.PAGE.iterdir():
        assert not re.search(r"(?:https?|wss?):", path.read_text()), path
    page = (web.PAGE / "index.html").read_text()
    assert "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'" in page
    assert not re.search(r"<script(?![^>]* src=)|<style|style=|onclick=", page)


def test_a_folder_is_replaced_as_a_whole_and_others_are_left_alone(artifact, package, tmp_path, monkeypatch):
    folder = tmp_path / "web"
    folder.mkdir()
    exported(artifact, folder, package)  # into an empty one
    before = (folder / "model.json").read_bytes()
    (folder / "ids.bin").write_bytes(b"")
    exported(artifact, folder, package)
    assert (folder / "model.json").read_bytes() == before
    assert (folder / "ids.bin").stat().st_size > 0
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt is no file of dqrm export and would be deleted; move it"):
        exported(artifact, folder, package)
    assert (folder / "notes.txt").read_text() == "mine"
    for name, says in (
        ("other", "files that dqrm export did not write"),
        ("file", "is a file, expected the name"),
    ):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/model.json").write_text("[]")
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=says):
            exported(artifact, tmp_path / name, package)
    monkeypatch.setattr(web, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match=r"the tables take \d+ bytes, more than a browser can hold \(1000\)"):
        exported(artifact, tmp_path / "large", package)
    assert not (tmp_path / "large").exists()


def test_what_a_folder_needs(run, artifact, package, tmp_path):
    for source, output, more, says in (
        (run, "web", {"vocabulary": "none"}, "needs the vocabularies, which --vocabulary none leaves out"),
        (run, "web", {"vocabulary": "beside"}, "a folder for browsers has them inside"),
        (run, "m.onnx", {}, r"onnxruntime_web is for a folder for browsers \(-o web/\), and the output is a \.onnx"),
    ):
        target = tmp_path / output
        with pytest.raises(UserError, match=says):
            dqrm.export_run(
                source,
                target if target.suffix else f"{target}/",
                dqrm.ExportConfig(onnxruntime_web=str(package), **more),
            )
    with pytest.raises(UserError, match=r"mine should end in \.dqrm, \.onnx, \.pt2, \.pte or /, which says"):
        dqrm.export_run(artifact, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_the_package_is_a_folder_or_an_archive_of_the_version(package, tmp_path):
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        archive.add(package, "package")
    for given in (package, package / "dist", tmp_path / "p.tgz"):
        target = tmp_path / "target"
        target.mkdir(exist_ok=True)
        web_runtime.copy_runtime(str(given), target, lambda *_: None)
        assert {path.name for path in target.iterdir()} == set(web_runtime.FILES)
        shutil.rmtree(target)
    (tmp_path / "target").mkdir()
    (package / "dist/ort.wasm.bundle.min.mjs").write_text("of another version")
    (tmp_path / "text").write_text("no archive")
    for given, says in (
        (package, r"dist/ort\.wasm\.bundle\.min\.mjs is another; expected version 1\.30\.0, unchanged"),
        (tmp_path / "text", r"it has no dist/ort\.wasm\.bundle\.min\.mjs; expected the folder or the \.tgz"),
        (tmp_path / "none", "No such file or directory"),
    ):
        with pytest.raises(UserError, match=rf"is not onnxruntime-web@1\.30\.0: .*{says}"):
            web_runtime.copy_runtime(str(given), tmp_path / "target", lambda *_: None)


def test_npm_fetches_the_package_once(package, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        archive.add(package, "package")
    tools, target = tmp_path / "bin", tmp_path / "target"
    tools.mkdir()
    target.mkdir()
    npm = tools / "npm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def fetch():
        told = []
        web_runtime.copy_runtime(None, target, lambda what, *_: told.append(what))
        return told

    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(UserError, match=r"there is no npm here .* \(npm pack onnxruntime-web@1\.30\.0\) and name the"):
        fetch()
    npm.write_text("#!/bin/sh\necho 'npm error network' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(UserError, match=r"npm cannot fetch onnxruntime-web@1\.30\.0 \(npm error network\); fetch it"):
        fetch()
    npm.write_text(f'#!/bin/sh\nPATH=/bin:/usr/bin\necho "$@" >> {tmp_path}/calls\ncp {tmp_path}/p.tgz got.tgz\n')
    assert fetch() == ["npm fetches onnxruntime-web@1.30.0, 33 MB, once"]
    assert fetch() == []
    assert (tmp_path / "calls").read_text() == "pack onnxruntime-web@1.30.0 --silent\n"
    (tmp_path / f"cache/dqrm/onnxruntime-web-{web_runtime.VERSION}/ort.wasm.bundle.min.mjs").write_text("cut")
    assert len(fetch()) == 1
