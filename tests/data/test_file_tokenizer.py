"""Tokenizers of files: what they do with texts, and the files and options that they refuse."""

from __future__ import annotations

import json
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import tokenizers

from tclip_jax.data.file_tokenizer import CLEAN, SPIECE_MODEL, TOKENIZER_JSON, FileTokenizer
from tclip_jax.data.tokenizer import Tokenizer, tokenizer_of
from tests.small_tokenizers import CONTEXT, SPIECE_SIZE, captions, gemma_json, padded, spiece_model, vocabulary_size


def gemma(**changed: Any) -> FileTokenizer:
    size = vocabulary_size(gemma_json())
    values = {"file": TOKENIZER_JSON, "data": padded(gemma_json()), "context_length": CONTEXT, "vocab_size": size}
    return FileTokenizer(**{"name": "timm/small", **values, "clean": "canonicalize", **changed})


def siglip(**changed: Any) -> FileTokenizer:
    values = {"file": SPIECE_MODEL, "data": spiece_model(), "context_length": CONTEXT, "vocab_size": SPIECE_SIZE}
    return FileTokenizer(**{"name": "google/small", **values, **changed})


@pytest.mark.parametrize("tokenizer", [gemma(), siglip()], ids=["json", "spiece"])
def test_texts_become_rows_of_ids(tokenizer: FileTokenizer) -> None:
    ids = tokenizer(["a photo of two dogs", "", "dogs " * 50])
    assert ids.shape == (3, CONTEXT) and ids.dtype == np.int32
    assert ids[0].tolist().count(1) >= 1 and ids[2, -1] == 1  # a long text is truncated before its end token
    np.testing.assert_array_equal(tokenizer("a photo of two dogs"), ids[:1])
    assert tokenizer([]).shape == (0, CONTEXT)
    assert tokenizer.decode(ids[0]).strip() == "a photo of two dogs"
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again == tokenizer and again.digest == tokenizer.digest
    np.testing.assert_array_equal(again(captions()[:200]), tokenizer(captions()[:200]))
    with pytest.raises(ValueError, match="a text is 5: it must be a string"):
        tokenizer(["a", 5])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (gemma(), gemma(data=padded(gemma_json(), 2048), context_length=2048)),
        (siglip(pad_id=0), siglip(pad_id=0, context_length=2048)),
    ],
    ids=["json", "spiece"],
)
def test_lengths_are_those_of_untruncated_texts_without_padding(short: FileTokenizer, long: FileTokenizer) -> None:
    texts = list(captions()[:300])
    lengths = short.lengths(texts)
    assert lengths == [len(np.trim_zeros(row, "b")) for row in long(texts)]
    assert min(lengths) >= 1 and CONTEXT < max(lengths) < 2048 and short.lengths([]) == []


@pytest.mark.torch
@pytest.mark.parametrize("clean", [name for name in CLEAN if name])
def test_texts_are_cleaned_as_by_open_clip(clean: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.tokenizer.get_clean_fn(clean)
    for text in captions():
        assert CLEAN[clean](text) == theirs(text)


def test_all_that_determines_the_ids_is_in_the_digest() -> None:
    kinds = [gemma(), gemma(clean="lower"), gemma(clean=""), gemma(data=padded(gemma_json(lower=True)))]
    kinds += [siglip(), siglip(lower=False), siglip(pad_id=0), siglip(clean="lower")]
    assert len({each.digest for each in kinds}) == len(kinds)
    assert gemma(name="another").digest == gemma().digest


@pytest.mark.parametrize("tokenizer", [gemma(), siglip(lower=False, pad_id=0)], ids=["json", "spiece"])
def test_options_go_to_json_and_back(tokenizer: FileTokenizer) -> None:
    options = json.loads(json.dumps(tokenizer.options))
    sizes = {"name": tokenizer.name, "context_length": CONTEXT, "vocab_size": tokenizer.vocab_size}
    assert FileTokenizer.from_options(options, {tokenizer.file: tokenizer.data}.__getitem__, **sizes) == tokenizer


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"file": "../secret"}, "^tokenizer.file is '../secret': it must be tokenizer.json or spiece.model"),
        ({"file": []}, r"^tokenizer.file is \[\]"),
        ({"more": 1}, "^tokenizer has the keys"),
        ({"clean": "all"}, "^tokenizer.clean is 'all': it must be one of '', 'whitespace'"),
        ({"clean": 1}, "^tokenizer.clean is 1: it must be str"),
        ({"lower": 1}, "^tokenizer.lower is 1: it must be bool"),
        ({"pad_id": SPIECE_SIZE}, f"^tokenizer.pad_id is {SPIECE_SIZE}: it must be 0 to {SPIECE_SIZE - 1}"),
        ({"eos_id": -1}, "^tokenizer.eos_id is -1"),
    ],
)
def test_wrong_options_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FileTokenizer.from_options(
            siglip().options | changed, lambda name: b"", name="x", context_length=CONTEXT, vocab_size=SPIECE_SIZE
        )


@pytest.mark.parametrize("options", [None, [], "tokenizer.json", {}])
def test_options_that_are_no_object_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer\.file is None"):
        FileTokenizer.from_options(options, lambda name: b"", name="x", context_length=CONTEXT, vocab_size=9)


def changed_json(**changes: Any) -> bytes:
    return json.dumps(json.loads(padded(gemma_json())) | changes).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "^tokenizer.json is not a tokenizer: "),
        (b"\xff\xfe", "^tokenizer.json is not a tokenizer: "),
        (b"{}", "^tokenizer.json is not a tokenizer: "),
        (b"[" * 100_000, "^tokenizer.json is not a tokenizer: "),
        (
            changed_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            "^tokenizer.json is not a tokenizer: ",
        ),
        (changed_json(padding=None), "^tokenizer.json has padding to None tokens: the model takes 16"),
        (padded(gemma_json(), 8), "^tokenizer.json has padding to 8 tokens: the model takes 16"),
    ],
    ids=["cut", "bytes", "empty", "deep", "panic", "no padding", "another length"],
)
def test_a_damaged_json_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        gemma(data=data).check()
    assert "\n" not in str(caught.value)


def replacement(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def test_replacements_that_make_texts_long_are_refused() -> None:
    doubled = {"type": "Sequence", "normalizers": [replacement({"String": "a"}, "aa")] * 40}
    with pytest.raises(ValueError, match=f"make a text {2**40} times as long: at most 64 are read"):
        gemma(data=changed_json(normalizer=doubled)).check()


def test_what_panics_at_a_caption_is_one_line() -> None:
    slow = gemma(data=changed_json(normalizer=replacement({"Regex": "(a+)+$"}, "")), clean="")
    slow.check()
    for use in (slow, slow.cleaned):
        with pytest.raises(ValueError, match=r"^tokenizer\.json is not a tokenizer: [^\n]*$"):
            use("a" * 40 + "b")


@pytest.mark.parametrize("data", [b"", b"\x0a\xff\xff\xff\x0f", b"{}"])
def test_a_damaged_spiece_model_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^spiece\.model is not a model of SentencePiece") as caught:
        siglip(data=data).check()
    assert "\n" not in str(caught.value)


def test_another_vocabulary_is_refused_with_names_and_sizes() -> None:
    size = vocabulary_size(gemma_json())
    with pytest.raises(ValueError, match=f"of the tokenizer 'timm/small' has {size} tokens, but the .* has 256000"):
        gemma(vocab_size=256_000)("a")
    with pytest.raises(ValueError, match=rf"^spiece.model of .* has {SPIECE_SIZE} tokens, .*\(text_cfg.vocab_size\)"):
        siglip(vocab_size=SPIECE_SIZE - 1)("a")


def test_sentinels_of_t5_need_no_embedding() -> None:
    parsed, size = tokenizers.Tokenizer.from_str(padded(gemma_json()).decode()), vocabulary_size(gemma_json())
    parsed.add_special_tokens([f"<extra_id_{i}>" for i in range(5)])
    tokenizer = gemma(data=parsed.to_str().encode(), clean="")
    np.testing.assert_array_equal(tokenizer("a photo"), gemma(clean="")("a photo"))
    with pytest.raises(ValueError, match=f"'a <extra_id_1>' has the token {size + 1}: the embedding has {size} tokens"):
        tokenizer(["b", "a <extra_id_1>"])


def test_without_sentencepiece_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"pip install 'tclip-jax\[sentencepiece\]'"):
        siglip(vocab_size=SPIECE_SIZE, name="not cached").check()


def test_a_model_has_its_own_tokenizer() -> None:
    assert tokenizer_of(9, "", gemma()) == Tokenizer(9)
    assert tokenizer_of(CONTEXT, "timm/small", gemma()) == gemma()
    with pytest.raises(ValueError, match="tokenized by 'timm/small', which is not stored with it: import it again"):
        tokenizer_of(CONTEXT, "timm/small")
