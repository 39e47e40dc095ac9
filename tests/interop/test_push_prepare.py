"""What `tclip push` would send: the listing, and the folders and names that it refuses."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from tclip_jax.interop.push import Upload, listing, prepare


def ready(folder: pathlib.Path, **options: Any) -> Upload:
    return prepare(str(folder), "me/model", **{"licence": "mit", **options})


def test_the_listing_is_aligned_and_whole(folder: pathlib.Path) -> None:
    (folder / ".DS_Store").write_text("/home/me/x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("gs://mine/x")
    upload = ready(folder)
    size = (folder / "model.safetensors").stat().st_size
    lines = listing(upload).splitlines()
    assert lines[:7] == [
        "file                         bytes",
        f"README.md                    {len(upload.card.encode()):5,}",
        "config.json                      3",
        f"model.safetensors            {size:5,}",
        f"open_clip_model.safetensors  {size:5,}",
        "stablehlo/load.py               11",
        f"total, 5 files               {2 * size + 14 + len(upload.card.encode()):5,}",
    ]
    assert lines[8:] == [
        "front matter of README.md:",
        *("  tags:", "  - clip", "  library_name: open_clip", "  license: mit"),
        "  pipeline_tag: zero-shot-image-classification",
        "stays here: .DS_Store, .cache (hidden)",
    ]
    assert not any(name.startswith(".") for name in upload.files)


def test_findings_name_file_and_line(folder: pathlib.Path) -> None:
    (folder / "config.json").write_text('{\n  "a": "/srv/me/x",\n  "b": "gs://mine/y"\n}\n')
    (folder / "README.md").write_text("---\ntags: [clip]\n---\n# Model\n\nfrom runs/vit-b/student\n")
    with pytest.raises(ValueError) as error:
        ready(folder)
    assert str(error.value) == (
        "private: README.md, line 6: the workdir of a run, runs/vit-b/student;"
        " config.json, line 3: a bucket, gs://mine/y; config.json, line 2: an absolute path, /srv/me/x."
        " Remove it, or pass --public TEXT for what is public"
    )
    assert len(ready(folder, public=["/srv/me", "gs://mine/", "runs/vit-b"]).files) == 5
    (folder / "config.json").write_text("".join(f'"/srv/{number}/x"\n' for number in range(20)))
    with pytest.raises(ValueError, match=r"config\.json, line 4: an absolute path, /srv/3/x; and 16 more\. Remove"):
        ready(folder)


def test_yaml_cannot_hide_a_path(folder: pathlib.Path) -> None:
    (folder / "README.md").write_text('---\nbase: "\\x2fhome\\x2fme/x"\n---\n')
    with pytest.raises(ValueError, match=r"^private: README\.md, line 2: an absolute path, /home/me/x\. Remove"):
        ready(folder)


def outside(root: pathlib.Path) -> str:
    (root.parent / "secret.json").write_text("{}")
    (root / "a.json").symlink_to(root.parent / "secret.json")
    return r"^a\.json is a link out of the folder, to /\S+secret\.json: copy the file"


def through_a_folder(root: pathlib.Path) -> str:
    (root / "b").symlink_to(root / "stablehlo")
    return "^b is a link to a folder: copy the folder"


def folder_outside(root: pathlib.Path) -> str:
    (root / "c").symlink_to("..")
    return "^c is a link out of the folder, to /"


def broken(root: pathlib.Path) -> str:
    (root / "d").symlink_to(root / "nothing")
    return "^d is not a plain file"


def pipe(root: pathlib.Path) -> str:
    os.mkfifo(root / "e")
    return "^e is not a plain file"


def odd_name(root: pathlib.Path) -> str:
    (root / "f\n\x1b[31m").write_text("")
    return r"^f\\n\\x1b\[31m: the hub takes no such name"


def no_utf8(root: pathlib.Path) -> str:
    pathlib.Path(os.fsdecode(os.fsencode(root) + b"/g\xff")).write_text("")
    return r"^g\\xff: the hub takes no such name"


def a_run(root: pathlib.Path) -> str:
    (root / "checkpoints" / "100").mkdir(parents=True)
    (root / "checkpoints" / "100" / "data").write_text("x")
    return "^checkpoints/100/data belongs to a run: export the run"


def no_card(root: pathlib.Path) -> str:
    (root / "README.md").unlink()
    return r"release has no README\.md, the model card: push what `tclip export` writes"


def no_text(root: pathlib.Path) -> str:
    (root / "README.md").write_bytes(b"\xff\xfe")
    return r"^README\.md is not UTF-8 text, as its name says: byte 0"


@pytest.mark.parametrize(
    "spoil",
    [outside, through_a_folder, folder_outside, broken, pipe, odd_name, no_utf8, a_run, no_card, no_text],
    ids=lambda spoil: spoil.__name__,
)
def test_hostile_folders_are_refused_by_name(spoil: Callable[[pathlib.Path], str], folder: pathlib.Path) -> None:
    message = spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        ready(folder)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "name", ["model", "me/model/x", "/model", "me/", "me model/x", "../x", "me/.x", "https://a/b", "a/b\n"]
)
def test_names_that_are_no_repository(name: str, folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r" is not a repository of the hub: write USER/NAME$"):
        prepare(str(folder), name, licence="mit")


@pytest.mark.parametrize("name", ["nowhere", "gs://bucket/release"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{name}: no such folder on this machine$"):
        prepare(name, "me/model", licence="mit")
