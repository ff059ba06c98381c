"""Programs of torch.export and ExecuTorch give what the converted model gives."""

import sys

import pytest
import torch

import export_helpers as helpers
from dqrm.errors import UserError
from dqrm.export.formats import executorch, format_of, score_file
from selection import slow

KINDS = ["2 bits", "4 bits", "32 bits", "dim 5", "cat", "no dense, cat, bags alone", "no tables", "one table",
         "bags, mean", "8-bit activations", "32-bit MLP, 8-bit activations", "dcn",
         "dcn, stacked, low rank, norm, bags", "dcn, norm, 32-bit MLP", "small tables of 8 bits",
         "small tables of 16 bits, bags", "lsq and pact", "a scale per row", "a scale per 4 rows", "affine",
         "affine, a scale per row, 2 bits", "affine, a scale per 4 rows, bags alone, 16 bits"]  # fmt: skip


def write(model, path):
    format_of(path).write(model, path, {})


def test_pt2_keeps_the_codes_packed(tmp_path):
    model = helpers.made("4 bits")
    write(model, tmp_path / "m.pt2")
    stored = torch.export.load(tmp_path / "m.pt2").state_dict
    assert stored["tables.codes"].dtype == torch.uint8
    assert torch.equal(stored["tables.codes"], model.tables.codes)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.pt2"]


@pytest.mark.parametrize(
    "kind", [*KINDS[1:4:2], *KINDS[5:10:2], *slow(*KINDS[:1], *KINDS[2:10:2], KINDS[10]), *KINDS[11:]]
)
def test_pt2(tmp_path, kind):
    _compare(helpers.made(kind), tmp_path / "m.pt2")


@pytest.mark.parametrize("kind", ["4 bits", "bags, sum"])
def test_pt2_with_a_scale_per_row(tmp_path, kind):
    _compare(helpers.with_row_scales(helpers.made(kind)), tmp_path / "m.pt2")


@pytest.mark.parametrize("kind", KINDS)
def test_pte(tmp_path, kind):
    pytest.importorskip("executorch", reason="the extra dqrm[executorch] is not installed")
    _compare(helpers.made(kind), tmp_path / "m.pte")


def test_pte_with_a_scale_per_row(tmp_path):
    pytest.importorskip("executorch", reason="the extra dqrm[executorch] is not installed")
    _compare(helpers.with_row_scales(helpers.made("bags, sum")), tmp_path / "m.pte")


def _compare(model, path):
    write(model, path)
    helpers.compare(model, score_file(path))


def test_ids_outside_are_row_0(tmp_path):
    model = helpers.made("4 bits")
    write(model, tmp_path / "m.pt2")
    samples = helpers.batch(model, 2)
    samples.ids[:] = 0
    wanted = helpers.expected(model, samples)
    samples.ids[0], samples.ids[1] = 1000, -1
    helpers.assert_same(score_file(tmp_path / "m.pt2")(samples), wanted)


def test_a_batch_beyond_the_bounds_is_cut(monkeypatch):
    monkeypatch.setattr(executorch, "MAX_BATCH", 7)
    monkeypatch.setattr(executorch, "MAX_VALUES", 5)
    model = helpers.made("bags, sum")
    samples = helpers.batch(model, 50)
    pieces = executorch.pieces(samples)
    assert all(len(piece) <= 7 and all(len(values) <= 5 for values, _ in piece.bags) for piece in pieces)
    torch.testing.assert_close(
        torch.cat([helpers.expected(model, piece) for piece in pieces]), helpers.expected(model, samples)
    )
    monkeypatch.setattr(executorch, "MAX_VALUES", 2)
    with pytest.raises(UserError, match="more than 2 ids"):
        executorch.pieces(samples)


def test_missing_executorch_and_damaged_files(tmp_path, monkeypatch):
    for suffix in (".pt2", ".pte"):
        (tmp_path / f"m{suffix}").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"m\.pt2 cannot be loaded: damaged"):
        score_file(tmp_path / "m.pt2")
    for name in ("executorch", "executorch.exir", "executorch.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"dqrm\[executorch\]"):
        write(helpers.made("4 bits"), tmp_path / "m.pte")
    with pytest.raises(UserError, match=r"dqrm\[executorch\]"):
        score_file(tmp_path / "m.pte")
