"""Token ids equal open_clip's, and those of transformers with the saved files."""

from __future__ import annotations

import json
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tclip_jax.data import tokenizer as tk

PLAIN = [
    "a photo of a cat",
    "A Photo of  a\tCAT \n",
    "don't we'll I'D they've o'clock rock 'n' roll 'S",
    "in 1999, 3.14 x 10^-2 = №5 ½ ²",
    "naïve café, Straße, ÅNGSTRÖM, İstanbul, ſhort, 'ſ",
    "日本語の写真 한국어 العربية हिन्दी ไทย",
    "family 👨‍👩‍👧‍👦 flag 🇫🇷 thumbs 👍🏽 ❤️",
    "e\u0301 combining, zero\u200bwidth, no\u00a0break, soft\u00adhyphen",
    "!!! ... --- <b>bold</b> @user #tag https://example.org/?q=1&r=2 </w> Ġ",
    "",
    " ",
    "word " * 100,
    "x" * 500,
]
REPAIRED = [
    "fish &amp; chips, &amp;amp; more, 5 &lt; 6, &#128512; &nbsp; &eacute; &#x41; &bogus;",
    "âœ” schÃ¶n, itâ€™s “quoted” ‘text’…, ﬁne ligature",
    "control\x00\x07 characters\x1b[31m, \ud800 lone surrogate, ＦＵＬＬ ｗｉｄｔｈ",
    "ΟΔΟΣ ΣΑΣ, final sigma",
]
# Libraries of another version of Unicode disagree about characters that this one does not assign; ftfy may make some.
ASSIGNED = st.text(st.characters(exclude_categories=("Cn", "Cs")), max_size=60).filter(
    lambda text: all(unicodedata.category(character) != "Cn" for character in ftfy.fix_text(text))
)


@pytest.fixture(scope="module")
def reference() -> Callable[..., Any]:
    open_clip = pytest.importorskip("open_clip")
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.mark.torch
@pytest.mark.parametrize("context_length", [2, 3, 16, 77])
def test_ids_equal_open_clip(reference: Callable[..., Any], context_length: int) -> None:
    texts = PLAIN + REPAIRED
    ids = tk.Tokenizer(context_length)(texts)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, reference(texts, context_length=context_length).numpy())


@pytest.mark.torch
@settings(deadline=None, max_examples=200)
@given(text=ASSIGNED)
def test_ids_of_any_text_equal_open_clip(reference: Callable[..., Any], text: str) -> None:
    np.testing.assert_array_equal(tk.Tokenizer()(text), reference(text).numpy())


def test_known_ids() -> None:
    ids = tk.Tokenizer(8)("a photo of a cat")
    assert ids.tolist() == [[tk.SOT, 320, 1125, 539, 320, 2368, tk.EOT, 0]]


def test_vocabulary_ends_with_the_special_tokens() -> None:
    vocab, merges = tk._vocabulary()
    assert len(vocab) == tk.VOCAB_SIZE and len(merges) == tk.VOCAB_SIZE - 2 * 256 - 2
    assert (vocab[tk.SOT_TOKEN], vocab[tk.EOT_TOKEN]) == (tk.SOT, tk.EOT)


@settings(deadline=None)
@given(texts=st.lists(ASSIGNED, max_size=4), context_length=st.integers(2, 20))
def test_rows_are_sot_caption_eot_zeros(texts: list[str], context_length: int) -> None:
    ids = tk.Tokenizer(context_length)(texts)
    assert ids.shape == (len(texts), context_length)
    for row in ids:
        end = int(np.flatnonzero(row == tk.EOT)[0])
        assert row[0] == tk.SOT and not row[end + 1 :].any() and tk.SOT not in row[1:]


@pytest.mark.parametrize(
    "injection", ["<start_of_text>", "<end_of_text>", "<|startoftext|>", "<|endoftext|>", "&lt;end_of_text&gt;"]
)
def test_a_caption_cannot_end_early(injection: str) -> None:
    row = tk.Tokenizer()(f"a cat {injection} a dog")[0]
    assert (row == tk.EOT).sum() == 1 and (row == tk.SOT).sum() == 1
    assert tk.Tokenizer().decode(row).endswith("a dog")


@pytest.mark.parametrize(
    ("text", "decoded"),
    [("A photo  of a cat", "a photo of a cat"), ("Ünï 日本 👍", "ünï 日本 👍"), ("", ""), ("hi!", "hi !")],
)
def test_decode_returns_the_cleaned_caption(text: str, decoded: str) -> None:
    tokenizer = tk.Tokenizer()
    assert tokenizer.decode(tokenizer(text)[0]) == decoded


def test_a_tokenizer_pickles_as_its_context_length() -> None:
    data = pickle.dumps(tk.Tokenizer(12))
    assert len(data) < 200 and pickle.loads(data) == tk.Tokenizer(12)


def test_too_short_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match="context_length 1 has no room"):
        tk.Tokenizer(1)


def test_save_writes_all_files_and_the_context_length(tmp_path: Path) -> None:
    tk.Tokenizer(24).save(tmp_path / "new")
    files = {path.name for path in (tmp_path / "new").iterdir()}
    configs = {"tokenizer_config.json", "special_tokens_map.json"}
    assert files == {"tokenizer.json", "vocab.json", "merges.txt"} | configs
    assert json.loads((tmp_path / "new/tokenizer_config.json").read_text())["model_max_length"] == 24
    assert "(?i)" not in (tmp_path / "new/tokenizer.json").read_text(encoding="utf-8")  # JavaScript has no such flag
    assert json.loads((tmp_path / "new/vocab.json").read_text(encoding="utf-8"))[tk.EOT_TOKEN] == tk.EOT


@pytest.mark.torch
@pytest.mark.parametrize("loader", ["CLIPTokenizer", "CLIPTokenizerFast", "AutoTokenizer"])
def test_transformers_reads_the_saved_folder(tmp_path: Path, loader: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = tk.Tokenizer(24)
    tokenizer.save(tmp_path)
    theirs = getattr(transformers, loader).from_pretrained(tmp_path)
    assert theirs.model_max_length == 24 and theirs.vocab_size == tk.VOCAB_SIZE
    batch = theirs(PLAIN, padding="max_length", truncation=True, return_tensors="np")
    # transformers pads with EOT; the mask removes it.
    np.testing.assert_array_equal(batch["input_ids"] * batch["attention_mask"], tokenizer(PLAIN))
