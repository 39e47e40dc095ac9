from __future__ import annotations

import os
import pathlib
import pickle

import pytest
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from tclip_jax.data.sources import BadSample, open_source


def example(**features: list[bytes]) -> bytes:
    message = tf_example_pb2.Example()
    for name, values in features.items():
        message.features.feature[name].bytes_list.value.extend(values)
    return message.SerializeToString()


def write(path: pathlib.Path, records: list[bytes]) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def kind(source: object, index: int) -> str:
    with pytest.raises(BadSample) as error:
        source[index]  # type: ignore[index]
    return error.value.kind


def test_records_of_several_files(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "0.array_record", [example(image=[bytes([i])], caption=[b"a", b"b"]) for i in range(3)])
    write(tmp_path / "1.array_record", [example(jpg=[b"x"], txt=["é".encode()]), example(txt=[b"x"]), b"\xff\xff"])
    write(tmp_path / "2.array_record", [])
    source = open_source(f"arrayrecord:{tmp_path}/*.array_record", "train")
    assert len(source) == 7
    assert [(source[i].image, source[i].captions) for i in range(3)] == [(bytes([i]), ("a", "b")) for i in range(3)]
    assert source[3].image == b"x" and source[3].captions == ("é",)
    assert [kind(source, i) for i in (4, 5, 6)] == ["no_image", "corrupt_record", "empty_shard"]
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_every_text_is_a_caption_and_other_examples_are_bad_samples(tmp_path: pathlib.Path) -> None:
    numbers = tf_example_pb2.Example()
    numbers.features.feature["image"].int64_list.value.extend([1, 2])
    records = [example(text=["two\nlines\u2028".encode(), b"b"], png=[b"x"]), numbers.SerializeToString()]
    records += [example(image=[b"x", b"y"], text=[b"a"]), example(image=[], jpg=[b"z"], text=[b"a"])]
    write(tmp_path / "0.array_record", records)
    source = open_source(f"arrayrecord:{tmp_path}/0.array_record", "train")
    assert source[0].captions == ("two\nlines", "b") and source[3].image == b"z"
    with pytest.raises(
        BadSample, match=r"/1: no bytes in any of the features image, image/encoded, .*; the Example has image$"
    ):
        source[1]
    with pytest.raises(BadSample, match=r"/2: 2 images in one Example$"):
        source[2]


def test_damaged_files(tmp_path: pathlib.Path) -> None:
    whole = tmp_path / "whole.array_record"
    write(whole, [example(image=[bytes(3000)], caption=[b"a"])] * 40)
    data = whole.read_bytes()
    (tmp_path / "cut.array_record").write_bytes(data[:-5000])
    (tmp_path / "empty.array_record").write_bytes(b"")
    (tmp_path / "html.array_record").write_bytes(b"<html>" * 30_000)
    source = open_source(f"arrayrecord:{tmp_path}/{{whole,cut,empty,html}}.array_record", "train")
    assert len(source) == 43
    assert [kind(source, i) for i in (40, 41, 42)] == ["broken_shard", "empty_shard", "broken_shard"]


def test_a_file_that_changed_after_indexing_is_not_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "0.array_record"
    write(path, [example(image=[bytes(9)], caption=[b"a"])] * 4)
    first = open_source(f"arrayrecord:{path}", "train")
    write(path, [example(image=[os.urandom(100_000)], caption=[b"another"])] * 5)
    with pytest.raises(BadSample, match=r"0\.array_record: the file was changed after it was indexed: restart"):
        first[0]
    second = open_source(f"arrayrecord:{path}", "train")
    assert second[4].captions == ("another",) and len(second) == 5


def test_missing_files_and_urls_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.array_record"):
        open_source(f"arrayrecord:{tmp_path}/none.array_record", "train")
    with pytest.raises(ValueError, match="ArrayRecord's reader opens only local paths"):
        open_source("arrayrecord:gs://bucket/*.array_record", "train")
