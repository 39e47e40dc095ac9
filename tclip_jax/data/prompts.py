"""Caption templates for class names. A template contains `{c}`, which is replaced by the class name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

DEFAULT = "simple"  # for labelled data without templates of its own

TEMPLATES: dict[str, tuple[str, ...]] = {
    "none": ("{c}",),
    "simple": ("a photo of a {c}.",),
    "digits": (
        "a handwritten digit {c}.",
        "a handwritten number {c}.",
        "a scan of the number {c}.",
        "a photo of the number {c}.",
        "a drawing of the digit {c}.",
        'a photo of the number: "{c}".',
        "{c}",
    ),
    # OpenAI's prompts for CIFAR-10 and CIFAR-100.
    "cifar10": (
        "a photo of a {c}.",
        "a blurry photo of a {c}.",
        "a black and white photo of a {c}.",
        "a low contrast photo of a {c}.",
        "a high contrast photo of a {c}.",
        "a bad photo of a {c}.",
        "a good photo of a {c}.",
        "a photo of a small {c}.",
        "a photo of a big {c}.",
        "a photo of the {c}.",
        "a blurry photo of the {c}.",
        "a black and white photo of the {c}.",
        "a low contrast photo of the {c}.",
        "a high contrast photo of the {c}.",
        "a bad photo of the {c}.",
        "a good photo of the {c}.",
        "a photo of the small {c}.",
        "a photo of the big {c}.",
    ),
    # OpenAI's prompts for ImageNet ("itap" is "I took a picture").
    "openai": (
        "a bad photo of a {c}.",
        "a photo of many {c}.",
        "a sculpture of a {c}.",
        "a photo of the hard to see {c}.",
        "a low resolution photo of the {c}.",
        "a rendering of a {c}.",
        "graffiti of a {c}.",
        "a bad photo of the {c}.",
        "a cropped photo of the {c}.",
        "a tattoo of a {c}.",
        "the embroidered {c}.",
        "a photo of a hard to see {c}.",
        "a bright photo of a {c}.",
        "a photo of a clean {c}.",
        "a photo of a dirty {c}.",
        "a dark photo of the {c}.",
        "a drawing of a {c}.",
        "a photo of my {c}.",
        "the plastic {c}.",
        "a photo of the cool {c}.",
        "a close-up photo of a {c}.",
        "a black and white photo of the {c}.",
        "a painting of the {c}.",
        "a painting of a {c}.",
        "a pixelated photo of the {c}.",
        "a sculpture of the {c}.",
        "a bright photo of the {c}.",
        "a cropped photo of a {c}.",
        "a plastic {c}.",
        "a photo of the dirty {c}.",
        "a jpeg corrupted photo of a {c}.",
        "a blurry photo of the {c}.",
        "a photo of the {c}.",
        "a good photo of the {c}.",
        "a rendering of the {c}.",
        "a {c} in a video game.",
        "a photo of one {c}.",
        "a doodle of a {c}.",
        "a close-up photo of the {c}.",
        "a photo of a {c}.",
        "the origami {c}.",
        "the {c} in a video game.",
        "a sketch of a {c}.",
        "a doodle of the {c}.",
        "a origami {c}.",
        "a low resolution photo of a {c}.",
        "the toy {c}.",
        "a rendition of the {c}.",
        "a photo of the clean {c}.",
        "a photo of a large {c}.",
        "a rendition of a {c}.",
        "a photo of a nice {c}.",
        "a photo of a weird {c}.",
        "a blurry photo of a {c}.",
        "a cartoon {c}.",
        "art of a {c}.",
        "a sketch of the {c}.",
        "a embroidered {c}.",
        "a pixelated photo of a {c}.",
        "itap of the {c}.",
        "a jpeg corrupted photo of the {c}.",
        "a good photo of a {c}.",
        "a plushie {c}.",
        "a photo of the nice {c}.",
        "a photo of the small {c}.",
        "a photo of the weird {c}.",
        "the cartoon {c}.",
        "art of the {c}.",
        "a drawing of the {c}.",
        "a photo of the large {c}.",
        "a black and white photo of a {c}.",
        "the plushie {c}.",
        "a dark photo of a {c}.",
        "itap of a {c}.",
        "graffiti of the {c}.",
        "a toy {c}.",
        "itap of my {c}.",
        "a photo of a cool {c}.",
        "a photo of a small {c}.",
        "a tattoo of the {c}.",
    ),
}


def get_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Return templates.

    Args:
      templates: a name in TEMPLATES, one template, or a list of templates.

    Raises:
      ValueError: the name is unknown (the message gives the nearest names), the list is empty, or a template has no
        `{c}`.
    """
    if isinstance(templates, str) and "{c}" in templates:
        return (templates,)
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            near = difflib.get_close_matches(templates, TEMPLATES, cutoff=0.5) or list(TEMPLATES)
            raise ValueError(f"templates {templates!r}: no such name; use {' or '.join(near)}, or captions with {{c}}")
        return TEMPLATES[templates]
    if not templates:
        raise ValueError("the list of templates is empty")
    for template in templates:
        if "{c}" not in template:
            raise ValueError(f"template {template!r} has no {{c}} for the class name")
    return tuple(templates)


def templates_for(source: object, templates: str | Sequence[str] = "") -> tuple[str, ...]:
    """Return the templates for the classes of a source: `templates`, else the source's own, else DEFAULT.

    Args:
      source: a `Source`; its own templates are its attribute `templates`.
      templates: as in `get_templates`, or empty.

    Raises:
      FileNotFoundError: the source's file of templates is missing.
      ValueError: as in `get_templates`.
    """
    if templates:
        return get_templates(templates)
    own = getattr(source, "templates", None)
    return get_templates(DEFAULT if own is None else own)


def parse_templates(words: Sequence[str]) -> tuple[str, ...]:
    """Return the templates of a command line: one name in TEMPLATES, or templates; () for no words."""
    if not words:
        return ()
    return get_templates(words[0] if len(words) == 1 else words)


def captions(classname: str, templates: str | Sequence[str]) -> list[str]:
    """Return one caption per template; `templates` is as in `get_templates`."""
    return [template.replace("{c}", classname) for template in get_templates(templates)]
