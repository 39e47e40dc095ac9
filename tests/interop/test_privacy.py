"""What `tclip push` holds to be private, and where it finds it."""

from __future__ import annotations

import getpass
import json
import pathlib
import pickle
import socket
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from tclip_jax.interop.privacy import Finding, find_in_text, find_private, shortened


def found(text: str, name: str = "README.md", public: tuple[str, ...] = ()) -> list[tuple[str, str, str]]:
    return [(each.place, each.what, each.text) for each in find_in_text(text, name, public=public)]


@pytest.mark.parametrize(
    ("text", "what", "match"),
    [
        ("from /home/me/runs/x/y.py on", "an absolute path", "/home/me/runs/x/y.py"),
        ('{"path": "/gscratch/lab/vit"}', "an absolute path", "/gscratch/lab/vit"),
        ("--data=/d/e", "an absolute path", "/d/e"),
        ("wds:/d/cc12m/*.tar", "an absolute path", "/d/cc12m/*.tar"),
        ("(/srv/a/b)", "an absolute path", "/srv/a/b"),
        ("~/models/x", "an absolute path", "~/models/x"),
        ("~me/models", "an absolute path", "~me/models"),
        (r"C:\Users\me\x", "an absolute path", r"C:\Users\me\x"),
        (json.dumps(r"D:\a\b"), "an absolute path", r"D:\\a\\b"),
        ("wds:gs://bucket/cc/{0..9}.tar, then", "a bucket", "gs://bucket/cc/{0..9}.tar"),
        ("s3://b", "a bucket", "s3://b"),
        ("file:///x/y", "a bucket", "file:///x/y"),
        ("https://storage.googleapis.com/mine/x?y=1", "a bucket", "https://storage.googleapis.com/mine/x?y=1"),
        ("https://b.s3.us-east-1.amazonaws.com/k", "a bucket", "https://b.s3.us-east-1.amazonaws.com/k"),
        ("https://acc.blob.core.windows.net/c/k", "a bucket", "https://acc.blob.core.windows.net/c/k"),
        ("teacher runs/vit-l/teacher.", "the workdir of a run", "runs/vit-l/teacher."),
        ('"workdir":  "vit"', "the workdir of a run", '"workdir":  "vit'),
        ("token hf_" + "a" * 34, "a secret", "hf_" + "a" * 34),
        ("AKIAIOSFODNN7EXAMPLE", "a secret", "AKIAIOSFODNN7EXAMPLE"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a secret", "-----BEGIN RSA PRIVATE KEY-----"),
    ],
)
def test_private_text_is_found_with_its_line(text: str, what: str, match: str) -> None:
    assert ("line 3", what, match) in found(f"# Model\n\n{text}\n")
    assert found(f"# Model\n\n{text}\n", public=(match,)) == []


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/org/name/blob/main/README.md and http://x.org/home/me",
        "image/png, and/or/either, 1/2/3, ./a/b, ../a/b/c, a/b/c, configs/ternaryclip.py",
        "<p>text</p></div> $HOME/x/y ${HOME}/x/y {folder}/image.bin",
        "#!/usr/bin/env python, /dev/null, /etc/hosts/x",
        "hf-hub:org/name, tfds:coco/2017, gs:// and s3:// alone, / and // and /a",
        "previous runs/, dry-runs/x",
        'license: apache-2.0\nlibrary_name: open_clip\ntags: [clip]\n"workdir": ""',
    ],
)
def test_public_text_is_passed(text: str) -> None:
    assert found(text) == []


def test_names_of_the_user_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "dana")
    monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("/home/dana.k"))
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-17.lab.example")
    text = "by dana\nby dana.k, dana@x.org\non gpu-17\ndanas, adana, Dana"
    places = [(place, what) for place, what, _ in found(text)]
    assert places.count(("line 1", "a user name")) == 1 and places.count(("line 2", "a user name")) == 2
    assert ("line 3", "the name of this machine") in places and len(places) == 4
    assert found("by dana", public=("dana",)) == []
    assert found('{"dana</w>": 1}', "tokenizer.json") == []  # a token
    for anybody in ("root", "user", "ab"):
        monkeypatch.setattr(getpass, "getuser", lambda name=anybody: name)
        monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("/root"))
        assert found(f"the {anybody} of the system") == []


def test_a_container_may_have_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise KeyError("getpwuid(): uid not found: 1000")

    monkeypatch.setattr(getpass, "getuser", none)
    assert found("a text") == []


def private(path: pathlib.Path) -> list[str]:
    return [str(each) for each in find_private(path, path.name)]


def test_json_with_escaped_slashes(tmp_path: pathlib.Path) -> None:
    for name in ("config.json", "CONFIG.JSON"):
        (tmp_path / name).write_text('{\n"x": "\\/srv\\/me\\/x"}')
        assert private(tmp_path / name) == [f"{name}, line 2: an absolute path, /srv/me/x"]


def test_headers_of_safetensors(tmp_path: pathlib.Path) -> None:
    path, tensors = tmp_path / "model.safetensors", {"w": np.zeros(3, np.float32)}
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    assert private(path) == []
    safetensors.numpy.save_file(tensors, path, {"source": "gs://mine/run/step_3"})
    assert private(path) == ["model.safetensors, header: a bucket, gs://mine/run/step_3"]
    for name in ("opt_state.0.mu.w", "optimizer.state.w", "exp_avg/w", "0/nu/w"):
        safetensors.numpy.save_file({name: tensors["w"]}, path)
        with pytest.raises(ValueError, match=rf"^model\.safetensors: {name} is the state of an optimizer: push the"):
            private(path)
    path.write_bytes(b"\x80\x02" + bytes(6) + b"{}".ljust(0x280))  # starts as a pickle does
    assert private(path) == []
    for data in (
        b"",
        b"\xff" * 40,
        pickle.dumps({"w": 1}),
        b"\x08" + bytes(7) + b"[1,2,3] ",
        b"version https://git-lfs.github.com/spec/v1",
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"^model\.safetensors is not a safetensors file: its header is not"):
            private(path)


def test_metadata_of_gguf(tmp_path: pathlib.Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"

    def write(source: str) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_string("general.source.url", source)
        writer.add_array("general.tags", ["clip", source])
        writer.add_array("tokenizer.ggml.tokens", ["/home/me/x"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()

    write("https://example.org")
    assert private(path) == []
    write("/gscratch/lab/vit")
    assert private(path) == ["model.gguf, metadata: an absolute path, /gscratch/lab/vit"] * 2
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"^model\.gguf is not a GGUF file: truncated"):
        private(path)


def test_programs_and_other_bytes(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "image.bin"
    path.write_bytes(np.random.default_rng(0).bytes(1_000_000) + b"x.replace(/a/g,/b/c/d)</p> ~/x/.test(y)")
    assert private(path) == []
    path.write_bytes(b"\x00\n\x01\x02/home/me/tclip/layers.py\x00\xffs3://mine\x80")
    assert private(path) == [
        "image.bin, line 2: an absolute path, /home/me/tclip/layers.py",
        "image.bin, line 2: a bucket, s3://mine",
    ]
    path.write_bytes(bytes(300) + b"x" * 200 + b"/home/me/home/me" + bytes(2000) + b"\n\n/mnt/a/tmp/b")
    assert private(path) == ["image.bin, line 3: an absolute path, /mnt/a/tmp/b"]
    path.write_bytes(b"x = 'hf_" + b"a" * 34 + b"'  # gho_" + b"b" * 36 + b"\n-----BEGIN PRIVATE KEY-----")
    assert private(path) == [
        "image.bin, line 1: a secret, hf_aaaaa…",
        "image.bin, line 1: a secret, gho_bbbb…",
        "image.bin, line 2: a secret, -----BEG…",
    ]
    for data in (b"", b"\x80\x02\x00\x00TFL3"):
        path.write_bytes(data)
        assert private(path) == []


def test_what_cannot_be_looked_through_is_refused(tmp_path: pathlib.Path) -> None:
    archive, pickled, text = tmp_path / "demo.zip", tmp_path / "model.pt", tmp_path / "notes.md"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x", "y")
    pickled.write_bytes(pickle.dumps({"w": 1}))
    text.write_bytes(b"caf\xe9")
    for path, reason in (
        (archive, "is a zip archive, which cannot"),
        (pickled, "is a pickle, which"),
        (text, "is not UTF-8 text, as its name says: byte 3"),
    ):
        with pytest.raises(ValueError, match=f"^{path.name} {reason}"):
            private(path)


@pytest.mark.parametrize(
    "name",
    [
        *("checkpoints/100/params/data", "metrics.jsonl", "history.jsonl", "a/_METADATA", "optimizer.pt"),
        *("tensorboard/events", "events.out.tfevents.1.x", "x/manifest.ocdbt"),
    ],
)
def test_parts_of_a_run_are_refused(name: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match=f"^{name} belongs to a run: export the run"):
        list(find_private(path, name))


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("wds:gs://bucket/cc12m/{000..999}.tar", "wds:cc12m"),
        ("wds:gs://bucket/cc12m/{0..9}.tar::gs://other/yfcc/*.tar", "wds:cc12m::yfcc"),
        ("/home/me/data/train.csv", "train.csv"),
        ("gs://bucket/*.tar", "unnamed"),
        ("https://storage.googleapis.com/bucket", "unnamed"),
        ("runs/vit-l/teacher", "teacher"),
        ("tfds:coco_captions@~/tensorflow_datasets", "tfds:coco_captions@tensorflow_datasets"),
        ("hf-hub:org/name", "hf-hub:org/name"),
    ],
)
def test_shortened_paths_keep_the_name_of_the_data(text: str, short: str) -> None:
    assert shortened(text) == short and found(short) == []


def test_a_finding_is_one_short_line() -> None:
    line = str(Finding("a.md", "line 1", "a bucket", "gs://" + "x" * 500 + "\n\x1b[31m"))
    assert line.startswith("a.md, line 1: a bucket, gs://xxx") and len(line) < 140 and line.isprintable()


def test_pictures_and_hashes_in_base64_are_no_paths() -> None:
    """A slash is a digit of base64, so that one after + looks like the start of a path."""
    body = "AAAAAAAAAAAAAAAA+/home/me/x+/gscratch/lab"
    for start in ("iVBORw0KGgo", "/9j/4AAQ", "R0lGODlh", "UklGRh4A"):
        assert found(f'"data:image/x;base64,{start}{body}==", "image/png": "{start}{body}"', "page.json") == []
    assert found(f'"integrity": "sha384-{"A" * 40}+/d/e/{"B" * 17}"') == []
    for hidden in (f"iVBORw0KGgo{body}== /home/me/x", f"sha384-short+/home/me/x {body}", body):
        assert found(hidden), hidden
