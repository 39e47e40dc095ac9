from __future__ import annotations

import io
import pathlib

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax.data.files import SkippedFiles, compression, read_lines, split_lines, walk


@given(st.text("ab\n\r\x0b\x0c\x1c\x85\u2028\u2029 ", max_size=20))
def test_lines_equal_those_of_open(text: str) -> None:
    with io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8") as file:
        assert split_lines(text) == [line.removesuffix("\n") for line in file]


def test_skipped_files_are_counted_by_kind() -> None:
    skipped = SkippedFiles()
    assert str(skipped) == ""
    for name in ("b/a.XYZ", "c.xyz", "README"):
        skipped.add(name)
    skipped.update({".xyz": 1_000, "hidden": 2}, "elsewhere")
    assert str(skipped) == "1,005 files skipped: 1,002 .xyz, 2 hidden, 1 without a suffix; first b/a.XYZ"
    for i in range(100):
        skipped.add(f"x.s{i}")
    assert len(skipped.kinds) == 21 and sum(skipped.kinds.values()) == 1_105 and skipped.kinds["others"] == 83


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(walk(epath.Path(tmp_path / "none"), SkippedFiles()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\nb\ncafé".encode("latin-1"), r"line 3 is not UTF-8 \(byte 0xe9\): if it is Latin-1, convert it to UTF-8"),
        ("a\nb".encode("utf-16"), "it is UTF-16: convert it to UTF-8"),
        (b"a\nb\0", "line 2 has a NUL byte: not a text file"),
        (b"\x1f\x8b\x08\0\0", r"compressed with gzip: unpack it first \(gzip -dk\)"),
    ],
)
def test_a_file_that_is_not_utf8_is_refused(tmp_path: pathlib.Path, data: bytes, message: str) -> None:
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(ValueError, match=rf"/t: {message}"):
        read_lines(tmp_path / "t")
    (tmp_path / "t").write_bytes("\ufeffa \r\n\r\n é".encode())
    assert read_lines(tmp_path / "t") == ["a", "", "é"]
    with pytest.raises(ValueError, match="12 bytes, where at most 9 are expected"):
        read_lines(tmp_path / "t", 9)


def test_compressed_files_are_recognised() -> None:
    assert compression(b"ustar") == "" and compression(b"\x28\xb5\x2f\xfd...").startswith("zstd: unpack it first")
