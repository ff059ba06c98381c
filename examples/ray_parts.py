"""Ray Data joins, filters and sorts a log into Parquet parts that `prepare` reads: `python examples/ray_parts.py`.

Impressions meet their clicks and the attributes of the ads; robots are dropped; parts are in order of time, a folder
per day. Ray writes parts where they will stay and marks no folder as whole, so the folder gets its name when all of
them are there. On a cluster the paths are on storage that all machines share, and `dqrm prepare PARTS` is the next job.
"""

import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import ray
import ray.data

import dqrm

CONFIG = dqrm.PrepareConfig(
    label="clicked", categorical=("user", "ad", "site", "advertiser"), split="column", split_column="day",
    validation_values=("2026-01-03",), test_values=(">2026-01-03",), vocabulary="hash", rows=10_000,
)  # fmt: skip


def make_logs(folder: Path) -> None:
    """Small logs as services write them: impressions, clicks (sent twice at times), and a table of ads."""
    random = np.random.default_rng(0)
    rows = 4000
    users = np.where(random.random(rows) < 0.1, 7, random.integers(10, 300, rows))  # user 7 is a robot
    shown = {
        "id": np.arange(rows), "user": users, "ad": random.integers(0, 40, rows), "site": random.integers(0, 9, rows),
        "time": 1_767_225_600 + random.permutation(rows) * 86,
    }  # fmt: skip
    impressions = pl.DataFrame(shown).with_columns(pl.from_epoch("time").dt.date().cast(pl.String).alias("day"))
    clicks = np.flatnonzero(random.random(rows) < 0.2)
    for name, table in {
        "impressions": impressions,
        "clicks": pl.DataFrame({"id": np.concatenate([clicks, clicks[::5]])}),
        "ads": pl.DataFrame({"ad": np.arange(40), "advertiser": np.arange(40) // 6}),
    }.items():
        table.write_parquet(folder / f"{name}.parquet")


def write_parts(logs: Path, output: Path, most_rows: int = 200, parts: int = 4) -> None:
    """The parts: rows of users with more than `most_rows` impressions are left out."""
    # Blocks keep their order, and so the names of the parts that of time, as `--split time` needs it.
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.default_hash_shuffle_parallelism = parts  # of the groups; 200 by default, for large logs
    impressions, clicks = (ray.data.read_parquet(f"{logs}/{name}.parquet") for name in ("impressions", "clicks"))
    counted = impressions.groupby("user").count().filter(lambda row: row["count()"] > most_rows)
    robots = [row["user"] for row in counted.take_all()]
    small = ray.put((robots, pl.read_parquet(logs / "ads.parquet")))  # every worker gets all of it

    def known_ads(table: pa.Table) -> pa.Table:
        robots, ads = ray.get(small)
        return pl.from_arrow(table).filter(~pl.col("user").is_in(robots)).join(ads, on="ad", how="left").to_arrow()

    def labelled(table: pa.Table) -> pa.Table:
        clicked = pl.col("count()").is_not_null().cast(pl.Int64).alias("clicked")
        return pl.from_arrow(table).with_columns(clicked).drop("count()").to_arrow()

    rows = impressions.map_batches(known_ads, batch_format="pyarrow")
    rows = rows.join(clicks.groupby("id").count(), "left_outer", parts, on=("id",))
    rows = rows.map_batches(labelled, batch_format="pyarrow").sort(["day", "time", "id"])
    partial = output.with_name(output.name + ".partial")
    rows.write_parquet(str(partial), partition_cols=["day"])
    partial.rename(output)


def main(folder: Path) -> dqrm.Dataset:
    """The dataset of the generated logs, in a folder."""
    make_logs(folder)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        write_parts(folder, folder / "parts", parts=2)
    finally:
        ray.shutdown()
    dataset = dqrm.prepare(folder / "parts", folder / "data", CONFIG)
    print(f"rows: {dataset.rows}, clicks: {dataset.info['clicks']}")
    return dataset


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
