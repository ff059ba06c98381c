"""Looking rows up in compiled code, against a slow reference in numpy and plain torch, and ids that are refused."""

import re

import numpy as np
import pytest
import torch

import reference as ref
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBagCollection
from kernel_helpers import NATIVE, PATHS, both, collection, on, random_ids, threads


@NATIVE
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("table_rows", "batch", "dims"),
    [((1,), 5, (3, 16)), ((7,), 129, (1, 64)), ((3, 1, 50, 2), 129, (16, 17)), ((9, 4), 0, (3,)), ((5, 6), 1, (17,))],
)
def test_lookup_is_exact_and_the_same_in_plain_torch(table_rows, batch, dims, dtype, bits):
    for dim, ids_dtype in zip(dims, (torch.int32, torch.int64)):
        tables = collection(table_rows, dim, dtype=dtype, bits=bits)
        ids = random_ids(table_rows, batch, ids_dtype)

        def run(tables=tables, ids=ids):
            tables.weight.grad = None
            out = tables(ids)
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            return out.detach(), tables.weight.grad.to_dense(), tables.scale.clone()

        found, grad, scale = both(run)
        assert found.dtype == torch.float32
        assert grad.dtype == dtype
        for number in range(len(table_rows)):
            table = ref.array(tables.table(number))
            if bits != 32:
                ref.assert_scale(scale[number], np.abs(table).max(), bits)
            flat = ids[:, number].numpy().reshape(-1, 1)
            ref.assert_pooled(
                ref.array(found[:, number]), table, scale=float(scale[number]), bits=bits, ids=flat,
                bags=ref.bag_positions(flat),
            )  # fmt: skip


@NATIVE
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_odd_weights_and_scales_give_what_plain_torch_gives(bits, dtype):
    tables = collection((13, 1), 17, odd=True, dtype=dtype, bits=bits)
    tables.eval()
    ids = random_ids((13, 1), 29, torch.int64)

    def run(scale):
        if scale is not None:
            tables.load_state_dict({**tables.state_dict(), "weight_fake_quantizer.scale": torch.full((2,), scale)})
        return tables(ids).detach(), tables.scale.clone()

    for scale in (None, 0.25, 1e-30, 1e30, 1e-45, float("inf"), float("nan")):
        both(lambda scale=scale: run(scale))


@PATHS
@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize(
    ("id", "dtype"),
    [(-1, torch.int32), (5, torch.int32), (2**31 - 1, torch.int32), (-(2**31), torch.int32), (-1, torch.int64),
     (5, torch.int64), (2**40, torch.int64), (-(2**63), torch.int64), (2**63 - 1, torch.int64), (2**32, torch.int64)],
)  # fmt: skip
def test_an_id_outside_its_table_is_refused_by_name(path, bits, id, dtype):
    tables = QuantEmbeddingBagCollection([9, 5, 9], 3, multi=[False, False, True], bits=bits)
    ids, bag = torch.zeros(4, 2, dtype=dtype), (torch.zeros(6, dtype=dtype), torch.arange(4))
    ids[2, 1] = id
    with on(path), pytest.raises(IndexError, match=re.escape(f"id {id} is outside table 1, which has 5 rows")):
        tables(ids, [bag])
    ids[2, 1], bag[0][5] = 4, id if id != 5 else 9
    with on(path), pytest.raises(IndexError, match=re.escape(f"id {bag[0][5]} is outside table 2, which has 9 rows")):
        tables(ids, [bag])
    with on(path):
        bag[0][5] = 8
        tables(ids, [bag])


@PATHS
def test_the_first_of_several_wrong_ids_is_named(path):
    tables = QuantEmbeddingBagCollection([4] * 26, 16)
    ids = torch.zeros(2048, 26, dtype=torch.int32)
    ids[1999, 3], ids[400, 25], ids[401, 0] = 7, 8, 9
    with on(path), threads(3), pytest.raises(IndexError, match="id 8 is outside table 25"):
        tables(ids)


@PATHS
def test_ids_may_lie_in_any_memory_layout(path):
    tables = collection((6, 7, 8), 3)
    ids = random_ids((6, 7, 8), 9, torch.int64)
    with on(path):
        expected = tables(ids)
        for other in (ids.t().contiguous().t(), torch.stack([ids, ids * 0], -1)[..., 0], ids.repeat(2, 1)[9:]):
            assert torch.equal(tables(other), expected)


@PATHS
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_narrow_ids_mean_what_they_say(path, dtype):
    """Not the bytes of some int32."""
    tables, ids = collection((6, 7, 8), 3), random_ids((6, 7, 8), 9, torch.int64)
    with on(path):
        assert torch.equal(tables(ids.to(dtype)), tables(ids))


@PATHS
@pytest.mark.parametrize("module", ["collection", "embedding"])
def test_ids_that_are_no_integers_are_refused(path, module):
    made = QuantEmbedding(6, 3, sparse=True) if module == "embedding" else QuantEmbeddingBagCollection([6], 3)
    ids = torch.zeros((4,) if module == "embedding" else (4, 1))
    with on(path), pytest.raises((RuntimeError, TypeError, ValueError)):
        made(ids)
