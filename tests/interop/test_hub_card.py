"""The model card that a push makes of README.md."""

from __future__ import annotations

import pytest
import yaml

from tclip_jax.interop.hub_card import hub_card, public_provenance

EXPORT = """\
---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, ternary, open_clip]
---
# Ternary CLIP

open_clip.get_tokenizer("local-dir:FOLDER"), CLIPModel.from_pretrained("FOLDER"), read_gguf("FOLDER/FILE.gguf")

| measured | |
|---|---|
| zero_shot_accuracy | 0.5 |

| provenance | |
|---|---|
| recipe | quickstart:student |
| data.source | wds:gs://bucket/cc12m/*.tar |
| teacher.source | /home/me/runs/teacher |
"""


def front(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_front_matter_of_an_export_gets_the_licence_alone() -> None:
    card = hub_card(EXPORT, ["README.md", "open_clip_model.safetensors"], "me/model", "apache-2.0")
    assert front(card) == {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "ternary", "open_clip"],
        "license": "apache-2.0",
    }
    body = EXPORT.split("---\n", 2)[2].replace("local-dir:FOLDER", "hf-hub:me/model").replace('"FOLDER"', '"me/model"')
    assert card.split("---\n", 2)[2] == body and '"me/model")' in body


@pytest.mark.parametrize(
    ("files", "library"),
    [
        (["open_clip_model.safetensors", "model.safetensors"], "open_clip"),
        (["model.safetensors"], "transformers"),
        (["tclip.json"], "tclip_jax"),
        (["stablehlo/image.bin"], None),
    ],
)
def test_a_text_without_front_matter_gets_one(files: list[str], library: str | None) -> None:
    card = hub_card("# Mine\n\n--- no YAML ---\n", files, "me/model", "mit")
    named = {"library_name": library} if library else {}
    assert front(card) == {
        "license": "mit",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip"],
        **named,
    }
    assert card.endswith("---\n# Mine\n\n--- no YAML ---\n")


def test_what_the_author_wrote_stays() -> None:
    text = (
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\ntags: [x]\npipeline_tag: y\nlanguage: en\n---"
    )
    stated = {"license": "other", "license_name": "mine", "license_link": "LICENSE", "language": "en"}
    assert front(hub_card(f"{text}\n", [], "me/model")) == stated | {"tags": ["x", "clip"], "pipeline_tag": "y"}


@pytest.mark.parametrize(
    ("text", "licence", "message"),
    [
        (EXPORT, "", "^no licence: pass --licence ID, such as apache-2.0, mit, "),
        (EXPORT, "Apache 2.0", "^licence 'Apache 2.0' is not an ID of the hub, such as"),
        (EXPORT, "other", "^licence other needs license_name and license_link in the front matter of README.md"),
        ("---\nlicense: mit\n---\n", "apache-2.0", "^README.md states the licence mit, and --licence is apache-2.0:"),
        ("---\nlicense: [mit, x]\n---\n", "", r"^licence \['mit', 'x'\] is not an ID"),
        ("---\n[: x\n---\n", "mit", "^README.md: its front matter is not what the hub reads: [^\n]+$"),
        ("---\n- x\n---\n", "mit", "^README.md: its front matter is not what the hub reads: [^\n]+$"),
    ],
)
def test_a_card_that_the_hub_would_refuse(text: str, licence: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hub_card(text, [], "me/model", licence)


def test_private_provenance_is_shortened_and_named() -> None:
    text, notes = public_provenance(EXPORT)
    assert "| data.source | wds:cc12m |\n| teacher.source | teacher |\n" in text
    assert notes == [
        "README.md: data.source is shortened to wds:cc12m",
        "README.md: teacher.source is shortened to teacher",
    ]
    assert len(text.splitlines()) == len(EXPORT.splitlines())
    assert (
        text.replace("wds:cc12m", "wds:gs://bucket/cc12m/*.tar").replace("| teacher |", "| /home/me/runs/teacher |")
        == EXPORT
    )


def test_paths_elsewhere_are_not_shortened() -> None:
    text = EXPORT.replace("# Ternary CLIP", "See gs://bucket/x and /home/me/y.")
    assert "See gs://bucket/x and /home/me/y." in public_provenance(text)[0]
    assert public_provenance(EXPORT.replace("| provenance | |", "| other | |"))[1] == []
