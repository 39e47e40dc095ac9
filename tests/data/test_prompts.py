"""Templates and their captions."""

from __future__ import annotations

import json
import types
from importlib import metadata

import pytest

from tclip_jax.data.prompts import DEFAULT, TEMPLATES, captions, get_templates, parse_templates, templates_for


@pytest.mark.parametrize(("name", "count"), [("openai", 80), ("cifar10", 18), ("simple", 1), ("none", 1)])
def test_each_set_has_the_published_number_of_templates(name: str, count: int) -> None:
    assert len(set(TEMPLATES[name])) == len(TEMPLATES[name]) == count


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_names_the_class_once(name: str) -> None:
    assert all(template.count("{c}") == 1 for template in get_templates(name))


@pytest.mark.parametrize(("name", "dataset"), [("openai", "imagenet1k"), ("cifar10", "cifar10")])
def test_equal_to_clip_benchmark(name: str, dataset: str) -> None:
    try:
        files = metadata.files("clip-benchmark") or []
    except metadata.PackageNotFoundError:
        pytest.skip("clip-benchmark is not installed (pip install -e '.[test]')")
    path = next(file for file in files if file.name == "en_zeroshot_classification_templates.json")
    assert list(TEMPLATES[name]) == json.loads(path.read_text())[dataset]


@pytest.mark.torch
def test_openai_equal_to_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    assert captions("cat", "openai") == [template("cat") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def test_captions_take_class_names_literally() -> None:
    assert captions("{c} {0} %s", ["a {c}.", "{c} {d}"]) == ["a {c} {0} %s.", "{c} {0} %s {d}"]
    assert captions("cat", "simple") == ["a photo of a cat."]


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("opennai", "templates 'opennai': no such name; use openai"),
        ("zzz", "use none or simple or digits or cifar10 or openai"),
        (["a photo of {c}", "a photo of {}"], "template 'a photo of {}' has no {c}"),
        ([], "the list of templates is empty"),
    ],
)
def test_invalid_templates_are_refused(templates: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_templates(templates)


def test_templates_of_a_command_line() -> None:
    assert parse_templates(["digits"]) == TEMPLATES["digits"]
    assert parse_templates(["a {c}"]) == get_templates("a {c}") == ("a {c}",)
    assert parse_templates(["a {c}", "{c}"]) == ("a {c}", "{c}") and parse_templates([]) == ()
    for words in (["digits", "a {c}"], ["simple", "digits"], ["nothing"]):
        with pytest.raises(ValueError, match=f"template.* '{words[0]}'"):
            parse_templates(words)


def test_the_argument_overrides_the_templates_of_the_data() -> None:
    source = types.SimpleNamespace(templates=("its {c}",))
    assert templates_for(source) == ("its {c}",) and templates_for(source, "none") == ("{c}",)
    assert templates_for(types.SimpleNamespace()) == TEMPLATES[DEFAULT] == templates_for(object(), "simple")
    with pytest.raises(ValueError, match="the list of templates is empty"):
        templates_for(types.SimpleNamespace(templates=()))
