"""The page's JavaScript makes the same inputs of a row as Python does; in Node, without a browser."""

import json
import random
import shutil
import subprocess
import zlib

import numpy as np
import pytest

import dqrm
import web_helpers as helpers
from dqrm.data.config import CRITEO_CATEGORICAL, CRITEO_DENSE, PrepareConfig
from dqrm.data.raw import RawEncoder
from dqrm.data.tables import rows_source
from dqrm.errors import UserError
from dqrm.export.formats import web, web_spec
from dqrm.options import build
from hash_helpers import reference

pytestmark = pytest.mark.skipif(helpers.NODE is None, reason="there is no Node here (Debian: apt-get install nodejs)")
_PROGRAM = """
import { readFileSync } from "node:fs";
import { encode, rowMaps } from "./rows.js";
const { spec, groups } = JSON.parse(readFileSync(0));
const bytes = readFileSync("ids.bin");
const maps = rowMaps(spec, bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
const numbers = (array) => Array.from(array, Number);
console.log(JSON.stringify(groups.map((rows) => {
  try {
    const { dense, ids, bags } = encode(spec, maps, rows);
    const lists = bags.map((bag) => [numbers(bag.values), numbers(bag.offsets)]);
    return { dense: numbers(dense), ids: numbers(ids), bags: lists };
  } catch (error) {
    if (error.constructor.name !== "RowError") throw error;
    return { error: error.message };
  }
})));
"""


class Opened:
    """What the writer reads of an artifact, from a dataset."""

    def __init__(self, dataset):
        self.path, self._dataset = "m.dqrm", dataset
        mode = "hash" if dataset.hashed else "embed"
        options, schema = dataset.info["options"], dataset.info["schema"]
        self.content = {"schema": schema, "options": options, "vocabulary": {"mode": mode}}

    def vocabulary(self, number):
        return self._dataset.vocabulary(number).to_bytes()


def node(folder, program, given=None):
    for path in web.PAGE.glob("*.js"):
        shutil.copy(path, folder)
    (folder / "package.json").write_text('{"type": "module"}')  # as a browser takes them
    (folder / "program.js").write_text(program)
    command = [helpers.NODE, folder / "program.js"]
    done = subprocess.run(command, cwd=folder, input=json.dumps(given), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def in_node(dataset, folder, groups):
    """What the page makes of each group of rows: inputs, or an error."""
    opened = Opened(dataset)
    plan = web_spec.require_pages(opened)
    (folder / "ids.bin").touch()
    columns, examples = web_spec.write_ids(opened, plan, folder / "ids.bin")
    return node(folder, _PROGRAM, {"spec": web_spec.reading(plan, columns, examples), "groups": groups})


def in_python(dataset, groups):
    options, columns = dataset.info["options"], dataset.info["schema"]["columns"]
    encoder = RawEncoder(build(PrepareConfig, options, "test"), columns, dataset.row_maps())
    results = []
    for rows in groups:
        source = rows_source(rows)
        try:
            source.check(encoder.plan)
            (block,) = encoder.blocks(source)
        except UserError as error:
            results.append({"error": str(error)})
            continue
        bags = [[part.tolist() for part in bag] for bag in block.batch.bags]
        dense, ids = (part.flatten().tolist() for part in (block.batch.dense, block.batch.ids))
        results.append({"dense": dense, "ids": ids, "bags": bags})
    return results


def assert_alike(dataset, folder, groups):
    found = in_node(dataset, folder, groups)
    for rows, page, python in zip(groups, found, in_python(dataset, groups), strict=True):
        assert ("error" in page) == ("error" in python), (rows, page, python)
        if "error" not in page:
            assert (page["ids"], page["bags"]) == (python["ids"], python["bags"]), rows
            np.testing.assert_allclose(page["dense"], python["dense"], rtol=1.2e-7, err_msg=str(rows))
    return found


# Values of one column that are, in some way or other, the same or nearly; and those that are refused.
VALUES = [None, "", 7, 7.0, "7", "7.0", "7.00", "07", "-7.0", "-0.0", "-0", 0, -0.0, True, "true", "NULL", "-1.0", "-1",
          -1, 1.25e-6, "0.00000125", "1.25e-6", 2.5e-6, 1e-7, 0.1, 123456.789, 2**53 - 1, "ad 0", "ad", "\u00e9",
          "\U0001f600", "a" * 40, " 7", [7]]  # fmt: skip
NUMBERS = [None, "", 0, 3, -2.5, "3", "3.0", " 4 ", "+5", ".5", "5.", "1e3", "1E-3", "nan", "inf", 1e39, "1e39", "1_0",
           "x", "0x10", True, "NULL", "-1.0", -1, "1,5", 1e308, 123456789.123, "  "]  # fmt: skip
TAGS = [
    None,
    "",
    "t1",
    "t1|t2|t1",
    "|t1||",
    [],
    ["t1", None, "t9"],
    ["t1", "", "NULL"],
    "NULL",
    ["1.0", 1],
    5,
    "none|t3",
]


def table_groups():
    base = {"price": 1.5, "age": 30, "user": 7, "ad": "ad 1", "site": 1.25e-6, "hour": 3, "tags": "t1"}
    groups = [[{**base, "user": value, "ad": value, "site": value, "hour": value}] for value in VALUES]
    groups += [[{**base, "price": value}] for value in NUMBERS] + [[{**base, "tags": value}] for value in TAGS]
    draw = random.Random(0)
    log = [
        {
            **base,
            "user": draw.randrange(250),
            "ad": draw.choice(["ad 3 \u00e9", "ad 4 \u00e9\u4e2d", "x"]),
            "tags": "|".join(f"t{draw.randrange(12)}" for _ in range(draw.randrange(4))),
        }
        for _ in range(200)
    ]
    return [*groups, log, [{name: value for name, value in base.items() if name != "hour"}], [{**base, "more": 1}]]


OPTIONS = {
    "vocabularies": {},
    "all rows count": {"vocabulary": "all", "min_count": 3, "dense_transform": "none", "null_values": ()},
    "modulo": {"max_rows_per_table": 37},
    "hashed": {"vocabulary": "hash", "rows": 50},
    "hashed by 3 functions": {"vocabulary": "hash", "rows": 5000, "hashes": 3},
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(given, id=name, marks=[pytest.mark.slow] * (name != "vocabularies"))
        for name, given in OPTIONS.items()
    ],
)
def test_a_table(tmp_path, options):
    groups = table_groups()
    found = assert_alike(helpers.prepared(tmp_path / "d", **options), tmp_path, groups)
    assert found[-2] == {"error": "row 1 has no 'hour'; a value that is missing is given as null"}
    assert sum("error" in result for result in found) > 10
    assert len({str((result.get("ids"), result.get("bags"))) for result in found}) > 5


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"cross": ("C1*C2", "C3*C4*I2"), "null_values": ("-", "0b")}, id="vocabularies"),
        pytest.param({"cross": ("C1*C2", "C3*C4*I2"), "max_rows_per_table": 300}, id="modulo", marks=pytest.mark.slow),
        pytest.param(
            {"cross": ("C1*C2", "C3*C4*C5"), "vocabulary": "hash", "rows": 700, "hashes": 2},
            id="hashed",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_criteo(generated, tmp_path, options):
    log = generated.path.parent / "log.txt"
    data = dqrm.prepare([log], tmp_path / "data", PrepareConfig(layout="criteo-kaggle", **options))
    names = [*CRITEO_DENSE, *CRITEO_CATEGORICAL]
    lines = [line.split("\t")[1:] for line in log.read_text().splitlines()[:150]]
    rows = [{name: cell or None for name, cell in zip(names, line)} for line in lines]
    groups = [rows]
    for name, values in (
        ("I1", [None, "", 3, "3", "+3", "-1", "3.0", 3.5, "x", str(2**63), "-", "0b"]),
        (
            "C1",
            [None, "", "0", "68FD1E64", "000000ff", "ff", "+1", "-1", "0xff", "123456789", "g", 7, "-", "0b", "1.0"],
        ),
    ):
        groups += [[{**rows[0], name: value}] for value in values]
    found = assert_alike(data, tmp_path, groups)
    assert 4 < sum("error" in result for result in found) < 20


@pytest.mark.slow
def test_whole_numbers_that_javascript_rounds_are_refused(tmp_path):
    data = helpers.prepared(tmp_path / "d")
    base = table_groups()[-1][0]
    (found,) = in_node(data, tmp_path, [[{**base, "user": 2**53}]])
    assert found["error"].startswith(
        "column user holds 9007199254740992, expected whole numbers of 2^53 and more as text"
    )


def test_hashes_are_those_of_their_specifications(tmp_path):
    lengths, seeds = [*range(70), 200], [0, 7, 2**32 + 3, 2**33]
    program = """import { crc32, splitmix64, xxh64 } from "./hashes.js";
        const bytes = (n) => Uint8Array.from({ length: n }, (_, at) => (at * 37 + n) & 255);
        const found = [];
        for (const n of LENGTHS) for (const seed of SEEDS) found.push(String(xxh64(bytes(n), BigInt(seed))));
        console.log(JSON.stringify([found, [0, 1, 9, 200].map((n) => crc32(bytes(n))), String(splitmix64(0n))]));"""
    found = node(tmp_path, program.replace("LENGTHS", str(lengths)).replace("SEEDS", str(seeds)))

    def content(length):
        return bytes((at * 37 + length) & 255 for at in range(length))

    assert found[0] == [str(reference(content(length), seed)) for length in lengths for seed in seeds]
    assert found[1] == [zlib.crc32(content(length)) for length in (0, 1, 9, 200)]
    assert found[2] == "16294208416658607535"  # its first output from state 0
