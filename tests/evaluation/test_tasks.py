"""The names of data sets."""

from __future__ import annotations

import pytest

from tclip_jax.evaluation.tasks import named_source, named_sources


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("digits", "digits"),
        ("folder:/data/birds", "birds"),
        ("folder:/data/birds/", "birds"),
        ("folder:birds/test", "birds-test"),
        ("folder:/data/my birds", "my-birds"),
        ("folder:.", "folder"),
        ("folder:~/a@b=c/vögel", "vögel"),
        ("folder:/data/summary", "folder-summary"),
        ("tfds:cifar10@/data/tfds", "cifar10"),
        ("tfds:imagenet_v2/matched-frequency:1.0.0@/data", "imagenet_v2"),
        ("tfds:imagenet_v2/matched-frequency", "imagenet_v2-matched-frequency"),
        ("wds:/data/flowers/{00000..00012}.tar", "flowers"),
        ("wds:gs://bucket/cc12m/*.tar::gs://bucket/extra/*.tar", "cc12m"),
        ("wds:exports/wds_mnist", "wds_mnist"),
        ("wds:/data/one.tar", "one"),
        ("csv:/data/cc3m/pairs.tsv", "pairs"),
        ("parquet:s3://bucket/meta/*.parquet?image=url&caption=alt", "meta"),
        ("arrayrecord:/data/cc12m/*.array_record*", "cc12m"),
        ("mixture:0.7*wds:/a/b.tar+0.3*csv:/c/d.csv", "mixture"),
        ("nothing", "nothing"),
    ],
)
def test_a_source_is_named_after_its_last_folder_or_file(text: str, name: str) -> None:
    assert named_source(text) == (name, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("birds=folder:/data/a", ("birds", "folder:/data/a")),
        ("vtab/cifar10=tfds:cifar10", ("vtab/cifar10", "tfds:cifar10")),
        ("a.b+c-1=parquet:x?image=y", ("a.b+c-1", "parquet:x?image=y")),
        ("d=digits", ("d", "digits")),
    ],
)
def test_a_name_comes_before_an_equals_sign(text: str, expected: tuple[str, str]) -> None:
    assert named_source(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("=digits", r"^the name '' of digits: it must be letters, digits and _ \. \+ - /$"),
        ("../up=digits", r"^the name '\.\./up' of digits: it must be"),
        ("a b=digits", "^the name 'a b' of digits: it must be"),
        ("summary=digits", r"^the name 'summary' of digits: summary\.json is another file of the results$"),
    ],
)
def test_a_name_that_cannot_be_a_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named_source(text)


def test_two_data_sets_need_two_names() -> None:
    assert [name for name, _ in named_sources(["folder:a/x", "y=folder:b/x"])] == ["x", "y"]
    with pytest.raises(ValueError, match=r"^two data sets are named 'x': write NAME=SOURCE for one of them$"):
        named_sources(["folder:a/x", "folder:b/x"])
