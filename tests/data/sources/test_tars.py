"""Tars of images and captions: complete, damaged, hostile and remote tars."""

from __future__ import annotations

import errno
import gc
import io
import os
import pathlib
import pickle
import re
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from tclip_jax.data.sources import BadSample, Record, Source, open_source, remote
from tclip_jax.data.sources.tars import split_name


def tar(files: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def hostile(kind: bytes, size: int = 0, **extended: str) -> bytes:
    """Returns a header of a kind that extends the next one, with a false size or false values."""
    info = tarfile.TarInfo("x.jpg")
    info.type, info.size, info.pax_headers = kind, size, extended
    return info.tobuf(tarfile.PAX_FORMAT if extended else tarfile.GNU_FORMAT)


def pair(key: str, image: bytes = b"image", text: bytes = b"text") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image), (f"{key}.json", b"{}"), (f"{key}.txt", text)]


def contents(source: Source) -> list[str]:
    """Returns the captions of good samples and the faults of bad ones."""
    result = []
    for i in range(len(source)):
        try:
            result.append(" | ".join(source[i].captions))
        except BadSample as error:
            assert error.name and error.reason
            result.append(f"! {error.kind}")
    return result


def name_of(source: Source, index: int) -> str:
    try:
        return source[index].name
    except BadSample as error:
        return error.name


def opened(tmp_path: pathlib.Path, *shards: bytes) -> Source:
    for i, data in enumerate(shards):
        (tmp_path / f"{i}.tar").write_bytes(data)
    return open_source(f"wds:{tmp_path}/{{0..{len(shards) - 1}}}.tar", "train")


def test_samples_of_many_tars(tmp_path: pathlib.Path) -> None:
    long = "long" * 60
    first = tar([*pair("a/0", b"one", "é\n\nb\n".encode()), *pair(long, b"two"), ("__meta__", b""), ("README", b"")])
    second = tar([("2.txt", b"x"), ("2.json", b"{}"), ("2.PNG", b"three"), ("2.jpg", b"no")])
    source = opened(tmp_path, first, second)
    assert source[0] == Record(b"one", ("é\n\nb",), -1, f"{tmp_path}/0.tar/a/0")
    assert source[1].image == b"two" and source[2].image == b"no" and len(source) == 3
    assert source.notes == [  # type: ignore[attr-defined]
        f"{tmp_path}/0.tar and 1 more: 6 files skipped: 3 .json, 1 .png, 1 webdataset metadata (__…__), "
        "1 without a suffix; first __meta__"
    ]
    again = pickle.loads(pickle.dumps(source))
    assert again[2] == source[2] and again.digest == source.digest  # type: ignore[attr-defined]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]


def test_bad_samples_keep_their_positions(tmp_path: pathlib.Path) -> None:
    whole = tar([*pair("0"), *pair("1")])
    many = tar(
        [
            *pair("0"),
            ("1.jpg", b"no caption"),
            ("2.txt", b"no image"),
            *pair("3", text=b"\xff\xfe"),
            *pair("../../etc/passwd"),
            *pair("/outside/x"),
            *pair("4", b""),
            *pair("5", text=b""),
            *pair("6"),
            *pair("6"),
            *pair("0"),
            ("7.jpg", b"7"),
            ("7.jpg", b"7"),
            ("7.txt", b"7"),
            *pair("8"),
        ]
    )
    source = opened(tmp_path, many, b"", whole[: 3 * 1024 + 1500], tar([]), b"<html>" * 500)
    kinds = ["no_caption", "no_image", "invalid_utf8", "unsafe_name", "unsafe_name", "no_image", "no_caption"]
    assert contents(source) == [
        *("text", *(f"! {kind}" for kind in kinds), "text", "! duplicate_key", "! duplicate_key"),
        *("! no_caption", "! duplicate_key", "text"),
        "! empty_shard",
        *("text", "! no_caption", "! broken_shard"),
        "! empty_shard",
        "! broken_shard",
    ]
    names = {name_of(source, i).removeprefix(f"{tmp_path}/0.tar/"): i for i in range(14)}
    assert list(names) == [
        *("0", "1", "2", "3", "../../etc/passwd", "/outside/x", "4", "5", "6"),
        *("6 (sample 9)", "0 (sample 10)", "7", "7 (sample 12)", "8"),
    ]
    (tmp_path / "0.tar").unlink()
    assert name_of(source, 9) == f"{tmp_path}/0.tar/9"  # the position, where the key cannot be read


@pytest.mark.parametrize("prefix", ["", "./", "v1.0/a/", "long" * 30 + "/" + "name" * 20, "é" * 70])
@pytest.mark.parametrize("mtime", [0, 1.5])  # webdataset's writer stores fractions of a second in an extended header
def test_the_name_of_a_sample_has_its_whole_key(tmp_path: pathlib.Path, prefix: str, mtime: float) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in [*pair(f"{prefix}0"), *pair(f"{prefix}1")]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            archive.addfile(info, io.BytesIO(data))
    source = open_source(f"wds:{tmp_path}/0.tar", "train")
    assert [source[i].name for i in range(2)] == [f"{tmp_path}/0.tar/{prefix}{i}" for i in range(2)]


def webdataset_samples(path: pathlib.Path) -> list[tuple[bytes, str]]:
    """Returns the samples of open_clip 3.3's training: the stages of `get_wds_dataset` without the shuffles."""
    webdataset, data = pytest.importorskip("webdataset"), pytest.importorskip("open_clip_train.data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset does not close files
        with open(path, "rb") as file:
            members = list(webdataset.tariterators.tar_file_iterator(file))
        files = ({**member, "__url__": ""} for member in members)
        samples = [each for each in data.group_by_keys_nothrow(files) if data.filter_no_caption_or_no_image(each)]
        images = [webdataset.filters.getfirst(sample, "jpg;png;jpeg;webp") for sample in samples]
        gc.collect()
    return [(image, sample["txt"].decode()) for image, sample in zip(images, samples, strict=True)]


@pytest.mark.torch
def test_samples_equal_open_clip(tmp_path: pathlib.Path) -> None:
    suffixes = [("jpg", "png"), ("png", "jpeg"), ("jpeg", "webp"), ("webp", "JPG"), ("PNG", "webp"), ("b.jpg", "jpeg")]
    files: list[tuple[str, bytes]] = [("__meta__", b"m"), ("README", b"r")]
    for number, (first, second) in enumerate(suffixes):
        for order in ((first, second), (second, first)):
            key = f"dir.x/{number}{order[0].replace('.', '')}"
            files += [(f"{key}.{suffix}", f"{key} {suffix}".encode()) for suffix in order]
            files += [(f"{key}.json", b'{"caption": "another"}'), (f"{key}.txt", b"one\n two \xc3\xa9\n\nthree")]
            files += [(f"{key}.cls", b"1"), (f"{key}.caption", b"not this")]
    (tmp_path / "0.tar").write_bytes(tar(files))
    expected = webdataset_samples(tmp_path / "0.tar")
    source = open_source(f"wds:{tmp_path}/0.tar", "train")
    assert [(source[i].image, *source[i].captions) for i in range(len(source))] == expected and len(expected) == 12
    assert "4 without a suffix" not in source.notes[0] and "12 .cls" in source.notes[0]  # type: ignore[attr-defined]


def test_files_of_macos_are_skipped(tmp_path: pathlib.Path) -> None:
    files = [(f"d/{mark}{name}", data) for name, data in pair("0") + pair("1") for mark in ("._", "")]
    source = opened(tmp_path, tar([("__MACOSX/._x.jpg", b""), ("d/.DS_Store", b""), *files]))
    assert contents(source) == ["text", "text"]
    assert "10 files skipped: 8 hidden, 2 .json" in source.notes[0]  # type: ignore[attr-defined]


def test_an_image_of_another_format_is_used_if_there_is_no_other(tmp_path: pathlib.Path) -> None:
    source = opened(
        tmp_path, tar([("0.tif", b"T"), ("0.txt", b"a"), ("1.gif", b"G"), ("1.webp", b"W"), ("1.txt", b"b")])
    )
    assert [source[i].image for i in range(2)] == [b"T", b"W"]


@given(st.text("a./", max_size=9))
def test_names_are_split_as_in_webdataset(name: str) -> None:
    match = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name)
    assert split_name(name) == (match and match.groups())


@pytest.mark.parametrize(
    "header",
    [
        hostile(tarfile.REGTYPE, **{"GNU.sparse.map": "x"}),
        hostile(tarfile.GNUTYPE_LONGNAME, 2**40),
        hostile(tarfile.XHDTYPE, 2**70),
    ],
)
def test_a_false_header_ends_its_shard(tmp_path: pathlib.Path, header: bytes) -> None:
    whole = tar(pair("0"))[: 3 * 1024]
    assert contents(opened(tmp_path, whole + header + bytes(10240), header + bytes(10240))) == [
        *("text", "! broken_shard"),
        "! broken_shard",
    ]


def test_long_names_do_not_take_quadratic_time(tmp_path: pathlib.Path) -> None:
    assert contents(opened(tmp_path, tar([("a/" * 500_000, b""), *pair("0")]))) == [
        "text"
    ]  # quadratic time would be hours


@settings(max_examples=30)
@given(cut=st.integers(0, 10239))
def test_a_truncated_tar_gives_its_complete_samples(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    data = tar([*pair("0", text=b"0"), *pair("1", text=b"1"), *pair("2", text=b"2")])
    source = opened(tmp_path_factory.mktemp("cut"), data[:cut], tar(pair("whole")))
    whole = min(cut // 3072, 3)  # three headers and three blocks each
    *samples, last = contents(source)
    assert last == "text"
    # A cut in the padding after the last text loses nothing.
    good = [sample for sample in samples if not sample.startswith("!")]
    assert good == [str(i) for i in range(len(good))] and whole <= len(good) <= whole + 1
    assert cut >= 9216 or samples[-1] in ("! broken_shard", "! empty_shard") or cut % 512 == 0


def test_missing_and_changed_tars(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"/1\.tar: no such file"):
        (tmp_path / "0.tar").write_bytes(tar(pair("0")))
        open_source(f"wds:{tmp_path}/{{0..1}}.tar", "train")
    with pytest.raises(FileNotFoundError, match=r"x\*\.tar: no file matches"):
        open_source(f"wds:{tmp_path}/x*.tar", "train")
    source = opened(tmp_path, tar(pair("0")))
    size = (tmp_path / "0.tar").stat().st_size
    for data in (tar([*pair("0"), *pair("1")] * 9), b"<html>".ljust(size)):
        (tmp_path / "0.tar").write_bytes(data)
        assert contents(source) == ["! broken_shard"]


class Unreliable(LocalFileSystem):
    """Local files behind URLs; the first opens of a file fail."""

    protocol = "unreliable"
    failures: dict[str, int] = {}  # noqa: RUF012
    opened: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("unreliable://")

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        name = path.rpartition("/")[2]
        self.opened.append(name)
        if self.failures.get(name, 0):
            self.failures[name] -= 1
            raise ConnectionError("the store is away")
        return super()._open(path, *arguments, **options)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Unreliable]]:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    remote.mirror.cache_clear()
    Unreliable.failures, Unreliable.opened = {}, []
    yield Unreliable
    remote.mirror.cache_clear()


def test_reads_of_remote_samples_are_retried_and_cached(store: type[Unreliable], tmp_path: pathlib.Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar([*pair("0", text=b"0"), *pair("1", text=b"1")]))
    store.failures = {"0.tar": 2}
    source = open_source(f"wds:unreliable://{tmp_path}/0.tar", "train")
    assert contents(source) == ["0", "1"]
    store.opened.clear()
    store.failures = {"0.tar": 9}
    assert contents(source) == ["0", "1"] and not store.opened  # from the cache


def test_with_a_full_cache_samples_are_read_from_the_store(
    store: type[Unreliable], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("TCLIP_CACHE_GIB", "0")
    (tmp_path / "0.tar").write_bytes(tar([*pair("0"), *pair("1")]))
    source = open_source(f"wds:unreliable://{tmp_path}/0.tar", "train")
    contents(source)
    store.failures = {"0.tar": 3}
    assert contents(source) == ["! unreadable", "text"]


@pytest.mark.parametrize("written", [None, 700])
def test_on_a_full_disk_samples_are_read_from_the_store(
    store: type[Unreliable], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, written: int | None
) -> None:
    def fill(descriptor: int, data: bytes, offset: int) -> int:
        if written is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data[:written], offset)

    pwrite = os.pwrite
    (tmp_path / "0.tar").write_bytes(tar([*pair("0", b"image" * 999), *pair("1")]))
    source = open_source(f"wds:unreliable://{tmp_path}/0.tar", "train")
    assert source[1].image == b"image"  # cached: the range of sample 0 is then a hole, not beyond the end of the copy
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fill)
        assert source[0].image == b"image" * 999
    assert source[0].image == b"image" * 999


def test_an_unreadable_shard_is_one_bad_sample(store: type[Unreliable], tmp_path: pathlib.Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.tar").write_bytes(tar(pair("0")))
    store.failures = {"1.tar": 99}
    assert contents(open_source(f"wds:unreliable://{tmp_path}/*.tar", "train")) == ["text", "! unreadable", "text"]
    store.failures = {"3.tar": 99}
    (tmp_path / "3.tar").write_bytes(tar(pair("0")))
    with pytest.raises(ValueError, match=r"3\.tar: none of 1 shards can be read"):
        open_source(f"wds:unreliable://{tmp_path}/3.tar", "train")
    store.failures = {}
    assert contents(open_source(f"wds:unreliable://{tmp_path}/3.tar", "train")) == ["text"]
    with pytest.raises(ValueError, match=r"nothing://0\.tar: Protocol not known"):
        open_source("wds:nothing://0.tar", "train")
