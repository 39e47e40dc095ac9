"""Digests of files: each local file is read once; remote files are identified by their store."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from tclip_jax.data.sources import content, digest, open_source, remote
from tclip_jax.data.sources.content import contents, stamps
from tests.data.sources.layouts import (
    laid_out,
    shade_of,
    tars,
)


def test_a_file_is_read_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b", "ü\udcff")]
    for path in paths:
        pathlib.Path(path).write_bytes(path.encode("utf-8", "surrogateescape"))
    read: list[str] = []
    monkeypatch.setattr(content, "_read", lambda path, really=content._read: (read.append(path), really(path))[1])
    expected = [hashlib.blake2b(pathlib.Path(path).read_bytes(), digest_size=16).hexdigest() for path in paths]

    # A file written just now may be written again within the same clock tick, so its digest is not stored.
    assert list(contents([*paths, paths[0]])) == [*expected, expected[0]] and sorted(read) == sorted(paths)
    assert list(contents(paths)) == expected and len(read) == 6
    monkeypatch.setattr(content, "_RECENT_NS", 0)
    assert list(contents(paths)) == expected and len(read) == 9
    assert list(contents(paths)) == expected and len(read) == 9

    # A file that replaces another with the same size and times has another inode and another ctime.
    (tmp_path / "new").write_bytes(b"x" * os.path.getsize(paths[0]))
    os.utime(tmp_path / "new", ns=(0, os.stat(paths[0]).st_mtime_ns))
    (tmp_path / "new").replace(paths[0])
    changed = list(contents(paths))
    assert changed[1:] == expected[1:] and changed[0] != expected[0] and len(read) == 10


@pytest.mark.parametrize("broken", [b"no database" * 100, None])
def test_without_the_database_files_are_read_again(
    tmp_path: pathlib.Path,
    own_cache: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: bytes | None,
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    if broken:
        (own_cache / "content.sqlite").write_bytes(broken)
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("TCLIP_CACHE_DIR", str(tmp_path / "file" / "folder"))
    content._warnings.clear()
    for _ in range(2):
        assert list(contents([str(tmp_path / "a")])) == [hashlib.blake2b(b"a", digest_size=16).hexdigest()]
    assert len(caplog.messages) == 1 and "content.sqlite cannot be used, so every start reads all files" in caplog.text


def test_pipes_and_large_files_are_not_read(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)  # a sparse file: reading it would take an hour
    names = ("pipe", "", "nothing", "pipe/x", "large")
    assert list(contents([str(tmp_path / name) for name in names], max_bytes=1 << 28)) == [
        *("no regular file", "no regular file", "missing", "missing"),
        f"{1 << 40} bytes",
    ]


class Store(LocalFileSystem):
    """Local files behind URLs, with metadata that a test sets."""

    protocol = "stating"
    stated: dict[str, Any] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("stating://")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self.asked.append(path)
        status = super().info(path, **options)
        return {"name": path, "size": status["size"], "type": status["type"], **self.stated}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Store]]:
    fsspec.register_implementation("stating", Store, clobber=True)
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0,))
    content._warnings.clear()
    remote.mirror.cache_clear()
    Store.stated, Store.asked = {}, []
    yield Store
    remote.mirror.cache_clear()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"md5Hash": "aa==", "etag": "1"}, {"md5Hash": "ab==", "etag": "1"}),
        ({"crc32c": "x"}, {"crc32c": "y"}),
        ({"ETag": '"1"', "LastModified": "today"}, {"ETag": '"2"', "LastModified": "today"}),
        ({"lfs": {"sha256": "1"}}, {"lfs": {"sha256": "2"}}),
        tuple({"content_settings": {"content_md5": bytearray(each)}} for each in (b"1", b"2")),
        ({"generation": "1"}, {"generation": "2"}),
    ],
)
def test_the_checksum_of_its_store_identifies_a_remote_file(
    store: type[Store], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, first: Any, second: Any
) -> None:
    spec = laid_out(tars, tmp_path, (1, 2, 3, 4)).replace("wds:", "wds:stating://")
    store.stated = first
    before = open_source(spec, "train")
    digest_before, image = digest(before), before[0].image
    laid_out(tars, tmp_path, (9, 2, 3, 4))
    # With an equal checksum no file is read; with another one neither the cached samples nor the index are used.
    assert digest(open_source(spec, "train")) == digest_before and open_source(spec, "train")[0].image == image
    store.stated = second
    after = open_source(spec, "train")
    assert digest(after) != digest_before and shade_of(after[0]) == 9
    assert not caplog.messages


def test_a_store_without_checksums_is_named_once(
    store: type[Store], tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = laid_out(tars, tmp_path, (1, 2, 3, 4)).replace("wds:", "wds:stating://")
    digests = []
    for stated in ({"mtime": 1.0}, {"mtime": 2.0}, {}):
        store.stated = stated
        digests.append(digest(open_source(spec, "train")))
    assert len(set(digests)) == 3
    assert caplog.messages == [
        f"stating:// gives no checksums: files are identified by {known}, so replacing a file by one with the same "
        f"{known} is not detected"
        for known in ("size and time", "size")
    ]


def test_many_files_of_a_store_need_one_listing(store: type[Store], tmp_path: pathlib.Path) -> None:
    urls = [f"stating://{tmp_path}/{i}" for i in range(70)]
    for i in range(69):
        (tmp_path / str(i)).touch()
    store.stated = {"md5": "x"}
    result = stamps(urls)
    assert result == ["md5 x 0"] * 69 + ["missing"] and store.asked.count(f"{tmp_path}/3") <= 1


def test_an_interrupted_read_resumes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(tmp_path / str(i)) for i in range(3)]
    for path in paths:
        pathlib.Path(path).write_text(path)
    monkeypatch.setattr(content, "_RECENT_NS", 0)
    monkeypatch.setattr(content, "_COMMIT_SECONDS", 0.0)
    read: list[str] = []

    def killed(path: str, really: Callable[[str], str] = content._read) -> str:
        if path == paths[2]:
            raise KeyboardInterrupt
        read.append(path)
        return really(path)

    with monkeypatch.context() as patch:
        patch.setattr(content, "_read", killed)
        with pytest.raises(KeyboardInterrupt):
            list(contents(paths))
    assert read == paths[:2]
    monkeypatch.setattr(content, "_read", lambda path, really=content._read: (read.append(path), really(path))[1])
    list(contents(paths))
    assert read == paths
    with contextlib.closing(sqlite3.connect(content.cache_folder() / "content.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM content").fetchone() == (3,)
