"""Adam's steps of rows with and without gradients, in plain torch: a part of the backend `plain`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dqrm.kernels.layout import EARLY_STEPS, IDLE_SIZES, IdleCourse

# Below it a weight without gradients is taken for 0, and so is what it moves by in a step.
_AT_REST = 1e-10


def idle_adam(
    weight: Tensor, first: Tensor, second: Tensor, last: Tensor, rows: Tensor, now: int, course: IdleCourse
) -> Tensor:
    rows = rows[last.index_select(0, rows) < now].unique()
    state, since = [part.index_select(0, rows) for part in (weight, first, second)], last.index_select(0, rows).long()
    coasting = (since >= EARLY_STEPS) & (len(course.fades) > 0)
    for which, move in ((coasting, _coast), (~coasting, _walk)):
        if which.any():
            moved = move([part[which] for part in state], since[which], now, course)
            for part, values in zip((weight, first, second), moved):
                part.index_copy_(0, rows[which], values)
    last.index_fill_(0, rows, now)
    return rows


def _coast(state: Sequence[Tensor], since: Tensor, now: int, course: IdleCourse) -> Sequence[Tensor]:
    """Weights and moments of rows after their whole gap in one."""
    w, m, v = state
    starts, inverse = since.unique(return_inverse=True)
    fades, grows = course.fades.view(2, -1)
    step = torch.arange(len(fades), device=since.device)
    at = (starts[:, None] + step).clamp(max=now - 1) // course.stride
    inside = step < now - starts[:, None]
    grown = grows / course.root[at]
    shares = torch.where(inside, course.alpha[at] * fades * grown, 0)
    way = shares.sum(1)
    spread = torch.where(way == 0, 1, (shares * grown).sum(1) / way)
    way, spread, gap = way[inverse, None], spread[inverse, None], (now - since).double()[:, None]
    new = w - way * m / (v.sqrt() + course.eps * spread)
    left = torch.where(gap > len(fades), 0, course.beta1**gap)
    return new, m * left.float(), v * (course.beta2**gap).float()


def _walk(start: Sequence[Tensor], since: Tensor, now: int, course: IdleCourse) -> Sequence[Tensor]:
    """The same in single steps, then in blocks."""
    state, done = [part.clone() for part in start], since.clone()
    while len(open_ := (done < now).nonzero()[:, 0]):
        at, age, left = done[open_], (done - since)[open_], now - done[open_]
        most = torch.minimum(torch.minimum(age // 8, at // 16).clamp_(1, 64), left)
        sizes = torch.bucketize(most, 1 << torch.arange(IDLE_SIZES, device=most.device), right=True) - 1
        for size in sizes.unique().tolist():
            rows = open_[sizes == size]
            parts = [part.index_select(0, rows) for part in state]
            step = done[rows]
            before, after = ((step + more) // course.stride for more in ((1 << size) - 1 >> 1, 1 << size >> 1))
            alpha, root = ((line[before] + line[after])[:, None] * 0.5 for line in (course.alpha, course.root))
            new = _idle_steps(parts, size, alpha, root, course) if size else _idle_step(parts, alpha, root, course)
            for part, values in zip(state, new):
                part.index_copy_(0, rows, values)
            done[rows] += 1 << size
    return state


def adam_moments(
    first: Tensor, second: Tensor, rows: Tensor, values: Tensor, beta1: float, beta2: float, root: float, eps: float
) -> Tensor:
    m = first.index_select(0, rows).mul_(beta1).add_(values, alpha=1 - beta1)
    v = second.index_select(0, rows).mul_(beta2).add_(values.square(), alpha=1 - beta2)
    first.index_copy_(0, rows, m)
    second.index_copy_(0, rows, v)
    return torch.div(m, v.sqrt_().mul_(root).add_(eps), out=values)


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
