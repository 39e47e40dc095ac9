"""Changes of valid files that make hostile ones: of bytes, and of the JSON that is in them."""

from __future__ import annotations

import copy
import json
from typing import Any

import hypothesis.strategies as st

# (kind, place as a fraction, value): a list of these is what hypothesis draws, prints and shrinks.
Change = tuple[str, float, int]

_BYTES = ("flip", "cut", "u32", "u64", "insert", "delete", "repeat", "text")
_DOCUMENT = ("value", "remove", "rename", "nest", "twice", "copy")
_NUMBERS = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_TEXTS = (
    b"\0",
    b"\xff\xfe",
    b"NaN",
    b"\x1b[2J\n",
    b"[" * 5000,
    b'"',
    b"9" * 5000,
    b"\r\n\r\n",
    b"../../x",
    b"\xe2\x80\xa8",
)

DEEP = "@deep@"
# Of every type, and of the same type at and beyond its bounds.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 1.5, -0.0, 1e308, 1e-320, 2**31, 2**63, -(2**63), 10**30, 10**400),
    *("", "x", "\x1b[31m\n\u2028", "../../../etc/passwd", "x" * 5000, "\ud800", "NaN", "1", DEEP),
    *([], {}, [None], [[[]]], [1, 2, 3], [0] * 2000, ["x", 1], {"": 1}, {"a": {"b": []}}),
    *(float("nan"), float("inf"), [-1], [2**62, 2**62], ["gelu"], {"height": 0, "width": -1}),
)

_place, _number = st.floats(0, 1), st.integers(0, 2**32)
BYTE_CHANGES = st.lists(st.tuples(st.sampled_from(_BYTES), _place, _number), min_size=1, max_size=4)
DOCUMENT_CHANGES = st.lists(st.tuples(st.sampled_from(_DOCUMENT), _place, _number), min_size=1, max_size=3)


def change_bytes(data: bytes, changes: list[Change]) -> bytes:
    """The bytes after each change in turn."""
    for kind, fraction, value in changes:
        at = min(int(fraction * len(data)), max(len(data) - 1, 0))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind in ("u32", "u64"):
            width = 4 if kind == "u32" else 8
            number = (_NUMBERS[value % len(_NUMBERS)] % 2 ** (8 * width)).to_bytes(width, "little")
            data = data[:at] + number + data[at + width :]
        elif kind == "insert":
            data = data[:at] + value.to_bytes(8, "little")[: 1 + value % 8] + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + 1 + value % 64 :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 1 + value % 512] * (2 + value % 3) + data[at:]
        elif kind == "text":
            data = data[:at] + _TEXTS[value % len(_TEXTS)] + data[at:]
    return data


def change_document(document: Any, changes: list[Change]) -> bytes:
    """The JSON text of a document after each change, which are of any of its members."""
    document, twice = json.loads(json.dumps(document)), []
    for kind, fraction, number in changes:
        places = list(_places(document))
        if not places:
            break
        section, key = places[min(int(fraction * len(places)), len(places) - 1)]
        value = copy.deepcopy(VALUES[number % len(VALUES)])
        if kind == "value":
            section[key] = value
        elif kind == "remove":
            del section[key]
        elif kind == "nest":
            section[key] = [section[key]] if number % 2 else {"x": section[key]}
        elif kind == "copy":
            section[key] = copy.deepcopy(places[number % len(places)][0])
        elif isinstance(section, dict):
            new = str(value) if number % 2 else f"{key}_"
            if kind == "rename":
                section[new] = section.pop(key)
            else:
                twice.append((key, value))
    text = json.dumps(document)
    for key, value in twice:
        member = f"{json.dumps(key)}: "
        text = text.replace(member, f"{member}{json.dumps(value)}, {member}", 1)
    return text.replace(f'"{DEEP}"', "[" * 20_000).encode()


def _places(document: Any) -> Any:
    """(container, key) of every member, the outer ones first."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    below = list(items)[:200]
    for key, _ in below:
        yield document, key
    for _, value in below:
        yield from _places(value)
