"""The door for storages: one of another dtype, registered here, is named by a configuration, trained and exported."""

from dataclasses import replace

import pytest
import torch

import dqrm
from conftest import tiny
from dqrm.config import TrainingConfig
from dqrm.models.registry import table_storage
from dqrm.quant.config import STORAGES
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.quant.int8_rows import Int8Rows
from dqrm.quant.storage import BF16, FP32, INT8, Storage, _encoded, max_abs, storage_for, storage_of
from dqrm.training.optimizers import SparseAdagrad, SparseSGD
from run_helpers import assert_resumes, last


class Half(Storage):
    """float16, rounded to nearest."""

    dtype = torch.float16
    rounds = True  # no row twice
    seeds: list[int] = []

    @classmethod
    def add(cls, weight, rows, values, factor, seed, ranges):
        cls.seeds.append(seed)
        weight.index_copy_(0, rows, (cls.gather(weight, rows) + factor * values).half())
        return False  # the next forward raises scales


@pytest.fixture
def half(monkeypatch):
    monkeypatch.setitem(STORAGES, "half", Half)
    Half.seeds.clear()


def test_each_dtype_has_its_storage(half):
    assert [storage_for(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [FP32, BF16, Half]
    assert storage_for(torch.float64) is Storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_read_as_float32(dtype):
    weight = torch.randn(50, 4, dtype=torch.float64).to(dtype)
    rows, storage = torch.tensor([3, 49, 3]), storage_for(dtype)
    assert torch.equal(storage.gather(weight, rows), weight[rows].float())
    assert torch.equal(storage.lookup(weight, rows, True), weight[rows].float())
    assert storage.largest(weight) == weight.abs().max().float()
    assert storage.largest(weight[:0]) == 0
    assert storage.largest is max_abs


@pytest.mark.parametrize("kind", [SparseSGD, SparseAdagrad])
def test_a_dtype_without_updates_is_refused_with_those_that_have_them(kind):
    optimizer = kind([torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))], 0.1)
    with pytest.raises(ValueError, match=r"is torch.float64, expected torch.float32 or torch.bfloat16 or torch.int8"):
        optimizer.step_rows(torch.tensor([1]), torch.ones(1, 2))


@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_updates_sum_repeated_rows_first(half, l2):
    weight = torch.nn.Parameter(torch.ones(4, 2, dtype=torch.float16))
    optimizer = SparseSGD([weight], 0.25, l2=l2)
    for _ in range(2):
        optimizer.step_rows(torch.tensor([1, 3, 1]), torch.ones(3, 2))
    row = [1.0, 1.0]
    for _ in range(2):
        row = [row[0] - 0.25 * (2 + l2 * row[0]), row[1] - 0.25 * (1 + l2 * row[1])]
    torch.testing.assert_close(weight[1].float(), torch.full((2,), row[0]), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(weight[3].float(), torch.full((2,), row[1]), rtol=2e-3, atol=2e-3)
    assert torch.equal(weight[::2], torch.ones(2, 2, dtype=torch.float16))
    assert len(set(Half.seeds)) == 2  # each update has another


def test_the_scales_of_its_tables_follow_their_weights(half):
    tables = QuantEmbeddingBagCollection([9, 5], 2, _weight=torch.randn(14, 2).half())
    optimizer = SparseSGD([tables.weight], 1.0)
    optimizer.tables = tables
    tables.only_looked_up_rows_change()
    for _ in range(4):
        tables(torch.tensor([[1, 2]])).mul(torch.randn(1, 2, 2)).sum().backward()
        optimizer.step()
        tables.weight.grad = None
    assert (tables.eval().current_scale() * 7 >= torch.stack([max_abs(tables.table(n)) for n in (0, 1)]) * 0.999).all()


def test_a_run_names_it_trains_resumes_and_exports(generated, half, tmp_path):
    config = tiny(max_steps=8, checkpoint_every=4, table_dtype="half")
    assert_resumes(generated, tmp_path, config, 6)
    assert last(tmp_path / "cut")["weights.safetensors/tables.weight"].dtype == torch.float16
    assert dqrm.export_run(tmp_path / "cut", tmp_path / "model.dqrm")["largest_difference"] == 0
    other = replace(config, training=replace(config.training, table_dtype="fp32"))
    assert table_storage(other) is FP32


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="table_dtype is 'fp64', expected 'fp32' or 'bf16' or 'int8' or 'int4'"):
        TrainingConfig(table_dtype="fp64")


def test_the_storage_of_encoded_rows_is_the_registered_one(monkeypatch):
    class Rows(Int8Rows):
        pass

    class Own(INT8):
        weight_class = Rows

    monkeypatch.setitem(STORAGES, "int8", Own)
    _encoded.cache_clear()
    weight = Rows.empty(3, 4)
    assert storage_of(weight) is Own
    assert storage_of(weight.stored) is Storage
    _encoded.cache_clear()
