"""One of the ranks of the tests of sharded tables: `rank_program.py FOLDER [CASE...]`, started by hand.

Trains the same small model with several plans and codecs, or only those named, and leaves what it found in
FOLDER/rank<N>.json and the gathered tables in FOLDER/<case>.safetensors. `problem` is shared with the test, which
trains it on one process.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, DIM, BATCH, STEPS, RATE = (60, 31, 7), 8, 16, 30, 2.0
RANKS = int(os.environ.get("WORLD_SIZE", "2"))
CASES = {
    "row_wise": ("row_wise", {"forward": "int4", "backward": "int8", "stochastic": False}),
    "table_wise": ("table_wise", {"forward": "int4", "backward": "int8", "stochastic": False}),
    "forward_only": ("row_wise", {"forward": "int4", "backward": None}),
    "stochastic": ("row_wise", {"forward": "int4", "backward": "int8", "stochastic": True}),
    "int2_fp16": ("row_wise", {"forward": "int2", "backward": None, "scale": "fp16"}),
    "fp32": ("row_wise", {"forward": None, "backward": None}),
}


def problem(ranks: int = RANKS) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Tables, ids int64 [STEPS, ranks * BATCH, tables], labels, and the weights of the logit."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(rows, DIM, generator=generator) * 0.5 for rows in ROWS]
    ids = torch.stack([torch.randint(rows, (STEPS, ranks * BATCH), generator=generator) for rows in ROWS], 2)
    labels = (torch.rand(STEPS, ranks * BATCH, generator=generator) < 0.4).float()
    return tables, ids, labels, torch.randn(DIM, generator=generator)


def loss_of(vectors: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean over the samples; vectors float32 [B, tables, DIM]."""
    logits = (vectors[:, 0] * vectors[:, 1] * weights).sum(1) + (vectors[:, 2] * weights).sum(1)
    return F.binary_cross_entropy_with_logits(logits, labels)


def _collections(pooled: bool):
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

    kind, config = (EmbeddingBagCollection, EmbeddingBagConfig) if pooled else (EmbeddingCollection, EmbeddingConfig)
    return kind(
        tables=[
            config(name=f"t{t}", embedding_dim=DIM, num_embeddings=rows, feature_names=[f"f{t}"])
            for t, rows in enumerate(ROWS)
        ]
    )


def _features(ids: Tensor):
    from torchrec import KeyedJaggedTensor

    names = [f"f{t}" for t in range(ids.shape[1])]
    return KeyedJaggedTensor(names, ids.T.reshape(-1), lengths=torch.ones(ids.numel(), dtype=torch.int32))


def _sharded(collection, sharder, plan: str):
    import torch.distributed as dist
    from torchrec.distributed.shard import shard
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
    from torchrec.distributed.types import ShardingEnv

    names = [f"t{t}" for t in range(len(ROWS))]
    with torch.no_grad():
        for name, table in zip(names, problem()[0]):
            next(p for key, p in collection.named_parameters() if f".{name}." in key).copy_(table)
    how = {
        name: row_wise(compute_kernel="fused") if plan == "row_wise" else table_wise(t % RANKS, compute_kernel="fused")
        for t, name in enumerate(names)
    }
    made = construct_module_sharding_plan(collection, how, sharder, RANKS, RANKS, "cpu")
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    return shard(collection, made, env, torch.device("cpu"), sharder)


def _fused() -> dict:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    return {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": RATE}


def _train(folder: Path, case: str, rank: int) -> dict:
    import torch.distributed as dist
    from safetensors.torch import save_file

    from dqrm.torchrec import EmbeddingCollectionSharder, gather_tables

    plan, options = CASES[case]
    module = _sharded(_collections(False), EmbeddingCollectionSharder(**options, fused_params=_fused()), plan)
    _, ids, labels, weights = problem()
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    losses, sent = [], {"forward": 0, "backward": 0}
    for step in range(STEPS):
        with counted(sent, "forward"):
            found = module(_features(ids[step, mine]))
            vectors = torch.stack([found[f"f{t}"].values() for t in range(len(ROWS))], 1)
        loss = loss_of(vectors, labels[step, mine], weights)
        with counted(sent, "backward"):
            loss.backward()
        total = loss.detach() / RANKS
        dist.all_reduce(total)
        losses.append(float(total))
    with torch.no_grad():
        found = module.eval()(_features(ids[0, mine]))
        evaluated = torch.stack([found[f"f{t}"].values() for t in range(len(ROWS))], 1)
    tables = dict(gather_tables(module))
    if rank == 0:
        save_file({**tables, "evaluated": evaluated}, folder / f"{case}.safetensors")
    return {"losses": losses, "sent": sent, "names": list(tables), "kept": [t is not None for t in tables.values()]}


class counted:
    """Adds the bytes of the embeddings (ids are integers) that all-to-all takes from this rank."""

    def __init__(self, into: dict, key: str) -> None:
        self.into, self.key = into, key

    def __enter__(self) -> None:
        import torch.distributed as dist

        self.before = dist.all_to_all_single

        def counting(output, input, *arguments, **named):
            if input.dtype in (torch.float32, torch.uint8):
                self.into[self.key] += input.nbytes
            return self.before(output, input, *arguments, **named)

        dist.all_to_all_single = counting

    def __exit__(self, *_) -> None:
        import torch.distributed as dist

        dist.all_to_all_single = self.before


def _pooled(rank: int) -> float:
    """By how much pooled vectors of a table-wise `EmbeddingBagCollection` differ from rounded ones, on rank 0."""
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    from dqrm.torchrec import codec_registry, fake_quantize_rows, gather_tables

    sharder = EmbeddingBagCollectionSharder(fused_params=_fused(), qcomm_codecs_registry=codec_registry(DIM))
    module = _sharded(_collections(True), sharder, "table_wise")
    tables = dict(gather_tables(module))
    mine = problem()[1][0, rank * BATCH : (rank + 1) * BATCH]
    found = module(_features(mine)).to_dict()
    sum(each.sum() for each in found.values()).backward()
    wanted = {f"f{name[1:]}": fake_quantize_rows(table[mine[:, int(name[1:])]])
              for name, table in tables.items() if table is not None}  # fmt: skip
    return max((float((found[name] - each).abs().max()) for name, each in wanted.items()), default=0.0)


def _column_wise(rank: int) -> dict[str, float]:
    """By how much rows of a column-wise plan, with our codecs in TorchRec's own sharder, differ from what has a scale
    per row, and from what has one per half of a row."""
    import torch.distributed as dist
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.shard import shard
    from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan
    from torchrec.distributed.types import ShardingEnv

    from dqrm.torchrec import codec_registry, fake_quantize_rows

    sharder = EmbeddingCollectionSharder(_fused(), codec_registry(DIM // 2))
    collection, table = _collections(False), problem()[0][0]
    with torch.no_grad():
        next(collection.parameters()).copy_(table)
    how = {f"t{t}": column_wise(ranks=[0, 1], compute_kernel="fused") for t in range(len(ROWS))}
    made = construct_module_sharding_plan(collection, how, sharder, RANKS, RANKS, "cpu")
    module = shard(collection, made, ShardingEnv.from_process_group(dist.group.WORLD), torch.device("cpu"), sharder)
    mine = problem()[1][0, rank * BATCH : (rank + 1) * BATCH]
    found, rows = module(_features(mine))["f0"].values().detach(), table[mine[:, 0]]
    halves = torch.cat([fake_quantize_rows(half) for half in rows.chunk(2, 1)], 1)
    differ = {"halves": halves, "rows": fake_quantize_rows(rows)}
    return {name: float((found - each).abs().max()) for name, each in differ.items()}


def _refused(rank: int) -> list[str]:
    from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, data_parallel
    from torchrec.distributed.types import ShardingEnv

    from dqrm.errors import UserError
    from dqrm.torchrec import EmbeddingCollectionSharder

    collection, sharder = _collections(False), EmbeddingCollectionSharder()
    from torchrec.distributed.embedding import EmbeddingCollectionSharder as theirs

    said = []
    kinds = (data_parallel(), column_wise(ranks=[0, 1], compute_kernel="fused"))
    for kind, env in zip((*kinds, kinds[0]), (*[ShardingEnv(RANKS, rank)] * 2, ShardingEnv(1, 0))):
        made = {f"t{t}": kind for t in range(len(ROWS))}
        plan = construct_module_sharding_plan(collection, made, theirs(), RANKS, RANKS, "cpu")
        try:
            sharder.shard(collection, plan, env, torch.device("cpu"))
        except UserError as error:
            said.append(str(error))
    return said


def main(folder: Path, *cases: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict = {case: _train(folder, case, rank) for case in cases or CASES}
    if not cases:
        found |= {"pooled": _pooled(rank), "columns": _column_wise(rank), "refused": _refused(rank)}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
