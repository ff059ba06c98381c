"""Clipping of gradient norms, and the tables' own learning rate, against torch and dense gradients."""

import copy
from dataclasses import replace

import pytest
import torch

from conftest import tiny
from dqrm.config import Config, ExchangeConfig
from dqrm.data.batches import Batch
from dqrm.models.dlrm import DLRM
from dqrm.training.step import TrainStep

ROWS = [40, 3]


def make(ranks=0, **optimizer):
    base = tiny(32)
    config = Config(base.model, base.quantization, replace(base.optimizer, **optimizer), base.training,
                    ExchangeConfig(ranks, table_codec="fp32", mlp_codec="fp32"))  # fmt: skip
    model = DLRM(13, ROWS, config=config.model, qat=config.quantization, seed=3).train()
    return model, TrainStep(model, config)


def batch(number):
    random = torch.Generator().manual_seed(number)
    ids = torch.stack([torch.randint(rows, (16,), generator=random) for rows in ROWS], 1).int()
    return Batch(torch.randn(16, 13, generator=random), ids, (), torch.randint(2, (16,), generator=random).float())


def by_hand(model, limit, steps, rate, table_rate):
    """Dense gradients, `torch.nn.utils.clip_grad_norm_` and SGD; returns the norms before clipping."""
    model = copy.deepcopy(model)
    norms = []
    for number in range(steps):
        data = batch(number)
        model.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(data.dense, data.ids), data.labels).backward()
        for parameter in model.parameters():
            parameter.grad = parameter.grad.to_dense()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        with torch.no_grad():
            for parameter in model.parameters():
                own = table_rate if parameter is model.tables.weight else rate
                parameter.sub_(parameter.grad, alpha=own)
    return model, norms


@pytest.mark.parametrize("ranks", [0, 3])
@pytest.mark.parametrize("limit", [0.05, 1e3])
def test_clipping_is_torchs_on_dense_gradients(ranks, limit):
    model, step = make(ranks, clip_norm=limit, table_learning_rate=0.4, learning_rate=0.2)
    expected, norms = by_hand(model, limit, 6, 0.2, 0.4)
    assert all(norm > 0.05 for norm in norms)
    for number in range(6):
        step(batch(number), 0.2, 16, number)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_without_a_limit_nothing_is_clipped():
    (one, plain), (two, far) = make(), make(clip_norm=1e9)
    for number in range(4):
        plain(batch(number), 0.2, 16, number)
        far(batch(number), 0.2, 16, number)
    for (name, ours), theirs in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_the_tables_rate_follows_the_schedule():
    _, step = make(learning_rate=0.2, table_learning_rate=0.05, warmup_steps=4)
    for rate in (0.05, 0.1, 0.2, 0.02):
        step(batch(0), rate, 16)
        tables, others = step.optimizers
        assert others.param_groups[0]["lr"] == rate
        assert tables.param_groups[0]["lr"] == pytest.approx(rate / 4)


def test_a_table_rate_of_0_leaves_the_tables_alone():
    model, step = make(table_learning_rate=0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(batch(0), 0.1, 16)
    moved = {name for (name, now), old in zip(model.named_parameters(), before) if not torch.equal(now, old)}
    assert "tables.weight" not in moved
    assert len(moved) == len(before) - 1


def test_a_batch_that_looks_up_nothing_is_clipped_too():
    model, step = make(clip_norm=0.1)
    model.tables.weight.grad = None
    for parameter in model.parameters():
        if parameter is not model.tables.weight:
            parameter.grad = torch.ones_like(parameter)
    step.update(0.1)
    count = sum(parameter.numel() for parameter in model.parameters()) - model.tables.weight.numel()
    assert float(model.top[0].bias.grad[0]) == pytest.approx(0.1 / count**0.5, rel=1e-3)
