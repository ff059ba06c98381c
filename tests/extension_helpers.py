"""A log that drifts from day to day, and vocabularies of it that are kept in plain dicts."""

import random

import numpy as np

from dqrm import PrepareConfig

CONFIG = PrepareConfig(
    label="click", categorical=("user", "tags"), multi=("tags",), cross=("user*site",), dense=("price",), split="time",
    validation_fraction=0.2, test_fraction=0.1,
)  # fmt: skip


class Reference:
    """One column, day by day, key by key."""

    def __init__(self, min_count=1, decay=1.0, evict_after=None):
        self.min_count, self.decay, self.evict_after = min_count, decay, evict_after
        self.day, self.size = -1, 1
        self.row, self.count, self.last, self.since = {}, {}, {}, {}

    def next(self, keys):
        """The training rows' keys of one more day, in order."""
        self.day += 1
        for key in self.count:
            self.count[key] *= self.decay if self.decay != 1 else 1
        today = {}
        for key in keys:
            today[key] = today.get(key, 0) + 1
        for key, seen in today.items():
            self.count[key] = self.count.get(key, 0) + seen
            self.last[key] = self.day
        for key in list(self.count):
            if self.evict_after is not None and self.day - self.last[key] >= self.evict_after:
                for kept in (self.row, self.count, self.last, self.since):
                    kept.pop(key, None)
        free = sorted(set(range(1, self.size)) - set(self.row.values()))
        for key in today:
            if key not in self.row and self.count[key] >= self.min_count:
                if free:
                    self.row[key] = free.pop(0)
                else:
                    self.row[key] = self.size
                    self.size += 1
                self.since[key] = self.day

    def check(self, vocabulary, rare):
        def of(names):
            return {key: tuple(name[key] for name in names) for key in self.row}

        assert vocabulary.rows == self.size
        zeros = np.zeros(len(vocabulary.keys), int)
        since = zeros if vocabulary.since is None else vocabulary.since
        last = zeros if vocabulary.last is None else vocabulary.last
        columns = zip(vocabulary.keys, vocabulary.table_rows, vocabulary.counts, since, last)
        got = {key: (int(row), count, int(born), int(seen)) for key, row, count, born, seen in columns}
        assert got == of((self.row, self.count, self.since, self.last))
        assert {key: (count, last) for key, count, last in rare.rows()} == {
            key: (self.count[key], self.last[key]) for key in self.count if key not in self.row
        }


def log(day, rows=60, seed=0):
    """A day's log: a fifth of its users is new, others are of the days before."""
    draw = random.Random(100 * seed + day)
    users = [f"u{draw.randint(8 * day, 8 * day + 20)}" for _ in range(rows)]
    return [
        {
            "click": draw.randint(0, 1),
            "user": user if draw.random() < 0.95 else "",
            "site": f"s{draw.randint(0, 3)}",
            "tags": "|".join(f"t{draw.randint(day, day + 9)}" for _ in range(draw.randint(0, 3))),
            "price": draw.randint(-3, 90),
        }
        for user in users
    ]


def keys_of(row, name):
    if name == "tags":
        return [key for key in row["tags"].split("|") if key]
    if name == "user*site":
        return [f"{row['user']}\x1f{row['site']}" if row["user"] else ""]
    return [row[name]]


def ids_of(dataset, split):
    """Row by row, per column the list of ids."""
    return [row for batch in dataset.split(split).batches(7) for row in rows_in(batch)]


def rows_in(batch):
    """Those of a batch."""
    columns = [[[row] for row in ids] for ids in batch.ids.T.tolist()]
    for values, offsets in batch.bags:
        ends = [*offsets.tolist()[1:], len(values)]
        columns.append([values[start:end].tolist() for start, end in zip(offsets.tolist(), ends)])
    return [list(cells) for cells in zip(*columns)]
