"""Scales for quantizing weights that are already trained (post-training quantization, PTQ).

`clip` says where a range ends. 'none': at its largest magnitude, as in training. 'mse': at the scale whose values are
nearest to the weights, that is with the least sum of (w - value)**2; a few outliers then no longer coarsen all others.

Both searches try scales and improve each: for given codes c the best scale is <w, c> / <c, c>. A row's candidates are
computed from its weights. A table's come from a histogram, one pass, because its weights may not fit into memory. What
they return is then compared, exactly and in float64, with the scale of the largest magnitude: no result is worse than
that one, and none is below the quantizer's floor of 1e-8 / n. Sums are taken in an order that depends on nothing but
the weights, so neither the pieces in which a table arrives nor the number of threads change a scale by a single bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dqrm.quant.packing import pieces as pieces_of
from dqrm.quant.storage import max_abs
from dqrm.quant.uniform import SMALLEST_MAXIMUM, code_limits, dequantize, quantize, scale_from_max

CLIPS = ("none", "mse")

# A table in pieces [rows, dim]: the pieces, or a function that yields them at each call.
Pieces = Sequence[Tensor] | Callable[[], Iterable[Tensor]]

# Weights processed at a time (they stay in the processor's cache), and read at a time.
_BLOCK = 1 << 16
_READ = 1 << 20
# Scales tried per row over its whole range, and then around the best of them.
_COARSE, _FINE = 96, 16
# Scales up to this multiple of the largest magnitude's: with few weights a coarser grid may happen to fit better.
_WIDEST = 1.5
# Bisection steps, on the exponent, for the smallest ratio worth trying; and the lower bound of these ratios.
_HALVINGS, _LEAST = 8, 2.0**-12
# A histogram bin is the sign, the exponent and the first 10 of 23 bits of the mantissa of a float32.
_DROPPED = 13
_BINS = 1 << (31 - _DROPPED)
# The histogram's thresholds looked up at once, and scales tried on it.
_LOOKUPS = 1 << 18
_TRIED = 1 << 10


@torch.no_grad()
def table_scale(pieces: Pieces, bits: int, clip: str = "none") -> Tensor:
    """One scale for a whole table: float32 scalar on the CPU.

    Reads the table once ('none') or three times ('mse'; once if it has at most 65536 weights) and never holds more than
    a few MB of it besides the pieces themselves.

    Args:
        pieces: the table's rows, [rows, dim] each; a memory-mapped table is one piece. Computed in float32.

    Raises:
        ValueError: an unsupported number of bits or clip; weights that are NaN or infinite; an iterator, which can be
            read only once.
    """
    _check(bits, clip)
    if isinstance(pieces, Iterator):
        raise ValueError("pieces is an iterator, expected a list or a function, because a table is read several times")
    again: Callable[[], Iterable[Tensor]] = pieces if callable(pieces) else lambda: pieces
    if clip == "none":
        maxima = [max_abs(piece.detach()) for piece in again() if piece.numel()]
        return scale_from_max(_finite(torch.stack(maxima).amax().cpu() if maxima else torch.zeros(())), bits)
    counts = torch.zeros(2 * _BINS, dtype=torch.int64)
    largest, total, only = torch.zeros(()), 0, torch.zeros(0)
    for block in _blocks(again()):
        largest = torch.maximum(largest, _finite(max_abs(block)))
        counts += torch.bincount((block.view(torch.int32) >> _DROPPED).add_(_BINS), minlength=2 * _BINS)
        total, only = total + len(block), block
    if total <= _BLOCK:
        return row_scales(only[None], bits, clip)[0]
    unclipped = scale_from_max(largest, bits)
    first = [unclipped, _best_on_histogram(_Histogram(counts), unclipped, bits)]
    errors, improved = _exact(_blocks(again()), first, bits)
    errors += _exact(_blocks(again()), improved, bits)[0]
    return (first + improved)[errors.index(min(errors))]


@torch.no_grad()
def row_scales(piece: Tensor, bits: int, clip: str = "none") -> Tensor:
    """One scale per row of a table, or per output channel of a linear weight: [rows, dim] -> float32 [rows].

    Works through the rows in blocks of a few MB (a row of more than 65536 weights is a block of its own); a row's scale
    does not depend on the others. Computed in float32.

    Raises:
        ValueError: an unsupported number of bits or clip; not two dimensions; weights that are NaN or infinite.
    """
    _check(bits, clip)
    if piece.ndim != 2:
        raise ValueError(f"weights of shape {tuple(piece.shape)}, expected [rows, dim]")
    scales = scale_from_max(torch.zeros(len(piece), device=piece.device), bits)
    if piece.numel() == 0:
        return scales
    rows = max(1, _BLOCK // piece.shape[1])
    for scale, part in zip(scales.split(rows), piece.detach().split(rows)):
        w = part.t().float().contiguous()
        scale.copy_(scale_from_max(_finite(w.abs().amax(0)), bits))
        if clip == "mse":
            scale.copy_(_best_per_column(w, scale, bits))
    return scales


@torch.no_grad()
def block_scales(table: Tensor, rows: int, bits: int, clip: str = "none") -> Tensor:
    """One scale for each `rows` rows of a table [R, dim], of which the last may be fewer: float32 [ceil(R / rows)].

    Raises:
        ValueError: as `row_scales`.
    """
    size = rows * table.shape[1]
    if rows > 1 and size > _BLOCK:
        return torch.stack([table_scale(partial(pieces_of, part), bits, clip) for part in table.split(rows)])
    scales = []
    for piece in pieces_of(table, rows):
        blocks = F.pad(piece.float(), (0, 0, 0, -len(piece) % rows))  # 0 is exact on any scale
        scales.append(row_scales(blocks.view(len(blocks) // rows, size), bits, clip))
    return torch.cat(scales)


FRACTIONS = tuple(2.0 ** (-number / 8) for number in range(40))
"""The grid of `grid_scales`: from 1 down to 0.034, by 8.3 %. With 2 bits and far outliers small ones are the best."""


@torch.no_grad()
def grid_scales(piece: Tensor, bits: int) -> Tensor:
    """One scale per row of [rows, n] by a search short enough for training: float32 [rows].

    Of max|w| / n times each of `FRACTIONS`, improved to <w, c> / <c, c> for its codes c, the scale with the least
    sum of (w - value)**2 (a grid search as in OMSE, arXiv 1902.06822, and in torch.ao's observers). NaN gives NaN.
    """
    w = piece.detach().t().float().contiguous()
    low, high = code_limits(bits)
    unclipped = scale_from_max(w.abs().amax(0), bits)
    u = w / unclipped
    sums = u.new_empty(3, *u.shape)
    floor = SMALLEST_MAXIMUM / high / unclipped
    error, ratio = _try(u, torch.ones_like(unclipped), low, high, sums)
    for fraction in FRACTIONS[1:]:
        _keep_better(error, ratio, *_try(u, floor.clamp(min=fraction), low, high, sums))
    return torch.maximum(unclipped * ratio, scale_from_max(torch.zeros_like(unclipped), bits))


def _check(bits: int, clip: str) -> None:
    code_limits(bits)
    if clip not in CLIPS:
        raise ValueError(f"clip is {clip!r}, expected {' or '.join(map(repr, CLIPS))}")


def _finite(largest: Tensor) -> Tensor:
    if not largest.isfinite().all():
        raise ValueError("weights are NaN or infinite, expected finite ones")
    return largest


def _sum(x: Tensor) -> Tensor:
    """x [..., n, columns] summed over n (x is overwritten).

    By halves: as accurate as pairwise summation, and, unlike `Tensor.sum`, in an order that is the same for every
    column, whatever their number and that of the threads.
    """
    length = x.shape[-2]
    while length > 1:
        half = (length + 1) // 2
        x[..., : length - half, :].add_(x[..., half:length, :])
        length = half
    return x[..., 0, :]


# --- rows, as the columns of [dim, rows]: one operation then runs along many rows at once


def _best_per_column(w: Tensor, unclipped: Tensor, bits: int) -> Tensor:
    """The scale with the least squared error for each column of `w`; `unclipped` is the largest magnitude's."""
    low, high = code_limits(bits)
    u = w / unclipped  # from here on scales are ratios to the unclipped one, and nothing overflows
    sums = u.new_empty(3, *u.shape)
    error, ratio = _try(u, torch.ones_like(unclipped), low, high, sums)
    smallest = torch.maximum(_least_ratio(u, error, low, sums), SMALLEST_MAXIMUM / high / unclipped)
    widest = 1.0 if high == 1 else _WIDEST  # with codes -2..1 no scale above the largest magnitude is ever best
    around = ratio.clone()
    for number in range(_COARSE):  # closer together where they are small
        tried = smallest + (widest - smallest) * (number / (_COARSE - 1)) ** 2
        around = torch.where(_keep_better(error, ratio, *_try(u, tried, low, high, sums)), tried, around)
    apart = (widest - smallest).mul_(around - smallest).clamp_(min=0).sqrt_().mul_(2 / _COARSE)
    apart += (widest - smallest) / _COARSE**2
    for number in range(_FINE):
        tried = torch.maximum(around + apart * ((2 * number + 1) / _FINE - 1), smallest)
        _keep_better(error, ratio, *_try(u, tried, low, high, sums))
    for _ in range(2):
        _keep_better(error, ratio, *_try(u, ratio, low, high, sums))
    best = torch.maximum(unclipped * ratio, scale_from_max(torch.zeros_like(unclipped), bits))
    return torch.where(_squared_error(w, best, bits) < _squared_error(w, unclipped, bits), best, unclipped)


def _squared_error(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The squared error of quantizing the columns of `w` on `scale`: float64 [rows]."""
    return _sum(w.double().sub_(dequantize(quantize(w, scale, bits), scale)).square_())


def _try(u: Tensor, ratio: Tensor, low: int, high: int, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the columns of `u` on `ratio` and fit the scale to their codes: (squared error on it, that scale).

    Args:
        sums: scratch [3, dim, rows].
    """
    rest, cross, codes = sums
    torch.mul(u, ratio.reciprocal(), out=codes).round_().clamp_(low, high)
    torch.sub(u, torch.mul(codes, ratio, out=rest), out=rest)
    torch.mul(rest, codes, out=cross)
    rest.square_()
    codes.square_()
    error, slope, norm = _sum(sums)
    change = slope / norm.clamp(min=1)  # where all codes are 0 the slope is 0 too
    return error - slope * change, ratio + change


def _keep_better(error: Tensor, ratio: Tensor, new_error: Tensor, new_ratio: Tensor) -> Tensor:
    better = new_error < error
    torch.where(better, new_error, error, out=error)
    torch.where(better, new_ratio, ratio, out=ratio)
    return better


def _least_ratio(u: Tensor, error: Tensor, low: int, scratch: Tensor) -> Tensor:
    """A ratio below which clipping alone costs more than `error`."""
    magnitude, over = torch.abs(u, out=scratch[0]), scratch[1]
    smallest, largest = torch.full_like(error, _LEAST), torch.ones_like(error)
    for _ in range(_HALVINGS):
        middle = (smallest * largest).sqrt_()
        clipped = _sum(torch.sub(magnitude, middle * -low, out=over).clamp_(min=0).square_())
        too_small = clipped > error
        smallest = torch.where(too_small, middle, smallest)
        largest = torch.where(too_small, largest, middle)
    return smallest


# --- tables


def _blocks(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """All weights in order, float32, in blocks that do not depend on the pieces; overwritten by the next."""
    block, filled = torch.empty(_READ), 0
    for piece in pieces:
        for rows in piece.detach().split(max(1, _READ // max(1, piece[:1].numel()))):
            rest = rows.reshape(-1)
            while len(rest):
                taken = rest[: _READ - filled]
                block[filled : filled + len(taken)] = taken
                filled, rest = filled + len(taken), rest[len(taken) :]
                if filled == _READ:
                    yield block
                    filled = 0
    if filled:
        yield block[:filled]


def _exact(blocks: Iterable[Tensor], scales: list[Tensor], bits: int) -> tuple[list[float], list[Tensor]]:
    """For each scale: the table's squared error on it, and the best scale for the codes that it gives."""
    sums = torch.zeros(len(scales), 3, dtype=torch.float64)
    for part in (part for block in blocks for part in block.split(_BLOCK)):
        exact = part.double()
        for number, scale in enumerate(scales):
            codes = quantize(part, scale, bits)
            errors, codes = exact - dequantize(codes, scale), codes.double()
            sums[number] += _sum(torch.stack([errors.square_(), exact * codes, codes.square()])[..., None])[:, 0]
    floor = scale_from_max(torch.zeros(()), bits)
    fitted = [(dot / norm).float().maximum(floor) if norm else scale for scale, (_, dot, norm) in zip(scales, sums)]
    return sums[:, 0].tolist(), fitted


class _Histogram:
    """Estimates the error of a scale from counts: the weights of a bin are taken as evenly spread.

    With thresholds t = (j - 1/2) * scale between codes j - 1 and j, the squared error is sum(w**2) - gain,

        gain = 2 * scale * sum over t of over(t)        over(t) = sum over |w| > t of (|w| - t)

    with n thresholds for the positive weights and n + 1 for the negative ones.
    """

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts.view(2, -1).flip(0).double()  # [positive, negative; magnitudes, rising]
        finite = (255 << (23 - _DROPPED)) - 1  # the bins after this one are infinity and NaN: empty
        starts = torch.arange(_BINS + 1, dtype=torch.int32).clamp_(max=finite) << _DROPPED
        self.edges = starts.view(torch.float32).double()
        self.widths = self.edges.diff().clamp_(min=1e-300)
        self.number_above = self._after(self.counts)
        self.sum_above = self._after(self.counts * (self.edges[:-1] + self.widths / 2))

    @staticmethod
    def _after(x: Tensor) -> Tensor:
        """For each bin the sum of the bins after it."""
        return x.flip(1).cumsum(1).flip(1) - x

    def gains(self, scales: Tensor, bits: int) -> Tensor:
        """The squared error on each of `scales` (float64 [N]), subtracted from sum(w**2)."""
        low, high = code_limits(bits)
        gains = []
        for some in scales.split(max(1, _LOOKUPS // -low)):
            thresholds = (torch.arange(-low, dtype=torch.float64) + 0.5)[:, None] * some
            bins = (thresholds.float().view(torch.int32) >> _DROPPED).long()
            inside = (self.edges[bins + 1] - thresholds).clamp_(min=0)
            positive, negative = (
                above_sum[bins] - thresholds * above[bins] + count[bins] * inside.square() / (2 * self.widths[bins])
                for above_sum, above, count in zip(self.sum_above, self.number_above, self.counts)
            )
            gains.append(2 * some * (_sum(positive[:high]) + _sum(negative)))
        return torch.cat(gains)


def _best_on_histogram(histogram: _Histogram, unclipped: Tensor, bits: int) -> Tensor:
    """The scale with the least estimated error: float32 scalar."""
    tried = min(_TRIED, 8 * _LOOKUPS >> bits)
    floor = scale_from_max(torch.zeros(()), bits).double()
    steps = torch.arange(tried, dtype=torch.float64)
    # Spaced geometrically, for tables with far outliers, and linearly.
    ratios = torch.cat([torch.exp2(steps * (-24 / tried)), 0.5 + (_WIDEST - 0.5) / tried * (1 + steps)]).sort()[0]
    for _ in range(2):
        scales = (unclipped.double() * ratios).clamp_(min=floor)
        best = int(histogram.gains(scales, bits).argmax())
        below, above = ratios[max(0, best - 1)], ratios[min(len(ratios) - 1, best + 1)]
        ratios = below + (above - below) / tried * steps
    return scales[best].float()
