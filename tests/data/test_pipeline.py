from __future__ import annotations

import collections
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
import pytest
from PIL import Image

from tclip_jax.data.augment import AUGMENTATIONS
from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.embedding_store import copy_generator
from tclip_jax.data.images import Preprocess
from tclip_jax.data.pipeline import Batch, TrainIterator, TrainRow, global_order, train_iterator
from tclip_jax.data.sources import FAULTS, BadSample, Record, open_source, remote
from tclip_jax.data.sources.mixture import Mixture
from tclip_jax.data.tokenizer import EOT, SOT, Tokenizer
from tests.data.records import CLASSNAMES, Records, labelled, png

TOKENIZER = Tokenizer(context_length=12)
PREPROCESS = Preprocess(8)
TEMPLATES = ("a photo of a {c}.", "the {c}")


def iterate(source: Any, **changes: Any) -> TrainIterator:
    arguments = {
        "tokenizer": TOKENIZER,
        "preprocess": PREPROCESS,
        "augment": "none",
        "templates": TEMPLATES,
        "batch_size": 4,
        "seed": 7,
    }
    return train_iterator(source, **(arguments | changes))


def take(iterator: TrainIterator, count: int) -> list[Batch]:
    return [next(iterator) for _ in range(count)]


def shades(batches: Sequence[Batch]) -> list[int]:
    return [int(image[0, 0, 0]) for batch in batches for image in batch["image"]]


def assert_same(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_of_labelled_data() -> None:
    batch = next(iterate(labelled(6), preprocess=Preprocess((10, 6)), batch_size=5))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((5, 10, 6, 3), "uint8"),
        "tokens": ((5, 12), "int32"),
        "weight": ((5,), "float32"),
        "fault": ((5,), "int32"),
    }
    assert batch["weight"].tolist() == [1] * 5
    for shade, tokens in zip(shades([batch]), batch["tokens"], strict=True):
        captions = [template.replace("{c}", CLASSNAMES[shade % 2]) for template in TEMPLATES]
        assert tokens.tolist() in TOKENIZER(captions).tolist()


def test_every_template_and_every_caption_is_drawn() -> None:
    drawn = np.concatenate([batch["tokens"] for batch in take(iterate(labelled(4)), 20)])
    assert len(np.unique(drawn, axis=0)) == len(CLASSNAMES) * len(TEMPLATES)

    captioned = Records([Record(png(0), ("red", "green", " "), -1, "x")])
    drawn = np.concatenate([batch["tokens"] for batch in take(iterate(captioned), 10)])
    assert sorted(np.unique(drawn, axis=0).tolist()) == sorted(TOKENIZER(["red", "green"]).tolist())


def test_the_templates_argument_overrides_those_of_the_data() -> None:
    source = labelled(4)
    templated = Records(source)
    templated.classnames, templated.templates = source.classnames, ("{c}: its", "its {c}")  # type: ignore[attr-defined]
    for data, templates, expected in (
        (templated, "", [f"{name}: its" for name in source.classnames] + [f"its {name}" for name in source.classnames]),
        (templated, ("the {c}",), [f"the {name}" for name in source.classnames]),
        (source, "", [f"a photo of a {name}." for name in source.classnames]),
    ):
        batches = take(iterate(data, templates=templates, batch_size=4), 8)
        rows = {tuple(row) for batch in batches for row in batch["tokens"].tolist()}
        assert rows == {tuple(row) for row in TOKENIZER(expected).tolist()}


def test_every_epoch_has_every_record_once_in_a_new_order() -> None:
    drawn = shades(take(iterate(labelled(12)), 6))
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12))
    assert drawn[:12] != drawn[12:]


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_divide_the_batches_of_one_process(process_count: int) -> None:
    source = open_source("digits", "train")
    arguments = {"augment": "affine", "batch_size": 8, "preprocess": Preprocess(16)}
    whole = take(iterate(source, **arguments), 3)
    parts = [
        take(iterate(source, **arguments, process_index=p, process_count=process_count), 3)
        for p in range(process_count)
    ]
    for p, part in enumerate(parts):
        assert_same(part, [{key: value[p::process_count] for key, value in batch.items()} for batch in whole])


def test_the_seed_determines_every_draw() -> None:
    source = open_source("digits", "train")
    first, again, other = (take(iterate(source, augment="affine", seed=seed), 2) for seed in (1, 1, 2))
    assert_same(first, again)
    assert not np.array_equal(first[0]["image"], other[0]["image"])


@pytest.mark.parametrize("threads", [0, 3])
def test_a_restored_iterator_continues_exactly(threads: int) -> None:
    source = open_source("digits", "train")
    iterator = iterate(source, augment="random_resized_crop", threads=threads, prefetch=threads)
    take(iterator, 3)
    state = iterator.get_state()
    expected = take(iterator, 3)

    restored = iterate(source, augment="random_resized_crop")
    restored.set_state(state)
    assert_same(take(restored, 3), expected)


def test_a_state_can_be_set_with_another_number_of_processes() -> None:
    source = open_source("digits", "train")
    iterator = iterate(source)
    take(iterator, 3)
    half = iterate(source, process_index=1, process_count=2)
    half.set_state(iterator.get_state())
    assert_same([next(half)], [{key: value[1::2] for key, value in next(iterator).items()}])


def test_every_state_continues_exactly() -> None:
    class Batches:
        """Six batches, an epoch and a half, as an iterable with states for Grain's check."""

        def __iter__(self) -> Any:
            iterator = iterate(labelled(16), augment="strong")

            class Six:
                get_state, set_state = iterator.get_state, iterator.set_state

                def __iter__(self) -> Any:
                    return self

                def __next__(self) -> Any:
                    if iterator.get_state()["samples"] == 24:
                        raise StopIteration
                    return next(iterator)

            return Six()

    grain.experimental.assert_equal_output_after_checkpoint(Batches())


@pytest.mark.parametrize("records", [6, 72])
def test_a_batch_may_have_one_row(records: int) -> None:
    one = take(iterate(labelled(records), batch_size=1), 8)
    assert shades(one) == shades(take(iterate(labelled(records), batch_size=4), 2))


def test_the_global_order_does_not_depend_on_processes_and_batch_size() -> None:
    source = open_source("digits", "train")
    whole = take(iterate(source, augment="affine", batch_size=8), 6)
    state: Any = None
    for count, batches in ((2, 2), (4, 1), (1, 1)):
        shares = [
            iterate(source, augment="affine", batch_size=8, process_index=p, process_count=count) for p in range(count)
        ]
        for share in shares:
            if state:
                share.set_state(json.loads(state))
        for _ in range(batches):
            parts, expected = [next(share) for share in shares], whole.pop(0)
            assert_same(parts, [{key: value[p::count] for key, value in expected.items()} for p in range(count)])
        states = {json.dumps(share.get_state()) for share in shares}
        assert len(states) == 1  # the state of one process is valid for all
        state = states.pop()
    halves = iterate(source, augment="affine", batch_size=4)
    halves.set_state(json.loads(state))
    assert_same(take(halves, 4), [{k: v[i : i + 4] for k, v in batch.items()} for batch in whole for i in (0, 4)])


def test_worker_processes_give_the_same_batches_and_state() -> None:
    source = open_source("digits", "train")
    iterator, expected = iterate(source, workers=2), take(iterate(source), 4)
    try:
        assert_same(take(iterator, 3), expected[:3])
        state = iterator.get_state()
        assert state["samples"] == 12  # the rows that were yielded, not those prepared ahead
    finally:
        iterator.close()
    restored = iterate(source)
    restored.set_state(state)
    assert_same(take(restored, 1), expected[3:])


BAD = {
    "not an image": Record(b"<html>404</html>", ("a cat",), -1, "not an image"),
    "truncated": Record(png(200)[:-30], ("a cat",), -1, "truncated"),
    "no captions": Record(png(201), (), -1, "no captions"),
    "blank captions": Record(png(202), ("", " \n"), -1, "blank captions"),
    "label out of range": Record(png(203), (), 2, "label out of range"),
    "several labels": Record(png(204), (), np.array([0, 1], np.int32), "several labels"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_keeps_its_row_and_is_listed_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = labelled(3), BadSamples()
    broken = Records([*good[:2], BAD[name]])
    broken.classnames = CLASSNAMES
    batches = take(iterate(broken, batch_size=3, bad=bad), 3)

    for batch, reference in zip(batches, take(iterate(good, batch_size=3), 3), strict=True):
        (row,) = np.flatnonzero(reference["image"][:, 0, 0, 0] == 2)
        assert batch["weight"].tolist() == [float(i != row) for i in range(3)]
        assert not batch["image"][row].any() and not batch["tokens"][row].any()
        for key in ("image", "tokens"):
            np.testing.assert_array_equal(np.delete(batch[key], row, 0), np.delete(reference[key], row, 0))
    assert re.fullmatch(rf"1 bad sample \(\w+ 1\), masked; the first: {name}: .+", bad.news()) and not caplog.records


def test_failed_reads_are_retried_and_then_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    attempts = collections.Counter[int]()

    class Unreliable(Records):
        classnames = CLASSNAMES

        def __getitem__(self, index: Any) -> Any:
            attempts[index] += 1
            if index == 0 or attempts[index] < 3:
                raise OSError("the disk failed")
            return super().__getitem__(index)

    batch = next(iterate(Unreliable(labelled(4)), threads=0))
    bad = batch["fault"] == FAULTS.index("unreadable")
    assert batch["weight"].tolist() == (~bad).tolist() and bad.sum() == 1 and set(attempts.values()) == {3}


def test_an_augmentation_that_fails_ends_the_run_and_one_that_decodes_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def darken(image: Image.Image, rng: np.random.Generator, p: Preprocess) -> np.ndarray:
        pixels = np.asarray(image.convert("RGB")) // 2  # decodes the image
        if faults and pixels[0, 0, 0] == 1:
            raise faults[-1]
        return pixels

    faults: list[Exception] = []
    monkeypatch.setitem(AUGMENTATIONS._entries, "darken", darken)
    source = Records([*labelled(3), BAD["truncated"], BAD["not an image"]])
    source.classnames = CLASSNAMES
    bad = BadSamples()
    batch = next(iterate(source, augment="darken", batch_size=5, bad=bad))
    assert sorted(batch["image"][batch["weight"] > 0, 0, 0, 0].tolist()) == [0, 0, 1]
    assert re.match(r"2 bad samples \(corrupt_image 2\), masked; the first: (truncated|not an image): ", bad.news())
    for error, message in ((ValueError("wrong size"), "ValueError: wrong size"), (KeyError("x"), "KeyError: 'x'")):
        faults.append(error)
        with pytest.raises(ValueError, match=rf"^the augmentation darken fails for shade [23]: {message}"):
            next(iterate(labelled(4), augment="darken"))


def test_other_errors_are_raised() -> None:
    class Broken(Records):
        def __getitem__(self, index: Any) -> Any:
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        next(iterate(Broken(labelled(2))))


class Cached:
    """A teacher cache whose embeddings are the index of the sample and the copy."""

    folder, samples, copies, seed = "cached", 6, 3, 11

    def read(self, index: int, copy: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(4, index, np.float16), np.full(3, copy, np.float16)


def test_cached_embeddings_come_with_the_image_and_caption_that_the_teacher_encoded() -> None:
    source = labelled(6)
    batches = take(iterate(source, cache=Cached(), augment="affine"), 9)
    row = TrainRow(source, TOKENIZER, PREPROCESS, "affine", TEMPLATES)
    copies = set()
    for batch in batches:
        assert batch["teacher_image"].dtype == batch["teacher_text"].dtype == np.float16
        for i in range(4):
            index, copy = int(batch["teacher_image"][i, 0]), int(batch["teacher_text"][i, 0])
            encoded = row.draw(index, copy_generator(Cached.seed, index, copy))
            np.testing.assert_array_equal(batch["image"][i], encoded["image"])
            np.testing.assert_array_equal(batch["tokens"][i], encoded["tokens"])
            copies.add((index, copy))
    assert len(copies) > 12 and {copy for _, copy in copies} == {0, 1, 2}
    for count in (5, 7):
        with pytest.raises(ValueError, match=f"^cached is of 6 samples: the source has {count}$"):
            iterate(labelled(count), cache=Cached())
    many = Cached()
    many.samples = 300  # Python does not intern integers above 256
    iterate(Records(labelled(6)[:1] * 300), cache=many)


@pytest.mark.parametrize("seed", [0, 3, 5, 2**32 - 1])
def test_each_part_of_a_mixture_is_shuffled_with_its_own_seed(seed: int) -> None:
    """The seed of part i is (seed + i) mod 2³². A resumed run depends on this rule."""
    counts = (5, 4, 7)
    order = global_order(Mixture((1, 1, 1), [labelled(count) for count in counts]), seed)
    drawn, start = np.array([order[i] for i in range(60)]), 0
    for i, count in enumerate(counts):
        part = drawn[(start <= drawn) & (drawn < start + count)] - start
        alone = grain.MapDataset.range(count).seed((seed + i) % 2**32).shuffle().repeat()
        assert len(part) == 20 and list(part) == [alone[j] for j in range(20)]
        start += count


def test_a_mixture_follows_its_weights_and_each_part_has_its_epochs() -> None:
    parts = [labelled(12), labelled(4)]
    mixture = Mixture((3, 1), parts)
    order = global_order(mixture, 5)
    drawn = np.array([order[i] for i in range(64)])
    assert len(mixture) == 16
    for start in range(0, 64, 4):
        assert (drawn[start : start + 4] >= 12).sum() == 1
    for part, count in ((drawn[drawn < 12], 12), (drawn[drawn >= 12] - 12, 4)):
        epochs = part.reshape(-1, count)
        assert (np.sort(epochs) == np.arange(count)).all() and len(np.unique(epochs, axis=0)) > 1
    whole = take(iterate(mixture), 4)
    shares = [iterate(mixture, process_index=p, process_count=2) for p in range(2)]
    for share in shares:
        share.set_state({"samples": 8, "data": share.get_state()["data"]})
    for p, share in enumerate(shares):
        assert_same(take(share, 2), [{key: value[p::2] for key, value in batch.items()} for batch in whole[2:]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 10, "process_count": 4}, "global batch 10 is not divisible by 4 processes"),
        (
            {"augment": "rotate"},
            "the augmentation is 'rotate': it must be one of 'none', 'affine', 'random_resized_crop'",
        ),
        ({"templates": "no such list"}, "no such list"),
        ({"source": Records()}, "the source has no records"),
    ],
)
def test_invalid_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        iterate(**({"source": labelled(2)} | changes))


def test_real_images_and_captions(tmp_path: pathlib.Path, shared_data: pathlib.Path) -> None:
    import tarfile

    with tarfile.open(shared_data / "emoji" / "noto.tar") as tar:
        members = [member for member in tar if member.name.endswith((".png", ".txt"))][:24]
        tar.extractall(tmp_path, members, filter="data")
    source = open_source(f"folder:{tmp_path}", "train")

    batch = next(iterate(source, preprocess=Preprocess(32), augment="random_resized_crop", batch_size=12))

    assert len(source) == 12 and batch["weight"].tolist() == [1] * 12
    assert (batch["tokens"][:, 0] == SOT).all() and (batch["tokens"] == EOT).any(axis=1).all()
    assert batch["image"].reshape(12, -1).std(axis=1).min() > 1


def test_the_names_and_reasons_of_a_batch_are_in_the_order_of_its_rows() -> None:
    class Named:
        classnames = ()

        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Record:
            if index % 3 == 0:
                raise BadSample("unreadable", f"sample {index}", "the disk is gone")
            return Record(np.full((4, 4, 3), index, np.uint8), ("a",), -1, f"sample {index}")

    iterator = iterate(Named(), batch_size=12)
    batch = next(iterator)
    for image, fault, name, reason in zip(
        batch["image"], batch["fault"], iterator.names, iterator.reasons, strict=True
    ):
        index = int(name.decode().split()[1])
        assert reason == (b"the disk is gone" if index % 3 == 0 else b"")
        assert bool(fault) is (index % 3 == 0) and image.max() == (0 if fault else index)
