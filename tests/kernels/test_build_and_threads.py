"""All compiled kernels: bad input never crashes, tracing works, any number of threads gives the same bits."""

import os
import subprocess
import sys

import torch

from dqrm import kernels
from dqrm.quant.linear import quantized_weight
from dqrm.quant.rows import add_rows, add_rows_stochastic, sum_duplicates
from dqrm.quant.uniform import scale_from_max
from kernel_helpers import NATIVE, collection, random_rows, threads


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@NATIVE
def test_what_the_kernels_cannot_take_is_refused_and_never_crashes():
    """As plain torch refuses it; in a process of its own, since a wrong write ends it."""
    code = """
import torch
from dqrm.quant.embedding import QuantEmbeddingBagCollection
from dqrm.quant.rows import add_rows
collection = QuantEmbeddingBagCollection([6], 3, bits=32)
calls = {
    "bf16 values": lambda: add_rows(torch.zeros(4, 2), torch.tensor([0, 1]), torch.ones(2, 2, dtype=torch.bfloat16)),
    "other width": lambda: add_rows(torch.zeros(4, 99999), torch.zeros(9, dtype=torch.int64), torch.ones(9, 1)),
    "row outside": lambda: add_rows(torch.zeros(4, 2), torch.tensor([0, 1 << 40]), torch.ones(2, 2)),
    "other device": lambda: collection(torch.zeros(4, 1, dtype=torch.int64, device="meta")),
}
narrow = add_rows(torch.zeros(50, 4), torch.arange(9, 49, dtype=torch.int32), torch.ones(40, 4))
assert narrow[9:49].eq(1).all() and narrow.sum() == 160
for name, call in calls.items():
    try:
        call()
        print("taken:", name, flush=True)
    except Exception:
        print("refused:", name, flush=True)
"""
    status, out, _ = run_python(code)
    assert "taken" not in out, out
    assert status == 0, out


@NATIVE
def test_a_traced_model_computes_and_does_not_replay_memory():
    """torch.jit.trace (torch's older ONNX exporter uses it) cannot see into a kernel."""
    code = """
import torch
from dqrm.config import ModelConfig
from dqrm.models.dlrm import DLRM
model = DLRM(3, [7, 9], config=ModelConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1))).eval()
model(torch.randn(5, 3), torch.randint(7, (5, 2)))
traced = torch.jit.trace(model, (torch.randn(5, 3), torch.randint(7, (5, 2))), check_trace=False)
dense, ids = torch.randn(5, 3), torch.randint(7, (5, 2))
torch.testing.assert_close(traced(dense, ids), model(dense, ids))
"""
    status, _, error = run_python(code)
    assert status == 0, error[-500:]


# ---- threads


def everything(seed=0):
    """One call of each kernel on more than they ask for before they use threads; all that comes out."""
    rows = torch.randint(3000, (2000,), generator=torch.Generator().manual_seed(seed))
    values, table = random_rows(2000, 17, seed), random_rows(3000, 17, seed + 1)
    out = [*sum_duplicates(rows, values), add_rows(table.clone(), rows, values, -0.3)]
    unique = rows.unique()
    out.append(add_rows_stochastic(table.bfloat16(), unique, values[: len(unique)], 0.1, 7))
    maxima = torch.full((5,), 1e-3)
    ranges = kernels.TableRanges(torch.tensor([0, 1, 700, 701, 2500]), maxima, 7)
    kernels.raise_scales(rows, table, ranges)
    out.append(maxima.clone())
    kernels.add_rows(table.clone(), rows, values, -0.3, ranges)
    out.append(maxima.clone())
    kernels.add_rows_stochastic(table.bfloat16(), unique, values[: len(unique)], 0.5, 7, ranges)
    blocks, dirty = torch.zeros(188), torch.ones(188, dtype=torch.uint8)
    out += [maxima, torch.tensor(kernels.blocks_max(table, 16, dirty, blocks)), blocks]
    for per_channel in (True, False):
        out += quantized_weight(table, 4, per_channel, True)
    y = table.bfloat16()
    scale = scale_from_max(table.abs().amax(0), 4)
    kernels.finish_linear(y, scale, scale, True)
    wide, mask = random_rows(101, 333, seed), random_rows(101, 333, seed + 3)
    out += [y, *kernels.start_linear(wide, mask.relu(), random_rows(333, 1)[:, 0])]
    vectors, dense = values[:1989].reshape(153, 13, 17), random_rows(153, 17, seed + 2)
    crossed = kernels.interact(dense, vectors, True, 17 + 105)
    out += [crossed, *kernels.interact_backward(crossed, dense, vectors, True)]
    module = collection((1000, 3000), 17)
    ids = torch.stack([rows % 1000, rows], 1)
    found = module(ids)
    found.sum().backward()
    return [*out, found.detach(), module.weight.grad.coalesce().values()]


@NATIVE
def test_any_number_of_threads_gives_the_same_bits():
    with threads(1):
        expected = everything()
    for count in (1, 2, 3, 2):
        with threads(count):
            for number, (one, two) in enumerate(zip(expected, everything(), strict=True)):
                assert torch.equal(one, two), f"output {number} with {count} threads"
