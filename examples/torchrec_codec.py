"""INT4 QAT in a TorchRec model of your own: tables sharded over two ranks, INT4 rows and INT8 gradients on the wire.

    python examples/torchrec_codec.py

The five lines are in `train`: a sharder of dqrm's in place of TorchRec's. The rest is a TorchRec model as ever.
`pip install 'dqrm[torchrec]' && pip install --no-deps torchrec` first; docs/guides/sharded.md says why in two steps.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

ROWS, DIM, BATCH, STEPS, RANKS = 1000, 16, 256, 60, 2


class Model(nn.Module):
    """The logit of a click: the dot product of a user and an ad."""

    def __init__(self) -> None:
        from torchrec import EmbeddingCollection, EmbeddingConfig

        super().__init__()
        self.tables = EmbeddingCollection(
            tables=[
                EmbeddingConfig(name=name, embedding_dim=DIM, num_embeddings=ROWS, feature_names=[name])
                for name in ("user", "ad")
            ]
        )

    def forward(self, features):
        vectors = self.tables(features)
        return (vectors["user"].values() * vectors["ad"].values()).sum(1) * ROWS**0.5


def train(rank: int, folder: str) -> None:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import KeyedJaggedTensor
    from torchrec.distributed.model_parallel import DistributedModelParallel

    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    torch.manual_seed(rank)

    from dqrm.torchrec import EmbeddingCollectionSharder

    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.02}
    sharder = EmbeddingCollectionSharder("int4", "int8", fused_params=fused)
    model = DistributedModelParallel(Model(), device=torch.device("cpu"), sharders=[sharder])

    losses = []
    for _ in range(STEPS):
        user, ad = torch.randint(ROWS, (2, BATCH))
        clicked = ((user + ad) % 2 == 0).float()
        ids = KeyedJaggedTensor(["user", "ad"], torch.cat([user, ad]), lengths=torch.ones(2 * BATCH, dtype=torch.int32))
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids), clicked)
        loss.backward()
        losses.append(loss.item())
    if rank == 0:
        Path(folder, "losses").write_text(f"{losses[0]} {sum(losses[-5:]) / 5}")
    dist.destroy_process_group()


def main() -> tuple[float, float]:
    """Loss of the first step, and mean loss of the last five."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (folder,), nprocs=RANKS)
        before, after = map(float, Path(folder, "losses").read_text().split())
    print(f"loss {before:.4f} -> {after:.4f}")
    return before, after


if __name__ == "__main__":
    main()
