"""The YAML file of a study: what it means, and what is refused in one sentence before anything runs."""

import pytest

from dqrm.config import Config
from dqrm.errors import UserError
from dqrm.studies.plan import BASES, SHIPPED, read_plan, shipped
from dqrm.studies.search import read_search
from shipped_helpers import blocks


def names(plan):
    return [each.name for each in plan.variants]


def test_variants_change_the_base(study_file):
    plan = read_plan(study_file(set={"training": {"batch_size": 32}}), settings=["optimizer.learning_rate=0.5"])
    assert names(plan) == ["FP32", "INT4", "PTQ INT4"]
    assert (plan.baseline, plan.seeds, plan.title) == ("FP32", (1, 2, 3), "study")
    fp32, int4, ptq = plan.variants
    assert (fp32.config.quantization.bits, int4.config.quantization.bits) == (32, 4)
    assert fp32.config.training.batch_size == 32
    assert int4.config.optimizer.learning_rate == 0.5
    assert (ptq.config, ptq.source, ptq.ptq.bits) == (None, "FP32", 4)


def test_bits_of_a_variant_replace_the_bits_of_parts_of_the_base(study_file):
    file = study_file(
        base={"quantization": {"table_bits": 4, "mlp_bits": 8}}, variants={"a": {"quantization.bits": 32}}
    )
    assert read_plan(file).variants[0].config.quantization.effective_mlp_bits == 32


def test_a_grid_is_every_combination(study_file):
    grid = {"training.batch_size": [32, 64], "model.top_mlp": [[8, 1], [4, 1]]}
    plan = read_plan(study_file(variants=None, grid=grid, baseline="batch_size=64 top_mlp=8-1"))
    assert names(plan) == [f"batch_size={size} top_mlp={width}-1" for size in (32, 64) for width in (8, 4)]
    assert [(each.config.training.batch_size, each.config.model.top_mlp) for each in plan.variants] == [
        (32, (8, 1)), (32, (4, 1)), (64, (8, 1)), (64, (4, 1)),
    ]  # fmt: skip
    both = read_plan(study_file(grid={"training.batch_size": [32, 64]}))
    assert names(both)[:2] == ["FP32 batch_size=32", "FP32 batch_size=64"]
    assert both.variants[-1].source == "FP32 batch_size=64"


def test_runs_are_by_seed_and_sources_come_first(study_file):
    variants = {"late": {"from": "first"}, "other": {}, "first": {"quantization.bits": 32}}
    plan = read_plan(study_file(variants=variants, seeds=[4, 2]))
    order = [(each.name, seed) for each, seed in plan.runs()]
    assert order == [(name, seed) for seed in (4, 2) for name in ("other", "first", "late")]
    assert names(plan) == ["late", "other", "first"]


def test_only_some_variants(study_file):
    plan = read_plan(study_file(), seeds="7").only(["INT4"])
    assert (names(plan), plan.baseline, plan.seeds) == (["INT4"], "INT4", (7,))
    with pytest.raises(UserError, match="'PTQ INT4' starts from 'FP32', which is left out"):
        read_plan(study_file()).only(["PTQ INT4"])
    with pytest.raises(UserError, match=r"no variant 'INT5'; did you mean 'INT4'\?"):
        read_plan(study_file()).only(["INT5"])


FINE = {"quantization.bits": 4}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"import": {"a": 1}}, "import is {'a': 1}, expected names of modules, as .my_metrics."),
        ({"variantz": {}}, "unknown key 'variantz'; did you mean 'variants'?"),
        ({"variants": {"a": {"training.batchsize": 3}}}, "unknown field 'training.batchsize'; did you mean 'training"),
        ({"variants": {"a": {"batch_size": 3}}}, "unknown field 'batch_size'; did you mean 'training.batch_size'?"),
        ({"variants": {"a": {"training.batch_size": "many"}}}, "variant 'a', training: batch_size: got 'many', expect"),
        ({"variants": {"a": {"quantization.bits": 5}}}, "variant 'a', quantization: bits is 5, expected one of 2, 4"),
        ({"variants": {"a": {"training.seed": 3}}}, "training.seed is set by seeds"),
        ({"variants": {"a": 4}}, "variant 'a': got 4, expected fields"),
        ({"variants": {"a": FINE, "A": FINE}}, "two variants are named 'A', up to case"),
        ({"variants": {"../up": FINE}}, "a variant is named '../up', expected 1 to 100 letters"),
        ({"variants": {"a/b": FINE}}, "a variant is named 'a/b'"),
        ({"variants": {"<script>alert(1)</script>": FINE}}, "a variant is named '<script>alert"),
        ({"variants": {"a|b": FINE}}, "a variant is named"),
        ({"variants": {"..": FINE}}, "a variant is named"),
        ({"variants": {"a" * 101: FINE}}, "a variant is named 'aaa"),
        ({"variants": {"": FINE}}, "a variant is named ''"),
        ({"variants": {"a\nb": FINE}}, r"a variant is named 'a\\nb'"),
        ({"variants": {True: FINE}}, "a variant is named True, expected text; put it in quotes"),
        ({"variants": []}, "variants is .*, expected named variants, or a grid"),
        ({"variants": None}, "variants is None, expected named variants, or a grid"),
        ({"baseline": "INT5"}, "baseline is 'INT5', expected a variant; did you mean 'INT4'?"),
        ({"seeds": [1, 1]}, "seeds: got 1, 1, expected different whole numbers"),
        ({"seeds": [-1]}, "seeds: got -1, expected different whole numbers, 0 or more"),
        ({"seeds": ["x"]}, "seeds: got 'x', expected a whole number"),
        ({"seeds": 3}, "seeds: got 3, expected one or more whole numbers, as 1,2,3"),
        ({"title": "a\nb"}, "title is .*, expected one line of text"),
        ({"base": "nowhere"}, "there is no file .*nowhere, and no shipped base 'nowhere'; shipped are paper, default"),
        ({"base": 3}, "base is 3, expected a file, a name or the sections"),
        ({"base": {"modelz": {}}}, "unknown section 'modelz'; did you mean 'model'?"),
        ({"set": {"model.embedding": 3}}, "set: unknown field 'model.embedding'; did you mean 'model.embedding_dim'?"),
        ({"set": {"training.epochs": 3, "training": {"epochs": 4}}}, "set: 'training.epochs' is given twice"),
        ({"grid": {"training.batch_size": 3}}, "grid, training.batch_size is 3, expected a list of values"),
        ({"grid": {"training.batch_size": [3, 3]}}, "grid has two points named 'batch_size=3'"),
        ({"grid": {"quantization.bits": [3, 4]}}, "bits is set by the variant and by the grid; leave one out"),
        ({"grid": {"training.batch_size": list(range(1, 2000))}}, "grid has over 1000 points"),
        ({"grid": {"training.batch_size": list(range(1, 500))}}, "3 variants with 499 points of the grid each"),
        ({"variants": {"a": {"from": "b"}}}, "variant 'a' starts from 'b', which is not a variant"),
        ({"variants": {"a": {"from": "b"}, "b": {"from": "a"}}}, "variant 'a' starts from itself, directly or by way"),
        ({"variants": {"a": {"from": "a"}}}, "variant 'a' starts from itself"),
        ({"variants": {"a": {}, "b": {"ptq": {"of": "a"}}}}, "'b' quantizes 'a', which is not trained in FP32"),
        ({"variants": {"a": {}, "b": {"ptq": {"bits": 4}}}}, "expected ptq alone, with the variant"),
        ({"variants": {"a": {}, "b": {"ptq": {"of": "a", "bits": 5}}}}, "ptq: bits: got 5, expected one of 2, 4, 8"),
    ],
    ids=range(42),
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(study_file, keys, message):
    with pytest.raises(UserError, match=message) as refused:
        read_plan(study_file(**keys))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": "1,x"}, "--seeds: got 'x', expected a whole number"),
        ({"seeds": "1,,2"}, "--seeds: got '', expected a whole number"),
        ({"settings": ["training.epochs"]}, "--set training.epochs: expected SECTION.FIELD=VALUE"),
        (
            {"settings": ["trainings.epochs=3"]},
            "--set: unknown field 'trainings.epochs'; did you mean 'training.epochs'?",
        ),
        ({"settings": ["training.epochs=x"]}, "epochs: got 'x', expected a whole number"),
        ({"base": "nowhere"}, "no shipped base 'nowhere'"),
    ],
)
def test_what_is_wrong_with_flags(study_file, arguments, message):
    with pytest.raises(UserError, match=message):
        read_plan(study_file(), **arguments)


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    (tmp_path / "s.yaml").write_text("variants:\n  a: {quantization.bits: 4}\n  a: {quantization.bits: 8}\n")
    with pytest.raises(UserError, match="'a' is given twice"):
        read_plan(str(tmp_path / "s.yaml"))


def test_a_study_is_a_file_or_the_name_of_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no file bitwidth, and no shipped study 'bitwidth'; shipped are bit_width"):
        read_plan("bitwidth")
    assert read_plan("bit_width").name == "bit_width"


def test_a_base_beside_the_study(study_file, tmp_path):
    (tmp_path / "own.yaml").write_text("training: {batch_size: 16}\n")
    assert read_plan(study_file(base="own.yaml")).variants[0].config.training.batch_size == 16


def test_the_papers_base_is_its_configuration():
    kaggle = SHIPPED.parents[3] / "configs" / "kaggle_int4.yaml"
    if not kaggle.exists():
        pytest.skip("dqrm is installed without its configurations")
    ours, theirs = Config.load(BASES / "paper.yaml"), Config.load(kaggle, {"eval_every": 0})
    assert ours == theirs


@pytest.mark.parametrize("base", ["default", "paper"])
@pytest.mark.parametrize("name", ["bit_width", "methods", "parts"])
def test_studies_with_either_base(name, base):
    plan = read_plan(name, base)
    assert len(plan.variants) <= 6
    configs = [each.config for each in plan.variants if each.config]
    assert len({str(each.to_dict()) for each in configs}) == len(configs), "two variants are the same"
    recipe = {each.optimizer.optimizer for each in configs}
    assert recipe <= {"sgd"} if base == "paper" else True


def test_the_files_of_the_guide_are_read(tmp_path):
    page = SHIPPED.parents[3] / "docs" / "guides" / "studies.md"
    if not page.exists():
        pytest.skip("dqrm is installed without its documentation")
    plan, search = (block.text for block in blocks(page.read_text()) if block.language == "yaml")
    (tmp_path / "s.yaml").write_text(plan)
    (tmp_path / "t.yaml").write_text(search)
    assert len(read_plan(str(tmp_path / "s.yaml")).variants) == 8
    assert len(read_search(str(tmp_path / "t.yaml")).ranges) == 4


def test_every_shipped_study_has_its_command_in_the_header():
    assert len(shipped()) == 10
    for name in shipped():
        text = (SHIPPED / f"{name}.yaml").read_text()
        assert f"#   dqrm study {name} data/ml1m -o runs/{name}\n" in text
        assert read_plan(name).title
