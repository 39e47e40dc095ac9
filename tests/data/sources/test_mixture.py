from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax.data.sources import Record, described, open_source
from tclip_jax.data.sources.mixture import Mixture, parse


class Numbered(list[Record]):
    templates: tuple[str, ...] | None = None

    def __init__(self, count: int, classnames: tuple[str, ...] = ()) -> None:
        super().__init__(
            Record(b"", (), i % len(classnames) if classnames else -1, f"{count}/{i}") for i in range(count)
        )
        self.classnames = classnames


@given(st.lists(st.tuples(st.floats(0.01, 9), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=4))
def test_records_and_class_names_are_concatenated(parts: list[tuple[float, int, int]]) -> None:
    sources = [
        Numbered(count, tuple(f"{i}:{c}" for c in range(classes))) for i, (_, count, classes) in enumerate(parts)
    ]
    mixture = Mixture([weight for weight, _, _ in parts], sources)
    expected = [(record.name, source, record) for source in sources for record in source]
    assert len(mixture) == len(expected) == sum(count for _, count in mixture.parts)
    assert sum(weight for weight, _ in mixture.parts) == pytest.approx(1)
    for i, (name, source, record) in enumerate(expected):
        mixed = mixture[i]
        assert mixed.name == name
        if source.classnames:
            assert mixture.classnames[mixed.label] == source.classnames[record.label]
        else:
            assert mixed.label == -1


def test_a_label_out_of_range_becomes_minus_one() -> None:
    invalid = Numbered(1, ("a",))
    invalid[0] = Record(b"", (), 1, "invalid")
    assert Mixture((1, 1), (invalid, Numbered(1, ("b",))))[0].label == -1


def test_specs_are_parsed_or_refused() -> None:
    assert parse("0.7*wds:/a+b/{0..9}*.tar+.3*csv:x.csv?image=a+2*digits") == [
        (0.7, "wds:/a+b/{0..9}*.tar"),
        (0.3, "csv:x.csv?image=a"),
        (2.0, "digits"),
    ]
    mixture = open_source("mixture:3*digits+1*digits", "train")
    assert len(mixture) == 2800 and len(mixture.classnames) == 20
    alone = described(open_source("digits", "train"))
    assert described(mixture)["parts"] == {"0": {"weight": 0.75, **alone}, "1": {"weight": 0.25, **alone}}
    for spec in ("", "digits", "0*digits", "1*digits+digits", "-1*digits"):
        with pytest.raises(ValueError, match=r"is not WEIGHT\*SOURCE with a weight above 0"):
            open_source(f"mixture:{spec}", "train")
    with pytest.raises(ValueError, match="unknown data source 'cifar'"):
        open_source("mixture:1*digits+1*cifar", "train")


def test_the_templates_of_labelled_sources_must_be_equal() -> None:
    def part(templates: tuple[str, ...] | None) -> Numbered:
        source = Numbered(1, ("a",))
        source.templates = templates
        return source

    captions = Numbered(1)
    assert Mixture([1, 2, 1], [part(("a {c}",)), part(("a {c}",)), captions]).templates == ("a {c}",)
    assert Mixture([1, 2], [part(None), captions]).templates is None
    with pytest.raises(ValueError, match="the sources of the mixture have different templates"):
        Mixture([1, 2], [part(("a {c}",)), part(None)]).templates  # noqa: B018
