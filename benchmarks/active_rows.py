"""Does a quantized step cost what its rows cost, whatever the size of the table?

    python benchmarks/active_rows.py

One INT4 table: forward, backward and SGD update of the rows that a batch looks up, between two refreshes of the scale,
for tables of 1e4 to 1e7 rows. The sizes alternate in one process. Prints JSON: median, 10th and 90th percentile in
milliseconds. Rows far apart cost more than rows in the cache, so `near` looks up the first 10,000 rows of every table,
and `spread` rows all over it, as an unquantized nn.EmbeddingBag of the same size does for comparison.
"""

import argparse
import json
import platform
import time

import torch
from torch import nn

from dqrm.quant.embedding import QuantEmbeddingBag
from dqrm.training.optimizers import SparseSGD


def step(table: nn.EmbeddingBag, optimizer: SparseSGD, ids: torch.Tensor) -> None:
    """One training step on one table."""
    optimizer.zero_grad(set_to_none=True)
    table(ids).sum().backward()
    optimizer.step()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7], help="Table sizes.")
    parser.add_argument("--lookups", type=int, default=2048, help="Rows looked up per step.")
    parser.add_argument("--dim", type=int, default=16, help="Embedding dim.")
    parser.add_argument("--repeats", type=int, default=200, help="Steps of each variant.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random = torch.Generator().manual_seed(0)
    cases = {}
    for rows in options.rows:
        quant = QuantEmbeddingBag(rows, options.dim, mode="sum", sparse=True, bits=4, scale_period=10**9)
        plain = nn.EmbeddingBag(rows, options.dim, mode="sum", sparse=True)
        for name, table, reach in (
            ("int4 near", quant, 10**4),
            ("int4 spread", quant, rows),
            ("fp32 spread", plain, rows),
        ):
            ids = torch.randint(0, reach, (options.repeats + 5, options.lookups, 1), generator=random)
            cases[f"{name}, {rows} rows"] = (table, SparseSGD(table.parameters(), 0.1), ids)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(options.repeats + 5):
        for name, (table, optimizer, ids) in cases.items():
            started = time.perf_counter()
            step(table, optimizer, ids[number])
            if number >= 5:  # the first steps compute the scale and warm up
                times[name].append(1e3 * (time.perf_counter() - started))
    variants = []
    for name, taken in times.items():
        taken.sort()
        low, middle, high = (round(taken[int(share * (len(taken) - 1))], 4) for share in (0.1, 0.5, 0.9))
        variants.append(
            {"name": name, "median_ms": middle, "p10_ms": low, "p90_ms": high, "per_second": round(1e3 / middle)}
        )
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
    }
    print(json.dumps({"variants": variants, "machine": machine}, indent=1))


if __name__ == "__main__":
    main()
