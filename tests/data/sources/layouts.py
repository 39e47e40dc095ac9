"""The same four images and captions in every layout that a source reads."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from pyarrow import parquet
from tensorflow_datasets.proto import tf_example_pb2

from tclip_jax.data.sources import Record
from tests.tars import write_tar

IMAGES, CAPTIONS = 4, ("a red square", "a cat on a mat", "no dog", "a tall tree")


def png(shade: int) -> bytes:
    """Returns an image whose file size does not depend on the shade."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 200, 100)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def labelled_folder(root: pathlib.Path, images: list[bytes], captions: Sequence[str]) -> str:
    for number, image in enumerate(images):
        path = root / "train" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return f"folder:{root}"


def captioned_folder(root: pathlib.Path, images: list[bytes], captions: Sequence[str]) -> str:
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        (root / f"{number}.png").write_bytes(image)
        (root / f"{number}.txt").write_text(caption)
    return f"folder:{root}"


def tars(root: pathlib.Path, images: list[bytes], captions: Sequence[str]) -> str:
    pairs = [
        [(f"{number}.png", image), (f"{number}.txt", caption.encode())]
        for number, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]
    write_tar(root / "0.tar", [*pairs[0], *pairs[1]])
    write_tar(root / "1.tar", [*pairs[2], *pairs[3]])
    return f"wds:{root}/{{0..1}}.tar"


def export(root: pathlib.Path, images: list[bytes], captions: Sequence[str]) -> str:
    (root / "train").mkdir()
    (root / "classnames.txt").write_text("cat\ndog\n")
    (root / "train" / "nshards.txt").write_text("1")
    members = [
        each for i, data in enumerate(images) for each in ((f"{i}.png", data), (f"{i}.cls", str(i % 2).encode()))
    ]
    write_tar(root / "train" / "0.tar", members)
    return f"wds:{root}"


def array_records(root: pathlib.Path, images: list[bytes], captions: Sequence[str]) -> str:
    writer = array_record_module.ArrayRecordWriter(str(root / "0.array_record"), "group_size:1,uncompressed")
    for image, caption in zip(images, captions, strict=True):
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(image)
        example.features.feature["caption"].bytes_list.value.append(caption.encode())
        writer.write(example.SerializeToString(deterministic=True))
    writer.close()
    return f"arrayrecord:{root}/0.array_record"


def prepared(root: pathlib.Path, images: list[bytes], captions: Sequence[str]) -> str:
    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "caption": tfds.features.Text(),
    }

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
                yield i, {"image": io.BytesIO(image), "caption": caption}

    Tiny(data_dir=root, file_format="array_record").download_and_prepare()
    return f"tfds:tiny@{root}"


def csv_table(root: pathlib.Path, images: list[bytes], captions: Sequence[str]) -> str:
    for number, image in enumerate(images):
        (root / f"{number}.png").write_bytes(image)
    rows = "".join(f"{number}.png\t{caption}\n" for number, caption in enumerate(captions))
    (root / "all.tsv").write_text(f"filepath\ttitle\n{rows}")
    return f"csv:{root}/all.tsv"


def parquet_table(root: pathlib.Path, images: list[bytes], captions: Sequence[str]) -> str:
    for number, image in enumerate(images):
        (root / f"{number}.png").write_bytes(image)
    names = [f"{number}.png" for number in range(len(images))]
    parquet.write_table(pa.table({"image": names, "caption": list(captions)}), root / "all.parquet")
    return f"parquet:{root}/all.parquet"


def mixture(root: pathlib.Path, images: list[bytes], captions: Sequence[str]) -> str:
    return f"mixture:3*digits+1*{captioned_folder(root, images, captions)}"


def shade_of(record: Record) -> int:
    """Returns the shade of a record's image."""
    assert isinstance(record.image, bytes)
    return int(np.asarray(Image.open(io.BytesIO(record.image)))[0, 0, 0])


LAYOUTS = (
    labelled_folder,
    captioned_folder,
    tars,
    export,
    array_records,
    prepared,
    csv_table,
    parquet_table,
    mixture,
)
UNCAPTIONED = (labelled_folder, export)

Layout = Callable[[pathlib.Path, list[bytes], Sequence[str]], str]


def laid_out(layout: Layout, root: pathlib.Path, shades: Sequence[int], captions: Sequence[str] = CAPTIONS) -> str:
    root.mkdir(exist_ok=True)
    return layout(root, [png(shade) for shade in shades], captions)


def files_of(root: pathlib.Path) -> dict[pathlib.Path, os.stat_result]:
    return {path.relative_to(root): path.stat() for path in root.rglob("*") if path.is_file()}
