"""prepare_qat: swaps modules in place and keeps names, parameters, flags and states."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import reference as ref
from dqrm.quant.config import QATConfig
from dqrm.quant.convert import prepare_qat
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag
from dqrm.quant.linear import QuantLinear

QUANTIZED = (QuantEmbedding, QuantEmbeddingBag, QuantLinear)


class Tower(nn.Module):
    """A small click model with every container: ModuleDict, ModuleList, Sequential, and a module in a module."""

    def __init__(self):
        super().__init__()
        self.users = nn.Embedding(9, 4, sparse=True)
        self.tags = nn.ModuleList([nn.EmbeddingBag(n, 4, mode=m) for n, m in ((5, "sum"), (7, "mean"))])
        self.parts = nn.ModuleDict(
            {"bottom": nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 4)))}
        )
        self.norm = nn.LayerNorm(16)
        self.top = nn.Linear(16, 1, bias=False)

    def forward(self, dense, user, tags):
        looked_up = [self.users(user), *(bag(tags) for bag in self.tags)]
        return self.top(self.norm(torch.cat([self.parts["bottom"](dense), *looked_up], dim=1)))


SWAPPED = {
    "users": QuantEmbedding,
    "tags.0": QuantEmbeddingBag,
    "tags.1": QuantEmbeddingBag,
    "parts.bottom.0": QuantLinear,
    "parts.bottom.2.0": QuantLinear,
    "top": QuantLinear,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tower()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(6, 3, generator=generator),
        torch.randint(9, (6,), generator=generator),
        torch.randint(5, (6, 2), generator=generator),
    )


def kinds(model):
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, QUANTIZED)}


def fake_quantized(weight, bits, *, per_row=False):
    """What the forward pass must see of a weight, from the reference."""
    size = abs(weight.detach().numpy())
    scale = ref.scale_from_max(size.max(axis=1, keepdims=True) if per_row else size.max(), bits)
    return torch.from_numpy(ref.fake_quantize(weight.detach().numpy(), scale, bits)).float()


# --- what is swapped and what is kept


def test_swaps_at_any_depth_and_in_place(model):
    names = set(dict(model.named_modules()))
    assert prepare_qat(model) is model
    assert kinds(model) == SWAPPED
    assert set(dict(model.named_modules())) == names | {f"{name}.weight_fake_quantizer" for name in SWAPPED}
    assert type(model.norm) is nn.LayerNorm


def test_the_parameters_are_the_very_same_objects(model):
    before = dict(model.named_parameters())
    prepare_qat(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize(
    ("module", "kind"),
    [(nn.Linear(3, 2), QuantLinear), (nn.Embedding(3, 2), QuantEmbedding), (nn.EmbeddingBag(3, 2), QuantEmbeddingBag)],
)
def test_the_root_itself(module, kind):
    prepared = prepare_qat(module)
    assert type(prepared) is kind
    assert prepared.weight is module.weight


def test_options_of_the_modules_are_kept():
    bag = nn.EmbeddingBag(5, 2, mode="sum", sparse=True, include_last_offset=True, padding_idx=1)
    prepared = prepare_qat(
        nn.Sequential(bag, nn.Embedding(4, 3, padding_idx=-1, sparse=True), nn.Linear(3, 2, bias=False))
    )
    assert (prepared[0].mode, prepared[0].sparse, prepared[0].include_last_offset) == ("sum", True, True)
    assert (prepared[0].num_embeddings, prepared[0].embedding_dim, prepared[0].padding_idx) == (5, 2, 1)
    assert (prepared[1].num_embeddings, prepared[1].embedding_dim, prepared[1].padding_idx) == (4, 3, 3)
    assert prepared[1].sparse
    assert (prepared[2].in_features, prepared[2].out_features, prepared[2].bias) == (3, 2, None)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_kept(model, training):
    model.train(training)
    model.top.train(not training)
    before = {name: module.training for name, module in model.named_modules()}
    prepare_qat(model)
    after = {name: module.training for name, module in model.named_modules()}
    assert {name: after[name] for name in before} == before
    assert all(after[f"{name}.weight_fake_quantizer"] == before[name] for name in SWAPPED)


def test_frozen_parameters_stay_frozen(model, batch):
    model.users.weight.requires_grad_(False)
    model.top.weight.requires_grad_(False)
    prepare_qat(model)
    model(*batch).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"users.weight", "top.weight"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_other_floating_types_are_kept(model, batch, dtype, training):
    model.to(dtype).train(training)
    prepare_qat(model, QATConfig(bits=8))
    assert {p.dtype for p in model.parameters()} == {dtype}
    out = model(batch[0].to(dtype), *batch[1:])
    assert out.dtype == dtype
    out.sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


def test_the_device_is_kept():
    with torch.device("meta"):
        model = Tower()
    prepare_qat(model)
    assert kinds(model) == SWAPPED
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_tied_weights_stay_tied():
    model = nn.Module()
    model.embed, model.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    model.head.weight = model.embed.weight
    prepare_qat(model)
    assert model.head.weight is model.embed.weight
    assert len(list(model.parameters())) == 1
    model.head(model.embed(torch.tensor([1, 2]))).sum().backward()
    assert model.embed.weight.grad is not None


def test_a_module_in_two_places_stays_one():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    model.alias = shared
    prepare_qat(model)
    assert isinstance(model[0], QuantLinear)
    assert model[0] is model[2][0] is model.alias


def test_subclasses_of_linear_are_left_alone():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"own": Own(4, 4), "attention": nn.MultiheadAttention(4, 2, batch_first=True)})
    model["plain"] = nn.Linear(4, 4)
    prepare_qat(model)
    assert kinds(model) == {"plain": QuantLinear}
    x = torch.randn(2, 3, 4)
    for training in (True, False):
        out, _ = model.train(training)["attention"](x, x, x)
        assert out.shape == x.shape


def test_calling_twice_is_harmless(model, batch):
    prepare_qat(model, QATConfig(bits=4))
    before, out = dict(model.named_modules()), model(*batch)
    assert prepare_qat(model, QATConfig(bits=4)) is model
    assert all(module is before[name] for name, module in model.named_modules())
    assert torch.equal(model(*batch), out)


def test_prepared_modules_keep_their_bits_the_second_time():
    model = prepare_qat(nn.Sequential(nn.Linear(8, 8)), QATConfig(bits=2))
    model.append(nn.Linear(8, 8))
    prepare_qat(model, QATConfig(bits=8))
    for layer, bits in ((model[0], 2), (model[1], 8)):
        expected = torch.eye(8) @ fake_quantized(layer.weight, bits, per_row=True).t() + layer.bias
        torch.testing.assert_close(layer(torch.eye(8)), expected)


def test_a_filter_leaves_modules_alone_by_name_and_by_kind(model):
    prepare_qat(model, filter_fn=lambda module, name: name != "top" and not isinstance(module, nn.EmbeddingBag))
    left_alone = {"top", "tags.0", "tags.1"}
    assert kinds(model) == {name: kind for name, kind in SWAPPED.items() if name not in left_alone}
    assert type(model.top) is nn.Linear
    assert type(model.tags[0]) is nn.EmbeddingBag


def test_a_filter_sees_full_names_and_the_modules_to_swap(model):
    expected = {name: module for name, module in model.named_modules() if name in SWAPPED}
    seen = {}
    prepare_qat(model, filter_fn=lambda module, name: seen.setdefault(name, module) is module)
    assert {name: seen.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("refused", "named"),
    [
        (nn.EmbeddingBag(3, 2, mode="max"), "max"),
        (nn.EmbeddingBag(3, 2, max_norm=1.0), "max_norm"),
        (nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
    ],
)
def test_a_refused_layer_is_named_and_nothing_is_swapped(refused, named):
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "odd_one": refused, "last": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=rf"odd_one.*{named}"):
        prepare_qat(model)
    assert kinds(model) == {}
    assert set(kinds(prepare_qat(model, filter_fn=lambda _, name: name != "odd_one"))) == {"first", "last"}


def test_hooks_still_run():
    model, calls = nn.Sequential(nn.Linear(2, 2)), []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    prepare_qat(model)(torch.zeros(1, 2))
    assert calls == ["before", "forward"]


# --- the configuration arrives


@pytest.mark.parametrize(
    ("config", "table_bits", "mlp_bits"),
    [
        (QATConfig(), 4, 4),
        (QATConfig(bits=8), 8, 8),
        (QATConfig(bits=2, mlp_bits=8), 2, 8),
        (QATConfig(table_bits=16, mlp_bits=2), 16, 2),
        (QATConfig(table_bits=2, mlp_bits=32), 2, 32),
        (QATConfig(table_bits=32), 32, 4),
    ],
)
def test_tables_and_mlp_have_their_own_bits(config, table_bits, mlp_bits):
    torch.manual_seed(0)
    model = prepare_qat(nn.ModuleList([nn.Embedding(9, 4), nn.EmbeddingBag(9, 4), nn.Linear(4, 3, bias=False)]), config)
    ids = torch.arange(9)
    for table, argument in ((model[0], ids), (model[1], ids.view(-1, 1))):
        torch.testing.assert_close(table(argument), fake_quantized(table.weight, table_bits))
    torch.testing.assert_close(model[2](torch.eye(4)).t(), fake_quantized(model[2].weight, mlp_bits, per_row=True))


def test_scale_period_granularity_bias_and_activation_bits_arrive():
    torch.manual_seed(0)
    config = QATConfig(bits=4, scale_period=2, linear_granularity="tensor", bias_bits=8, activation_bits=16)
    table, layer = prepare_qat(nn.ModuleList([nn.Embedding(3, 2), nn.Linear(3, 2)]), config)
    by_hand = QuantLinear(3, 2, bits=4, granularity="tensor", bias_bits=8, activation_bits=16)
    by_hand.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), by_hand(x))
    scales = []
    for step in range(4):
        with torch.no_grad():
            table.weight.fill_(7.0 * (step + 1))
        table(torch.tensor([0]))
        scales.append(table.scale.item())
    assert scales == [1.0, 1.0, 3.0, 3.0]


# --- states, copies, optimizers


def test_the_state_of_the_float_model_loads_strictly(model, batch):
    state = copy.deepcopy(model.state_dict())
    other = prepare_qat(Tower())
    other(*batch)
    result = other.load_state_dict(state, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    prepare_qat(model)
    assert torch.equal(other(*batch), model(*batch)), "the scale is that of the loaded weights"
    assert torch.equal(other.users.scale, model.users.scale)


def test_the_state_of_the_float_model_loads_strictly_with_quantized_activations():
    state = nn.Sequential(nn.Linear(3, 2)).state_dict()
    prepared = prepare_qat(nn.Sequential(nn.Linear(3, 2)), QATConfig(activation_bits=8))
    prepared.load_state_dict(state, strict=True)
    assert torch.equal(prepared[0].weight, state["0.weight"])


def test_other_missing_keys_are_still_reported(model):
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "users.weight"}
    with pytest.raises(RuntimeError, match=r"users\.weight"):
        prepare_qat(model).load_state_dict(state, strict=True)


@pytest.mark.parametrize("way", ["torch.save", "pickle"])
def test_the_state_round_trips_with_the_scale_clock(model, batch, way):
    config = QATConfig(scale_period=3)
    prepare_qat(model, config)
    for _ in range(2):
        model(*batch)
    if way == "torch.save":
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    else:
        state = pickle.loads(pickle.dumps(model.state_dict()))
    other = prepare_qat(Tower(), config)
    other.load_state_dict(state, strict=True)
    for one in (model, other):
        with torch.no_grad():
            one.users.weight.mul_(3)
    for refreshed in (False, True):
        before = model.users.scale.clone()
        assert torch.equal(other(*batch), model(*batch))
        assert torch.equal(other.users.scale, model.users.scale)
        assert (model.users.scale != before).all() == refreshed


def test_a_deep_copy_is_independent(model, batch):
    twin = copy.deepcopy(prepare_qat(model))
    assert kinds(twin) == SWAPPED
    assert torch.equal(twin(*batch), model(*batch))
    with torch.no_grad():
        twin.users.weight.mul_(2)
        twin.top.weight.zero_()
    assert twin(*batch).count_nonzero() == 0
    assert model(*batch).count_nonzero() > 0


def test_the_whole_model_pickles(model, batch):
    prepare_qat(model)
    expected = model(*batch)
    assert torch.equal(pickle.loads(pickle.dumps(model)).eval()(*batch), expected)


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_an_optimizer_built_before_still_trains(model, batch, bits):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    prepare_qat(model, QATConfig(bits=bits))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (model(*batch) - 1).square().sum().backward()
    optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_32_bits_change_no_output(model, batch):
    expected = model(*batch)
    assert torch.equal(prepare_qat(model, QATConfig(bits=32))(*batch), expected)
    assert not torch.equal(prepare_qat(Tower().requires_grad_(False), QATConfig(bits=2))(*batch), expected)


def test_a_prepared_model_runs_the_same_in_training_and_evaluation(model, batch):
    prepare_qat(model)
    assert torch.equal(model(*batch), model.eval()(*batch))


def test_the_fused_path_of_a_transformer_layer_does_not_go_around_the_quantization():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    model = prepare_qat(nn.TransformerEncoder(layer, 2), QATConfig(bits=2))
    x = torch.randn(3, 5, 8)
    trained = model.train()(x)
    with torch.no_grad():
        evaluated = model.eval()(x)
    torch.testing.assert_close(trained, evaluated)
