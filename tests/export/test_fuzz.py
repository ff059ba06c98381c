"""Damaged, foreign and hostile files: always one sentence, never a crash, never a silent wrong answer with --verify."""

import hashlib
import io
import json
import pickle
import random
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dqrm
from conftest import tiny
from dqrm import Artifact, UserError
from dqrm.console import print_json
from dqrm.info import describe, print_description
from dqrm.serving.evaluation import evaluate
from selection import slow

BLANK = "0" * 64
HUGE = 10**18
VALUES = (None, True, False, -1, 0, 3, HUGE, 10**30, 1.5, float("inf"), float("nan"), "", "x", "[/x]", [], [None], [[]],
          {}, {"a": 1}, [1, 2, 3], "1" * 5000, "\ud800\x1b[2J")  # fmt: skip
REMOVED = object()


@pytest.fixture(scope="module")
def exported(bags_data, tmp_path_factory):
    """A small artifact: one single-valued and one multi-valued table, with vocabularies."""
    folder = tmp_path_factory.mktemp("fuzz")
    dqrm.train(bags_data, folder / "run", tiny(max_steps=5))
    dqrm.export_run(folder / "run", folder / "model.dqrm")
    return folder / "model.dqrm"


@pytest.fixture(scope="module")
def batch(bags_data):
    return next(iter(bags_data.split("test").batches(1000)))


@pytest.fixture
def scored(batch):
    def score(path, verify=False):
        with torch.inference_mode():
            return dqrm.load(path, verify=verify)(batch.dense, batch.ids, batch.bags)

    return score


def parts(path):
    """(length of the header with its 8 bytes, the header, the tensors' bytes)."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length, json.loads(data[8 : 8 + length]), data[8 + length :]


def sealed(header, body):
    """A file whose header has the right checksum, as somebody can make who knows the format."""
    header = json.loads(json.dumps(header))
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["header_sha256"] = BLANK
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little")
    own = hashlib.sha256(head + text).hexdigest()
    return head + text.replace(f'"header_sha256": "{BLANK}"'.encode(), f'"header_sha256": "{own}"'.encode()) + body


def places(tree, at=()):
    """The path of every node of a JSON value; of lists the first two entries."""
    yield at
    children = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, child in children:
        yield from places(child, (*at, key))


def changed(tree, at, value):
    """A copy of a JSON value with another value (or none) at a path."""
    if not at:
        return value
    tree = json.loads(json.dumps(tree))
    node = tree
    for key in at[:-1]:
        node = node[key]
    if value is REMOVED:
        del node[at[-1]]
    else:
        node[at[-1]] = value
    return tree


def with_text(header, key, value):
    """The header with another value in one of its texts of JSON."""
    return header | {"__metadata__": header["__metadata__"] | {key: json.dumps(value)}}


def one_sentence(error, *words):
    text = str(error)
    assert text
    assert "\n" not in text
    assert text.isprintable(), "a stranger's control characters would reach the terminal"
    assert len(text) < 1000, text
    for word in words:
        assert word in text, text


def flipped(data, at, bit):
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def use(path, data):
    """Everything that reads an artifact; what each of them said. Only UserError may come out."""
    found = []
    for call in (
        lambda: dqrm.load(path),
        lambda: dqrm.load(path, verify=True),
        lambda: print_description(str(path), verify=True),
        lambda: print_json(describe(str(path))),
        lambda: [Artifact.open(path).vocabulary(number) for number in range(2)],
        lambda: evaluate(path, data.path),
    ):
        try:
            with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
                call()
        except UserError as error:
            one_sentence(error)
            found.append(str(error))
        else:
            found.append(None)
    return found


def test_the_file_that_the_others_damage_is_whole(exported, scored):
    size, header, body = parts(exported)
    assert sealed(header, body) == exported.read_bytes()
    assert size % 64 == 0
    assert torch.equal(scored(exported), scored(exported, verify=True))


def test_a_flipped_bit_anywhere_in_the_header_is_refused(exported, tmp_path):
    data, path = exported.read_bytes(), tmp_path / "model.dqrm"
    size, _, _ = parts(exported)
    draw = random.Random(0)
    for at in range(size):
        path.write_bytes(flipped(data, at, draw.randrange(8)))
        with pytest.raises(UserError) as error:
            dqrm.load(path)
        one_sentence(error.value, str(path))


def test_a_flipped_bit_anywhere_else_is_found_where_it_is_looked_for(exported, scored, tmp_path):
    data, path = exported.read_bytes(), tmp_path / "model.dqrm"
    size, header, _ = parts(exported)
    draw = random.Random(1)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (size + offset for offset in entry["data_offsets"])
        for at in {start, end - 1, *(draw.randrange(start, end) for _ in range(12))}:
            path.write_bytes(flipped(data, at, draw.randrange(8)))
            with pytest.raises(UserError) as error:
                dqrm.load(path, verify=True)
            one_sentence(error.value, str(path), name)
            with pytest.raises(UserError):
                print_description(str(path), verify=True)
            assert scored(path).shape == scored(exported).shape  # runs, whatever it gives
    assert size > 1000


def test_a_vocabulary_is_compared_with_its_checksum_each_time(exported, tmp_path):
    size, header, _ = parts(exported)
    path = tmp_path / "model.dqrm"
    path.write_bytes(flipped(exported.read_bytes(), size + header["vocabulary.01"]["data_offsets"][0] + 9, 3))
    opened = Artifact.open(path)
    assert opened.vocabulary(0) == Artifact.open(exported).vocabulary(0)
    with pytest.raises(UserError, match=r"vocabulary\.01"):
        opened.vocabulary(1)


def test_a_file_cut_anywhere_is_refused(exported, bags_data, tmp_path):
    data, path = exported.read_bytes(), tmp_path / "model.dqrm"
    size, _, _ = parts(exported)
    lengths = {
        *range(20),
        *range(20, size, 61),
        *range(size - 9, size + 9),
        *range(size, len(data), 257),
        len(data) - 1,
    }
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        for said in use(path, bags_data):
            assert said is not None, length
            assert str(path) in said


@pytest.mark.parametrize("more", [b"\0", b" ", b"x" * 64, b"\0" * 4096])
def test_bytes_behind_the_end_are_refused(exported, bags_data, tmp_path, more):
    path = tmp_path / "model.dqrm"
    path.write_bytes(exported.read_bytes() + more)
    assert all(said is not None for said in use(path, bags_data))


def test_a_piece_in_the_middle_is_missing_doubled_or_zero(exported, tmp_path):
    data, path = exported.read_bytes(), tmp_path / "model.dqrm"
    draw = random.Random(2)
    for _ in range(60):
        at, count = draw.randrange(len(data)), draw.choice((1, 8, 64, 512))
        for wrong in (data[:at] + data[at + count :], data[:at] + data[at : at + count] + data[at:],
                      data[:at] + bytes(len(data[at : at + count])) + data[at + count :]):  # fmt: skip
            if wrong == data:
                continue
            path.write_bytes(wrong)
            with pytest.raises(UserError) as error:
                dqrm.load(path, verify=True)
            one_sentence(error.value)


@pytest.mark.parametrize("seed", [3, *slow(4, 5)])
def test_anything_at_any_place_of_the_description(exported, bags_data, tmp_path, seed):
    _, header, body = parts(exported)
    content, path = json.loads(header["__metadata__"]["content"]), tmp_path / "model.dqrm"
    draw = random.Random(seed)
    for at in list(places(content)):
        values = [*VALUES, REMOVED] if at else VALUES
        for value in draw.sample(values, 2):
            path.write_bytes(sealed(with_text(header, "content", changed(content, at, value)), body))
            use(path, bags_data)


@pytest.mark.parametrize("value", [*VALUES, REMOVED], ids=range(len(VALUES) + 1))
def test_what_info_prints_can_be_anything(exported, bags_data, tmp_path, value):
    _, header, body = parts(exported)
    content, path = json.loads(header["__metadata__"]["content"]), tmp_path / "model.dqrm"
    for at in (
        ("quantization", "method"), ("vocabulary", "mode"), ("model", "config", "top_mlp"), ("schema", "dense"),
        ("model", "table_rows"), ("model", "multi"), ("model", "table_bits"), ("provenance", "run", "step"),
        ("provenance", "run", "metrics", "validation"), ("provenance", "run", "metrics", "validation", "auc"),
        ("provenance", "data", "fingerprint"), ("provenance", "dqrm"), ("schema", "columns", 0, "name"),
    ):  # fmt: skip
        path.write_bytes(sealed(with_text(header, "content", changed(content, at, value)), body))
        use(path, bags_data)


@pytest.mark.parametrize("value", [*VALUES, REMOVED], ids=range(len(VALUES) + 1))
def test_anything_at_any_place_of_the_header(exported, bags_data, tmp_path, value):
    _, header, body = parts(exported)
    path = tmp_path / "model.dqrm"
    names = ("tables.codes", "top.0.scale", "vocabulary.00", "__metadata__")
    for at in [at for at in places(header) if at and at[0] in names]:
        path.write_bytes(sealed(changed(header, at, value), body))
        found = use(path, bags_data)
        if at[0] in names[:2] and at[1:2] in ((), ("data_offsets",)) and not (at[2:] == (0,) and value in (0, False)):
            assert found[1] is not None, (at, value)
    checksums = json.loads(header["__metadata__"]["checksums"])
    for wrong in (changed(checksums, (), value if value is not REMOVED else None),
                  changed(checksums, ("tables.codes",), value)):  # fmt: skip
        path.write_bytes(sealed(with_text(header, "checksums", wrong), body))
        assert use(path, bags_data)[1] is not None


def test_huge_numbers_take_no_memory(exported, bags_data, tmp_path):
    _, header, body = parts(exported)
    content, path = json.loads(header["__metadata__"]["content"]), tmp_path / "model.dqrm"
    for at, value in (
        (("model", "table_rows"), [HUGE, HUGE]), (("model", "config", "embedding_dim"), HUGE),
        (("model", "config", "top_mlp"), [HUGE, 1]), (("model", "num_dense"), HUGE),
        (("model", "config", "top_mlp"), [10**6, 10**6, 1]),
        (("model", "config", "top_mlp"), [8] * 100_000 + [1]),
    ):  # fmt: skip
        other = changed(content, at, value)
        if at[-1] == "table_rows":
            for column in other["schema"]["columns"]:
                column["rows"] = HUGE
        path.write_bytes(sealed(with_text(header, "content", other), body))
        found = use(path, bags_data)
        assert found[0] is not None
        assert found[1] is not None
    for shape in ([HUGE, 2], [2**62, 4], [2**64, 1], [-1, 2]):
        path.write_bytes(sealed(changed(header, ("tables.codes", "shape"), shape), body))
        assert use(path, bags_data)[0] is not None


def test_swapped_tensors_are_found(exported, scored, tmp_path):
    _, header, body = parts(exported)
    path = tmp_path / "model.dqrm"
    names = [name for name in header if name != "__metadata__"]
    swapped = 0
    for one in names:
        for other in names:
            same = all(header[one][key] == header[other][key] for key in ("dtype", "shape"))
            first, second = header[one]["data_offsets"], header[other]["data_offsets"]
            if one < other and same and body[slice(*first)] != body[slice(*second)]:
                wrong = changed(changed(header, (one, "data_offsets"), second), (other, "data_offsets"), first)
                path.write_bytes(sealed(wrong, body))
                assert scored(path).shape == scored(exported).shape
                with pytest.raises(UserError, match="checksum"):
                    dqrm.load(path, verify=True)
                swapped += 1
    assert swapped


def test_tensors_on_top_of_each_other_are_refused(exported, tmp_path):
    _, header, body = parts(exported)
    path = tmp_path / "model.dqrm"
    for at, value in ((("top.0.scale", "data_offsets"), header["tables.scale"]["data_offsets"]),
                      (("tables.scale", "data_offsets"), [4, 12])):  # fmt: skip
        path.write_bytes(sealed(changed(header, at, value), body))
        with pytest.raises(UserError) as error:
            dqrm.load(path)
        one_sentence(error.value, str(path))


@pytest.mark.parametrize("version", ["6", "17", "0", "", "1.0", "v1"])
def test_another_format_version_is_refused_with_both_named(exported, bags_data, tmp_path, version):
    _, header, body = parts(exported)
    path = tmp_path / "model.dqrm"
    path.write_bytes(sealed(changed(header, ("__metadata__", "format_version"), version), body))
    for said in use(path, bags_data):
        assert f"format version {version}" in said
        assert "versions 1 to 5" in said


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


def test_foreign_files_are_refused_in_one_sentence(bags_data, tmp_path):
    marker = tmp_path / "executed"
    foreign = {
        "empty": b"", "text": b"label,user\n1,7\n", "png": b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "zeros": b"\0" * 500,
        "ones": b"\xff" * 500, "gzip": b"\x1f\x8b\x08" + b"\0" * 50, "parquet": b"PAR1" + b"\0" * 50,
        "onnx": b"\x08\x08\x12\x07pytorch" + b"\0" * 50, "json": b'{"format": "dqrm-model"}',
        "pickle": pickle.dumps(Evil(marker)), "brace": (2).to_bytes(8, "little") + b"{}",
        "random": random.Random(4).randbytes(999),
        "list": (2).to_bytes(8, "little") + b"[]", "deep": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    }  # fmt: skip
    paths = []
    for name, data in foreign.items():
        paths.append(tmp_path / f"{name}.dqrm")
        paths[-1].write_bytes(data)
    save_file({"a": torch.ones(3)}, tmp_path / "plain.dqrm")
    save_file({"a": torch.ones(3)}, tmp_path / "marked.dqrm", {"format": "pt"})
    torch.save({"a": torch.ones(3), "b": Evil(marker)}, tmp_path / "torch.dqrm")
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.dqrm")
    paths += [tmp_path / f"{name}.dqrm" for name in ("plain", "marked", "torch", "array", "missing")]
    for path in paths:
        for call in (dqrm.load, Artifact.open, lambda path: evaluate(path, bags_data.path)):
            with pytest.raises(UserError) as error:
                call(path)
            one_sentence(error.value, str(path))
    (tmp_path / "folder.dqrm").mkdir()
    for call in (dqrm.load, Artifact.open):
        with pytest.raises(UserError, match=r"folder\.dqrm"):
            call(tmp_path / "folder.dqrm")
    assert not marker.exists(), "code from a stranger's file was run"


def test_control_characters_of_a_stranger_do_not_reach_the_terminal(exported, tmp_path, capsys):
    _, header, body = parts(exported)
    content, path = json.loads(header["__metadata__"]["content"]), tmp_path / "model.dqrm"
    for at in [at for at in places(content) if at]:
        wrong = changed(content, at, "\x1b[2J\x1b]0;owned\x07")
        path.write_bytes(sealed(with_text(header, "content", wrong), body))
        try:
            print_description(str(path))
        except UserError as error:
            one_sentence(error)
        assert "\x1b" not in capsys.readouterr().out, at
    renamed = {name.replace("tables.codes", "\x1b[2J"): entry for name, entry in header.items()}
    checksums = json.loads(header["__metadata__"]["checksums"])
    checksums["\x1b[2J"] = BLANK
    del checksums["tables.codes"]
    path.write_bytes(sealed(with_text(renamed, "checksums", checksums), body))
    with pytest.raises(UserError) as error:
        dqrm.load(path, verify=True)
    one_sentence(error.value)


def test_numbers_that_json_does_not_know(exported, bags_data, tmp_path):
    _, header, body = parts(exported)
    path = tmp_path / "model.dqrm"
    text = header["__metadata__"]["content"]
    for wrong in ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "[" * 5000 + "]" * 5000):
        metadata = header["__metadata__"] | {"content": text[:-1] + f', "more": {wrong}}}'}
        path.write_bytes(sealed(header | {"__metadata__": metadata}, body))
        use(path, bags_data)
