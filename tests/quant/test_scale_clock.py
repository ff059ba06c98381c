"""When a table's scale is refreshed: training forwards 0, P, 2P, ... from the whole table, at no other time."""

import io
import pickle

import pytest
import torch

import reference as ref
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection

ROWS, DIM = 6, 3


class Table:
    """The three modules behind one interface: looks up row 0 only, the largest weight stands in row 5."""

    def __init__(self, module, arguments):
        self.module, self.arguments = module, arguments

    def forward(self):
        return self.module(*self.arguments)

    def scales(self):
        return self.module.scale.clone().numpy()

    def set_max(self, value):
        """Every table's largest absolute weight becomes ``value``; returned are the scales this asks for."""
        with torch.no_grad():
            self.module.weight.fill_(0.01)
            self.module.weight[ROWS - 1 :: ROWS, -1] = -value


def make(kind, period, bits=4):
    if kind == "bag":
        module = QuantEmbeddingBag(ROWS, DIM, mode="sum", sparse=True, bits=bits, scale_period=period)
        return Table(module, (torch.tensor([[0, 0]]),))
    if kind == "embedding":
        return Table(QuantEmbedding(ROWS, DIM, bits=bits, scale_period=period), (torch.tensor([0]),))
    module = QuantEmbeddingBagCollection([ROWS, ROWS, ROWS], DIM, bits=bits, scale_period=period)
    return Table(module, (torch.tensor([[0, 0, 0]]), []))


KINDS = pytest.mark.parametrize("kind", ["bag", "embedding", "collection"])


def shows(table, max_abs, bits=4):
    """Whether the scales are those of ``max_abs``."""
    return bool((abs(table.scales() / ref.scale_from_max(max_abs, bits) - 1) < 1e-6).all())


@KINDS
@pytest.mark.parametrize(("period", "steps"), [(1, 5), (3, 10), (200, 402)])
def test_training_forwards_0_p_2p_refresh(kind, period, steps):
    table = make(kind, period)
    current = None
    for step in range(steps):
        table.set_max(step + 1.0)
        table.forward()
        if step % period == 0:
            current = step + 1.0
        assert shows(table, current), f"training forward {step}"


@KINDS
def test_the_default_period_is_200(kind):
    periodic = {"scale_refresh": "periodic"}
    default = {
        "bag": QuantEmbeddingBag(ROWS, DIM, mode="sum", **periodic),
        "embedding": QuantEmbedding(ROWS, DIM, **periodic),
        "collection": QuantEmbeddingBagCollection([ROWS] * 3, DIM, **periodic),
    }[kind]
    table = Table(default, make(kind, 200).arguments)
    for step in range(201):
        table.set_max(step + 1.0)
        table.forward()
        assert shows(table, 1.0 if step < 200 else 201.0), f"training forward {step}"


@KINDS
@pytest.mark.parametrize("bits", ref.BITS)
def test_evaluation_neither_refreshes_nor_ticks(kind, bits):
    table = make(kind, 3, bits)
    table.set_max(1.0)
    table.forward()
    table.module.eval()
    for _ in range(7):
        table.set_max(2.0)
        table.forward()
        assert shows(table, 1.0, bits)
    table.module.train()
    for expected in (1.0, 1.0, 3.0):
        table.set_max(3.0)
        table.forward()
        assert shows(table, expected, bits)


@KINDS
def test_the_first_evaluation_computes_a_scale_that_was_never_computed(kind):
    table = make(kind, 3)
    table.module.eval()
    table.set_max(5.0)
    table.forward()
    assert shows(table, 5.0)
    table.set_max(6.0)
    table.forward()
    assert shows(table, 5.0)
    table.module.train()
    table.forward()
    assert shows(table, 6.0), "training forward 0 refreshes"


@KINDS
def test_evaluation_uses_the_training_scale(kind):
    """Scale 1 was computed in training; 40 is clamped to code 7 although the table would now ask for scale 40/7."""
    table = make(kind, 200)
    table.set_max(7.0)
    table.forward()
    with torch.no_grad():
        table.module.weight.fill_(40.0)
    value = table.module.eval()(*table.arguments).flatten()[0].item()
    assert value == (14.0 if kind == "bag" else 7.0)


@KINDS
def test_the_scale_does_not_depend_on_gradient_mode(kind):
    table = make(kind, 2)
    for step, expected in enumerate([1.0, 1.0, 3.0, 3.0]):
        table.set_max(step + 1.0)
        with torch.no_grad():
            table.forward()
        assert shows(table, expected)


@KINDS
def test_an_empty_batch_is_a_training_forward_too(kind):
    table = make(kind, 2)
    for step, expected in enumerate([1.0, 1.0, 3.0]):
        table.set_max(step + 1.0)
        ids = table.arguments[0][:0]
        table.module(ids, *table.arguments[1:])
        assert shows(table, expected)


@KINDS
@pytest.mark.parametrize("done", [1, 2, 3, 4])
@pytest.mark.parametrize("way", ["state_dict", "torch.save", "pickle"])
def test_a_saved_state_goes_on_with_the_same_clock(kind, done, way):
    table, fresh = make(kind, 3), make(kind, 3)
    for step in range(done):
        table.set_max(step + 1.0)
        table.forward()
    state = table.module.state_dict()
    if way == "torch.save":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    if way == "pickle":
        state = pickle.loads(pickle.dumps(state))
    fresh.module.load_state_dict(state)
    for step in range(done, done + 7):
        for one in (table, fresh):
            one.set_max(step + 1.0)
            one.forward()
        assert (table.scales() == fresh.scales()).all(), f"training forward {step}"
        assert shows(fresh, 3 * (step // 3) + 1.0)


@KINDS
def test_weights_without_a_scale_load_and_are_scanned_at_the_next_forward(kind):
    for training in (True, False):
        table = make(kind, 200)
        table.set_max(1.0)
        table.forward()
        table.module.load_state_dict({"weight": torch.full_like(table.module.weight, 9.0)}, strict=True)
        table.module.train(training)
        table.forward()
        assert shows(table, 9.0)
