"""Pages fit any screen, and names and messages are printable."""

from __future__ import annotations

import os

import pytest
from matplotlib.figure import Figure

from tclip_jax.pages import (
    blank,
    details,
    page,
    plot,
    plot_axes,
    printable,
    properties,
    row_axes,
    sample_name,
    table,
    without_details,
)
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
        ("picture", None),
    ]
    assert ("tr", "over") in kinds and "<d>" in shown.words
    (viewport,) = [attributes for _, attributes in shown.tags if attributes.get("name") == "viewport"]
    assert viewport["content"] == "width=device-width, initial-scale=1"


def test_a_plot_has_a_picture_for_phones_and_one_for_wide_screens() -> None:
    figure = Figure(figsize=(8, 2))
    shown = Page(plot(figure, "a <plot>"))
    tags = dict(shown.tags)
    assert tags["source"]["media"] == "(max-width: 40rem)" and tags["img"]["alt"] == "a <plot>"
    sizes = [(int(tags[tag]["width"] or 0), int(tags[tag]["height"] or 0)) for tag in ("source", "img")]
    assert sizes == [(353, 192), (768, 192)]
    # They have two pixels for each of the page's 96 an inch.
    assert [picture.size for picture in shown.pictures()] == [(706, 384), (1536, 384)]
    assert tuple(figure.get_size_inches()) == (8, 2)


def test_columns_of_text_are_left_aligned_and_breakable() -> None:
    rows = [["set", "class", "%"], ["a_b/c", "x" * 40, "1_0"]]
    shown = Page(table(rows, text=2))
    cells = [attributes for tag, attributes in shown.tags if tag in ("td", "th")]
    assert [cell.get("class") for cell in cells] == 2 * ["text", "text", None]
    assert [cell.get("style") for cell in cells] == ["min-width: 5ch", "min-width: 12ch", *4 * [None]]
    assert [tag for tag, _ in shown.tags].count("wbr") == 2 and shown.words == [
        *rows[0],
        *("a_", "b/", "c"),
        *rows[1][1:],
    ]
    shown = Page(properties([("seed", "3"), ("source", "<a>")]))
    assert {attributes.get("class") for tag, attributes in shown.tags if tag == "td"} == {"text"}
    assert shown.words == ["seed", "3", "source", "<a>"]
    assert properties([]) == table([]) == ""


def test_a_missing_picture_has_a_reason_in_its_place() -> None:
    assert Page(blank("no <image>")).words == ["no <image>"]
    assert Page(blank("no <image>")).tags == [("div", {"class": "blank"})]


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
    assert parsed.text == shown and parsed.tags[0] == ("span", {"class": "note", "title": name})
    assert [tag for tag, _ in parsed.tags[1:]] == ["wbr"] * shown.count("/")


@pytest.mark.parametrize("rows", [1, 2, 41])
def test_rows_have_the_same_space_whatever_their_number(rows: int) -> None:
    axes = row_axes(rows)
    low, high = axes.get_ylim()
    assert (low, high - (rows - 1)) == (-0.75, 0.75)
    assert axes.figure.get_figheight() == pytest.approx(0.8 + 0.25 * (rows + 0.5)) and axes.figure.get_figwidth() == 8


def test_a_plot_has_lines_at_the_left_and_the_bottom() -> None:
    axes = plot_axes(4, 3)
    assert {side for side, spine in axes.spines.items() if spine.get_visible()} == {"left", "bottom"}
    assert tuple(axes.figure.get_size_inches()) == (4, 3)


@pytest.mark.parametrize(
    "details",
    ["[source locations='a.cc:3\\nb.cc:4']", "[tensorstore_spec='{\"a\": [1]}']", "[http_response_code='403'] [x='y']"],
)
def test_details_of_tensorstore_are_left_out(details: str) -> None:
    assert without_details(f"Error writing [1] a/b: no access {details}") == "Error writing [1] a/b: no access"
    assert without_details("a list [1, 2] stays") == "a list [1, 2] stays"
