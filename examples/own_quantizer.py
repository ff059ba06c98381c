"""A quantizer of your own, registered from outside the package: `python examples/own_quantizer.py`.

A learned scale: it is a parameter, and its gradient weighs rounding errors against clamped weights. It goes into the
register of quantizers; `QATConfig.quantizer` then names it, and tables, linear layers, `convert` and exports use it
like the built-in ones. (One of those is `lsq`, learned step size quantization, arXiv 1902.08153: the same idea with the
paper's first scale, its factor on the gradient, and scales that stay above 0.)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dqrm
from dqrm.quant.config import QUANTIZERS
from dqrm.quant.quantizer import Groups, WeightFakeQuantizer
from dqrm.quant.uniform import code_limits


class LearnedScale(WeightFakeQuantizer):
    """One learned scale per group of the weight: per table, or per output channel of a linear layer."""

    def __init__(self, qat: dqrm.QATConfig, bits: int, groups: Groups) -> None:
        super().__init__(qat, bits, groups)
        self.scale = nn.Parameter(torch.zeros(groups.count))  # set from the weight before it is first used

    def fake_quantize(self, values: Tensor, group: slice = slice(None)) -> Tensor:
        """The values of the codes; the gradient reaches values and scale."""
        scale = self.scale[group, None]
        clamped = (values / scale).clamp(*code_limits(self.bits))
        codes = clamped + (clamped.round() - clamped).detach()
        return codes * scale


QUANTIZERS["learned_scale"] = LearnedScale


def main() -> tuple[float, float]:
    """Train with a learned scale, pack, and return a scale before and after training."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.EmbeddingBag(200, 8, mode="sum", sparse=True), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)
    )
    dqrm.prepare_qat(model, dqrm.QATConfig(bits=4, quantizer="learned_scale"))
    ids = torch.randint(200, (256, 3))
    labels = (ids.sum(1) % 2).float()
    model(ids)  # the first forward sets the scales
    scale = model[0].weight_fake_quantizer.scale
    before = float(scale.detach())

    optimizers = [
        dqrm.SparseSGD([model[0].weight], lr=0.1),
        torch.optim.Adam([parameter for parameter in model.parameters() if parameter is not model[0].weight], lr=0.01),
    ]
    for _ in range(200):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(ids).squeeze(1), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    after = float(scale.detach())

    model.eval()
    trained = model(ids).detach()
    dqrm.convert(model)
    assert torch.equal(model(ids), trained), "the packed layers hold the codes of the learned scale"
    print(f"loss {float(loss.detach()):.3f}; the table's scale went from {before:.4f} to {after:.4f}")
    return before, after


if __name__ == "__main__":
    main()
