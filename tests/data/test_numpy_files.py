"""Arrays in .npy and .npz files, read some rows at a time: what NumPy loads, in bounded memory."""

import tracemalloc

import numpy as np
import pytest

from dqrm.data.formats import arrays as arrays_module
from dqrm.data.formats.arrays import Unreadable, npy, npz


def test_another_checksum_is_noticed(tmp_path):
    array = np.arange(60.0).reshape(20, 3)
    for order in (array, np.asfortranarray(array)):
        np.savez(tmp_path / "a.npz", x=order)
        data = bytearray((tmp_path / "a.npz").read_bytes())
        at = data.index(np.float64(31).tobytes())
        data[at + 7] ^= 1
        (tmp_path / "a.npz").write_bytes(data)
        with npz(tmp_path / "a.npz") as arrays, pytest.raises(Unreadable, match="x has another checksum"):
            list(arrays["x"].blocks(3))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (1, 1), (1, 5), (7,), (7, 1), (7, 5), (64, 3)])
@pytest.mark.parametrize("dtype", ["<f8", ">i4", "u1", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_blocks_are_what_numpy_loads(tmp_path, monkeypatch, shape, dtype, order):
    monkeypatch.setattr(arrays_module, "_READ", 16)
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", x=array, other=np.zeros(3))
    np.savez_compressed(tmp_path / "b.npz", other=np.zeros(3), x=array)
    for rows in (1, 3, 7, 100):
        for opened in (npy(tmp_path / "a.npy"), npz(tmp_path / "a.npz"), npz(tmp_path / "b.npz")):
            with opened as found:
                stored = found["x"] if isinstance(found, dict) else found
                blocks = list(stored.blocks(rows))
                assert all(len(block) <= rows for block in blocks)
                assert np.array_equal(stored.whole(), array)
                assert sum(map(len, blocks)) == len(array)


def test_a_transposed_deflated_array_is_not_held_in_memory(tmp_path):
    array = np.random.default_rng(0).integers(0, 1000, (26, 100_000)).astype(np.float64)
    np.savez_compressed(tmp_path / "a.npz", x=array.T)
    tracemalloc.start()
    total = 0.0
    with npz(tmp_path / "a.npz") as arrays:
        for block in arrays["x"].blocks(1000):
            total += float(block.sum())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == array.sum()
    assert peak < array.nbytes / 2
