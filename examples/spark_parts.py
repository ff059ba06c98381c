"""Spark joins, filters and sorts a log into Parquet parts that `prepare` reads: `python examples/spark_parts.py`.

Impressions meet their clicks and the attributes of the ads; robots are dropped; parts are in order of time, a folder
per day. On a cluster the paths are on storage that all machines share, and `dqrm prepare PARTS` is the next job: it
refuses a folder in which a job has written but not committed (`_temporary` without `_SUCCESS`). Needs pyspark and Java.
"""

import tempfile
from pathlib import Path

import numpy as np
import polars as pl
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

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


def write_parts(spark: SparkSession, logs: Path, output: Path, most_rows: int = 200, parts: int = 4) -> None:
    """The parts: rows of users with more than `most_rows` impressions are left out."""
    impressions, clicks, ads = (
        spark.read.parquet(f"{logs}/{name}.parquet") for name in ("impressions", "clicks", "ads")
    )
    robots = impressions.groupBy("user").count().where(F.col("count") > most_rows)
    rows = (
        impressions.join(robots, "user", "left_anti")
        .join(clicks.distinct().withColumn("clicked", F.lit(1)), "id", "left")
        .join(F.broadcast(ads), "ad", "left")
        .fillna(0, ["clicked"])
    )
    # Range by range, so that the parts are in order of time by their names, as `--split time` needs them.
    in_order = rows.repartitionByRange(parts, "day", "time", "id").sortWithinPartitions("day", "time", "id")
    in_order.write.partitionBy("day").parquet(str(output))


def main(folder: Path) -> dqrm.Dataset:
    """The dataset of the generated logs, in a folder."""
    make_logs(folder)
    spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        write_parts(spark, folder, folder / "parts")
    finally:
        spark.stop()
    dataset = dqrm.prepare(folder / "parts", folder / "data", CONFIG)
    print(f"rows: {dataset.rows}, clicks: {dataset.info['clicks']}")
    return dataset


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
