"""`convert` on modules of all kinds that went through `prepare_qat`: the same answers, a real eighth of the size."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import dqrm
from dqrm import QATConfig, QuantLinear, convert, prepare_qat
from dqrm.quant.activations import ActivationFakeQuantizer
from dqrm.quant.packed import PackedEmbedding, PackedEmbeddingBag, PackedEmbeddingBagCollection, PackedLinear
from dqrm.quant.quantizer import WeightFakeQuantizer
from quant.test_packing import same

PACKED = (PackedEmbedding, PackedEmbeddingBag, PackedEmbeddingBagCollection, PackedLinear)


class Ranker(nn.Module):
    """Nested, with a shared module, tied weights and something that is not quantized."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(12, 8, padding_idx=0)
        self.tags = nn.ModuleList([nn.EmbeddingBag(9, 8, mode="mean"), nn.EmbeddingBag(5, 8, mode="sum")])
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ModuleDict({"in": nn.Linear(8, 8)})["in"])
        self.again = self.block[0]
        self.back = nn.Linear(8, 12, bias=False)
        self.back.weight = self.words.weight
        self.top = nn.Linear(12, 1)

    def forward(self, words, tags, offsets):
        pooled = sum(bag(tags % bag.num_embeddings, offsets) for bag in self.tags)
        return self.top(self.back(self.again(self.block(self.words(words) + pooled)).relu()))


INPUT = (torch.tensor([3, 0, 11]), torch.tensor([1, 8, 4, 4]), torch.tensor([0, 1, 1]))


def ranker(config=None, steps=3, keep=None):
    torch.manual_seed(0)
    model = prepare_qat(Ranker(), config or QATConfig(bits=4, scale_period=2), keep)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*INPUT).square().mean().backward()
        optimizer.step()
    return model.eval()


CHILDREN = (WeightFakeQuantizer, ActivationFakeQuantizer)


def layers(model):
    return [(name, module) for name, module in model.named_modules() if not isinstance(module, CHILDREN)]


def packed_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "norm" not in name}


CONFIGS = {
    **{f"{bits} bits": {"bits": bits} for bits in (2, 4, 8, 16, 32)},
    "tables": {"mlp_bits": 32}, "MLP": {"table_bits": 32}, "mixed": {"table_bits": 2, "mlp_bits": 8},
    "tensor": {"linear_granularity": "tensor"}, "bias": {"bias_bits": 4}, "activations": {"activation_bits": 8},
    "activations of FP32": {"activation_bits": 8, "mlp_bits": 32}, "running_max": {"scale_refresh": "running_max"},
    "lsq": {"quantizer": "lsq"},
    "lsq and pact": {"quantizer": "lsq", "activation_bits": 8, "activation_quantizer": "pact"},
    "all": {"bits": 2, "activation_bits": 8, "bias_bits": 8, "linear_granularity": "tensor"},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", [0, 3])
@torch.no_grad()
def test_a_whole_model(name, steps):
    period = {} if "scale_refresh" in CONFIGS[name] else {"scale_period": 2}
    config = QATConfig(**period, **CONFIGS[name])
    if config.activation_bits != 32 and not steps:
        pytest.skip("activation ranges come from training")
    with torch.enable_grad():
        model = ranker(config, steps)
    expected = model(*INPUT)
    before = {key: id(module) for key, module in layers(model)}
    assert convert(model.train()) is model
    assert not model.training
    same(model(*INPUT), expected)
    assert {key: id(module) for key, module in layers(model)} == before
    assert model.again is model.block[0]
    tables, mlp = config.effective_table_bits, config.effective_mlp_bits
    for module, bits in ((model.words, tables), (model.tags[1], tables), (model.back, mlp), (model.block[2], mlp)):
        assert isinstance(module, PACKED) == (bits != 32)
        assert not (bits != 32 and list(module.parameters())), "an FP32 weight is still there"
    same(convert(model)(*INPUT), expected)  # again changes nothing
    if config.activation_bits == 32 or config.effective_mlp_bits != 32:  # what stays trainable learns its range again
        same(model.train()(*INPUT), expected)


@torch.no_grad()
def test_copies_pickles_and_state_dicts():
    with torch.enable_grad():
        model, other = convert(ranker()), convert(ranker(steps=0))
    expected = model(*INPUT)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        same(copied(*INPUT), expected)
        assert copied.again is copied.block[0]
    assert not torch.equal(other(*INPUT), expected)
    for assign in (False, True):
        fresh = copy.deepcopy(other)
        fresh(*INPUT)
        fresh.load_state_dict(model.state_dict(), assign=assign)
        same(fresh(*INPUT), expected)
    with pytest.raises(RuntimeError, match="words"):
        ranker(steps=0).load_state_dict(model.state_dict())


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
def test_a_cast_leaves_codes_and_scales_alone(change):
    model = convert(prepare_qat(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))))
    expected, state = model(torch.arange(7)), packed_state(model)
    change(model)
    for name, tensor in model.state_dict().items():
        if not name.endswith("bias"):
            same(tensor, state[name])
    assert torch.allclose(model(torch.arange(7)).float(), expected, atol=1e-2)
    change(model.to("cpu")).float()
    same(model(torch.arange(7)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("converted", ["before", "after"])
@torch.no_grad()
def test_a_model_of_another_dtype_still_runs(dtype, converted):
    model = prepare_qat(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))).eval()
    x = torch.randn(5, 4).to(dtype)
    expected = copy.deepcopy(model).to(dtype)(x)
    found = convert(model).to(dtype)(x) if converted == "before" else convert(model.to(dtype))(x)
    assert torch.allclose(found.double(), expected.double(), atol=0.05)
    if converted == "after":
        assert found.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_tables_of_another_dtype_answer_in_it(dtype):
    for layer, ids in ((nn.Embedding(6, 4), torch.arange(6)), (nn.EmbeddingBag(6, 4), torch.arange(6).view(2, 3))):
        model = prepare_qat(layer.to(dtype)).eval()
        expected = model(ids)
        found = convert(model)(ids)
        assert found.dtype == expected.dtype == dtype
        assert torch.allclose(found.double(), expected.double(), atol=0.05)


@torch.no_grad()
def test_a_root_that_is_itself_a_layer():
    for layer, x in ((nn.Linear(5, 3), torch.randn(2, 5)), (nn.Embedding(6, 4), torch.arange(6)),
                     (nn.EmbeddingBag(6, 4), torch.arange(6).view(2, 3))):  # fmt: skip
        model = prepare_qat(layer).eval()
        expected = model(x)
        assert convert(model) is layer
        same(layer(x), expected)


def test_hooks_are_kept_and_can_be_removed():
    layer, seen = nn.Linear(4, 4), []
    before = layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    after = layer.register_forward_hook(lambda module, args, kwargs, out: seen.append("after"), with_kwargs=True)
    convert(prepare_qat(layer))
    layer(torch.ones(1, 4))
    layer(input=torch.ones(1, 4))
    before.remove()
    after.remove()
    layer(torch.ones(1, 4))
    assert seen == ["before", "after"] * 2


def test_what_a_user_put_on_a_module_stays():
    layer = nn.Linear(4, 4)
    layer.tag = "mine"
    assert getattr(convert(prepare_qat(layer)), "tag", None) == "mine"


def test_an_untrained_activation_range_is_refused_before_anything_is_converted():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    prepare_qat(model, QATConfig(activation_bits=8)).train()
    model[0](torch.ones(1, 4))  # the first has seen something, the second has not
    with pytest.raises(ValueError, match=r"1\.0"):
        convert(model)
    assert [type(layer) for layer in (model[0], model[1][0])] == [QuantLinear, QuantLinear]
    assert model.training


def test_a_subclass_with_a_forward_of_its_own_keeps_it():
    class Doubled(QuantLinear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(4, 4)).eval()
    x = torch.randn(3, 4)
    expected = model(x)
    same(convert(model)(x), expected)


def test_what_was_never_prepared_or_was_filtered_stays():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    assert [type(layer) for layer in convert(plain)] == [nn.Linear, nn.Embedding]
    model = ranker(keep=lambda module, name: name != "top")
    expected = model(*INPUT)
    assert type(convert(model).top) is nn.Linear
    assert torch.equal(model(*INPUT), expected)


@torch.no_grad()
def test_a_transformer_layer():
    model = prepare_qat(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    expected = model(x)
    same(convert(model)(x), expected)


def test_gradients_reach_the_input_also_after_inference_mode():
    model = convert(prepare_qat(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))))
    with torch.inference_mode():
        model(torch.ones(2, 4))
    x = torch.ones(2, 4, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


def test_a_converted_model_is_as_small_as_its_codes_even_after_use():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    convert(dqrm.prepare_qat(model, QATConfig(bits=4)))
    before = len(pickle.dumps(model))
    assert before < 2 * 256 * 128 + 2 * 256 * 8 + 8000
    model(torch.randn(2, 256))
    assert len(pickle.dumps(model)) < before + 2000, "the unpacked weights travel along"
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) == 2 * 256 * 128 + 2 * 256 * 8


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_dlrm(bits, dtype, generated):
    config = dqrm.ModelConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1))
    model = dqrm.DLRM(13, generated.table_rows, config=config, qat=QATConfig(bits=bits), table_dtype=dtype)
    batch = next(iter(generated.split("test").batches(200)))
    expected = model.eval()(batch.dense, batch.ids, batch.bags)
    same(convert(model)(batch.dense, batch.ids, batch.bags), expected)
    same(copy.deepcopy(model)(batch.dense, batch.ids, batch.bags), expected)
    if bits != 32:
        assert isinstance(model.tables, PackedEmbeddingBagCollection)
        assert not list(model.parameters())
        same(model.train()(batch.dense, batch.ids, batch.bags), expected)
