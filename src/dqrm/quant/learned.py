"""Learned quantizers: the step size of weights (LSQ), and the largest activation (PACT). Both are parameters.

LSQ (Esser et al., arXiv 1902.08153): with code limits -Q_N and Q_P, a weight v and the step size s of its group,

    value = round(clip(v / s, -Q_N, Q_P)) * s

    d value / d s = round(v / s) - v / s   where -Q_N < v / s < Q_P, else the limit that is met     (eq. 3)
    d value / d v = 1                      where -Q_N < v / s < Q_P, else 0                         (eq. 5)

s starts at 2 * mean|v| / sqrt(Q_P), and its gradient is multiplied by g = 1 / sqrt(N * Q_P), N weights of the group.

PACT (Choi et al., arXiv 1805.06085): an input x is clipped to the learned alpha, whose gradient is 1 where x >= alpha.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dqrm.quant.activations import ActivationFakeQuantizer
from dqrm.quant.config import QATConfig
from dqrm.quant.groups import Groups
from dqrm.quant.packing import pieces
from dqrm.quant.quantizer import WeightFakeQuantizer
from dqrm.quant.uniform import SMALLEST_MAXIMUM, check_floats, code_limits, fake_quantize, scale_from_max


def initial_step(mean: Tensor, bits: int) -> Tensor:
    """LSQ's step size of weights whose magnitudes have this mean: float32, same shape."""
    highest = code_limits(bits)[1]
    return (2 * mean.double() / highest**0.5).clamp(min=SMALLEST_MAXIMUM / highest).float()


def gradient_factor(weights: Tensor, bits: int) -> Tensor:
    """LSQ's factor on the gradient of a step size that `weights` weights share: float32, same shape."""
    return (weights.double().clamp(min=1) * code_limits(bits)[1]).rsqrt().float()


class _LearnedStep(torch.autograd.Function):
    """Values [..., groups, dim] on steps [groups] (or [1] for all), the gradients of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, factor: Tensor, limits: tuple[int, int]) -> Tensor:
        scale = step[:, None].clone()  # the next update changes the parameter in place
        ctx.save_for_backward(values, scale, factor)
        ctx.limits = limits
        return (values.float() / scale).round_().clamp_(*limits).mul_(scale).to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, scale, factor = ctx.saved_tensors
        low, high = ctx.limits
        x = values.float() / scale
        inside = (x > low) & (x < high)
        by_step = grads[0].float() * torch.where(inside, x.round() - x, x.clamp(low, high))
        total = by_step.sum().view(1) if len(scale) == 1 else by_step.view(-1, *by_step.shape[-2:]).sum((0, 2))
        return grads[0] * inside, total * factor, None, None


class _Positive:
    """Keeps a learned scale above 0: no update takes it below half of what the forward before it used.

    An optimizer's steps do not know that a scale has a sign; those of Adagrad and Adam are of the learning rate's size,
    whatever the scale's. Doing it twice changes nothing, so it does not matter who asks first: a forward, an
    evaluation, or a checkpoint.
    """

    def __init__(self, floor: float) -> None:
        self._floor = floor
        self._lowest: Tensor | None = None

    @torch.no_grad()
    def keep(self, scale: Tensor) -> None:
        """Raise `scale`, in place, where an update took it too far."""
        if self._lowest is not None:
            torch.maximum(scale, self._lowest, out=scale)

    def updated(self, scale: Tensor) -> None:
        """An optimizer has changed `scale`; what changes it from here on until the next forward is no update."""
        self.keep(scale)
        self.forget()

    @torch.no_grad()
    def used(self, scale: Tensor) -> None:
        """A forward that an update may follow uses `scale`."""
        self._lowest = (scale * 0.5).clamp_(min=self._floor)

    def forget(self) -> None:
        """The scale is another one now: loaded, moved or set."""
        self._lowest = None


class LearnedStep(WeightFakeQuantizer):
    """LSQ for tables and linear layers: `scale`, the step sizes, is a parameter [groups].

    For tables, N in the gradient's factor counts all weights of the table, not those of the rows in use: the paper
    balances the relative update of s against that of the whole weight, whose gradient is 0 in the other rows; the
    factor does not change with the batch; and the gradients of ranks, whose rows differ, add up to that of the batch.
    A forward reads the rows in use; whole tables are read once, for the first scale, and when they are redrawn.
    """

    scale: nn.Parameter
    clips = True

    def __init__(self, qat: QATConfig, bits: int, groups: Groups) -> None:
        super().__init__(qat, bits, groups)
        self.scale = nn.Parameter(torch.zeros(groups.count))
        self._factor: Tensor | None = None
        self._positive = _Positive(SMALLEST_MAXIMUM / self._limits[1])

    @torch.no_grad()
    def refresh(self, weight: Tensor, everything: bool = False) -> None:
        """Start again from 2 * mean|v| / sqrt(Q_P), of all weights."""
        if self.groups.table_rows is not None:
            self.tables_redrawn(weight, range(self.groups.count))
        else:
            rows = weight if self.groups.count == len(weight) else weight.reshape(1, -1)
            self._start(slice(None), rows.abs().double().mean(1))
        self._scale_known = True

    @torch.no_grad()
    def tables_redrawn(self, weight: Tensor, numbers: Any) -> None:
        """Only their step sizes start again."""
        tables = self.groups.tables(weight)
        self._positive.keep(self.scale)  # the others go on
        for number in numbers:
            total = sum(piece.abs().sum(dtype=torch.float64) for piece in pieces(tables[number]))
            self._start(slice(number, number + 1), total / max(tables[number].numel(), 1))

    def _start(self, part: slice, mean: Tensor) -> None:
        self.scale[part] = initial_step(mean, self.bits)
        self._positive.forget()

    def before_forward(self, weight: Tensor, sparse: bool = False) -> None:
        self.current_scale(weight)
        if self.training or torch.is_grad_enabled():
            self._positive.used(self.scale)
        if self._factor is None:
            rows = self.groups.table_rows or (len(weight) // max(self.groups.count, 1),) * self.groups.count
            weights = torch.tensor(rows, dtype=torch.float64, device=weight.device) * weight.shape[1]
            self._factor = gradient_factor(weights, self.bits)

    def fake_quantize(self, values: Tensor, group: slice = slice(None)) -> Tensor:
        assert self._factor is not None  # of before_forward
        quantized: Tensor = _LearnedStep.apply(values, self.scale[group], self._factor[group], self._limits)
        return quantized

    def synchronize(self, weight: Tensor) -> None:
        self._positive.keep(self.scale)

    def current_scale(self, weight: Tensor) -> Tensor:
        self.synchronize(weight)
        if not self._scale_known:  # or somebody has set it
            self._look_at_scale()
        return super().current_scale(weight)

    def updated(self) -> None:
        """The optimizer has changed the scales."""
        self._positive.updated(self.scale)

    def weights_replaced(self, weight: Tensor, ticks: int) -> None:
        self._positive.forget()
        super().weights_replaced(weight, ticks)

    def weight_moved(self, weight: Tensor, cast: bool) -> None:
        self._positive.forget()
        self._factor = None


class _Clip(torch.autograd.Function):
    """Inputs on the scale of alpha; what is beyond its codes gets no gradient, and gives its own to alpha."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, bits: int) -> Tensor:
        scale = scale_from_max(alpha, bits)
        ctx.save_for_backward(x, scale)
        ctx.limits = code_limits(bits)
        return fake_quantize(x, scale, bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        low, high = ctx.limits
        codes = x.float() / scale
        above, below = codes >= high, codes <= low
        grad = grads[0].float()
        by_alpha = (grad * above).sum() + (grad * below).sum() * (low / high)
        return grads[0] * ~(above | below), by_alpha, None


class PACT(ActivationFakeQuantizer):
    """PACT: `maximum` is the learned alpha. It starts from the largest magnitude of the first training batch.

    Codes are signed, as those of the running maximum: for inputs of at least 0, which follow a ReLU, the values are the
    paper's for one bit less; inputs below 0 are clipped at the lowest code, whose value moves alpha too.
    """

    maximum: nn.Parameter

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.maximum = nn.Parameter(torch.zeros(()))
        self._known = False
        self._positive = _Positive(SMALLEST_MAXIMUM)

    def forward(self, x: Tensor) -> Tensor:
        check_floats("input", x)
        if x.numel() == 0:
            return x
        if not self._known:
            self._look()
        if not self._known:
            largest = x.detach().abs().amax().float()
            if not self.training or not largest > 0:
                return fake_quantize(x, scale_from_max(largest, self.bits), self.bits)
            self.maximum.detach().copy_(largest)
            self._known = True
        self._positive.keep(self.maximum)
        if self.training or torch.is_grad_enabled():
            self._positive.used(self.maximum)
        clipped: Tensor = _Clip.apply(x, self.maximum, self.bits)
        return clipped

    def scale(self) -> Tensor:
        self._positive.keep(self.maximum)
        return super().scale()

    def updated(self) -> None:
        """The optimizer has changed alpha."""
        self._positive.updated(self.maximum)

    def reset(self) -> None:
        super().reset()
        self._look()

    def _look(self) -> None:
        self._positive.forget()
        self._known = bool(self.maximum > 0)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._positive.keep(self.maximum)
        self._positive.forget()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._positive.keep(self.maximum)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._look()
