"""Archives of NumPy arrays: equal to those of NumPy in both directions, and refused if damaged or of another kind."""

from __future__ import annotations

import pathlib
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from tclip_jax.interop.npz import read_npz, write_npz

ARRAYS = {
    "a/b": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "columns": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "half": np.arange(5, dtype=np.float16),
    "scalar": np.float32(3),
    "empty": np.zeros((0, 3), np.int32),
}


def test_numpys_files_are_read(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "x.npz", **ARRAYS)  # type: ignore[arg-type]
    read = read_npz(tmp_path / "x.npz")
    assert read.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        assert read[name].shape == np.shape(value) and read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)
    for name in ("a/b", "columns"):
        np.testing.assert_array_equal(read[name].layers(), ARRAYS[name])
        np.testing.assert_array_equal(read[name].layers()[1], ARRAYS[name][1])


def test_numpy_reads_what_is_written_and_bytes_repeat(tmp_path: pathlib.Path) -> None:
    arrays = ARRAYS | {"bf": jnp.arange(3, dtype=jnp.bfloat16)}
    for name in ("x.npz", "y.npz"):
        write_npz(tmp_path / name, arrays)
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()
    loaded = np.load(tmp_path / "x.npz", allow_pickle=False)
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], value)
    assert loaded["bf"].dtype == np.dtype("V2")
    np.testing.assert_array_equal(loaded["bf"].view(jnp.bfloat16), np.arange(3))
    np.testing.assert_array_equal(read_npz(tmp_path / "x.npz")["bf"], np.arange(3))


def test_a_damaged_array_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, weight=np.arange(1000, dtype=np.float32))
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    array = read_npz(path)["weight"]
    for read in (lambda: np.asarray(array), lambda: array.layers()[7].load()):
        with pytest.raises(ValueError, match=r"x\.npz: weight\.npy is damaged: its bytes do not have the stored"):
            read()


def stating(header: bytes) -> bytes:
    head = header.ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "it holds a.txt, which is no array"),
        ("a.npy", b"", "is not an archive of NumPy arrays"),
        ("a.npy", b"\x93NUMPY\3\0" + b" " * 200, r"has version \(3, 0\) of the array format"),
        ("a.npy", stating(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2**40,)}"), "x.npz is not an archive"),
        (
            "a.npy",
            stating(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}"),
            r"a\.npy has 128 bytes: an array of float32 \(1099511627776,\) has",
        ),
        ("a.npy", stating(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), r"array of float32 \(-1,\)"),
        ("a.npy", stating(b"{'descr': '|O', 'fortran_order': False, 'shape': ()}"), "a.npy is object: only bfloat16"),
        ("a.npy", stating(b"{'descr': '>f4', 'fortran_order': False, 'shape': ()}"), "a.npy is >f4: only bfloat16"),
    ],
)
def test_a_wrong_header_is_refused(name: str, data: bytes, message: str, tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr(name, data)
    with pytest.raises(ValueError, match=message):
        read_npz(tmp_path / "x.npz")


def test_compressed_archives_are_refused(tmp_path: pathlib.Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(1000))
    with pytest.raises(ValueError, match=r"x\.npz is not .*: a\.npy is compressed: write the file by np\.savez"):
        read_npz(tmp_path / "x.npz")


def test_a_truncated_archive_is_refused(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(1000))
    data = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"x\.npz is not an archive of NumPy arrays"):
        read_npz(tmp_path / "x.npz")
