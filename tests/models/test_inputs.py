"""Tensors of the wrong kind: converted where that loses nothing, refused in one sentence otherwise, never garbage."""

import numpy as np
import pytest
import torch
from torch import nn

import dqrm
from dqrm import DLRM, QATConfig, UserError
from dqrm.export.formats.traceable import flat_model
from dqrm.quant.mlp import QuantMLP
from dqrm.quant.packed import PackedEmbeddingBagCollection
from dqrm.quant.packing import pack, unpack
from dqrm.quant.uniform import dequantize, fake_quantize, quantize
from export_helpers import batch, made

KIND = "bags, sum"  # 3 dense columns, 2 single-valued and 2 multi-valued tables


def trained():
    return DLRM(3, (7, 1, 40, 9), multi=(False, False, True, True), qat=QATConfig(bits=4))


@pytest.fixture(params=["packed", "trained", "training"])
def model(request):
    return made(KIND) if request.param == "packed" else trained().train(request.param == "training")


@pytest.fixture
def given():
    rows = batch(made(KIND), 6)
    return {"dense": rows.dense, "ids": rows.ids, "bags": rows.bags}


def values(model, given):
    with torch.no_grad():
        return model(**given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_converted(model, given, dtype):
    rounded = given["dense"].to(dtype)
    wanted = values(model, {**given, "dense": rounded.float()})
    found = values(model, {**given, "dense": rounded})
    assert found.dtype == torch.float32
    assert found.equal(wanted)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.int64,
                                   torch.uint64])  # fmt: skip
def test_ids_of_any_integers_are_the_same_ids(model, given, dtype):
    bags = [(found.to(dtype), offsets.to(dtype)) for found, offsets in given["bags"]]
    assert values(model, {**given, "ids": given["ids"].to(dtype), "bags": bags}).equal(values(model, given))


def bag(given, **changed):
    found, offsets = given["bags"][0]
    return {"bags": ((changed.get("values", found), changed.get("offsets", offsets)), given["bags"][1])}


WRONG = {
    "long dense": (lambda g: {"dense": g["dense"].long()}, r"dense is torch.int64, expected torch.float32"),
    "bool dense": (lambda g: {"dense": g["dense"] > 0}, r"dense is torch.bool"),
    "complex dense": (lambda g: {"dense": g["dense"] + 0j}, r"dense is torch.complex64"),
    "numpy dense": (lambda g: {"dense": g["dense"].numpy()}, r"numpy.ndarray.*torch.from_numpy\(dense\)"),
    "list dense": (lambda g: {"dense": g["dense"].tolist()}, r"dense is a list.*torch.tensor\(dense\)"),
    "no dense": (lambda g: {"dense": None}, r"dense is a NoneType, expected a torch.Tensor"),
    "one sample": (lambda g: {"dense": g["dense"][0]}, r"dense is 1-dimensional \[3\], expected \[B, 3\].*\[None\]"),
    "3-d dense": (lambda g: {"dense": g["dense"][None]}, r"dense is 3-dimensional"),
    "columns": (lambda g: {"dense": g["dense"][:, :2]}, r"dense has 2 columns \[6, 2\], expected 3"),
    "rows": (lambda g: {"dense": g["dense"][:5]}, r"dense has 5 rows and ids has 6"),
    "one row": (lambda g: {"dense": g["dense"][:1]}, r"dense has 1 rows and ids has 6"),
    "device": (lambda g: {"dense": g["dense"].to("meta")}, r"dense is on meta, but the model is on cpu"),
    "device of ids": (lambda g: {"ids": g["ids"].to("meta")}, r"ids is on meta"),
    "float ids": (lambda g: {"ids": g["ids"].float()}, r"ids is torch.float32, expected integers"),
    "bool ids": (lambda g: {"ids": g["ids"] > 0}, r"ids is torch.bool, expected integers"),
    "numpy ids": (lambda g: {"ids": g["ids"].numpy()}, r"ids is a numpy.ndarray.*torch.from_numpy\(ids\)"),
    "1-d ids": (lambda g: {"ids": g["ids"][0]}, r"ids is 1-dimensional \[2\]"),
    "columns of ids": (lambda g: {"ids": g["ids"][:, :1]}, r"ids has 1 columns \[6, 1\], expected 2"),
    "swapped": (lambda g: {"dense": g["ids"], "ids": g["dense"]}, r"ids has 3 columns"),
    "no bags": (lambda g: {"bags": ()}, r"bags has 0 entries, expected 2"),
    "a tensor for bags": (lambda g: {"bags": g["ids"]}, r"bags is a Tensor"),
    "a bag without offsets": (lambda g: {"bags": (g["bags"][0][0], g["bags"][1])}, r"bags\[0\] is a Tensor"),
    "float values": (lambda g: bag(g, values=g["bags"][0][0].float()), r"values of bags\[0\] is torch.float32"),
    "float offsets": (lambda g: bag(g, offsets=g["bags"][0][1].float()), r"offsets of bags\[0\] is torch.float32"),
    "2-d values": (lambda g: bag(g, values=g["bags"][0][0][:, None]), r"values of bags\[0\] is 2-dimensional"),
    "offsets": (lambda g: bag(g, offsets=g["bags"][0][1][:4]), r"bags\[0\] has 4 offsets, expected 6"),
    "numpy values": (lambda g: bag(g, values=g["bags"][0][0].numpy()), r"values of bags\[0\] is a numpy.ndarray"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_model_cannot_take_is_refused(model, given, wrong):
    change, message = WRONG[wrong]
    with pytest.raises(UserError, match=message) as refused:
        values(model, {**given, **change(given)})
    assert isinstance(refused.value, ValueError)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("id", [-1, 7, 2**31, 2**40])
def test_ids_outside_their_table(model, given, id):
    ids = given["ids"].long()
    ids[3, 0] = id
    with pytest.raises(IndexError, match=f"id {id} is outside table 0"):
        values(model, {**given, "ids": ids})


def test_nan_in_nan_out(model, given):
    dense = given["dense"].clone()
    dense[2, 1] = float("nan")
    assert values(model, {**given, "dense": dense}).isnan().nonzero().tolist() == [[2]]


def test_models_without_dense_columns_take_none_for_them():
    model = made("no dense")
    rows = batch(model, 5)
    assert model(None, rows.ids).equal(model(rows.dense, rows.ids))
    with pytest.raises(UserError, match="dense has 3 columns"):
        model(torch.zeros(5, 3), rows.ids)


def test_a_model_cast_to_double_computes_in_it(given):
    model = trained().double().eval()
    for dtype in (torch.float64, torch.float16):
        assert values(model, {**given, "dense": given["dense"].to(dtype)}).dtype == torch.float64


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_checked_model_is_traced_and_exported_as_before(given):
    model = made("4 bits")
    rows = batch(model, 5)
    wanted = values(model, {"dense": rows.dense, "ids": rows.ids})
    scripted = torch.jit.trace(model, (rows.dense, rows.ids))
    torch.testing.assert_close(scripted(rows.dense, rows.ids), wanted)
    exported = torch.export.export(flat_model(model), (rows.dense, rows.ids.long()), strict=False)
    torch.testing.assert_close(exported.module()(rows.dense, rows.ids.long()), wanted)


TABLES = {
    "QuantEmbedding": lambda: dqrm.QuantEmbedding(9, 4),
    "QuantEmbeddingBag": lambda: dqrm.QuantEmbeddingBag(9, 4, mode="sum"),
    "PackedEmbedding": lambda: dqrm.convert(nn.Sequential(dqrm.QuantEmbedding(9, 4)))[0],
    "PackedEmbeddingBag": lambda: dqrm.convert(nn.Sequential(dqrm.QuantEmbeddingBag(9, 4, mode="sum")))[0],
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), np.zeros((2, 3), np.int64)])
def test_drop_in_tables_refuse_what_are_no_ids(kind, wrong):
    with pytest.raises((TypeError, ValueError), match=r"ids (is|are)"):
        TABLES[kind]()(wrong)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("shape", [(2, 3), (300, 1), (4, 120)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_drop_in_tables_take_any_integers(kind, shape, dtype):
    table, ids = TABLES[kind]().eval(), torch.arange(shape[0] * shape[1]).reshape(shape) % 9
    assert table(ids.to(dtype)).equal(table(ids))


@pytest.mark.parametrize("make", [lambda: dqrm.QuantEmbeddingBagCollection((4, 5), 4, multi=(False, True)),
                                  lambda: PackedEmbeddingBagCollection((4, 5), 4, multi=(False, True))])  # fmt: skip
def test_collections_refuse_other_shapes_and_dtypes(make):
    tables, ids = make(), torch.zeros(3, 1, dtype=torch.int64)
    good = (torch.zeros(6, dtype=torch.int64), torch.tensor([0, 2, 4]))
    assert tables(ids, [good]).shape == (3, 2, 4)
    for wrong, error, message in (
        ((ids.numpy(), [good]), TypeError, "ids is a numpy.ndarray"),
        ((ids[:, 0], [good]), ValueError, "ids are 1-dimensional"),
        ((ids.float(), [good]), ValueError, "ids are torch.float32"),
        ((ids, [(good[0].view(3, 2), good[1])]), ValueError, "one dimension"),
        ((ids, [(good[0], good[1].float())]), ValueError, "offsets are torch.float32"),
        ((ids, [(good[0].numpy(), good[1])]), TypeError, "values is a numpy.ndarray"),
    ):
        with pytest.raises(error, match=message):
            tables(*wrong)


LINEAR = {
    "QuantLinear": lambda: dqrm.QuantLinear(3, 2),
    "with activations": lambda: dqrm.QuantLinear(3, 2, activation_bits=8),
    "PackedLinear": lambda: dqrm.convert(nn.Sequential(dqrm.QuantLinear(3, 2)))[0],
    "QuantMLP": lambda: QuantMLP(dqrm.QuantLinear(3, 2)),
    "packed QuantMLP": lambda: dqrm.convert(QuantMLP(dqrm.QuantLinear(3, 2))),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_linear_layers_refuse_integers_as_torch_does(kind):
    layer, x = LINEAR[kind](), torch.tensor([[1, 2, 3]])
    for wrong in (x, x.int(), x > 1, x.numpy()):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            layer(wrong)
    assert layer(x.float()).shape == (1, 2)


def test_quantizers_refuse_other_dtypes():
    scale, x = torch.tensor(0.5), torch.tensor([1, 2])
    for function in (lambda x: quantize(x, scale, 4), lambda x: fake_quantize(x, scale, 4)):
        for wrong, error in ((x, ValueError), (x > 1, ValueError), (x.numpy(), TypeError)):
            with pytest.raises(error, match="x is"):
                function(wrong)
    for function, message in (
        (lambda: dequantize(torch.ones(2), scale), "codes is torch.float32, expected torch.int8 or torch.int16"),
        (lambda: pack(torch.ones(2, 2, dtype=torch.int32), 4), "codes is torch.int32, expected torch.int8"),
        (lambda: unpack(torch.ones(2, 2), 4, 4), "packed is torch.float32, expected torch.uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            function()


def test_evaluate_wants_a_model(generated):
    for call in (lambda model: dqrm.evaluate(model, generated), lambda model: dqrm.predict(model, "log.txt", "p.csv")):
        for wrong in (3, None, generated, torch.nn.Linear(2, 1)):
            with pytest.raises(
                UserError, match=f"model is a {type(wrong).__name__}, expected the path of a run folder"
            ):
                call(wrong)
