"""Tars of image-text pairs: what is read of whole ones, of damaged and hostile ones, and of remote ones."""

from __future__ import annotations

import errno
import gc
import io
import os
import pathlib
import pickle
import re
import tarfile
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from tclip_jax.data.sources import BadSample, Record, Source, open_source, remote, shard_index
from tclip_jax.data.sources.shard_index import ShardIndex, write_sparse_index
from tclip_jax.data.sources.tar import split_name
from tclip_jax.data.sources.tars import Tars


def tar(files: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def hostile(kind: bytes, size: int = 0, **extended: str) -> bytes:
    """A header of a kind that extends the next one, with a size or with values that are lies."""
    info = tarfile.TarInfo("x.jpg")
    info.type, info.size, info.pax_headers = kind, size, extended
    return info.tobuf(tarfile.PAX_FORMAT if extended else tarfile.GNU_FORMAT)


def pair(key: str, image: bytes = b"image", text: bytes = b"text") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image), (f"{key}.json", b"{}"), (f"{key}.txt", text)]


def contents(source: Source) -> list[str]:
    """The captions of good samples, the kinds of bad ones."""
    found = []
    for i in range(len(source)):
        try:
            found.append(" | ".join(source[i].captions))
        except BadSample as error:
            assert error.name and error.reason
            found.append(f"! {error.kind}")
    return found


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
        f"{tmp_path}/0.tar and 1 more: 6 files passed over: 3 .json, 1 .png, 1 of webdataset's own (__…__), "
        "1 without a suffix; first __meta__"
    ]
    again = pickle.loads(pickle.dumps(source))
    assert again[2] == source[2] and again.digest == source.digest  # type: ignore[attr-defined]
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            source[wrong]


def test_what_is_bad_keeps_its_place(tmp_path: pathlib.Path) -> None:
    whole = tar([*pair("0"), *pair("1")])
    many = tar(
        [
            *pair("0"),
            ("1.jpg", b"no caption"),
            ("2.txt", b"no image"),
            *pair("3", text=b"\xff\xfe"),
            *pair("../../etc/passwd"),
            *pair("/root/x"),
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


@pytest.mark.parametrize("prefix", ["", "./", "v1.0/a/", "long" * 30 + "/" + "name" * 20, "é" * 70])
@pytest.mark.parametrize("mtime", [0, 1.5])  # webdataset's writer stores fractions of a second, in a header before
def test_a_sample_is_named_by_its_whole_key(tmp_path: pathlib.Path, prefix: str, mtime: float) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in [*pair(f"{prefix}0"), *pair(f"{prefix}1")]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            archive.addfile(info, io.BytesIO(data))
    source = open_source(f"wds:{tmp_path}/0.tar", "train")
    assert [source[i].name for i in range(2)] == [f"{tmp_path}/0.tar/{prefix}{i}" for i in range(2)]


def webdataset_samples(path: pathlib.Path) -> list[tuple[bytes, str]]:
    """The samples that open_clip 3.3 trains on, by the stages of its `get_wds_dataset` without its shuffles."""
    webdataset, data = pytest.importorskip("webdataset"), pytest.importorskip("open_clip_train.data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files open
        with open(path, "rb") as file:
            members = list(webdataset.tariterators.tar_file_iterator(file))
        files = ({**member, "__url__": ""} for member in members)
        samples = [each for each in data.group_by_keys_nothrow(files) if data.filter_no_caption_or_no_image(each)]
        images = [webdataset.filters.getfirst(sample, "jpg;png;jpeg;webp") for sample in samples]
        gc.collect()
    return [(image, sample["txt"].decode()) for image, sample in zip(images, samples, strict=True)]


@pytest.mark.torch
def test_samples_are_those_of_open_clip(tmp_path: pathlib.Path) -> None:
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


def test_what_a_mac_puts_beside_is_passed_over(tmp_path: pathlib.Path) -> None:
    files = [(f"d/{mark}{name}", data) for name, data in pair("0") + pair("1") for mark in ("._", "")]
    source = opened(tmp_path, tar([("__MACOSX/._x.jpg", b""), ("d/.DS_Store", b""), *files]))
    assert contents(source) == ["text", "text"]
    assert "10 files passed over: 8 hidden, 2 .json" in source.notes[0]  # type: ignore[attr-defined]


def test_an_image_of_any_format_counts_where_there_is_no_other(tmp_path: pathlib.Path) -> None:
    source = opened(
        tmp_path, tar([("0.tif", b"T"), ("0.txt", b"a"), ("1.gif", b"G"), ("1.webp", b"W"), ("1.txt", b"b")])
    )
    assert [source[i].image for i in range(2)] == [b"T", b"W"]


@given(st.text("a./", max_size=9))
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
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
def test_a_header_that_lies_costs_the_rest_of_its_shard(tmp_path: pathlib.Path, header: bytes) -> None:
    whole = tar(pair("0"))[: 3 * 1024]
    assert contents(opened(tmp_path, whole + header + bytes(10240), header + bytes(10240))) == [
        *("text", "! broken_shard"),
        "! broken_shard",
    ]


def test_the_time_for_a_name_does_not_grow_with_its_square(tmp_path: pathlib.Path) -> None:
    assert contents(opened(tmp_path, tar([("a/" * 500_000, b""), *pair("0")]))) == ["text"]  # else it takes hours


@settings(max_examples=30)
@given(cut=st.integers(0, 10239))
def test_a_tar_cut_anywhere_gives_its_whole_samples(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    data = tar([*pair("0", text=b"0"), *pair("1", text=b"1"), *pair("2", text=b"2")])
    source = opened(tmp_path_factory.mktemp("cut"), data[:cut], tar(pair("whole")))
    whole = min(cut // 3072, 3)  # three headers and three blocks each
    *found, last = contents(source)
    assert last == "text"
    # The last text may be cut after its bytes and before the end of its block, where nothing is lost.
    good = [each for each in found if not each.startswith("!")]
    assert good == [str(i) for i in range(len(good))] and whole <= len(good) <= whole + 1
    assert cut >= 9216 or found[-1] in ("! broken_shard", "! empty_shard") or cut % 512 == 0


def test_a_tar_that_is_not_there_or_has_changed(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"/1\.tar: no such file"):
        (tmp_path / "0.tar").write_bytes(tar(pair("0")))
        open_source(f"wds:{tmp_path}/{{0..1}}.tar", "train")
    with pytest.raises(FileNotFoundError, match=r"x\*\.tar: no file matches"):
        open_source(f"wds:{tmp_path}/x*.tar", "train")
    source = opened(tmp_path, tar(pair("0")))
    size = (tmp_path / "0.tar").stat().st_size
    for other in (tar([*pair("0"), *pair("1")] * 9), b"<html>".ljust(size)):
        (tmp_path / "0.tar").write_bytes(other)
        assert contents(source) == ["! broken_shard"]


def test_an_index_is_made_once_and_gone_on_with(
    tmp_path: pathlib.Path, own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[str] = []

    def scan(path: str) -> shard_index.Scan:
        scanned.append(path)
        if len(scanned) == 3:
            raise KeyboardInterrupt
        return shard_index.Scan(100, 2)

    monkeypatch.setattr(shard_index.concurrent.futures, "ThreadPoolExecutor", Serial)
    shards = ["a", "b", "c", "d"]
    with pytest.raises(KeyboardInterrupt):
        shard_index.open_index("arrayrecord", shards, scan)
    index = shard_index.open_index("arrayrecord", shards, scan)
    assert scanned == ["a", "b", "c", "c", "d"] and len(index) == 8
    assert [index.locate(i) for i in (0, 3, 7)] == [(0, 0), (1, 1), (3, 1)]
    assert shard_index.open_index("arrayrecord", shards, scan).folder == index.folder and len(scanned) == 5
    (index.folder / "starts.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a whole index; delete the folder"):
        ShardIndex(index.folder)


def test_a_missing_shard_is_told_before_all_others_are_read() -> None:
    scanned: list[str] = []

    def scan(path: str) -> shard_index.Scan:
        scanned.append(path)
        if path == "store://0":
            raise FileNotFoundError(path)
        time.sleep(0.01)
        return shard_index.Scan(1, 1)

    with pytest.raises(FileNotFoundError):
        shard_index.open_index("arrayrecord", [f"store://{i}" for i in range(10_000)], scan)
    assert len(scanned) < 5_000


def test_names_of_shards_may_hold_any_letter_but_a_new_line() -> None:
    shards = ["a\u2028b", "c\x85", "d\x0be"]
    assert shard_index.open_index("arrayrecord", shards, lambda path: shard_index.Scan(1, 1)).shards == shards


class Serial:
    """A pool that does each task when it is given."""

    def __init__(self, workers: int) -> None:
        del workers

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None: ...

    def shutdown(self, **_: object) -> None: ...

    def map(self, function: Any, each: Any) -> Any:
        return map(function, each)

    def submit(self, function: Any, *arguments: Any) -> Any:
        future: Any = shard_index.concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any))
def test_places_of_samples(tmp_path_factory: pytest.TempPathFactory, counts: list[int]) -> None:
    tmp = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCLIP_CACHE_DIR", str(tmp))
        index = shard_index.open_index(
            "arrayrecord", [str(i) for i in range(len(counts))], lambda path: shard_index.Scan(1, counts[int(path)])
        )
    expected = [(shard, place) for shard, count in enumerate(counts) for place in range(count)]
    assert [index.locate(i) for i in range(len(index))] == expected


def test_a_sparse_index_of_any_size(tmp_path: pathlib.Path) -> None:
    write_sparse_index(tmp_path / "sparse", shards=300, samples=1_000_000)
    source = Tars(ShardIndex(tmp_path / "sparse"))
    assert len(source) == 300_000_000 and (tmp_path / "sparse" / "samples.bin").stat().st_blocks < 100
    with pytest.raises(BadSample, match=r"/nowhere/000299\.tar/999999: no jpg, png, jpeg, webp beside"):
        source[299_999_999]


class Unreliable(LocalFileSystem):
    """Local files behind URLs, which fail to be opened the first times."""

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


def test_a_remote_sample_is_tried_again_and_kept(store: type[Unreliable], tmp_path: pathlib.Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar([*pair("0", text=b"0"), *pair("1", text=b"1")]))
    store.failures = {"0.tar": 2}
    source = open_source(f"wds:unreliable://{tmp_path}/0.tar", "train")
    assert contents(source) == ["0", "1"]
    store.opened.clear()
    store.failures = {"0.tar": 9}
    assert contents(source) == ["0", "1"] and not store.opened  # from the copy


def test_without_room_samples_are_read_from_the_store(
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
    assert source[1].image == b"image"  # what lies behind is kept: before it is a hole, not the end of the copy
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fill)
        assert source[0].image == b"image" * 999
    assert source[0].image == b"image" * 999


def test_a_shard_that_cannot_be_read_costs_one_sample(store: type[Unreliable], tmp_path: pathlib.Path) -> None:
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
