"""Names and messages are printable."""

from __future__ import annotations

import os

import pytest

from tclip_jax.pages import printable


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
