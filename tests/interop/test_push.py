"""`tclip push`: what it sends and how it fails, with a hub that the test runs."""

from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from etils import epath
from huggingface_hub import constants

from tclip_jax.artifacts import pack_params
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.export import export_model
from tclip_jax.interop.push import Upload, prepare, push
from tclip_jax.interop.stablehlo import write_stablehlo
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.ternary import Quantizer
from tests.hub_server import TOKEN, Hub, hub_server

# huggingface_hub calls its own HTTP library in a way that this one will not take one day.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[Hub]:
    """The hub of this process, with a token; retries do not wait."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def ready(folder: pathlib.Path, **options: Any) -> Upload:
    return prepare(str(folder), "me/model", **{"licence": "mit", **options})


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_arrives_in_one_commit(folder: pathlib.Path, hub: Hub) -> None:
    before = contents(folder)
    assert push(ready(folder)) == f"{hub.address}/models/me/model/commit/1"
    sent = hub.files["models/me/model"]
    assert len(hub.commits) == 1 and set(hub.commits[0]) == set(before) == set(sent)
    card = sent.pop("README.md").decode()
    assert card.startswith("---\n") and "license: mit\n" in card and card.endswith("---\n# Model\n")
    assert contents(folder) == before and all(before[name] == data for name, data in sent.items())
    assert hub.private["models/me/model"] is False


def test_a_private_repository(folder: pathlib.Path, hub: Hub) -> None:
    push(ready(folder), private=True)
    assert hub.private["models/me/model"] is True
    push(ready(folder), private=True)
    hub.private["models/me/model"] = False
    count = len(hub.commits)
    with pytest.raises(ValueError, match=r"^me/model exists and is public, which --private does not change: make it"):
        push(ready(folder), private=True)
    assert len(hub.commits) == count


def test_other_files_of_the_repository_stay(folder: pathlib.Path, hub: Hub) -> None:
    hub.create("models/me/model")
    hub.files["models/me/model"]["old.txt"] = b"old"
    push(ready(folder))
    assert hub.files["models/me/model"]["old.txt"] == b"old" and "POST /api/repos/create" not in hub.requests


def test_an_upload_that_breaks_commits_nothing_and_is_resumed(folder: pathlib.Path, hub: Hub) -> None:
    first = threading.Event()

    def second_breaks(number: int) -> bool:
        if number == 0:
            first.set()
            return False
        return first.wait(10)

    hub.breaks = second_breaks
    with pytest.raises(
        ConnectionError, match=r"^me/model: http\S+ cannot be reached, or the upload was inter"
    ) as error:
        push(ready(folder))
    assert "\n" not in str(error.value) and str(error.value).endswith("the same command resumes it")
    assert hub.commits == [] and len(hub.objects) == 1
    (arrived,) = hub.objects
    hub.breaks, before = (lambda number: False), hub.puts[arrived]
    push(ready(folder))
    assert len(hub.commits) == 1 and len(hub.objects) == 2 and hub.puts[arrived] == before
    for name in ("model.safetensors", "open_clip_model.safetensors"):
        assert hub.files["models/me/model"][name] == (folder / name).read_bytes()


@pytest.mark.faults
def test_a_killed_push_is_resumed(folder: pathlib.Path, hub: Hub) -> None:
    """The process dies in the middle of the second file; the next sends that file alone."""
    second, released = threading.Event(), threading.Event()

    def second_waits(number: int) -> bool:
        if number:
            second.set()
            released.wait(60)
        return bool(number)

    hub.breaks = second_waits
    command = [sys.executable, "-m", "tclip_jax", "push", str(folder), "me/model", "--licence", "mit", "--yes"]
    environment = os.environ | hub.environ
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert second.wait(60)
    until = time.monotonic() + 600
    while not hub.objects and time.monotonic() < until:
        time.sleep(0.05)
    running.kill()
    running.communicate()
    released.set()
    assert running.returncode == -9 and hub.commits == []
    (arrived,) = hub.objects
    hub.breaks, before = (lambda number: False), hub.puts[arrived]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and done.stdout.endswith(f"{hub.address}/models/me/model/commit/1\n"), done.stderr
    assert hub.puts[arrived] == before and len(hub.objects) == 2 and len(hub.commits) == 1


def test_the_same_again_sends_no_large_file(folder: pathlib.Path, hub: Hub) -> None:
    push(ready(folder))
    before = dict(hub.puts)
    push(ready(folder))
    assert dict(hub.puts) == before
    assert set(before) == {
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "open_clip_model.safetensors")
    }


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_a_name_of_another_kind_is_refused(kind: str, folder: pathlib.Path, hub: Hub) -> None:
    hub.create(f"{kind}s/me/model")
    with pytest.raises(
        ValueError, match=f"^me/model is a {kind} on the hub, and this would be a model: choose another"
    ):
        push(ready(folder))
    assert hub.commits == [] and set(hub.files) == {f"{kind}s/me/model"}


def test_tokens(folder: pathlib.Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = ready(folder)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"^no token for the hub: run `hf auth login`, or set HF_TOKEN$"):
        push(upload)
    assert hub.requests == []
    for token, reason in (
        ("wrong", "me/model: the hub does not accept the token: run `hf auth login`"),
        ("reader", "me/model: the token may not write there: make one"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PermissionError, match=f"^{reason}") as error:
            push(upload)
        assert "\n" not in str(error.value)
    assert hub.files == {}


def test_a_licence_that_the_hub_does_not_know_creates_nothing(folder: pathlib.Path, hub: Hub) -> None:
    with pytest.raises(ValueError, match=r'"license" must be one of \[apache') as error:
        push(ready(folder, licence="unknown-1.0"))
    assert "\n" not in str(error.value) and hub.files == {}


def test_no_network(folder: pathlib.Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = ready(folder)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"^me/model: http://127.0.0.1:9 cannot be reached, or the") as error:
        push(upload)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"^me/model: HF_HUB_OFFLINE is set, and a push needs the network$"):
        push(upload)


def test_a_link_within_the_folder_is_sent_as_its_file(folder: pathlib.Path, hub: Hub) -> None:
    (folder / "copy.json").symlink_to("config.json")
    push(ready(folder))
    assert hub.files["models/me/model"]["copy.json"] == b"{}\n"


@pytest.mark.slow
def test_a_real_export_has_nothing_private(
    tmp_path: pathlib.Path, random_params: Callable[[CLIPConfig], dict[str, Any]], hub: Hub
) -> None:
    """In every format; what its provenance has of paths is shortened."""
    config = CLIPConfig(
        embed_dim=32,
        vision=VisionConfig(image_size=(32, 32), patch_size=16, width=256, layers=1),
        text=TextConfig(context_length=12, width=256, heads=4, layers=1),
    )
    params = pack_params(random_params(config), ternary_rules("Q-ALL", Quantizer()))
    provenance = {"recipe": "quickstart", "data": {"source": "wds:gs://mine/cc12m/{0..9}.tar"}}
    formats = ["open_clip", "hf", "gguf-tq1_0", "gguf-tq2_0"]
    figures = {"zero_shot_accuracy": 0.5}
    fields: dict[str, Any] = {"config": config, "preprocess": Preprocess(32), "params": params, "check": True}
    export_model(tmp_path / "out", **fields, formats=formats, figures=figures, provenance=provenance)
    write_stablehlo(epath.Path(tmp_path / "out" / "stablehlo"), config=config, params=params)
    upload = ready(tmp_path / "out")
    assert upload.notes == ["README.md: data.source is shortened to wds:cc12m"]
    push(upload)
    sent = hub.files["models/me/model"]
    assert set(sent) == set(contents(tmp_path / "out")) and len(sent) == 19
    card = sent["README.md"].decode()
    assert "| zero_shot_accuracy | 0.5 |" in card and "| data.source | wds:cc12m |" in card
    assert "| recipe | quickstart |" in card and "hf-hub:me/model" in card and "mine" not in card
