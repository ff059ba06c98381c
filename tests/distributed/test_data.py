"""What each rank reads: of every batch a share, in evaluation whole batches; and the payload that follows from it."""

from dataclasses import replace
from itertools import zip_longest

import numpy as np
import pytest
import torch

from conftest import tiny
from dqrm.config import ExchangeConfig, ModelConfig
from dqrm.data import batches
from dqrm.data.batches import Batch
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.distributed.codecs import Codec
from dqrm.distributed.dense import Bucket, MLPLayout
from dqrm.distributed.world import World
from dqrm.models.dlrm import DLRM
from dqrm.training.evaluation import evaluate, evaluate_shared, predict_logits
from dqrm.training.launch import train
from dqrm.training.run import Run
from launch_helpers import lines

ROWS = 1003
SHUFFLES = pytest.mark.parametrize("shuffle", ["none", "block", "global"])
RANKS = pytest.mark.parametrize("ranks", [2, 3, 4, 7, 64])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Column n is the row's number; a row has as many tags as its number modulo 4; two multi-valued columns."""
    path = tmp_path_factory.mktemp("data")
    tags = ["|".join(f"t{k}" for k in range(n % 4)) for n in range(ROWS)]
    more = ["|".join(f"u{n % 5 + k}" for k in range((n // 7) % 3)) for n in range(ROWS)]
    rows = [f"{n % 2},{n},c{n},d{n % 9},{tags[n]},{more[n]}\n" for n in range(ROWS)]
    (path / "log.csv").write_text("label,n,c,d,tags,more\n" + "".join(rows))
    config = PrepareConfig(
        dense=("n",), categorical=("c", "d", "tags", "more"), multi=("tags", "more"), dense_transform="none",
        split="time", validation_fraction=0, test_fraction=0,
    )  # fmt: skip
    return prepare([path / "log.csv"], path / "out", config)


def together(shares):
    """The rows of all shares, in their order, as one batch."""
    bags = []
    for column in zip(*(share.bags for share in shares)):
        before = np.cumsum([0, *(len(values) for values, _ in column)])
        offsets = [offsets + int(at) for (_, offsets), at in zip(column, before)]
        bags.append((torch.cat([values for values, _ in column]), torch.cat(offsets)))
    dense, ids, labels = (torch.cat([getattr(share, name) for share in shares]) for name in ("dense", "ids", "labels"))
    return Batch(dense, ids, tuple(bags), labels)


def assert_equal(one, two):
    """The same rows, bit for bit, in the same dtypes and shapes."""
    a, b = ([x.dense, x.ids, x.labels, *(t for pair in x.bags for t in pair)] for x in (one, two))
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x, y)


def assert_shares(split, ranks, size, **how):
    """All ranks' shares of each batch, put together, are the batch; each is its `Batch.share`; sizes as documented."""
    whole = split.batches(size, **how)
    parts = [split.batches(size, share=(rank, ranks), **how) for rank in range(ranks)]
    count = 0
    for batch, *shares in zip_longest(whole, *parts):  # None where one of them has fewer batches
        rows = len(batch)
        assert [len(s) for s in shares] == [rows * (r + 1) // ranks - rows * r // ranks for r in range(ranks)]
        assert_equal(together(shares), batch)
        for rank, share in enumerate(shares):
            assert_equal(share, batch.share(rank, ranks))
        count += 1
    return count


@SHUFFLES
@RANKS
@pytest.mark.parametrize("size", [1, 5, 64, 128, 1000, 4000])
def test_the_shares_of_a_batch_are_the_batch(dataset, monkeypatch, shuffle, ranks, size):
    """1003 rows: the last batch is short, with 64 and 128 and most ranks not divisible, with 1000 of 3 rows."""
    monkeypatch.setattr(batches, "_GATHER_ROWS", 256)  # several pieces
    split = dataset.split("train")
    start = max(0, split.num_batches(size) - 40)  # a thousand batches of one row say no more than the last ones
    how = {"shuffle": shuffle, "seed": 3, "epoch": 1, "block_rows": 16, "start_batch": start}
    assert assert_shares(split, ranks, size, **how) == split.num_batches(size) - start


@SHUFFLES
@pytest.mark.parametrize("ranks", [2, 4])
def test_pieces_of_their_real_size(dataset, shuffle, ranks):
    assert assert_shares(dataset.split("train"), ranks, 100, shuffle=shuffle, block_rows=64) == 11


@SHUFFLES
@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("drop_last", [False, True])
def test_starting_later_and_without_the_last(dataset, monkeypatch, shuffle, ranks, drop_last):
    monkeypatch.setattr(batches, "_GATHER_ROWS", 100)
    split = dataset.split("train")
    total = split.num_batches(30, drop_last=drop_last)
    assert total == 33 + (not drop_last)
    for start in (0, 1, 3, 20, 32, 33, 34, 500):
        how = {"shuffle": shuffle, "seed": 1, "epoch": 2, "block_rows": 3, "drop_last": drop_last}
        assert assert_shares(split, ranks, 30, start_batch=start, **how) == max(0, total - start)
        for rank in range(ranks):
            own = split.batches(30, share=(rank, ranks), **how)
            tail = split.batches(30, share=(rank, ranks), start_batch=start, **how)
            for late, early in zip_longest(tail, list(own)[start:]):
                assert_equal(late, early)


@SHUFFLES
def test_an_epoch_is_shared_without_overlap_or_loss(dataset, shuffle):
    """Over all ranks and batches each row comes once, and over two epochs in another order where rows are shuffled."""
    split, orders = dataset.split("train"), []
    for epoch in (0, 1):
        seen = [
            int(n)
            for rank in range(4)
            for batch in split.batches(64, shuffle=shuffle, epoch=epoch, share=(rank, 4), block_rows=8)
            for n in batch.dense[:, 0]
        ]
        assert sorted(seen) == list(range(ROWS))
        orders.append(seen)
    assert (orders[0] == orders[1]) == (shuffle == "none")


def test_one_rank_gets_everything(dataset):
    split = dataset.split("train")
    for batch, own in zip_longest(split.batches(64), split.batches(64, share=(0, 1))):
        assert_equal(batch, own)
        assert_equal(batch.share(0, 1), batch)


def test_more_ranks_than_rows_and_an_empty_split(dataset):
    batch = next(dataset.split("train").batches(3))
    shares = [batch.share(rank, 5) for rank in range(5)]
    assert [len(share) for share in shares] == [0, 1, 0, 1, 1]
    assert_equal(together(shares), batch)
    empty = shares[0]
    assert (empty.dense.shape, empty.ids.shape, empty.labels.shape) == ((0, 1), (0, 2), (0,))
    assert [(len(values), len(offsets)) for values, offsets in empty.bags] == [(0, 0), (0, 0)]
    assert_equal(empty.share(1, 3), empty)
    for rank in (0, 1):
        assert list(dataset.split("test").batches(4, shuffle="global", share=(rank, 2))) == []


def test_shares_of_bags_by_hand():
    """Rows with 2, 0, 1, 0 and 3 ids; an empty row at a border belongs to one side and takes nothing along."""
    values, offsets = torch.tensor([5, 6, 7, 8, 9, 4], dtype=torch.int32), torch.tensor([0, 2, 2, 3, 3])
    numbers = torch.arange(5)
    batch = Batch(numbers[:, None].float(), numbers[:, None].int(), ((values, offsets),), numbers.float())

    def bags(ranks):
        shares = [batch.share(rank, ranks) for rank in range(ranks)]
        return [(s.labels.int().tolist(), s.bags[0][0].tolist(), s.bags[0][1].tolist()) for s in shares]

    assert bags(2) == [([0, 1], [5, 6], [0, 2]), ([2, 3, 4], [7, 8, 9, 4], [0, 1, 1])]
    assert bags(3) == [([0], [5, 6], [0]), ([1, 2], [7], [0, 0]), ([3, 4], [8, 9, 4], [0, 0])]
    assert bags(5) == [([0], [5, 6], [0]), ([1], [], [0]), ([2], [7], [0]), ([3], [], [0]), ([4], [8, 9, 4], [0])]


@pytest.mark.parametrize("size", [1, 7, 50, 142, 8192])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 64])
def test_evaluation_is_shared_by_whole_batches(generated, bags_data, size, ranks):
    """No logit depends on who computes it: the ranks' parts, one after the other, are what one rank computes."""
    for data, dense in ((generated, 13), (bags_data, 0)):
        multi = [column.multi for column in data.columns]
        config = ModelConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1))
        model = DLRM(dense, data.table_rows, multi=multi, config=config).train()
        whole = predict_logits(model, data, "validation", size)
        parts = [predict_logits(model, data, "validation", size, share=(rank, ranks)) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(parts), whole)
        assert len(whole) == data.rows["validation"] > 0
        batches_each = [-(-len(part) // size) for part in parts]
        assert max(batches_each) - min(batches_each) <= 1
        assert model.training


def test_a_world_of_one_evaluates_as_always(generated):
    config = ModelConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1))
    model = DLRM(13, generated.table_rows, config=config)
    assert evaluate_shared(model, generated, "test", 50, World())[0] == evaluate(model, generated, "test", 50)


# ---- payload: also for test_distributed_launch, which counts the bytes that are sent

PARTS = ["ids", "table_scales", "table_values", "mlp_scales", "mlp_values"]


def up_to_four(count):
    return -(-count // 4) * 4


def message(rows, table_rows, dim=4):
    """Bytes of the ids, scales and values of a message of rows (of the one weight of all tables) in int8."""
    if not len(rows):
        return np.array([4, 0, 0])
    starts = np.cumsum([0, *table_rows])
    counts = np.histogram(rows, starts)[0]
    assert counts.sum() == len(rows)
    widths = [next(width for width in (1, 2, 3, 4) if size <= 256**width) for size in table_rows]
    ids = 4 + 2 * len(table_rows) + int((counts * widths).sum())
    return np.array([up_to_four(ids), 4 * int((counts > 0).sum()), up_to_four(len(rows) * dim)])


def rows_of(data, rank, ranks, steps):
    """The rows that a rank looks up in each step, found in the dataset."""
    starts, found, epoch = np.cumsum([0, *data.table_rows])[:-1], [], 0
    while len(found) < steps:
        for share in data.split("train").batches(64, shuffle="global", epoch=epoch, share=(rank, ranks)):
            found.append(np.unique(share.ids.numpy() + starts))
        epoch += 1
    return found[:steps]


def expected(data, ranks, steps, owners_sum):
    """By the documented layout, per rank and step: bytes of (ids, scales, values), and of rows sent to others."""
    rows = [rows_of(data, rank, ranks, steps) for rank in range(ranks)]
    parts, sent = np.zeros((ranks, steps, 3)), np.zeros((ranks, steps))
    for step in range(steps):
        for rank in range(ranks):
            own = rows[rank][step]
            if owners_sum:
                each = [message(own[own % ranks == owner], data.table_rows) for owner in range(ranks)]
                parts[rank, step] = sum(each)
                summed = np.unique(np.concatenate([one[step][one[step] % ranks == rank] for one in rows]))
                sent[rank, step] = sum(one.sum() for owner, one in enumerate(each) if owner != rank)
                sent[rank, step] += (ranks - 1) * (message(summed, data.table_rows).sum() + 8)
            else:
                parts[rank, step] = message(own, data.table_rows)
                sent[rank, step] = (ranks - 1) * parts[rank, step].sum()
            sent[rank, step] += (ranks - 1) * 8  # of each message: its length, and flags
    return parts, sent


def dense_bytes(model, ranks):
    """Bytes of all scales and of all values of the MLP in int8, and what each rank sends to others: once its codes to
    the other owners, once the codes of its sums to all others."""
    shapes = [tensor.shape for name, tensor in model.named_parameters() if name != "tables.weight"]
    layout = MLPLayout(shapes)
    sizes = Bucket(layout, ranks, Codec("int8"), torch.device("cpu")).sizes
    blocks = sum(shape[0] if len(shape) > 1 else 1 for shape in shapes)
    values = sum(shape.numel() for shape in shapes)
    assert 4 * blocks + values <= sum(sizes) < 4 * blocks + values + 4 * ranks
    return 4 * blocks, values, [sum(sizes) - sizes[rank] + (ranks - 1) * sizes[rank] for rank in range(ranks)]


@pytest.mark.parametrize(
    ("ranks", "table_exchange"), [(2, "all_gather"), (3, "all_gather"), (4, "all_to_all"), (16, "auto"), (64, "auto")]
)
def test_the_payload_of_simulated_ranks_follows_from_the_rows(generated, tmp_path, ranks, table_exchange):
    """Rank 0's messages, on average over the steps; nothing is sent and nobody waits."""
    exchange = ExchangeConfig(ranks, table_exchange=table_exchange)
    config = replace(tiny(max_steps=8, log_every=2), exchange=exchange)
    summary = train(generated, tmp_path / "run", config)
    parts, _ = expected(generated, ranks, 8, table_exchange == "all_to_all" or ranks == 64)
    scales, values, _ = dense_bytes(Run.open(tmp_path / "run").load_model("last")[0], ranks)
    reports = [(line["step"], line["exchange"]) for line in lines(tmp_path / "run", "train")]
    assert [step for step, _ in reports] == [2, 4, 6, 8]
    for step, report in [*reports, (8, summary["exchange"])]:
        figures = [*parts[0, :step].mean(0), scales, values]
        assert list(report) == ["ranks", "payload_bytes", "payload_parts", "sent_bytes", "waited_ms"]
        assert list(report["payload_parts"]) == PARTS
        assert list(report["payload_parts"].values()) == pytest.approx(figures, abs=0.051)
        assert report["payload_bytes"] == pytest.approx(sum(figures), abs=0.051)
        assert (report["ranks"], report["sent_bytes"], report["waited_ms"]) == (ranks, 0, 0)
