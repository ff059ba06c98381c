"""Updates of tables in two tiers, in plain torch: rows of 4 bits, and int8 rows in slots. See `tiers.c`."""

import torch
from torch import Tensor

from dqrm.kernels.layout import TableRanges, Tiers
from dqrm.kernels.rows import bf16_at_end, hash_of, int4_codes, int4_rows, int8_rows, read_rows, slots_of, uniform

WAYS = 8
"""Slots of a set: a row may lie in those of its own set only."""
_SET_SEED, _ADMIT, _DEMOTE = 0x5BD1E995, 0x2545F491, 0x68E31DA4
_MOST = 0xFFFF


def encode_tiers(values: Tensor, out: Tiers) -> None:
    slots = slots_of(out, torch.arange(len(out), device=out.device))
    write_rows(out, torch.arange(len(out), device=out.device), slots, values)


def write_rows(weight: Tiers, rows: Tensor, slots: Tensor, values: Tensor, noise: Tensor | None = None) -> None:
    """Encode values in these rows, in the tier where each lies: their slots, or -1."""
    hot = slots >= 0
    weight.cold[rows[~hot]] = int4_rows(values[~hot], None if noise is None else noise[~hot])
    weight.hot[slots[hot]] = int8_rows(values[hot], None if noise is None else noise[hot])


def _noise(rows: Tensor, dim: int, seed: int) -> Tensor:
    return uniform(rows[:, None] * dim + torch.arange(dim, device=rows.device), seed)


def update_tiers(
    weight: Tiers, rows: Tensor, values: Tensor, factor: float, seed: int, ranges: TableRanges | None = None
) -> Tensor:
    from dqrm.kernels.plain import raise_scales

    new = read_rows(weight, rows, weight.dim) + values * factor
    slots = slots_of(weight, rows)
    write_rows(weight, rows, slots, new, _noise(rows, weight.dim, seed))
    used = slots[slots >= 0]
    weight.counts[used] = ((weight.counts[used].int() & _MOST) + 1).clamp_(max=_MOST).to(torch.int16)
    moved = _admit_all(weight, rows, seed) if len(weight.hot) else rows[:0]
    if ranges is not None:
        raise_scales(torch.cat([rows, moved]), weight, ranges)
    return moved


def _admit_all(weight: Tiers, rows: Tensor, seed: int) -> Tensor:
    """Give slots to rows that win them, in the order of `rows`; returns the rows that lost theirs."""
    sets = _sets(weight, rows)
    draw = hash_of(rows, seed ^ _ADMIT)
    # Counts only grow here: a row that is refused by the lowest count of its set now is refused later as well.
    lowest = (weight.counts.view(-1, WAYS).int() & _MOST).amin(1).long()
    likely = (draw * (lowest[sets] + 1) >> 32 == 0).nonzero()[:, 0]
    moved = []
    for row, place, chance in zip(rows[likely].tolist(), sets[likely].tolist(), draw[likely].tolist()):
        if int(weight.cold[row, -1]) >= 0x80:
            continue
        counts = [count & _MOST for count in weight.counts[place * WAYS : (place + 1) * WAYS].tolist()]
        least = min(counts)
        if chance * (least + 1) >> 32:
            continue
        moved.append(_admit(weight, row, place * WAYS + counts.index(least), seed))
        weight.counts[place * WAYS + counts.index(least)] = _signed(min(least + 1, _MOST))
    return torch.tensor([row for row in moved if row >= 0], dtype=torch.int64, device=rows.device)


def _sets(weight: Tiers, rows: Tensor) -> Tensor:
    return hash_of(rows, _SET_SEED) * (len(weight.hot) // WAYS) >> 32


def take_slots(weight: Tiers, rows: Tensor, first: int, counts: Tensor) -> Tensor:
    """Give rows that have no slot one that is free, in the order of their counts: the slots int64 [N], or -1.

    The caller fills them.

    Args:
        weight: of a whole table, or a slice of one that begins at row `first`.
        rows: int64 [N], of the slice, each once. counts: of their updates, integers [N] of 16 bits.
    """
    found = torch.full_like(rows, -1)
    if not len(rows) or not len(weight.hot):
        return found
    sets = _sets(weight, rows + first)
    order = (sets * (_MOST + 1) + (_MOST - (counts.long() & _MOST))).argsort(stable=True)
    _, begun, sizes = torch.unique_consecutive(sets[order], return_inverse=True, return_counts=True)
    number = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[begun]  # of each row in its set
    free = weight.owner.view(-1, WAYS)[sets[order]] == 0
    chosen = free & (free.cumsum(1) == number[:, None] + 1)
    got = chosen.any(1)
    at, slots = order[got], sets[order[got]] * WAYS + chosen[got].int().argmax(1)
    found[at] = slots
    weight.owner[slots] = (rows[at] + first + 1).int()
    weight.counts[slots] = counts[at].to(torch.int16)
    cold = torch.zeros(len(at), weight.cold.shape[1], dtype=torch.uint8, device=rows.device)
    cold[:, :4] = slots.int()[:, None].contiguous().view(torch.uint8)
    cold[:, -1] = 0x80
    weight.cold[rows[at]] = cold
    return found


def _signed(count: int) -> int:
    return count - (1 << 16) if count >> 15 else count


def _admit(weight: Tiers, row: int, slot: int, seed: int) -> int:
    """Put a row into a slot; the row that had it, or -1, is rounded to 4 bits."""
    dim, out = weight.dim, int(weight.owner[slot]) - 1
    if out >= 0:
        lost = torch.tensor([out], device=weight.device)
        weight.cold[lost] = int4_rows(read_rows(weight, lost, dim), _noise(lost, dim, seed ^ _DEMOTE))
    mine = weight.cold[row : row + 1]
    codes = int4_codes(mine, dim) * 16  # exactly the same values, on a scale of a sixteenth
    scale = bf16_at_end(mine)
    scale = torch.where(scale.isnan(), 0x7FC0, (scale / 16).view(torch.int32) >> 16).to(torch.int16)
    weight.hot[slot] = torch.cat([codes, codes.new_zeros(1, dim % 2), scale.view(torch.int8)], 1)[0]
    mine.zero_()
    mine[0, :4] = torch.tensor([slot], dtype=torch.int32).view(torch.uint8).to(mine.device)
    mine[0, -1] = 0x80
    weight.owner[slot] = row + 1
    return out
