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
def test_names_are_printable_whatever_they_are(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable(text).encode()


def test_a_message_keeps_its_lines() -> None:
    assert printable("a\n\tb\r\x1b", lines=True) == "a\n\tb\\r\\x1b"
