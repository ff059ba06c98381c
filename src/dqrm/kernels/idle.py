"""Adam's steps of rows without gradients, in plain torch: a part of the backend `plain`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dqrm.kernels.layout import IDLE_SIZES, IdleCourse

# Below it a weight without gradients is taken for 0, and so is what it moves by in a step.
_AT_REST = 1e-10


def idle_adam(weight: Tensor, first: Tensor, second: Tensor, last: Tensor, now: int, course: IdleCourse) -> None:
    since = last.long()
    done = since.clone()
    while len(open_ := (done < now).nonzero()[:, 0]):
        at, age, left = done[open_], (done - since)[open_], now - done[open_]
        most = torch.minimum(torch.minimum(age // 8, at // 16).clamp_(1, 64), left)
        sizes = torch.bucketize(most, 1 << torch.arange(IDLE_SIZES, device=most.device), right=True) - 1
        for size in sizes.unique().tolist():
            rows = open_[sizes == size]
            state = [part.index_select(0, rows) for part in (weight, first, second)]
            step = done[rows]
            before, after = ((step + more) // course.stride for more in ((1 << size) - 1 >> 1, 1 << size >> 1))
            alpha, root = ((line[before] + line[after])[:, None] * 0.5 for line in (course.alpha, course.root))
            new = _idle_steps(state, size, alpha, root, course) if size else _idle_step(state, alpha, root, course)
            for part, values in zip((weight, first, second), new):
                part.index_copy_(0, rows, values)
            done[rows] += 1 << size


def _idle_step(state: Sequence[Tensor], alpha: Tensor, root: Tensor, course: IdleCourse) -> Sequence[Tensor]:
    """Weights and moments after one step of `torch.optim.Adam`."""
    w, m, v = state
    _, _, beta2, rest = course.powers.view(4, -1)[:, 0]
    g = course.l2 * w
    m = course.beta1 * m + (1 - course.beta1) * g
    v = beta2 * v + rest * (g * g)
    return w - alpha * m / (v.sqrt() * root + course.eps), m, v


def _idle_steps(
    state: Sequence[Tensor], size: int, alpha: Tensor, root: Tensor, course: IdleCourse
) -> Sequence[Tensor]:
    """The same after 2^size steps in one."""
    w, m, v = state
    half, half_l2, whole, whole_l2 = course.powers.view(4, -1)[:, size]
    q = (alpha / ((half * v + half_l2 * (w * w)).sqrt() * root + course.eps)).clamp(max=course.most)
    a, b = 1 - q * course.gamma, -q * course.beta1
    c, d = torch.full_like(w, course.gamma), torch.full_like(w, course.beta1)
    for _ in range(size):
        cross, trace = b * c, a + d
        a, b, c, d = a * a + cross, b * trace, c * trace, d * d + cross
    new, moment = a * w + b * m, c * w + d * m
    v = whole * v + whole_l2 * (w * w + w * new + new * new)
    rest = (q * moment).abs() <= _AT_REST
    if course.l2:
        rest &= new.abs() <= _AT_REST
        new = torch.where(rest, 0, new)
    return new, torch.where(rest, 0, moment), v
