"""DLRM against a slow float64 forward, its sizes and its initial weights."""

import numpy as np
import pytest
import torch

from dqrm.config import ModelConfig
from dqrm.models.dlrm import DLRM
from dqrm.quant.config import QATConfig

FP32 = QATConfig(bits=32)


def slow_forward(model, dense, ids, bags=()):
    """Sample by sample in float64, from the paper's figure 1, unquantized."""

    def run(layers, x, last_relu):
        linear = [layer for layer in layers if hasattr(layer, "weight")]
        for number, layer in enumerate(linear):
            x = layer.weight.detach().double().numpy() @ x + layer.bias.detach().double().numpy()
            if last_relu or number < len(linear) - 1:
                x = np.maximum(x, 0)
        return x

    config, tables = model.config, model.tables
    logits = []
    for sample in range(len(ids)):
        vectors = [tables.table(k).double().numpy()[ids[sample, k]] for k in range(ids.shape[1])]
        for k, (values, offsets) in enumerate(bags, start=ids.shape[1]):
            ends = [*offsets.tolist(), len(values)]
            rows = tables.table(k).double().numpy()[values[ends[sample] : ends[sample + 1]].numpy()]
            pooled = rows.sum(0) if config.pooling == "sum" else rows.mean(0) if len(rows) else np.zeros(rows.shape[1])
            vectors.append(pooled)
        first = run(model.bottom, dense[sample].double().numpy(), True) if model.bottom is not None else None
        if config.interaction == "cat":
            x = np.concatenate(([first] if first is not None else []) + vectors)
        else:
            together = ([first] if first is not None else []) + vectors
            pairs = [
                together[i] @ together[j] for i in range(len(together)) for j in range(i + config.self_interaction)
            ]
            x = np.concatenate(([first] if first is not None else []) + [pairs])
        logits.append(run(model.top, x, False)[0])
    return np.array(logits)


def inputs(batch, num_dense, table_rows, multi=()):
    random = torch.Generator().manual_seed(batch)
    single = [rows for rows, is_multi in zip(table_rows, multi or [False] * len(table_rows)) if not is_multi]
    dense = torch.randn(batch, num_dense, generator=random)
    ids = torch.stack([torch.randint(0, rows, (batch,), generator=random) for rows in single], 1).int()
    bags = []
    for rows in table_rows[len(single) :]:
        lengths = torch.randint(0, 4, (batch,), generator=random)
        values = torch.randint(0, rows, (int(lengths.sum()),), generator=random).int()
        bags.append((values, lengths.cumsum(0) - lengths))
    return dense, ids, bags


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("num_dense", [0, 3])
@pytest.mark.parametrize("interaction", [("dot", False), ("dot", True), ("cat", False)])
@pytest.mark.parametrize("multi", [(), (False, False, True, True)])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_forward_equals_the_reference(batch, num_dense, interaction, multi, pooling):
    rows = [7, 1, 20, 5]
    config = ModelConfig(4, (6, 4), (5, 1), *interaction, pooling)
    model = DLRM(num_dense, rows, multi=multi or None, config=config, qat=FP32, seed=3)
    dense, ids, bags = inputs(batch, num_dense, rows, multi)
    logits = model(dense, ids, bags)
    assert logits.shape == (batch,)
    np.testing.assert_allclose(logits.detach(), slow_forward(model, dense, ids, bags), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_a_quantized_model_is_the_plain_one_on_dequantized_weights(bits):
    rows, config = [30, 8, 3], ModelConfig(4, (6, 4), (5, 1))
    model = DLRM(2, rows, config=config, qat=QATConfig(bits=bits), seed=1).eval()
    plain = DLRM(2, rows, config=config, qat=FP32, seed=1).eval()
    n = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for number in range(3):
            table = plain.tables.table(number)
            scale = table.abs().max() / n
            table.copy_((table / scale).round().clamp(-n - 1, n) * scale)
        for layer in [*plain.bottom, *plain.top]:
            if hasattr(layer, "weight"):
                scale = layer.weight.abs().amax(1, keepdim=True) / n
                layer.weight.copy_((layer.weight / scale).round().clamp(-n - 1, n) * scale)
        batch = inputs(50, 2, rows)
        torch.testing.assert_close(model(*batch), plain(*batch))


def test_sizes_are_the_papers():
    kaggle = DLRM(13, [2] * 26, qat=FP32)
    assert kaggle.top[0].in_features == 367
    mlp = [p for name, p in kaggle.named_parameters() if not name.startswith("tables")]
    assert sum(p.numel() for p in mlp if p.dim() == 2) == 474_368
    assert sum(p.numel() for p in mlp if p.dim() == 1) == 1_617
    terabyte = DLRM(13, [2] * 26, config=ModelConfig(64, (512, 256, 64), (512, 512, 256, 1)), qat=FP32)
    assert terabyte.top[0].in_features == 415
    mlp = [p for name, p in terabyte.named_parameters() if not name.startswith("tables")]
    assert sum(p.numel() for p in mlp if p.dim() == 2) == 760_064
    assert sum(p.numel() for p in mlp if p.dim() == 1) == 2_113


def test_initial_weights_have_the_papers_distributions():
    model = DLRM(13, [40_000, 100], qat=FP32, seed=5)
    for number, rows in enumerate((40_000, 100)):
        table, bound = model.tables.table(number), rows**-0.5
        assert table.abs().max() <= bound
        assert table.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert table.mean().item() == pytest.approx(0, abs=bound / 10)
    weight = model.bottom[2].weight  # 512 -> 256
    assert weight.std().item() == pytest.approx((2 / (512 + 256)) ** 0.5, rel=0.02)
    assert model.bottom[0].bias.std().item() == pytest.approx((1 / 512) ** 0.5, rel=0.15)


def test_a_seed_gives_the_same_model_whatever_torchs_random_state():
    torch.manual_seed(1)
    one = DLRM(3, [9, 4], seed=7)
    torch.manual_seed(2)
    same, other = DLRM(3, [9, 4], seed=7), DLRM(3, [9, 4], seed=8)
    longer = DLRM(3, [9, 4, 6], seed=7)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name]), name
    assert not torch.equal(one.tables.weight, other.tables.weight)
    assert torch.equal(one.tables.table(1), longer.tables.table(1))


def test_golden_initial_weights():
    """The streams behind the seeds: a change here changes every model that a seed stands for."""
    model = DLRM(13, [100, 7], seed=1)
    first = [
        *model.tables.table(0)[0, :2].tolist(),
        *model.bottom[0].weight[0, :2].tolist(),
        model.top[0].bias[0].item(),
    ]
    assert first == pytest.approx([-0.0053622723, 0.0023643137, 0.026074341, 0.044158921, 0.029791521], rel=1e-6)


def test_impossible_models_are_refused():
    with pytest.raises(ValueError, match="neither dense columns nor tables"):
        DLRM(0, [])
    with pytest.raises(ValueError, match="no pair"):
        DLRM(0, [5])
    assert DLRM(0, [5], config=ModelConfig(self_interaction=True)).top[0].in_features == 1
    assert DLRM(4, []).top[0].in_features == 16


def test_ids_outside_a_table_are_refused_by_name():
    model = DLRM(0, [5, 3])
    with pytest.raises(IndexError, match=r"id 3 is outside table 1, which has 3 rows \(0 to 2\)"):
        model(torch.zeros(1, 0), torch.tensor([[4, 3]]))
    with pytest.raises(IndexError, match="id -1 is outside table 0"):
        model(torch.zeros(1, 0), torch.tensor([[-1, 0]]))
