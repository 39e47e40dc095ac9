"""Teacher caches: reproducible, resumable, and with the losses of a teacher in the step."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from tclip_jax.artifacts import write_artifact
from tclip_jax.data.embedding_store import MANIFEST, TeacherCache
from tclip_jax.data.images import normalize
from tclip_jax.data.pipeline import train_iterator
from tclip_jax.data.sources import open_source
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.inference.load import load_model
from tclip_jax.interop.export import export_model
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.runs.config import LossConfig, run_config
from tclip_jax.runs.record import read_metrics
from tclip_jax.training import loop
from tclip_jax.training.objective import Encoders, Objective, init_heads
from tclip_jax.training.teacher_cache import open_cache, write_cache

SIZES = {"copies": 2, "batch_size": 700, "file_rows": 1000}


@pytest.fixture
def cached(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> ml_collections.ConfigDict:
    """The configuration of a student with the cache, of two copies, of a teacher with other pixel statistics."""
    teacher = config.copy_and_resolve_references()
    teacher.steps = 2
    teacher.preprocess.update({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    loop.train(teacher, tmp_path / "teacher")
    config.data.augment = "affine"
    config.model.embed_dim, config.steps = 8, 2
    write_cache(tmp_path / "cache", run_config(config), str(tmp_path / "teacher"), **SIZES)
    config.data.teacher_cache = str(tmp_path / "cache")
    config.loss.update({"crd": 1.0, "icl": 1.0, "fd": 1.0})
    return config


def batches(config: ml_collections.ConfigDict, count: int) -> list[dict[str, Any]]:
    run = run_config(config)
    iterator = train_iterator(
        open_source("digits", "train"),
        tokenizer=Tokenizer(run.model.text.context_length),
        preprocess=run.preprocess,
        augment=run.data.augment,
        templates=run.data.templates,
        batch_size=8,
        seed=3,
        cache=open_cache(run),
    )
    return [next(iterator) for _ in range(count)]


@pytest.mark.slow
def test_cache(cached: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
    folder, run = tmp_path / "cache", run_config(cached)
    cache = TeacherCache.open(folder)
    assert (cache.samples, cache.copies, cache.files, cache.embed_dim) == (1400, 2, 3, 16)
    assert np.load(folder / "00002.npy").shape == (800, 2, 16)

    # The losses are those of the teacher in the step, which uses its own pixel statistics.
    teacher, loss = load_model(tmp_path / "teacher"), LossConfig(crd=1.0, icl=1.0, fd=1.0, positives="equal_text")
    student = CLIP(run.model)
    params = {
        "clip": jax.jit(init_params, static_argnums=0)(student, jax.random.key(0)),
        "heads": init_heads(jax.random.key(1), run.model, cache.embed_dim, loss),
    }
    encode_teacher = Encoders(CLIP(teacher.config), teacher.preprocess.mean, teacher.preprocess.std)
    encode_student = Encoders(student, run.preprocess.mean, run.preprocess.std)

    def metrics(objective: Objective, p: Any, t: Any, b: Any) -> Any:
        return objective.loss(p, t, b, *objective.encode(p, t, b, b))[1]

    in_the_step = jax.jit(lambda p, t, b: metrics(Objective(encode_student, encode_teacher, loss), p, t, b))
    from_cache = jax.jit(lambda p, b: metrics(Objective(encode_student, cache.logit_scale, loss), p, None, b))
    for batch in batches(cached, 2):
        in_step, stored = in_the_step(params, teacher.params, batch), from_cache(params, batch)
        for name in ("loss/crd", "loss/icl", "loss/fd"):
            assert float(stored[name]) == pytest.approx(float(in_step[name]), abs=1e-3), name
        mistaken = normalize(batch["image"], run.preprocess.mean, run.preprocess.std)
        assert np.abs(teacher.encode_image(mistaken) - batch["teacher_image"]).max() > 0.01

    # Exported to open_clip and read again, the teacher gives the same embeddings, by the pixel statistics of its files.
    described = {"config": teacher.config, "preprocess": teacher.preprocess, "params": teacher.params}
    export_model(tmp_path / "open_clip", **described, formats=("open_clip",))
    imported = load_model(tmp_path / "open_clip")
    again = Encoders(CLIP(imported.config), imported.preprocess.mean, imported.preprocess.std)
    for ours, theirs in zip(encode_teacher(teacher.params, batch)[:2], again(imported.params, batch)[:2], strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-6)

    # Both copies are used, and they are reproducible.
    rows = [row.tobytes() for batch in batches(cached, 20) for row in batch["image"]]
    assert rows == [row.tobytes() for batch in batches(cached, 20) for row in batch["image"]]

    # Whole files are unchanged, and missing ones are written again with the same bytes.
    (folder / "00001.npy").rename(tmp_path / "was.npy")
    with pytest.raises(FileNotFoundError, match=r"00001\.npy: no such file; run `tclip teacher-cache` again"):
        open_cache(run)
    first = (folder / "00000.npy").stat().st_mtime_ns
    again = write_cache(folder, run, str(tmp_path / "teacher"), **SIZES)
    assert (folder / "00001.npy").read_bytes() == (tmp_path / "was.npy").read_bytes() and again == cache
    assert (folder / "00000.npy").stat().st_mtime_ns == first
    with pytest.raises(
        ValueError, match=r"cache\.json: the folder contains another cache \(copies: 2, not 3\): choose another"
    ):
        write_cache(folder, run, str(tmp_path / "teacher"), copies=3, file_rows=1000)

    loop.train(cached, tmp_path / "student")
    last = read_metrics(tmp_path / "student")[-1]
    assert last["step"] == 2 and all(np.isfinite(last[f"loss/{name}"]) for name in ("task", "crd", "icl", "fd"))

    # Whole runs without augmentation agree too, up to the rounding of float16 embeddings.
    plain = cached.copy_and_resolve_references()
    plain.data.update({"augment": "none", "templates": ("a {c}",)})
    plain.loss.update({"open_clip": 1.0, "affinity": 1.0, "kl": 1.0})
    write_cache(tmp_path / "plain", run_config(plain), str(tmp_path / "teacher"), **(SIZES | {"copies": 1}))
    lines = {}
    for name, teachers in (("from cache", ("", "plain")), ("in step", ("teacher", ""))):
        plain.teacher, plain.data.teacher_cache = (str(tmp_path / each) if each else "" for each in teachers)
        loop.train(plain, tmp_path / name)
        lines[name] = read_metrics(tmp_path / name)
    for stored, in_step in zip(*lines.values(), strict=True):
        terms = [name for name in in_step if name.startswith("loss")]
        assert len(terms) == 8
        assert {name: stored[name] for name in terms} == pytest.approx(
            {name: in_step[name] for name in terms}, rel=1e-3
        )

    cached.data.augment = "none"
    with pytest.raises(
        ValueError, match=r"the teacher's inputs differ \(augment: 'affine', not 'none'\): make another"
    ):
        loop.train(cached, tmp_path / "other")
    cached.data.augment = "affine"
    broken = pathlib.Path(shutil.copytree(folder, tmp_path / "broken"))
    whole = (broken / "00000.npy").read_bytes()
    (broken / "00000.npy").write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=r"00000\.npy: 64,127 bytes: a complete file .* has 64,128; run `tclip teacher-cache`"
    ):
        TeacherCache.open(broken)
    assert write_cache(broken, run, str(tmp_path / "teacher"), **SIZES).read(999, 0).shape == (2, 16)
    assert (broken / "00000.npy").read_bytes() == whole
    (broken / "00001.npy").write_bytes(b"x" * 64_128)
    opened = TeacherCache.open(broken)
    with pytest.raises(ValueError, match=r"00001\.npy: not a file of embeddings of the expected shape"):
        opened.read(1, 1)
    (broken / "00000.npy").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert TeacherCache.open(broken).read(998, 0).shape == (2, 16)
    with pytest.raises(ValueError, match=r"00000\.npy: row 999 is damaged: remove this file and run `tclip teacher"):
        opened.read(999, 0)
    os.truncate(broken / "00000.npy", 64_100)  # reading a truncated memory map would raise SIGBUS
    with pytest.raises(ValueError, match=r"00000\.npy: row 999 is missing: the file was truncated"):
        opened.read(999, 0)
    (folder / MANIFEST).write_text(json.dumps({"teacher": "x"}))
    with pytest.raises(ValueError, match=r"cache\.json lacks 'source'"):
        TeacherCache.open(folder)
    with pytest.raises(FileNotFoundError, match="expected a folder written by `tclip teacher-cache`"):
        TeacherCache.open(tmp_path / "nothing")


def test_bad_samples_are_logged_as_one_count(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data" / "train" / "cat"
    folder.mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (20, 20)).save(folder / f"{i}.png")
        if i % 2:
            (folder / f"{i}.png").write_bytes(b"not an image")
    config.data.update({"source": f"folder:{tmp_path}/data", "templates": "simple"})
    run = run_config(config)
    params = init_params(CLIP(run.model), jax.random.key(0))
    write_artifact(tmp_path / "teacher", config=run.model, preprocess=run.preprocess, params=params, rules=())
    cache = write_cache(tmp_path / "cache", run, str(tmp_path / "teacher"), copies=3, batch_size=8)
    assert cache.samples == 5
    (line,) = (line for line in caplog.messages if "bad sample" in line)
    assert line.startswith("2 bad samples (corrupt_image 2), masked; the first: ") and f"{folder}/" in line


@pytest.mark.slow
def test_a_cache_of_other_data_or_of_another_teacher_is_refused(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    for number in range(8):
        path = tmp_path / "data" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * number, 0, 0)).save(path, compress_level=0)
    config.data.update({"source": f"folder:{tmp_path}/data", "templates": ("a {c}",)})
    config.steps, teacher, cache = 1, str(tmp_path / "teacher"), tmp_path / "cache"
    loop.train(config, teacher)
    run = run_config(config)
    made = write_cache(cache, run, teacher, copies=1, batch_size=8)
    config.data.teacher_cache, config.loss.crd = str(cache), 1.0
    run = run_config(config)
    assert open_cache(run, open_source(run.data.source, "train")) == made
    shutil.copytree(tmp_path / "data", tmp_path / "copy")  # the data may be moved
    assert open_cache(run, open_source(f"folder:{tmp_path}/copy", "train")).made_by == made.made_by

    # Another image with the same name and size; other captions under the same name of templates.
    image = tmp_path / "data" / "cat" / "1.png"
    was = image.read_bytes()
    Image.new("RGB", (20, 20), (31, 0, 0)).save(image, compress_level=0)
    assert len(image.read_bytes()) == len(was)
    for refused in (
        lambda: loop.train(config, tmp_path / "student"),
        lambda: write_cache(cache, run, teacher, copies=1, batch_size=8),
    ):
        with pytest.raises(ValueError, match=r"data\.content: '\w+', not '\w+'"):
            refused()
    image.write_bytes(was)
    assert not (tmp_path / "student").exists()
    config.data.templates = ("the {c}",)
    with pytest.raises(ValueError, match=r"inputs differ \(templates: \['a \{c\}'\], not \['the \{c\}'\]\)"):
        open_cache(run_config(config), open_source(config.data.source, "train"))

    # Another teacher at the same path, and the manifest of an older version.
    config.data.update({"templates": ("a {c}",), "teacher_cache": ""})
    config.seed, config.loss.crd = 1, 0.0
    shutil.rmtree(teacher)
    loop.train(config, teacher)
    config.seed = 0
    with pytest.raises(ValueError, match=r"made_by\.teacher: '\w+', not '\w+'\): choose another folder"):
        write_cache(cache, run_config(config), teacher, copies=1, batch_size=8)
    old = json.loads((cache / MANIFEST).read_text())
    old["inputs"] = old.pop("made_by")
    (cache / MANIFEST).write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"cache\.json: an older version wrote it.*make the cache in a new folder"):
        TeacherCache.open(cache)


PROCESS = """
import os, sys
index, port, root, out = int(sys.argv[1]), *sys.argv[2:]
os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
import jax
jax.config.update("jax_disable_most_optimizations", True)
if port != "0":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
from tclip_jax.runs.config import run_config
from tclip_jax.runs.config import read_config
from tclip_jax.training.teacher_cache import write_cache
write_cache(out, read_config(root), root, copies=2, batch_size=8, file_rows=100)
"""


def start(index: int, port: int, *paths: pathlib.Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(index), str(port), *map(str, paths)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_killed_and_started_again_give_the_files_of_one(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    config.steps = 1
    loop.train(config, tmp_path / "teacher")
    two, one = tmp_path / "two", tmp_path / "one"

    def start_two() -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = int(probe.getsockname()[1])
        return [start(index, port, tmp_path / "teacher", two) for index in (0, 1)]

    killed = start_two()
    deadline = time.monotonic() + 600
    while not list(two.glob("*.npy")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in killed:
        process.kill()
        process.communicate()
    assert 0 < len(list(two.glob("*.npy"))) < 28
    with pytest.raises(FileNotFoundError, match="again, which resumes"):
        TeacherCache.open(two)
    first = {path: path.stat().st_mtime_ns for path in two.glob("*.npy")}

    for process in [*start_two(), start(0, 0, tmp_path / "teacher", one)]:
        _, log = process.communicate(timeout=900)
        assert process.returncode == 0, log[-2000:]
    assert TeacherCache.open(two).files == 28 and {path: path.stat().st_mtime_ns for path in first} == first
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()
