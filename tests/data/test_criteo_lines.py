"""Compiled parsing of Criteo's lines against `Plan.typed`: the same rows, the same messages, the same datasets."""

import numpy as np
import pytest

import dqrm
from dqrm.data import criteo_lines, ingest, lines
from dqrm.data.columns import CRITEO_COLUMNS, make_plan
from dqrm.data.config import PrepareConfig
from dqrm.data.lines import TextReader
from dqrm.errors import UserError
from dqrm.kernels import logs

pytestmark = pytest.mark.skipif(not logs.available(), reason="needs the compiled kernels")

DENSE = ["", "0", "7", "-1", "-256", "-257", "65535", "65536", "-0", "007", "123456789012345678", "-99999999999", "31"]
HEX = ["", "0", "00000000", "ffffffff", "FFFFFFFF", "68fd1e64", "AbCdEf09", "7", "123", "1234567"]
# Fields that are no number, or are one in a way that hardly anybody writes.
BAD_DENSE = [
    " 1",
    "1 ",
    "+1",
    "-",
    "--1",
    "1.5",
    "1e3",
    "x",
    "1234567890123456789",
    "9" * 30,
    "-" + "9" * 19,
    "é",
    "\r",
]
BAD_HEX = ["123456789", "0000000001", "ghijklmn", "68fd1e6g", "68fd1e6 ", "+8fd1e64", "-1", "0x12", ":;<=>?@a",
           "`1234567", "é", "68fd1e6\x10", "\x10\x11\x12\x13\x14\x15\x16\x17", "68fd1é"]  # fmt: skip
BAD_LABEL = ["", "2", "01", "-1", "1.0", " 1", "true"]


def log(rows, seed=0, label=True):
    """Lines of fields from the lists above."""
    draw = np.random.default_rng(seed)
    return [
        [*[str(draw.integers(2))] * label, *draw.choice(DENSE, 13).tolist(), *draw.choice(HEX, 26).tolist()]
        for _ in range(rows)
    ]


def text(rows, newline="\n"):
    return "".join("\t".join(row) + newline for row in rows).encode()


def both(data, monkeypatch, tmp_path, **config):
    """What a file gives with and without compiled parsing: frames as one list of rows, and lines; or the message."""
    config = {"layout": "criteo-kaggle", **config}
    path = tmp_path / "log.txt"
    path.write_bytes(data)
    results = []
    for compiled in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(logs, "available", lambda compiled=compiled: compiled)
            plan = make_plan(PrepareConfig(**config))
            (source,) = dqrm.data.tables.gather([path])
            try:
                frames = list(ingest.typed_blocks(source, plan))
                rows = [row for frame in frames for row in frame.rows()]
                results.append((rows, [frame.schema for frame in frames], source.skipped, source.sha256))
            except UserError as error:
                results.append(str(error))
    return results


def counted(monkeypatch):
    """How many blocks compiled code has parsed, and how many it has left to polars."""
    calls, parse = [], logs.parse_lines

    def spy(*arguments):
        calls.append(parse(*arguments))
        return calls[-1]

    monkeypatch.setattr(logs, "parse_lines", spy)
    return calls


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("transform", ["log1p", "none"])
@pytest.mark.parametrize("block", [1 << 24, 5000])
def test_same_rows(block, transform, newline, monkeypatch, tmp_path):
    monkeypatch.setattr(lines, "_BLOCK", block)
    calls = counted(monkeypatch)
    compiled, plain = both(text(log(300), newline), monkeypatch, tmp_path, dense_transform=transform)
    assert compiled == plain
    assert len(plain[0]) == 300
    assert calls
    assert all(parsed is not None for parsed in calls)


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n\n", b"\r\n\r\n"], ids=["none", "one", "several", "returns"])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_end_of_the_file(rows, end, monkeypatch, tmp_path):
    compiled, plain = both(text(log(rows)).rstrip(b"\n") + end, monkeypatch, tmp_path)
    assert compiled == plain
    assert len(plain[0]) == rows


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n", b"0\n", b"\t" * 39, b"\t" * 39 + b"\n", b"1" + b"\t" * 39])
def test_hardly_anything(data, monkeypatch, tmp_path):
    compiled, plain = both(data, monkeypatch, tmp_path)
    assert compiled == plain


FIELDS = [
    *((0, bad) for bad in BAD_LABEL), *((5, bad) for bad in BAD_DENSE), *((13, bad) for bad in BAD_DENSE[:3]),
    *((14, bad) for bad in BAD_HEX), *((39, bad) for bad in BAD_HEX),
]  # fmt: skip


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize(("field", "bad"), FIELDS)
def test_same_answer_to_an_odd_field(field, bad, on_error, monkeypatch, tmp_path):
    rows = log(40)
    rows[23][field] = bad
    compiled, plain = both(text(rows), monkeypatch, tmp_path, on_error=on_error)
    assert compiled == plain


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize(
    "line", [b"", b"\r", b"0\t1", b"1" + b"\t1" * 40, b"\xff" + b"\t" * 39, b"0\t\x001" + b"\t" * 38]
)
def test_same_answer_to_an_odd_line(line, on_error, monkeypatch, tmp_path):
    good = text(log(20))
    at = good.index(b"\n", len(good) // 2) + 1
    compiled, plain = both(good[:at] + line + b"\n" + good[at:], monkeypatch, tmp_path, on_error=on_error)
    assert compiled == plain


def test_lines_are_numbered_on(monkeypatch):
    """Blocks that compiled code parses, and those that it does not, count lines alike."""
    rows = log(60)
    rows[30][0] = "9"
    plan = make_plan(PrepareConfig(layout="criteo-kaggle"))
    monkeypatch.setattr(lines, "_BLOCK", 1000)
    data = text(rows)
    pieces = [data[at : at + 500] for at in range(0, len(data), 500)]
    reader = TextReader(iter(pieces), "log.txt", "\t", False, CRITEO_COLUMNS)
    reader.decode = criteo_lines.decoder(plan, reader.names)
    blocks = list(reader.blocks(plan.needed))
    assert [line for block in blocks for line in block.lines.tolist()] == list(range(1, 61))
    assert len({block.typed is None for block in blocks}) == 2


def test_random_bytes(monkeypatch, tmp_path):
    """Changed bytes anywhere: compiled code accepts nothing that polars does not, and reads nothing else."""
    draw = np.random.default_rng(3)
    for _ in range(60):
        data = bytearray(text(log(3, seed=1)))
        for at in draw.integers(0, len(data), 1 + draw.integers(3)):
            data[at] = draw.choice(np.frombuffer(b"\t\n\r 0179afAFgG-+.:@`/\x00\x80\xff", np.uint8))
        compiled, plain = both(bytes(data), monkeypatch, tmp_path, on_error=str(draw.choice(["stop", "skip"])))
        assert compiled == plain, bytes(data)


def test_without_a_label(monkeypatch):
    """Kaggle's test.txt, and a labelled log whose label is not asked for."""
    import dataclasses

    plan = dataclasses.replace(make_plan(PrepareConfig(layout="criteo-kaggle")), label=None)
    for names in (CRITEO_COLUMNS, CRITEO_COLUMNS[1:]):
        decode = criteo_lines.decoder(plan, list(names))
        data = text(log(50, label=len(names) == 40))
        reader = TextReader(iter([data]), "log.txt", "\t", False, names)
        (block,) = reader.blocks(plan.needed)
        assert decode(data).equals(plan.typed(block))


@pytest.mark.parametrize(
    "more",
    [
        {"cross": ("C1*C2",)},
        {"null_values": ("7",)},
        {"group": "C3"},
        {"split": "column", "split_column": "C1", "test_values": ("68fd1e64",)},
    ],
)
def test_what_needs_more_is_left_to_polars(more):
    plan = make_plan(PrepareConfig(layout="criteo-kaggle", **more))
    assert criteo_lines.decoder(plan, list(CRITEO_COLUMNS)) is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_rows": 100, "min_count": 2},
        {"vocabulary": "all", "memory": "1GB", "chunk_rows": 77, "split": "random"},
        {"vocabulary": "hash", "rows": 1000},
        {"vocabulary": "hash", "rows": 2, "hashes": 2},
        {"max_rows_per_table": 50},
    ],
)
def test_same_dataset(options, monkeypatch, tmp_path):
    (tmp_path / "log.txt").write_bytes(text(log(700)))
    for name, compiled in (("compiled", True), ("plain", False)):
        monkeypatch.setattr(logs, "available", lambda compiled=compiled: compiled)
        dqrm.prepare(tmp_path / "log.txt", tmp_path / name, PrepareConfig(layout="criteo-kaggle", **options))
    files = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file())
    assert len(files) > 9
    for file in files:
        assert (tmp_path / "compiled" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
