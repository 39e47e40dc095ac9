from __future__ import annotations

import io
import pathlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tclip_jax.data.sources import BadSample, open_source

ROWS = 5
IMAGE = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
TEXT = tfds.features.Text()
LABELLED = {"image": IMAGE, "label": tfds.features.ClassLabel(names=["cat", "dog"])}


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def label_zero(index: int) -> dict[str, Any]:
    return {"label": 0}


def prepare(data_dir: pathlib.Path, features: dict[str, Any], row: Callable[[int], dict[str, Any]]) -> None:
    """Writes the data set `tiny` with splits train and test. Images are BytesIO, so TensorFlow is not needed."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for i in range(ROWS):
                yield i, {"image": io.BytesIO(png(i)), **row(i)}

    Tiny(data_dir=data_dir, file_format="array_record").download_and_prepare()


def test_labelled_data(tmp_path: pathlib.Path) -> None:
    features = {**LABELLED, "image/filename": TEXT}
    prepare(tmp_path, features, lambda i: {"label": i % 2, "image/filename": f"{i}.png"})

    source = pickle.loads(pickle.dumps(open_source(f"tfds:tiny@{tmp_path}", "train")))

    assert source.classnames == ("cat", "dog")
    assert {(source[i].image, source[i].label) for i in range(len(source))} == {(png(i), i % 2) for i in range(ROWS)}
    assert source[2].captions == () and source[2].name == "tiny/train/2"
    assert len(open_source(f"tfds:tiny:1.0.0@{tmp_path}", "test[:40%]")) == 2


@pytest.mark.parametrize(
    ("feature", "spec", "value", "captions"),
    [
        ("caption", TEXT, "ein Café", ("ein Café",)),
        ("texts", tfds.features.Sequence(TEXT), ["a", "b"], ("a", "b")),
        ("captions", tfds.features.Sequence({"text": TEXT}), [{"text": "a"}, {"text": "b"}], ("a", "b")),
        ("captions", tfds.features.Sequence(TEXT), [], ()),
    ],
)
def test_captioned_data(tmp_path: pathlib.Path, feature: str, spec: Any, value: Any, captions: tuple[str, ...]) -> None:
    prepare(tmp_path, {"image": IMAGE, feature: spec}, lambda i: {feature: value})
    source = open_source(f"tfds:tiny@{tmp_path}", "train")
    assert source.classnames == () and source[0].label == -1
    assert source[0].captions == captions
    assert {source[i].image for i in range(len(source))} == {png(i) for i in range(ROWS)}


def test_a_damaged_record_is_one_bad_sample(tmp_path: pathlib.Path) -> None:
    prepare(tmp_path, LABELLED, label_zero)
    (file,) = tmp_path.rglob("tiny-train.array_record*")
    data = bytearray(file.read_bytes())
    data[data.index(b"PNG") + 20] ^= 255
    file.write_bytes(data)
    source = open_source(f"tfds:tiny@{tmp_path}", "train")
    with pytest.raises(BadSample, match=r"tiny/train/0: ArrayRecord cannot read it \(.*hash mismatch") as error:
        source[0]
    assert error.value.kind == "corrupt_record" and all(source[i].label == 0 for i in range(1, ROWS))


def test_data_that_is_not_prepared_is_refused(tmp_path: pathlib.Path) -> None:
    message = rf"^tfds:a/b: not prepared in {tmp_path}; prepare it with `tfds build a/b --file_format=array_record "
    with pytest.raises(FileNotFoundError, match=message):
        open_source(f"tfds:a/b@{tmp_path}", "train")


def test_file_formats_without_random_access_are_refused(tmp_path: pathlib.Path) -> None:
    prepare(tmp_path, LABELLED, label_zero)
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"^tfds:tiny: prepared as tfrecord, which has no random access; prepare it"):
        open_source(f"tfds:tiny@{tmp_path}", "train")


def test_an_invalid_name_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"^tfds:no name: Parsing builder name string no name failed\.$"):
        open_source(f"tfds:no name@{tmp_path}", "train")


def test_an_unknown_split_is_refused(tmp_path: pathlib.Path) -> None:
    prepare(tmp_path, LABELLED, label_zero)
    with pytest.raises(ValueError, match=r"^tfds:tiny: no split 'val'; it has train, test$"):
        open_source(f"tfds:tiny@{tmp_path}", "val")


def test_data_without_labels_and_captions_is_refused(tmp_path: pathlib.Path) -> None:
    prepare(tmp_path, {**LABELLED, "label": tfds.features.Scalar(np.int64)}, label_zero)
    with pytest.raises(ValueError, match=r"^tfds:tiny: has the features image, label; needs image and a ClassLabel"):
        open_source(f"tfds:tiny@{tmp_path}", "train")


def first_file(folder: pathlib.Path) -> pathlib.Path:
    return next((folder / "tiny" / "1.0.0").glob("tiny-train.array_record*"))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda folder: first_file(folder).unlink(),
            FileNotFoundError,
            r"tiny-train.*: no such file: a file is missing$",
        ),
        (
            lambda folder: (folder / "tiny" / "1.0.0" / "dataset_info.json").unlink(),
            ValueError,
            r"^tfds:tiny: Could not read dataset info from .*dataset_info.json",
        ),
        (
            lambda folder: (folder / "tiny" / "1.0.0" / "dataset_info.json").write_text('{"name'),
            ValueError,
            r"^tfds:tiny: Failed to load JSON: Unterminated string",
        ),
    ],
)
def test_an_incomplete_copy_is_refused(
    damage: Callable[[pathlib.Path], object], error: type[Exception], message: str, tmp_path: pathlib.Path
) -> None:
    prepare(tmp_path, LABELLED, label_zero)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        open_source(f"tfds:tiny@{tmp_path}", "train")
    if error is FileNotFoundError:
        assert len(open_source(f"tfds:tiny@{tmp_path}", "test")) == ROWS


def test_the_records_of_a_truncated_file_are_bad_samples(tmp_path: pathlib.Path) -> None:
    prepare(tmp_path, LABELLED, label_zero)
    file = first_file(tmp_path)
    source = open_source(f"tfds:tiny@{tmp_path}", "train")
    whole = file.read_bytes()
    for length in (0, len(whole) // 2, len(whole) - 200):
        file.write_bytes(whole[:length])
        with pytest.raises(BadSample, match=r"^tiny/train/0: ArrayRecord cannot read it") as error:
            _ = open_source(f"tfds:tiny@{tmp_path}", "train")[0]
        assert error.value.kind == "corrupt_record" and len(source) == ROWS
