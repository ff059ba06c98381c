"""Text into fields: shapes, quotes, line numbers. The reader must agree with Python's csv module."""

import csv
import io

import pytest

from dqrm.data import lines
from dqrm.data.lines import TextReader
from dqrm.errors import UserError


def read(text, separator=",", quoting=True, names=("a", "b"), pieces=1):
    """All rows as (line, fields), and all malformed lines."""
    data = text if isinstance(text, bytes) else text.encode()
    step = max(1, -(-len(data) // pieces))
    reader = TextReader(
        iter([data[at : at + step] for at in range(0, len(data), step)]), "log.csv", separator, quoting, names
    )
    rows, bad = [], []
    for block in reader.blocks(reader.names):
        rows += list(zip(block.lines.tolist(), block.fields.fill_null("").rows()))
        bad += block.bad
    return rows, bad


@pytest.fixture(params=[1 << 24, 40, 7])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(lines, "_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize(
    "text",
    [
        "1,x\n2,y\n",
        "1,x\n2,y",
        "1,x\r\n2,y\r\n",
        "1,\n,y\n,\n",
        '1,"x, and y"\n2,"say ""so"""\n',
        '1,"two\nlines"\n2,y\n3,"and\n\nthree"\n',
        '"1","x"\n"2","y"\n',
        '"",""\n1,""\n',
        "1,grün\n2,日本\n",
        "\ufeff1,x\n2,y\n",
        "1,x\n2,y\n\n\n",
    ],
)
def test_same_as_the_csv_module(text, block_bytes):
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n")
    wanted = [tuple(row) for row in csv.reader(io.StringIO(plain, newline="")) if row]
    rows, bad = read(text, pieces=5)
    assert [fields for _, fields in rows] == wanted
    assert not bad
    line, starts = 1, []
    for fields in wanted:
        starts.append(line)
        line += 1 + sum(field.count("\n") for field in fields)
    assert [line for line, _ in rows] == starts


def test_many_quoted_rows_in_small_blocks(block_bytes):
    wanted = [(f"{n}", f'a "{n}"\n, b' if n % 3 else "plain") for n in range(300)]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(wanted)
    rows, bad = read(out.getvalue(), pieces=20)
    assert [fields for _, fields in rows] == wanted
    assert not bad


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("1,x\n2\n3,z\n", 2, "1 columns, expected 2"),
        ("1,x\n2,y,z\n3,z\n", 2, "3 columns, expected 2"),
        ("1,x\n\n3,z\n", 2, "an empty line"),
        (b"1,x\n2,\xff\n3,z\n", 2, "byte 0xff at position 3 is not UTF-8 text"),
        ('1,x\n2,a"b\n3,z\n', 2, "an unterminated quote"),
        ('1,x\n2,a"b"\n3,z\n', 2, "a quote inside a field"),
        ('1,x\n2,"a"b\n3,z\n', 2, "a quote inside a field"),
        ('1,x\n3,z\n2,"a\n', 3, "an unterminated quote"),
        ('1,"p\nq"\n2\n', 3, "1 columns, expected 2"),
    ],
)
def test_malformed_lines_are_named(text, line, reason, block_bytes):
    rows, bad = read(text, pieces=3)
    assert [number for number, _ in bad] == [line]
    assert bad[0][1].startswith(reason)
    assert [fields for _, fields in rows if fields[0] in "13"] == [fields for _, fields in rows]


def test_columns_that_make_up_for_each_other_are_found():
    rows, bad = read("1,x,9\n2\n3,z\n")
    assert [line for line, _ in bad] == [1, 2]
    assert rows == [(3, ("3", "z"))]


def test_without_quoting_quotes_are_text():
    rows, bad = read('5" disc\tx\n"a\tb"\n', separator="\t", quoting=False)
    assert [fields for _, fields in rows] == [('5" disc', "x"), ('"a', 'b"')]
    assert not bad


def test_an_unclosed_quote_does_not_swallow_the_file():
    text = '0,"open\n' + "".join(f"{n},x\n" for n in range(1, 1000))
    rows, bad = read(text)
    assert [line for line, _ in bad] == [1]
    assert len(rows) == 999


def test_header_names_the_columns():
    reader = TextReader(iter([b'\xef\xbb\xbfa,"b, c"\r\n1,x\r\n']), "log.csv", ",", True, None)
    assert reader.names == ["a", "b, c"]
    (block,) = reader.blocks(["b, c", "a"])
    assert block.fields.rows() == [("x", "1")]
    assert block.lines.tolist() == [2]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "is empty"),
        (b"\n1,2\n", "is empty"),
        (b"a,\xff\n", "0xff"),
        (b'a,b"c\n', "an unterminated quote"),
        (b"a,b\r1,2\r", "log.csv, line 1: a carriage return"),
    ],
)
def test_header_that_cannot_be_read(text, reason):
    with pytest.raises(UserError, match=reason):
        TextReader(iter([text]), "log.csv", ",", True, None)
