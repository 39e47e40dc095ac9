"""`data check`: counts of planted faults, duplicates against a dictionary, and samples that training masks."""

from __future__ import annotations

import collections
import json
import pathlib

import numpy as np
import pytest

from tclip_jax import cli
from tclip_jax.data.file_tokenizer import TOKENIZER_JSON, FileTokenizer
from tclip_jax.data.sources import BadSample, Record, open_source
from tclip_jax.datasets import check as check_module
from tclip_jax.datasets.check import Findings, check, examine, quantile
from tests.small_tokenizers import CONTEXT, gemma_json, padded, write_gemma

BROKEN = {"corrupt_image": 1, "no_caption": 1, "broken_shard": 1, "empty_shard": 1}
TWINS = ("00000.tar/000000", "00001.tar/000013")  # samples of one image


def test_planted_faults_are_counted(
    tars: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["data", "check", "--data", f"wds:{tars}/*.tar", "--workers", "2", "--context-length", "20"]
    assert cli.main([*command, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["broken"] == BROKEN and (report["samples"], report["good"]) == (11, 7)
    assert report["formats"] == {"JPEG RGB": 7}
    assert report["short_sides"]["0.5"] == 30 and report["long_sides"]["1"] == 40
    assert (report["captions"]["0"], report["captions"]["1"]) == (1, 1)
    # The start token, "cat" and the end token are three; one of seven captions has 40 · 3 words.
    assert report["tokens"]["0"] == 3 and report["tokens"]["1"] == 122 and report["cut_share"] == 1 / 7
    assert report["notes"] == [f"{tars}/00000.tar and 3 more: 1 file skipped: 1 .json; first 000012.json"]
    # 000013 has the image of 000000.
    assert report["duplicates"] == 1 and report["duplicate_examples"] == [[f"{tars}/{name}" for name in TWINS]]

    assert cli.main(command) == 1
    text = capsys.readouterr().out
    assert (
        "broken: corrupt_image" in text
        and "captions cut at 20 tokens" in text
        and f"\n  {tars}/{TWINS[0]}, {tars}/" in text
    )
    assert f"\nSkipped by the source:\n  {tars}/00000.tar and 3 more: 1 file skipped" in text
    assert cli.main(["data", "check", "--data", f"wds:{tars}/00000.tar", "--workers", "1"]) == 0


def test_captions_are_counted_with_the_tokenizer_and_context_of_a_recipe(
    tmp_path: pathlib.Path, jpeg: collections.abc.Callable[[int], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    texts = ("dogs", "a photo of two brown dogs " * 9)
    for i, text in enumerate(texts):
        (tmp_path / f"data/{i}.jpg").write_bytes(jpeg(i))
        (tmp_path / f"data/{i}.txt").write_text(text)
    size = write_gemma(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from configs import quickstart\n\ndef get_config():\n    config = quickstart.get_config('student')\n"
        f"    config.data.tokenizer = {str(tmp_path)!r}\n    config.data.source = 'folder:{tmp_path}/data'\n"
        f"    text = dict(context_length={CONTEXT}, vocab_size={size}, hf_tokenizer_name='org/small')\n"
        "    config.model.text_cfg.update(text)\n"
        "    return config\n"
    )
    recipe, source = ["--config", str(tmp_path / "mine.py")], ["--data", f"folder:{tmp_path}/data"]
    longest = []
    for options in (recipe, [*recipe, *source], source):
        assert cli.main(["data", "check", *options, "--workers", "1", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        longest.append(report["tokens"]["1"])
        assert report["cut_share"] == (0.0 if options == source else 0.5)
    whole = FileTokenizer("", TOKENIZER_JSON, padded(gemma_json(), 512), 512, size, "canonicalize")
    assert longest == [ids := len(np.trim_zeros(whole(texts[1])[0], "b")), ids, 2 + 6 * 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "add --data or --config"),
        (["--data", "digits", "--config.seed=1"], "--config.KEY changes a recipe: add --config"),
    ],
)
def test_a_source_or_a_recipe_is_needed(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", *options]) == 2
    assert capsys.readouterr().err == f"tclip data check: error: {message}\n"


def test_the_findings_of_parts_add_up(tars: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, spec = check(f"wds:{tars}/*.tar", "train", workers=1), f"wds:{tars}/*.tar"
    parts = Findings()
    for index in range(len(open_source(spec, "train"))):
        parts.add(check_module.check_part(spec, "train", index, index + 1)[0])
    parts.duplicates, parts.duplicate_examples = whole.duplicates, whole.duplicate_examples
    parts.notes = whole.notes
    assert parts == whole


def test_duplicates_match_a_dictionary(tmp_path: pathlib.Path, jpeg: collections.abc.Callable[[int], bytes]) -> None:
    seeds = [0, 1, 2, 1, 3, 1, 0, 4]
    for i, seed in enumerate(seeds):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(seed))
        (tmp_path / f"{i}.txt").write_text("x")
    findings = check(f"folder:{tmp_path}", "train", workers=1)
    assert findings.duplicates == len(seeds) - len(set(seeds))
    assert findings.duplicate_examples == [[f"{tmp_path}/{i}.jpg" for i in group] for group in ([1, 3, 5], [0, 6])]


def test_labelled_images_need_no_captions(tmp_path: pathlib.Path, jpeg: collections.abc.Callable[[int], bytes]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.jpg").write_bytes(jpeg(len(name)))
    findings = check(f"folder:{tmp_path}", "train", workers=1)
    assert findings.samples == 2 and not findings.broken


def test_quantiles() -> None:
    counts = collections.Counter({1: 5, 10: 4, 100: 1})
    assert [quantile(counts, share) for share in (0.0, 0.5, 0.51, 0.9, 1.0)] == [1, 1, 10, 10, 100]
    assert quantile(collections.Counter(), 0.5) == 0


class Labelled(list[Record]):
    classnames = ("cat", "dog")


def labelled_source(label: int | np.ndarray) -> Labelled:
    return Labelled([Record(np.zeros((4, 4, 3), np.uint8), (), label, "x")])


def test_a_label_replaces_captions_unless_captions_are_required() -> None:
    assert examine(labelled_source(1), 0, captioned=False)[0].label == 1
    with pytest.raises(BadSample, match=r"x: no caption$"):
        examine(labelled_source(1), 0)


@pytest.mark.parametrize("label", [-1, 2, np.array([0, 1], np.int32)])
def test_an_invalid_label_does_not_replace_captions(label: int | np.ndarray) -> None:
    with pytest.raises(BadSample, match="x: no caption and no valid label"):
        examine(labelled_source(label), 0, captioned=False)
