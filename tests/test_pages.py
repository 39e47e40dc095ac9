"""Pages fit any screen, and names and messages are printable."""

from __future__ import annotations

import os

import pytest
from matplotlib.figure import Figure

from tclip_jax.pages import details, fit_rows, page, plot, printable, sample_name, table, without_details
from tests.pages import Page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ä.png", "ä.png"),
        ("日本\u3000語 🦊", "日本\u3000語 🦊"),
        (os.fsdecode(b"\xff.png"), "\\xff.png"),
        ("a\x1b[31m\x07\x9b", "a\\x1b[31m\\x07\\x9b"),
        ("a\nb\tc\u2028d", "a\\nb\\tc\\u2028d"),
        ("\ud800", "\\ud800"),
        ("a\u202egnp.b", "a\\u202egnp.b"),
    ],
)
def test_control_characters_and_invalid_bytes_are_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable(text).encode()


def test_line_breaks_and_tabs_can_be_kept() -> None:
    assert printable("a\n\tb\r\x1b", lines=True) == "a\n\tb\\r\\x1b"


def test_a_table_and_a_plot_scroll_by_themselves_and_a_page_fits_a_phone() -> None:
    figure = Figure(figsize=(8, 2))
    shown = Page(page("a <title>", table([["a", "b"], ["c", "<d>"]], marked=[False, True]) + plot(figure, "a <plot>")))
    kinds = [(tag, attributes.get("class")) for tag, attributes in shown.tags]
    assert [kinds[i + 1] for i, kind in enumerate(kinds) if kind == ("div", "wide")] == [
        ("table", None),
        ("img", "plot"),
    ]
    assert ("tr", "over") in kinds and "<d>" in shown.words
    (viewport,) = [attributes for _, attributes in shown.tags if attributes.get("name") == "viewport"]
    assert viewport["content"] == "width=device-width, initial-scale=1"
    # The picture has two pixels for each of the page's 96 an inch.
    (picture,) = shown.pictures()
    (image,) = [attributes for tag, attributes in shown.tags if tag == "img"]
    assert picture.size == (2 * 768, 2 * 192) and image["style"] == "width: 768px" and image["alt"] == "a <plot>"


def test_a_section_is_open_and_a_table_leads_to_it() -> None:
    body = table([["set"], ["a<b"]], links={"a<b": "set-0"}) + details("a<b", "…", anchor="set-0")
    tags = dict(Page(page("x", body)).tags)
    assert tags["a"] == {"href": "#set-0"} and tags["details"] == {"open": None, "id": "set-0"}
    assert Page(details("more", "…", is_open=False)).tags == [("details", {}), ("summary", {})]


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a.png", "a.png"), ("b/a.png", "b/a.png"), ("/x/y/b/<a>.png", "…/b/<a>.png"), ('x/y/z"', '…/y/z"')],
)
def test_the_end_of_a_name_is_shown_and_all_of_it_is_there(name: str, shown: str) -> None:
    parsed = Page(sample_name(name))
    assert parsed.words == [shown] and parsed.tags == [("span", {"class": "note", "title": name})]


@pytest.mark.parametrize("rows", [1, 2, 41])
def test_rows_have_the_same_space_whatever_their_number(rows: int) -> None:
    figure = Figure()
    axes = figure.subplots()
    fit_rows(axes, rows)
    low, high = axes.get_ylim()
    assert (low, high - (rows - 1)) == (-0.75, 0.75)
    assert figure.get_figheight() == pytest.approx(0.8 + 0.25 * (rows + 0.5)) and figure.get_figwidth() == 8


@pytest.mark.parametrize(
    "details",
    ["[source locations='a.cc:3\\nb.cc:4']", "[tensorstore_spec='{\"a\": [1]}']", "[http_response_code='403'] [x='y']"],
)
def test_details_of_tensorstore_are_left_out(details: str) -> None:
    assert without_details(f"Error writing [1] a/b: no access {details}") == "Error writing [1] a/b: no access"
    assert without_details("a list [1, 2] stays") == "a list [1, 2] stays"
