"""Tables stored in 4 bits, but the rows that are updated most often in 8: an eighth of float32 and little more.

A row of 4 bits is `dim` codes from -7 to 7, two per byte, and its scale max|row| / 7 in bf16, rounded up: dim / 2 + 2
bytes. Stochastic rounding to 4 bits adds noise of the size of its step at each update, so rows that are updated often
lie in slots instead, as int8 rows with the row that has the slot and a count of its updates: dim + 8 bytes for each
slot. Who has a slot is decided at updates (`kernels.update_tiers`), without a count of the other rows and without a
pass over the table; a lookup of a row with a slot reads the slot's number where its codes were.

Two tiers as Yang et al. (arXiv 2010.11305) have them, who keep the most frequent rows in float.
"""

from typing import Any

import torch
from torch import Tensor

from dqrm import kernels
from dqrm.kernels import Tiers
from dqrm.kernels.layout import int4_row_width, int8_row_width
from dqrm.kernels.rows import slots_of
from dqrm.kernels.tiers import WAYS, take_slots, write_rows
from dqrm.quant.config import HOT_ROWS
from dqrm.quant.encoded_rows import EncodedRows

_MOST_ROWS = 2**31 - 2


def slot_bytes(dim: int) -> int:
    """Bytes of a slot: its int8 row, the row that has it, and its count."""
    return int8_row_width(dim) + 6


def slots_for(rows: int, hot_rows: float) -> int:
    """Slots of a table of so many rows of which a share may be hot: a multiple of 8, rounded up."""
    return -(-int(rows * hot_rows) // WAYS) * WAYS


def words_for(rows: int, dim: int, slots: int) -> int:
    """int32 words of memory."""
    return -(-(rows * int4_row_width(dim) + slots * slot_bytes(dim)) // 4)


class _Fixed:
    """An integer of a weight that is set before the memory, which is checked against it, and not afterwards."""

    def __init__(self, text: str) -> None:
        self.__doc__ = text

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, weight: Any, owner: Any = None) -> Any:
        return self if weight is None else weight.__dict__[self._name]

    def __set__(self, weight: Any, value: int) -> None:
        if "stored" in weight.__dict__:
            raise ValueError(f"{self._name} of a table stored as INT4 rows cannot change")
        weight.__dict__[self._name] = int(value)


class TieredRows(EncodedRows):
    """A float32 weight [R, dim] stored in two tiers, or a slice of one; what it can do: `EncodedRows`.

    Writing all values (`copy_`, `uniform_`) leaves each row in its tier.

    Args:
        stored: int32 [`words_for(rows, dim, slots)`], not copied: the row of each slot plus 1 (int32), its count
            (uint16), its int8 row, then the rows of 4 bits.
        rows: of the whole table.
        dim: values of a row.

    Raises:
        ValueError: `stored` has another dtype or size, is not contiguous, or its rows and slots do not match.
    """

    kind = "INT4"

    @staticmethod
    def __new__(cls, stored: Tensor, rows: int, dim: int) -> "TieredRows":
        made: TieredRows = cls._made(rows, dim, stored.device)
        made.__dict__.update(first=0, total=rows)
        made.stored = stored
        return made

    first = _Fixed("The first row of the table that is here: of a slice above 0.")
    total = _Fixed("Rows of the whole table.")

    @property
    def whole(self) -> bool:
        """Whether this is no slice."""
        return len(self) == self.total

    def _slots(self, stored: Tensor) -> int:
        rows, dim = self.total, self.shape[1]
        slots = (4 * stored.numel() - rows * int4_row_width(dim)) // (WAYS * slot_bytes(dim)) * WAYS
        if not 0 <= self.first <= rows - len(self):
            raise ValueError(f"rows {self.first} to {self.first + len(self)} are not rows of a table of {rows}")
        if stored.dtype != torch.int32 or stored.dim() != 1 or slots < 0 or len(stored) != words_for(rows, dim, slots):
            least = words_for(rows, dim, 0)
            raise ValueError(
                f"stored rows are {stored.dtype} {list(stored.shape)}, expected torch.int32 [{least}] "
                f"for {rows} rows of dim {dim} without slots and {WAYS * slot_bytes(dim)} bytes more for each {WAYS}"
            )
        return slots

    def _check_layout(self, stored: Tensor) -> None:
        self._slots(stored)

    @property
    def operand(self) -> Tiers:
        dim, stored = self.shape[1], self.stored
        slots, width, wide = self._slots(stored), int4_row_width(dim), int8_row_width(dim)
        memory, at = stored.view(torch.uint8), slots * slot_bytes(dim) + self.first * int4_row_width(dim)
        return Tiers(
            memory[at : at + len(self) * width].view(len(self), width),
            memory[6 * slots : slots * slot_bytes(dim)].view(torch.int8).view(slots, wide),
            dim,
            stored[:slots],
            memory[4 * slots : 6 * slots].view(torch.int16),
        )

    def check(self) -> None:
        """Raise ValueError unless exactly those rows refer to slots that have them: kernels read what they say."""
        whole = self.part(-self.first, self.total - self.first).operand
        hot = (whole.cold[:, -1] >= 0x80).nonzero()[:, 0]
        slots = slots_of(whole, hot)
        owner = whole.owner.long()
        right = len(hot) == int((owner != 0).sum()) and bool(((slots >= 0) & (slots < len(owner))).all())
        if not right or not torch.equal(owner[slots], hot + 1):
            raise ValueError("rows and slots of a table stored as INT4 rows do not match")

    @classmethod
    def empty(
        cls, rows: int, dim: int, device: torch.device | str | None = None, hot_rows: float = HOT_ROWS
    ) -> "TieredRows":
        """Rows of 4 bits, none of which has a slot yet.

        Args:
            hot_rows: at most this share of the rows, rounded up to a multiple of 8 rows, will have slots.

        Raises:
            ValueError: 2**31 rows or so, which no slot can name.
        """
        if rows > _MOST_ROWS:
            raise ValueError(f"a table stored as INT4 rows has at most {_MOST_ROWS:,} rows, not {rows:,}")
        words = words_for(rows, dim, slots_for(rows, hot_rows))
        made: TieredRows = cls._made(rows, dim, torch.device(device or "cpu"))
        made.__dict__.update(first=0, total=rows, stored=torch.zeros(words, dtype=torch.int32, device=device))
        return made

    @classmethod
    def encode(cls, values: Tensor, hot_rows: float = HOT_ROWS) -> "TieredRows":
        """Floating-point values [R, dim] to the nearest codes of 4 bits."""
        rows, dim = values.shape
        made = cls.empty(rows, dim, values.device, hot_rows)
        made.copy_(values)
        return made

    def part(self, start: int, stop: int) -> "TieredRows":
        made: TieredRows = self._made(stop - start, self.shape[1], self.stored.device)
        made.__dict__.update(first=self.first + start, total=self.total, stored=self.stored)
        return made

    def on(self, stored: Tensor) -> "TieredRows":
        made = self.part(0, len(self))
        made.__dict__["stored"] = stored
        return made

    def encode_into(self, values: Tensor) -> None:
        kernels.encode_tiers(values, self.operand)

    def write_from(self, rows: Tensor, source: Tensor, source_rows: Tensor) -> None:
        """Encode rows int64 [N] of any weight in rows of this one, to the nearest codes of the tier where each lies.

        From another table in tiers, rows that have slots there get free ones of their sets here, those that are updated
        most often first, and rows in the same tier as there keep their codes.
        """
        own, theirs = self.operand, source.operand if isinstance(source, TieredRows) else None
        slots = slots_of(own, rows)
        rest = torch.ones_like(rows, dtype=torch.bool)
        if theirs is not None:
            given = slots_of(theirs, source_rows)
            cold, hot = (slots < 0) & (given < 0), (slots >= 0) & (given >= 0)
            own.cold[rows[cold]] = theirs.cold[source_rows[cold]]
            own.hot[slots[hot]] = theirs.hot[given[hot]]
            rest = ~(cold | hot)
        values = source.detach().index_select(0, source_rows[rest]).float().to(self.device)
        write_rows(own, rows[rest], slots[rest], values)

    def take_slots(self, rows: Tensor, source: "TieredRows", source_rows: Tensor) -> None:
        """Give these rows slots, as `write_from` says; it fills them."""
        own, theirs = self.operand, source.operand
        given = slots_of(theirs, source_rows)
        wanted = (given >= 0) & (slots_of(own, rows) < 0)
        take_slots(own, rows[wanted], self.first, theirs.counts[given[wanted]])

    def take_codes(self, other: "TieredRows") -> bool:
        if not (self.whole and other.whole and len(self.stored) == len(other.stored)):
            return False
        self.stored.copy_(other.stored)
        return True

    def same_codes(self, other: "TieredRows") -> bool:
        if self.whole and other.whole:
            return torch.equal(self.stored, other.stored)
        return torch.equal(self.dequantize(), other.dequantize())

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["stored"], (self.first, len(self), self.total, self.shape[1])

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> "TieredRows":
        first, rows, total, dim = context
        return TieredRows(inner["stored"], total, dim).part(first, first + rows)


torch.serialization.add_safe_globals([TieredRows])
