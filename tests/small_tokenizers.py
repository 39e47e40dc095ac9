"""Small tokenizers in the forms that SigLIP's checkpoints have, made from generated captions, and those captions."""

from __future__ import annotations

import functools
import io
import json
import pathlib
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tclip_jax.data.tokenizer import SOT_TOKEN
from tclip_jax.numerics.inputs import sample_texts

SIZE, SPIECE_SIZE = 400, 240
CONTEXT = 16
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
_MORE = (
    "",
    " ",
    "_under_score_ and-hyphen",
    "</s> in <unk> the <pad> text </s>",
    "<eos>two<bos> ends<eos>",
    "▁underlined ▁ text",
    "  spaces\u3000of\u2003all   kinds\n",
    "&lt;b&gt; &amp;amp; \u2013 \U0001f600\U0001f44d\U0001f3fd",
    f"{SOT_TOKEN} of another tokenizer",
    "ΣΑΣ İstanbul ẞ ǅ",
    "<extra_id_0> sentinel",
)


@functools.cache
def captions(count: int = 5000) -> tuple[str, ...]:
    """Captions of many scripts and lengths, with special tokens, HTML, mojibake, emoji, and none of these."""
    words = [
        "a",
        "photo",
        "of",
        "the",
        "small",
        "brown",
        "dogs",
        "sitting",
        "near",
        "Red",
        "houses,",
        "two",
        "cats;",
        "rain!",
        "o'clock",
        "x2",
    ]
    rng = np.random.default_rng(1)
    plain = [" ".join(rng.choice(words, rng.integers(1, 40))) for _ in range(count // 2)]
    return (*_MORE, *plain, *sample_texts(count - len(plain) - len(_MORE)))


@functools.cache
def gemma_json(*, lower: bool = False) -> str:
    """A BPE with byte fallback in the form of Gemma's: spaces become underlines, and an end token is added."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), spaces]) if lower else spaces
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=vocabulary, show_progress=False, limit_alphabet=60)
    tokenizer.train_from_iterator(captions(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    document = json.loads(tokenizer.to_str())
    # Bytes are words of Gemma's tokenizer, not special tokens.
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in _SPECIAL]
    return json.dumps(document)


@functools.cache
def t5_json() -> str:
    """A Unigram model in the form of T5's, whose texts begin with an underline and end with </s>."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=SIZE, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(captions()[:2000], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer.to_str()


@functools.cache
def spiece_model() -> bytes:
    """A Unigram model of SentencePiece, with T5's special tokens."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in captions() if text.strip() and "\0" not in text]),
        model_writer=model,
        vocab_size=SPIECE_SIZE,
        character_coverage=0.98,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def vocabulary_size(file: str) -> int:
    """The number of tokens of a tokenizer.json."""
    return tokenizers.Tokenizer.from_str(file).get_vocab_size()


def padded(file: str, length: int = CONTEXT) -> bytes:
    """The bytes of a tokenizer.json that states its padding and truncation."""
    parsed = tokenizers.Tokenizer.from_str(file)
    parsed.enable_padding(length=length, pad_id=0, pad_token="<pad>")
    parsed.enable_truncation(length)
    return parsed.to_str().encode()


def write_gemma(folder: pathlib.Path, *, lower: bool = False, **config: Any) -> int:
    """Write a Gemma tokenizer as SigLIP 2's checkpoints have it, and return the size of its vocabulary."""
    file = gemma_json(lower=lower)
    stated = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
        "model_max_length": CONTEXT,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer.json").write_text(file)
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | config))
    return vocabulary_size(file)


def write_t5(folder: pathlib.Path, **config: Any) -> int:
    """Write a T5 tokenizer as open_clip's SigLIPs have it, and return the size of its vocabulary."""
    stated = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "</s>", "eos_token": "</s>"}
    stated |= {"unk_token": "<unk>", "additional_special_tokens": [], "model_max_length": CONTEXT}
    (folder / "tokenizer.json").write_text(t5_json())
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | config))
    return vocabulary_size(t5_json())


def write_spiece(folder: pathlib.Path, **config: Any) -> int:
    """Write a spiece.model as transformers' SigLIPs have it, and return the size of its vocabulary."""
    stated = {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True, "model_max_length": CONTEXT}
    stated |= {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (folder / "spiece.model").write_bytes(spiece_model())
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | config))
    return SPIECE_SIZE
