"""Ids hashed to table rows, without a vocabulary: row 1 + XXH64(key, seed) mod (rows - 1), row 0 for a missing id.

With several hash functions an id has one row of the same table for each, pooled like the ids of a multi-valued column
(hash embeddings, https://arxiv.org/abs/1709.03933, without their weights).

XXH64 is Yann Collet's hash of 64 bits (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md). It is computed for all
keys of one length at once. Any program with an implementation of it finds the same rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from dqrm.kernels import logs

Array = NDArray[Any]
Hashes = NDArray[np.uint64]

NAME = "xxh64"
_P1, _P2, _P3, _P4, _P5 = map(
    np.uint64, (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
)
# Keys hashed at once: they stay in the processor's cache.
_PIECE = 1 << 15


@dataclass(frozen=True)
class HashedRows:
    """The rows of a column whose ids are hashed.

    rows: of its table, 2 or more. seed: the column's number, from 0. hashes: functions, and so rows of an id; the seed
    of function j is seed + j * 2^32.
    """

    rows: int
    seed: int
    hashes: int = 1

    @classmethod
    def of_columns(cls, columns: Sequence[Mapping[str, Any]]) -> "list[HashedRows] | None":
        """Those of a schema's columns; None where ids have vocabularies."""
        if not columns or any(column.get("hash") != NAME for column in columns):
            return None
        return [cls(column["rows"], column["seed"], column.get("hashes", 1)) for column in columns]

    def describe(self) -> dict[str, Any]:
        """For dataset.json."""
        several = {"hashes": self.hashes} if self.hashes > 1 else {}
        return {"rows": self.rows, "hash": NAME, "seed": self.seed, **several, "vocabulary": None}

    def lookup(self, keys: pl.Series) -> NDArray[np.int32]:
        """The table rows of each key: UInt32 or UInt64 as 4 or 8 little-endian bytes, text as UTF-8.

        Returns:
            int32 [N * hashes], those of one key side by side.
        """
        seeds = [self.seed + (function << 32) for function in range(self.hashes)]
        if keys.dtype == pl.UInt32 and logs.available():
            return logs.hash_ids(keys.to_numpy(), np.array(seeds, np.uint64), self.rows)
        if keys.dtype == pl.String:
            present, hashes = (keys != "").to_numpy(), _of_texts(keys, seeds)
        else:
            numbers = keys.to_numpy()
            present, hashes = numbers != 0, _of_numbers(numbers, seeds)
        table_rows = (hashes % np.uint64(self.rows - 1)).astype(np.int32) + np.int32(1)
        return np.where(present[:, None], table_rows, np.int32(0)).reshape(-1)

    def encode(self, keys: pl.Series, lengths: pl.Series | None) -> tuple[NDArray[np.int32], pl.Series | None]:
        """The table rows of keys, and how many of them each row of the log has (None: one), given its number of keys
        (None: one)."""
        if self.hashes == 1:
            return self.lookup(keys), lengths
        each = pl.repeat(1, len(keys), dtype=pl.UInt32, eager=True) if lengths is None else lengths
        return self.lookup(keys), each * self.hashes


def xxh64(messages: NDArray[np.uint8], seed: int) -> Hashes:
    """XXH64 of messages of one length.

    Args:
        messages: uint8 [N, L].

    Returns:
        uint64 [N].
    """
    count, length = messages.shape
    at, start = 0, np.uint64(seed)
    with np.errstate(over="ignore"):
        if length >= 32:
            lanes = [start + _P1 + _P2, start + _P2, start, start - _P1]
            sums = [np.full(count, lane) for lane in lanes]
            for at in range(0, length - 31, 32):
                words = _words(messages, at, 4, np.uint64)
                sums = [_round(lane, words[:, n]) for n, lane in enumerate(sums)]
            at += 32
            hashes = np.zeros(count, np.uint64)
            for lane, turn in zip(sums, (1, 7, 12, 18)):
                hashes = hashes + _rotated(lane, turn)
            for lane in sums:
                hashes = (hashes ^ _round(np.uint64(0), lane)) * _P1 + _P4
        else:
            hashes = np.full(count, start + _P5)
        hashes = hashes + np.uint64(length)
        for begin in range(at, length - 7, 8):
            word = _words(messages, begin, 1, np.uint64)[:, 0]
            hashes = _rotated(hashes ^ _round(np.uint64(0), word), 27) * _P1 + _P4
            at = begin + 8
        if at + 4 <= length:
            word = _words(messages, at, 1, np.uint32)[:, 0].astype(np.uint64)
            hashes = _rotated(hashes ^ (word * _P1), 23) * _P2 + _P3
            at += 4
        for byte in range(at, length):
            hashes = _rotated(hashes ^ (messages[:, byte].astype(np.uint64) * _P5), 11) * _P1
        hashes = (hashes ^ (hashes >> np.uint64(33))) * _P2
        hashes = (hashes ^ (hashes >> np.uint64(29))) * _P3
        mixed: Hashes = hashes ^ (hashes >> np.uint64(32))
        return mixed


def _round(lane: Any, word: Any) -> Any:
    return _rotated(lane + word * _P2, 31) * _P1


def _rotated(numbers: Any, bits: int) -> Any:
    return (numbers << np.uint64(bits)) | (numbers >> np.uint64(64 - bits))


def _words(messages: NDArray[np.uint8], at: int, count: int, kind: type) -> Array:
    """`count` little-endian words from byte `at` of each message: [N, count]."""
    dtype = np.dtype(kind).newbyteorder("<")
    taken = np.ascontiguousarray(messages[:, at : at + count * dtype.itemsize])
    return taken.view(dtype).astype(kind, copy=False)


def _of_numbers(numbers: Array, seeds: Sequence[int]) -> Hashes:
    """Of unsigned integers, as their little-endian bytes. uint64 [N, seeds]."""
    little = np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("<"))
    return _in_pieces(little.view(np.uint8).reshape(len(numbers), numbers.dtype.itemsize), seeds)


def _of_texts(keys: pl.Series, seeds: Sequence[int]) -> Hashes:
    """Of texts, as UTF-8: those of one length after the other. uint64 [N, seeds]."""
    hashes = np.empty((len(keys), len(seeds)), np.uint64)
    lengths = keys.str.len_bytes().to_numpy()
    order = np.argsort(lengths, kind="stable")
    data = np.frombuffer("".join(keys.gather(order).to_list()).encode(), np.uint8)
    known, counts = np.unique(lengths, return_counts=True)
    row = at = 0
    for length, count in zip(known.tolist(), counts.tolist()):
        messages = data[at : at + count * length].reshape(count, length)
        hashes[order[row : row + count]] = _in_pieces(messages, seeds)
        row, at = row + count, at + count * length
    return hashes


def _in_pieces(messages: NDArray[np.uint8], seeds: Sequence[int]) -> Hashes:
    hashes = np.empty((len(messages), len(seeds)), np.uint64)
    for at in range(0, len(messages), _PIECE):
        for function, seed in enumerate(seeds):
            hashes[at : at + _PIECE, function] = xxh64(messages[at : at + _PIECE], seed)
    return hashes
