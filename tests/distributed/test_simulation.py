"""N ranks in one process against one rank with the whole batch, and against gradients summed and bounded by hand."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from conftest import tiny
from dqrm.config import Config, ExchangeConfig, ModelConfig, OptimizerConfig, TrainingConfig
from dqrm.data.batches import Batch
from dqrm.distributed.local import LocalExchange
from dqrm.errors import UserError
from dqrm.models.dlrm import DLRM
from dqrm.quant.config import QATConfig
from dqrm.training.launch import resume, train
from dqrm.training.optimizers import OPTIMIZERS
from dqrm.training.step import TrainStep
from launch_helpers import same_tensors
from run_helpers import Killed, killer

TABLES, MULTI = (7, 300, 20, 3, 50), (False, False, False, True, True)
STARTS = (0, 7, 307, 327, 330, 380)
STEPS = 20
RANKS = pytest.mark.parametrize("ranks", [2, 3, 4])
PLAIN = {"table_codec": "fp32", "mlp_codec": "fp32"}
# Every fourth is too small for four ranks; none is a multiple of 2, 3 and 4.
SIZES = (16, 13, 22, 3, 11, 15, 7, 1, 16, 5, 9, 2)
PERIODS = {"periodic": {"scale_period": 3}, "running_max": {"rescan_period": 7}}
MODEL = ModelConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1))


def batch_of(step, rows=None, dense=3):
    """Few enough ids that ranks share rows; bags of 0 to 3 ids, some rows and some ranks without any."""
    random = torch.Generator().manual_seed(step)
    rows = SIZES[step % len(SIZES)] if rows is None else rows

    def draw(high, *shape):
        return torch.randint(0, high, shape, generator=random, dtype=torch.int32)

    bags = []
    for size in TABLES[3:]:
        lengths = draw(4, rows).long()
        lengths[rows // 2 :] *= step % 3 > 0  # in every third batch the last ranks have no id in their bags
        bags.append((draw(size, int(lengths.sum())), lengths.cumsum(0) - lengths))
    ids = torch.stack([draw(size, rows) for size in TABLES[:3]], 1)
    labels = draw(2, rows).float()
    return Batch(torch.randn(rows, dense, generator=random), ids, tuple(bags), labels)


def make(ranks, bits=32, optimizer="sgd", qat=None, dense=3, precision="fp32", seed=0, batch_size=64, **exchange):
    """A step with so many simulated ranks; 0: with none."""
    config = Config(
        model=MODEL,
        quantization=QATConfig(bits=bits, **(qat or PERIODS["periodic"])),
        optimizer=OptimizerConfig(optimizer, 0.1),
        training=TrainingConfig(precision=precision, seed=seed, batch_size=batch_size),
        exchange=ExchangeConfig(simulate_ranks=ranks, **exchange),
    )
    model = DLRM(dense, TABLES, multi=MULTI, config=MODEL, qat=config.quantization, seed=seed, precision=precision)
    return TrainStep(model.train(), config)


def run(step, rate=0.1, steps=STEPS, first=0, **of_batch):
    """The mean loss of each step."""
    losses = []
    for number in range(first, first + steps):
        batch = batch_of(number, **of_batch)
        each = step(batch, rate, len(batch), number)
        many = step.exchange.size > 1
        assert (each.shape, each.dtype, each.requires_grad) == ((step.exchange.size,) * many, torch.float32, False)
        losses.append(each.sum() / len(batch) if many else each)
    return torch.stack(losses)


def assert_same(one, two, close=None):
    """Weights, buffers and optimizer state: bit for bit, or to a tolerance (rtol, atol)."""
    a, b = everything(one), everything(two)
    assert a.keys() == b.keys()
    for name in a:
        if close is None or not a[name].is_floating_point():
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], rtol=close[0], atol=close[1], msg=lambda m: f"{name}: {m}")  # noqa: B023


def everything(step):
    found = dict(step.model.state_dict())
    for number, optimizer in enumerate(step.optimizers):
        for parameter, values in optimizer.state_dict()["state"].items():
            found |= {f"{number}/{parameter}/{k}": v for k, v in values.items() if isinstance(v, torch.Tensor)}
    return found


# ---- without loss: what one rank gives


@RANKS
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("table_exchange", ["all_gather", "all_to_all"])
def test_fp32_codecs_give_what_one_rank_gives(ranks, optimizer, table_exchange):
    """In FP32: INT4 weights next to a rounding boundary would take another code for the last bit of a sum."""
    one = make(0, optimizer=optimizer)
    many = make(ranks, optimizer=optimizer, table_exchange=table_exchange, **PLAIN)
    assert isinstance(one.exchange, LocalExchange)
    torch.testing.assert_close(run(many), run(one), rtol=1e-5, atol=1e-6)
    assert_same(one, many, (1e-4, 1e-5))
    before = make(0, optimizer=optimizer)
    assert (before.model.tables.weight - one.model.tables.weight).abs().max() > 0.01  # there was something to compare


@RANKS
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_without_dense_columns_and_with_l2(ranks, pooling):
    def built(simulated):
        config = Config(
            replace(MODEL, pooling=pooling),
            QATConfig(bits=32),
            OptimizerConfig("sgd", 0.1, table_l2=0.1, mlp_l2=0.1),
            TrainingConfig(),
            ExchangeConfig(simulate_ranks=simulated, **PLAIN),
        )
        model = DLRM(0, TABLES, multi=MULTI, config=config.model, qat=config.quantization)
        return TrainStep(model.train(), config)

    one, many = built(0), built(ranks)
    run(one, dense=0)
    run(many, dense=0)
    assert_same(one, many, (1e-4, 1e-5))


def test_simulating_one_rank_is_one_rank():
    one, same = make(0, bits=4), make(1, bits=4)
    assert isinstance(same.exchange, LocalExchange)
    run(one)
    run(same)
    assert_same(one, same)


@RANKS
@pytest.mark.parametrize("refresh", ["periodic", "running_max"])
@pytest.mark.parametrize("rows", [None, 2])
def test_the_clock_of_int4_scales_ticks_once_per_step(ranks, refresh, rows):
    """Whether a step refreshes a scale decides its result; ranks without samples count no less and no more."""
    one, many = make(0, 4, qat=PERIODS[refresh]), make(ranks, 4, qat=PERIODS[refresh], **PLAIN)
    for first in range(8):
        run(one, steps=1, first=first, rows=rows)
        run(many, steps=1, first=first, rows=rows)
        clocks = [
            {n: t for n, t in step.model.state_dict().items() if n.endswith("scale_ticks")} for step in (one, many)
        ]
        assert len(clocks[0]) >= 1
        for name in clocks[0]:
            assert torch.equal(clocks[0][name], clocks[1][name]), (first, name)
    # The clocks agree, and so do the scales, as far as a code that flips lets them.
    torch.testing.assert_close(one.model.tables.scale, many.model.tables.scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("refresh", ["periodic", "running_max"])
def test_int4_with_rate_0_has_the_scales_and_loss_of_one_rank(refresh):
    """Weights stand still, so nothing flips: every rank must see the same scales that one rank sees."""
    one, many = (make(n, 4, qat=PERIODS[refresh], **PLAIN) for n in (0, 4))
    torch.testing.assert_close(run(one, 0.0), run(many, 0.0), rtol=1e-5, atol=1e-6)
    assert_same(one, many)


# ---- codecs: within what their rounding allows


def by_hand(step, batch, ranks):
    """Each rank's gradient by plain autograd: [{name: gradient}], tables dense; they sum to the batch's mean's."""
    found = []
    for rank in range(ranks):
        model = copy.deepcopy(step.model)
        share = batch.share(rank, ranks)
        logits = model(share.dense, share.ids, share.bags)
        (F.binary_cross_entropy_with_logits(logits, share.labels, reduction="sum") / len(batch)).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        found[-1]["tables.weight"] = found[-1]["tables.weight"].to_dense()
    return found


def gradients(step, batch, number):
    """What the exchange gives, before any update: {name: gradient}, tables dense."""
    given = []
    step.update = lambda _, of_tables=None: given.append(of_tables)  # type: ignore[method-assign]
    step(batch, 0.0, len(batch), number)
    ((rows, values),) = given
    assert (rows.dtype, values.dtype) == (torch.int64, torch.float32)
    assert len(rows.unique()) == len(rows)
    found = {name: p.grad.clone() for name, p in step.model.named_parameters() if name != "tables.weight"}
    found["tables.weight"] = torch.zeros_like(step.model.tables.weight.detach()).index_copy_(0, rows, values)
    return found


def blocks(name, tensor):
    """What shares a scale: rows of a table, output channels of a weight, a whole bias."""
    if name == "tables.weight":
        return tensor.split(TABLES)
    return tensor.unbind(0) if tensor.dim() > 1 else [tensor]


def bounds(name, parts, codec, twice, carried=False):
    """For each block, how far the sum of `parts` (a gradient per rank) may be off: half a step of each scale.

    Args:
        twice: the sum is encoded once more, by its owner.
        carried: what was lost before may be in it: up to half a step more, which makes the scale larger.
    """
    found = []
    for each in zip(*(blocks(name, part) for part in parts)):
        tops = [float(part.abs().max()) if part.numel() else 0.0 for part in each]
        if codec == "bf16":  # 7 stored bits: neighbours are 2**-7 of the value apart
            half = 2.0**-8
            lost = [half * top for top in tops]
        else:
            n = {"int8": 127, "int4": 7}[codec]
            half = 0.5 / (n - 0.5 * carried)
            lost = [half * max(top, 1e-8) for top in tops]
        total = sum(top + loss for top, loss in zip(tops, lost))
        found.append((sum(lost) + twice * half * max(total, 1e-8)) * 1.001 + 1e-7)
    return found


@RANKS
@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("table_exchange", ["all_gather", "all_to_all"])
def test_a_coded_gradient_is_within_half_a_step_of_each_scale(ranks, codec, table_exchange):
    """To nearest, a value moves by at most half of scale = max/n (n = 127 or 7): at each rank, and at the owner."""
    for number in range(4):  # 16, 13, 22 and 3 samples
        step = make(ranks, table_codec=codec, mlp_codec=codec, table_exchange=table_exchange)
        batch, moved = batch_of(number), False
        parts = by_hand(step, batch, ranks)
        for name, given in gradients(step, batch, number).items():
            twice = name != "tables.weight" or table_exchange == "all_to_all"
            each = [part[name] for part in parts]
            for got, true, bound in zip(blocks(name, given), blocks(name, sum(each)), bounds(name, each, codec, twice)):
                assert (got - true).abs().max() <= bound, name
                moved |= not torch.equal(got, true)
        assert moved


@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_error_compensation_keeps_the_sum_of_many_steps_within_one_steps_rounding(ranks, codec):
    """sum(sent) = sum(true) + what is still kept: with the same gradient 20 times, the error of 1 time.

    Without compensation the same rounding errors add up, 20 times.
    """
    totals = {}
    for compensated in (True, False):
        step = make(ranks, mlp_codec=codec, mlp_compensation=compensated, **{"table_codec": "fp32"})
        batch = batch_of(2)
        parts = by_hand(step, batch, ranks)
        sums = None
        for number in range(STEPS):
            given = gradients(step, batch, number)
            sums = {name: value + (sums[name] if sums else 0) for name, value in given.items()}
        totals[compensated] = 0.0
        for name in sums.keys() - {"tables.weight"}:
            each = [part[name] for part in parts]
            limits = bounds(name, each, codec, True, carried=True)
            for got, true, bound in zip(blocks(name, sums[name]), blocks(name, sum(each)), limits):
                error = float((got - STEPS * true).abs().max())
                totals[compensated] = max(totals[compensated], error)
                if compensated:
                    assert error <= bound + 1e-5 * float(true.abs().max()) * STEPS, name
    assert totals[False] > 4 * totals[True]


@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_training_with_codecs_stays_close(codec, rounding):
    """After 20 steps the weights have moved as without codecs, to a tenth of the way (int4: half).

    A code is off by half a step of 1/127 (int8) or 1/7 (int4) of the largest of its block, or by 2**-8 of itself
    (bf16); stochastic rounding by up to twice that. Most values of a block are well below its largest.
    """
    start, one, many = make(0), make(0), make(4, table_codec=codec, mlp_codec=codec, codec_rounding=rounding)
    run(one)
    run(many)
    for (name, w0), (_, w1), (_, w4) in zip(*(step.model.named_parameters() for step in (start, one, many))):
        away, moved = (w4 - w1).norm(), (w1 - w0).norm()
        assert 0 < away < {"int8": 0.1, "int4": 0.5, "bf16": 0.1}[codec] * moved, name


# ---- the same bits each time, up to 64 ranks, shared scales, refusals


ALL = {"table_codec": "int4", "mlp_codec": "int4", "mlp_codec_scale": "bucket:10", "codec_rounding": "stochastic",
       "table_exchange": "all_to_all"}  # fmt: skip


@pytest.mark.parametrize("exchange", [{}, ALL, {"shared_scales": True}], ids=["default", "all", "shared"])
def test_the_same_bits_each_time(exchange):
    def trained(seed=0):
        step = make(3, 4, "rowwise_adagrad", seed=seed, **exchange)
        return step, run(step)

    (one, losses), (two, again) = trained(), trained()
    assert torch.equal(losses, again)
    assert_same(one, two)
    a, b = one.exchange.state(), two.exchange.state()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_seed_rounds_otherwise():
    one, two = (gradients(make(2, codec_rounding="stochastic"), batch_of(0), number) for number in (0, 1))
    assert not all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("ranks", "steps"), [(8, 20), (16, 12), (64, 4)])
def test_up_to_64_ranks(ranks, steps):
    """With exact codecs what one rank gives, most ranks without samples in the small batches; with int8 it runs."""
    one, many = make(0), make(ranks, **PLAIN)
    run(one, steps=steps)
    run(many, steps=steps)
    assert_same(one, many, (1e-4, 1e-5))
    coded = make(ranks, 4)
    losses = run(coded, steps=3)
    assert torch.isfinite(losses).all()
    report = coded.exchange.report()
    assert (report["ranks"], report["sent_bytes"], report["waited_ms"]) == (ranks, 0, 0)
    assert report["payload_bytes"] == pytest.approx(sum(report["payload_parts"].values()), abs=0.3)
    assert report["payload_parts"].keys() == {"ids", "table_scales", "table_values", "mlp_scales", "mlp_values"}


@pytest.mark.parametrize("shared", [False, True])
def test_shared_scales_put_all_ranks_on_one_grid(shared):
    """Each table's summed gradient is then a whole number of steps of the largest scale, which it else is not."""
    step = make(4, shared_scales=shared, table_exchange="all_gather")
    batch, on_grid = batch_of(0), True
    parts = by_hand(step, batch, 4)
    given = gradients(step, batch, 0)
    for table, got in enumerate(given["tables.weight"].split(TABLES)):
        tops = [part["tables.weight"].split(TABLES)[table].abs().max() for part in parts]
        steps = got / (max(tops) / 127)
        on_grid &= bool((steps - steps.round()).abs().max() < 2e-3)
    assert on_grid == shared
    for name in given:  # no scale is larger than the largest: half a step of that one, per rank
        limits = zip(*([blocks(name, part[name]) for part in parts]))
        for got, each in zip(blocks(name, given[name]), limits):
            top = max(float(part.abs().max()) for part in each)
            bound = 4 * 0.5 * top / 127 + (name != "tables.weight") * 0.5 * 4 * top / 127
            assert (got - sum(each)).abs().max() <= 1.01 * bound + 1e-7, name


BAD_BUCKETS = ["", "bucket", "bucket:", "bucket:0", "bucket:-1", "bucket:x", "bucket:1.5", "bucket:³", "bucket: 5",
               "Bucket:5", "bucket:5:5", "bucket:2147483648", "row", "table"]  # fmt: skip


@pytest.mark.parametrize("text", BAD_BUCKETS)
def test_bad_buckets_are_refused(text):
    with pytest.raises(ValueError, match=r"mlp_codec_scale is .*expected 'channel' or 'bucket:K'"):
        ExchangeConfig(mlp_codec_scale=text)


def test_what_cannot_be_simulated_is_refused(generated, tmp_path):
    with pytest.raises(ValueError, match=r"simulate_ranks is 65.*batch_size"):
        Config(training=TrainingConfig(batch_size=64), exchange=ExchangeConfig(simulate_ranks=65))
    Config(training=TrainingConfig(batch_size=64), exchange=ExchangeConfig(simulate_ranks=64))
    for codec in ("int8", "int4"):
        with pytest.raises(ValueError, match="shared_scales is true but table_codec_scale is 'row'"):
            ExchangeConfig(shared_scales=True, table_codec_scale="row", table_codec=codec)
    for fields in ({"simulate_ranks": -1}, {"simulate_ranks": 10**6}, {"table_codec": "int2"}, {"mlp_codec": "fp16"},
                   {"exchange_timeout": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(fields))):
            ExchangeConfig(**fields)
    config = tiny()
    qat = replace(config.quantization, activation_bits=8)
    config = replace(config, quantization=qat, exchange=ExchangeConfig(simulate_ranks=2))
    with pytest.raises(UserError, match="activation_bits is 8"):
        train(generated, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_a_run_of_before_residuals_of_rows_were_dropped_goes_on_without(generated, tmp_path):
    config = replace(tiny(checkpoint_every=5, max_steps=20), exchange=ExchangeConfig(simulate_ranks=2))
    with pytest.raises(Killed):
        train(generated, tmp_path / "run", config, progress=killer(8))
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    info = json.loads((tmp_path / "old" / "run.json").read_text())
    info["config"]["exchange"]["table_compensation_rows"] = 50
    (tmp_path / "old" / "run.json").write_text(json.dumps(info))
    (checkpoint,) = (tmp_path / "old" / "checkpoints").iterdir()
    kept = {"row_residual_rows": torch.zeros(2, 50, dtype=torch.int64), "row_residual_values": torch.ones(2, 50, 4)}
    file = checkpoint / "exchange.safetensors"
    save_file(load_file(file) | kept, file)
    said = []
    resume(tmp_path / "run")
    resume(tmp_path / "old", log=said.append, verify=False)
    assert f"{tmp_path / 'old'}: table_compensation_rows was 50; it is no longer supported and dropped" in said
    same_tensors(tmp_path / "run", tmp_path / "old")
    with pytest.raises(UserError, match="unknown field 'table_compensation_rows'"):
        Config.from_dict({"exchange": {"table_compensation_rows": 50}})
