"""XXH64 written out in plain integers, and the table rows of hashed ids."""

M = 2**64 - 1
P1, P2, P3, P4, P5 = (
    11400714785074694791, 14029467366897019727, 1609587929392839161, 9650029242287828579, 2870177450012600261
)  # fmt: skip


def rotated(number, bits):
    return (number << bits | number >> 64 - bits) & M


def reference(data, seed=0):
    """XXH64 of bytes, as its specification has it."""

    def stirred(lane, word):
        return rotated((lane + word * P2) & M, 31) * P1 & M

    rest = data
    if len(data) >= 32:
        lanes = [(seed + P1 + P2) & M, (seed + P2) & M, seed, (seed - P1) & M]
        while len(rest) >= 32:
            lanes = [stirred(lane, int.from_bytes(rest[8 * n : 8 * n + 8], "little")) for n, lane in enumerate(lanes)]
            rest = rest[32:]
        found = sum(rotated(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18))) & M
        for lane in lanes:
            found = ((found ^ stirred(0, lane)) * P1 + P4) & M
    else:
        found = (seed + P5) & M
    found = (found + len(data)) & M
    while len(rest) >= 8:
        found = (rotated(found ^ stirred(0, int.from_bytes(rest[:8], "little")), 27) * P1 + P4) & M
        rest = rest[8:]
    if len(rest) >= 4:
        found = (rotated(found ^ int.from_bytes(rest[:4], "little") * P1 & M, 23) * P2 + P3) & M
        rest = rest[4:]
    for byte in rest:
        found = rotated(found ^ byte * P5 & M, 11) * P1 & M
    found = (found ^ found >> 33) * P2 & M
    found = (found ^ found >> 29) * P3 & M
    return found ^ found >> 32


def row(key, rows, seed, width=None):
    """The row of a key: a text, or a number of `width` bytes."""
    if not key:
        return 0
    return 1 + reference(key.to_bytes(width, "little") if width else key.encode(), seed) % (rows - 1)


def rows_of(key, rows, seed, hashes, width=None):
    """The rows of a key by several hash functions."""
    return [row(key, rows, seed + function * 2**32, width) for function in range(hashes)]
