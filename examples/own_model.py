"""INT4 training of a module of your own, in a plain torch loop: `python examples/own_model.py`.

The clicks are drawn from a known model, so the AUC printed at the end has a meaning: an untrained model has 0.5.
"""

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

import dqrm

USERS, ADS, BATCH, STEPS = 500, 100, 128, 1500


class Clicks(nn.Module):
    """Two embedding tables and an MLP on their product and sum."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.users = nn.EmbeddingBag(USERS, dim, mode="sum", sparse=True)
        self.ads = nn.EmbeddingBag(ADS, dim, mode="sum", sparse=True)
        self.top = nn.Sequential(nn.Linear(2 * dim, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B] of ids [B, 2]."""
        user, ad = self.users(ids[:, :1]), self.ads(ids[:, 1:])
        return self.top(torch.cat([user * ad, user + ad], dim=1)).squeeze(1)


def draw(samples: int, truth: tuple[Tensor, Tensor], random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids int64 [N, 2] and labels float32 [N] of a model with hidden user and ad vectors."""
    users, ads = truth
    ids = torch.stack(
        [torch.randint(USERS, (samples,), generator=random), torch.randint(ADS, (samples,), generator=random)], dim=1
    )
    logits = (users[ids[:, 0]] * ads[ids[:, 1]]).sum(1)
    return ids, torch.bernoulli(torch.sigmoid(2 * logits), generator=random)


def main() -> float:
    """Train, pack, and return the test AUC of the packed model."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    truth = torch.randn(USERS, 2, generator=random), torch.randn(ADS, 2, generator=random)

    model = Clicks()
    dqrm.prepare_qat(model, dqrm.QATConfig(bits=4))
    tables = [model.users.weight, model.ads.weight]  # sparse gradients want an optimizer that takes them
    optimizers = [dqrm.SparseAdagrad(tables, lr=0.1), torch.optim.Adagrad(model.top.parameters(), lr=0.02)]
    for _ in range(STEPS):
        ids, labels = draw(BATCH, truth, random)
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(ids), labels).backward()
        for optimizer in optimizers:
            optimizer.step()

    model.eval()
    ids, labels = draw(20_000, truth, random)
    with torch.no_grad():
        trained = model(ids)
        fp32_bytes = sum(4 * weight.numel() for weight in model.parameters())
        dqrm.convert(model)  # codes and scales in place of the weights
        packed = model(ids)
    assert torch.equal(trained, packed), "packing changes no bit"
    stored = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    auc = float(roc_auc_score(labels, packed))
    print(f"test AUC {auc:.4f}; {stored:,} bytes packed, {fp32_bytes:,} in FP32")
    return auc


if __name__ == "__main__":
    main()
