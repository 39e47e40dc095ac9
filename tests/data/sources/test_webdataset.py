"""Exports of CLIP_benchmark: complete, damaged and hostile exports."""

from __future__ import annotations

import bz2
import gc
import glob
import gzip
import io
import lzma
import pathlib
import pickle
import tarfile
import warnings
from collections.abc import Mapping

import numpy as np
import pytest

from tclip_jax.data.sources import BadSample, open_source, remote
from tclip_jax.data.sources.webdataset import Webdataset
from tests.tars import write_tar


def write(folder: pathlib.Path, *shards: Mapping[str, bytes], **texts: str) -> pathlib.Path:
    (folder / "test").mkdir(parents=True)
    for number, members in enumerate(shards):
        write_tar(folder / "test" / f"{number}.tar", members.items())
    (folder / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def npy(array: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array), **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def test_labelled_samples_in_the_order_of_the_shards(tmp_path: pathlib.Path) -> None:
    first = {"s0.webp": b"0", "s0.cls": b"2", "s1.cls": b" 0\n", "s1.png": b"1", "__meta__": b"", "README": b""}
    second = {"a/b.c.jpg": b"", "dir/x.JPEG": b"3", "dir/x.jpg": b"4", "dir/x.cls": b"1"}
    names = "snow leopard\n\n  cat \n"
    templates = "a {c}.\nthe {c}\n"
    folder = write(tmp_path / "wds_x", first, second, classnames=names, zeroshot_classification_templates=templates)
    source = Webdataset(str(folder), "test")
    assert source.kind == "classification" and source.classnames == ("snow leopard", "", "cat")
    assert source.templates == ("a {c}.", "the {c}")
    records = [source[i] for i in range(len(source))]
    assert [(r.image, r.label, r.name) for r in records] == [
        (b"0", 2, "wds_x/test/0.tar/s0"),
        (b"1", 0, "wds_x/test/0.tar/s1"),
        (b"", -1, "wds_x/test/1.tar/a/b"),  # the suffix is c.jpg
        (b"4", 1, "wds_x/test/1.tar/dir/x"),  # jpg is preferred to jpeg
    ]
    again = pickle.loads(pickle.dumps(source))
    assert again[1].image == b"1" and all(record.captions == () for record in records)


def test_captions_are_the_lines_of_the_text(tmp_path: pathlib.Path) -> None:
    members = {
        "0.png": b"",
        "0.txt": "a café\nb\u2028\x0b \r\n\nc".encode(),
        "1.png": b"",
        "2.txt": b"d\xff",
        "2.jpg": b"x",
    }
    source = open_source(f"wds:{write(tmp_path / 'x', members, dataset_type=' Retrieval')}", "test")
    assert source.classnames == ()
    assert [source[i].captions for i in range(2)] == [("a café", "b\u2028\x0b ", "", "c"), ()]
    with pytest.raises(BadSample, match=r"0\.tar/2: the caption is not UTF-8 at byte 1"):
        source[2]


def test_skipped_files_are_counted(tmp_path: pathlib.Path) -> None:
    members = {
        "0.png": b"",
        "0.jpg": b"",
        "0.cls": b"0",
        "0.json": b"",
        "._0.png": b"",
        "d/._0.cls": b"",
        "README": b"",
    }
    folder = write(tmp_path / "x", members, classnames="a\n\nc\n")
    (folder / "test" / "1.tar").write_bytes(b"of a later export")
    source = Webdataset(str(folder), "test")
    assert len(source) == 1 and source.notes == [
        f"{folder}/test: 6 files skipped: 2 hidden, 1 .jpg, 1 .json, 1 shard not counted in nshards.txt, "
        "1 without a suffix; first ._0.png",
        f"{folder}/classnames.txt: line 2 is blank, so its class has no name",
    ]


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
def test_compressed_shards_are_refused(tmp_path: pathlib.Path, kind: str) -> None:
    folder = write(tmp_path / "x", {"0.png": b"", "0.cls": b"0"}, classnames="a\n")
    shard = folder / "test" / "0.tar"
    pack = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}[kind]
    shard.write_bytes(pack(shard.read_bytes()))
    with pytest.raises(ValueError, match=rf"0\.tar: compressed with \w+: unpack .*{kind[0]}"):
        Webdataset(str(folder), "test")
    with pytest.raises(ValueError, match=rf"0\.tar: compressed with \w+: unpack .*{kind[0]}"):
        open_source(f"wds:{shard}", "test")
    shard.rename(tmp_path / f"0.tar.{kind}")
    with pytest.raises(ValueError, match=rf"0\.tar\.{kind}: compressed with"):
        open_source(f"wds:{tmp_path}/0.tar.{kind}", "test")
    with pytest.raises(FileNotFoundError, match=r"0\.tar: no such file, although nshards\.txt counts it"):
        Webdataset(str(folder), "test")


@pytest.mark.parametrize("inside", ["", "train", "train [1]"])
def test_a_folder_of_tars_is_read_as_its_tars(tmp_path: pathlib.Path, inside: str) -> None:
    folder, tars = tmp_path / "cc12m", tmp_path / "cc12m" / inside
    for number in (1, 0):
        write_tar(tars / f"{number}.tar", [(f"{number}.jpg", b"x"), (f"{number}.txt", b"a caption\nof two lines")])
    (tars / "stats.json").write_text("{}")
    source = open_source(f"wds:{folder}", inside or "train")
    same = open_source(f"wds:{glob.escape(str(tars))}/*.tar", "train")
    assert [source[i] for i in range(len(source))] == [same[i] for i in range(len(same))]
    assert [record.name for record in map(source.__getitem__, range(2))] == [f"{tars}/0.tar/0", f"{tars}/1.tar/1"]
    assert source[0].captions == ("a caption\nof two lines",) and source.classnames == ()


def test_an_export_is_never_read_as_a_folder_of_tars(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train/nshards\.txt: no such file; a webdataset export of CLIP_b"):
        open_source(f"wds:{tmp_path}", "train")
    folder = write(tmp_path / "x", {"0.png": b"", "0.txt": b"a"}, dataset_type="retrieval")
    with pytest.raises(FileNotFoundError, match=r"x: no split 'train'; it has test$"):
        open_source(f"wds:{folder}", "train")
    (folder / "test" / "nshards.txt").unlink()  # as after an interrupted download
    with pytest.raises(FileNotFoundError, match=r"test/nshards\.txt: no such file"):
        open_source(f"wds:{folder}", "test")


def test_a_sample_that_cannot_be_read_has_its_own_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0,))
    source = Webdataset(str(write(tmp_path / "x", {"a.png": b"", "a.cls": b"0"}, classnames="a\n")), "test")
    name = source[0].name
    (tmp_path / "x" / "test" / "0.tar").unlink()
    with pytest.raises(BadSample) as error:
        source[0]
    assert (error.value.kind, error.value.name) == ("unreadable", name)


@pytest.mark.parametrize(
    ("data", "label"),
    [
        (npy([1, 0, 1]), [1, 0, 1]),
        (npy(np.array([0, 1, 0], np.float32)), [0, 1, 0]),
        (npy([True, False, True]), [1, 0, 1]),
        (npy([1, 0]), None),
        (npy([[1, 0, 1]]), None),
        (npy([1, 0, 2]), None),
        (npy([1, 0, np.nan]), None),
        (npy([1, 0, 1])[:-1], None),
        (npy(np.array([1, None, "x"], object), allow_pickle=True), None),
        (npy(1), None),
        (b"", None),
        (b"\x93NUMPY\x01\x00\xff\xff{", None),
        (b"\x93NUMPY\x01\x00\x02\x00{\n", None),
        (b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,), }\n", None),
    ],
)
def test_the_headers_of_vectors_are_not_trusted(tmp_path: pathlib.Path, data: bytes, label: list[int] | None) -> None:
    folder = write(tmp_path / "x", {"0.png": b"", "0.npy": data}, dataset_type="multilabel", classnames="a\nb\nc\n")
    vector = Webdataset(str(folder), "test")[0].label
    assert isinstance(vector, np.ndarray) and vector.dtype == np.int32
    assert vector.tolist() == (label or [-1, -1, -1])


@pytest.mark.parametrize("text", [b"", b"-1", b"1.0", b"cat", b"9" * 5000, b"1 2", "١".encode()])
def test_an_invalid_class_becomes_minus_one(tmp_path: pathlib.Path, text: bytes) -> None:
    folder = write(tmp_path / "x", {"0.png": b"", "0.cls": text}, classnames="a\n")
    assert Webdataset(str(folder), "test")[0].label == -1


def damage(kind: str, folder: pathlib.Path) -> None:
    shard = folder / "test" / "0.tar"
    data = bytearray(shard.read_bytes())
    header = tarfile.TarInfo("0.png")
    if kind == "cut within a file":
        data = data[: 512 + 600]
    elif kind == "cut within a header":
        data = data[: 512 + 1024 + 100]
    elif kind == "damaged second header":
        data[512 + 1024 + 4] ^= 1
    elif kind == "size beyond the file":
        header.size = 1 << 40
        data[:512] = header.tobuf(tarfile.GNU_FORMAT)
    elif kind == "size below zero":
        header.size = -1024
        data[:512] = header.tobuf(tarfile.GNU_FORMAT)
    elif kind == "no tar":
        data[:512] = b"<html>" * 86
    shard.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut within a file", "not a complete tar file"),
        ("cut within a header", "not a complete tar file"),
        ("damaged second header", "damaged header at byte 1536"),
        ("size beyond the file", "'0.png' does not lie within the file"),
        ("size below zero", "not a complete tar file"),
        ("no tar", "not a complete tar file"),
    ],
)
def test_damaged_shards_are_refused(tmp_path: pathlib.Path, kind: str, message: str) -> None:
    folder = write(tmp_path / "x", {"0.png": b"p" * 1000, "0.cls": b"0"}, classnames="a\n")
    damage(kind, folder)
    with pytest.raises(ValueError, match=message) as error:
        Webdataset(str(folder), "test")
    assert str(error.value).startswith(f"{folder}/test/0.tar: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: (f / "test" / "0.tar").unlink(), FileNotFoundError, r"test/0\.tar: no such file, although nshards"),
        (lambda f: (f / "test" / "nshards.txt").unlink(), FileNotFoundError, r"nshards\.txt: no such file"),
        (lambda f: (f / "test" / "nshards.txt").write_text("-1"), ValueError, "'-1' is not a number of shards"),
        (lambda f: (f / "test" / "nshards.txt").write_text("9" * 99), ValueError, "is not a number of shards"),
        (lambda f: (f / "classnames.txt").unlink(), FileNotFoundError, r"classnames\.txt: no such file"),
        (
            lambda f: (f / "classnames.txt").write_bytes(b"\xff"),
            ValueError,
            r"classnames\.txt: line 1 is not UTF-8 \(byte 0xff\)",
        ),
        (lambda f: (f / "classnames.txt").write_bytes(bytes(1 << 25)), ValueError, "33,554,432 bytes, where at most"),
        (lambda f: (f / "dataset_type.txt").write_text("video"), ValueError, "'video' is not one of classification"),
    ],
)
def test_missing_and_invalid_files_are_named(
    tmp_path: pathlib.Path, change: object, error: type[Exception], message: str
) -> None:
    folder = write(tmp_path / "x", {"0.png": b"", "0.cls": b"0"}, classnames="a\n")
    change(folder)  # type: ignore[operator]
    with pytest.raises(error, match=message):
        Webdataset(str(folder), "test")


def test_missing_folders_and_repeated_members_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; expected tars, or a folder of tars"):
        open_source(f"wds:{tmp_path}/nowhere", "test")
    folder = write(tmp_path / "x", {"0.png": b"", "0.cls": b"0", "0.PNG": b""}, classnames="a\n")
    with pytest.raises(ValueError, match=r"0\.tar: 0\.png occurs twice"):
        Webdataset(str(folder), "test")
    source = Webdataset(str(write(tmp_path / "y", {"0.png": b"", "0.cls": b"0"}, classnames="a\n")), "test")
    with pytest.raises(FileNotFoundError, match=r"zeroshot_classification_templates\.txt: no such file"):
        _ = source.templates


@pytest.mark.torch
def test_samples_equal_webdataset(tmp_path: pathlib.Path) -> None:
    """webdataset, which CLIP_benchmark uses, writes the tars; it and this package read them."""
    webdataset = pytest.importorskip("webdataset")
    folder = write(tmp_path / "x", classnames="".join(f"{i}\n" for i in range(5)))
    for shard in range(2):
        with webdataset.TarWriter(str(folder / "test" / f"{shard}.tar")) as sink:
            for i in range(4 - shard):
                key = f"{'very_' * 30 * shard}long/{'x' * 90}{i}"
                sink.write({"__key__": key, "png": bytes([shard, i]), "cls": i, "json": {"more": i}})
    (folder / "test" / "nshards.txt").write_text("2")
    shards = [str(folder / "test" / f"{i}.tar") for i in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset does not close files
        samples = list(webdataset.WebDataset(shards, shardshuffle=False))
        gc.collect()
    source = Webdataset(str(folder), "test")
    expected = [(sample["png"], int(sample["cls"])) for sample in samples]
    assert [(source[i].image, source[i].label) for i in range(len(source))] == expected and len(expected) == 7
