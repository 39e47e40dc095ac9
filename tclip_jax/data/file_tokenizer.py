"""Tokenizers that come as a file, as SigLIP's do: a tokenizer.json of Hugging Face, or SentencePiece's spiece.model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import html
import importlib
import json
import math
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ftfy
import numpy as np
import numpy.typing as npt
import tokenizers
from etils import epath
from tokenizers import normalizers

from tclip_jax import keys
from tclip_jax.data.tokenizer import clean as _clean_lower

TOKENIZER_JSON, SPIECE_MODEL = "tokenizer.json", "spiece.model"
UNKNOWN = "<unk>"

_MAX_GROWTH = 64  # of a text by a normalizer

_UNDERLINE = "▁"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# T5's sentinels end its vocabulary. They are no words, and SigLIP's embeddings may leave them out.
_SENTINEL = re.compile(f"{_UNDERLINE}?<extra_id_[0-9]+>")
_OPTIONS: dict[str, dict[str, type]] = {
    TOKENIZER_JSON: {"clean": str},
    SPIECE_MODEL: {"clean": str, "lower": bool, "eos_id": int, "pad_id": int},
}


def _repaired(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _clean_whitespace(text: str) -> str:
    return " ".join(_repaired(text).split())


def _canonicalize(text: str) -> str:
    """Repair a text, remove its ASCII punctuation, and lower its case, as big_vision does for SigLIP."""
    return " ".join(_repaired(text).strip().replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


# The values of open_clip's tokenizer_kwargs.clean; "" is none of them: transformers does not clean texts.
CLEAN: dict[str, Callable[[str], str]] = {
    "": str,
    "whitespace": _clean_whitespace,
    "lower": _clean_lower,
    "canonicalize": _canonicalize,
}

_SPACES = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
_PUNCTUATION = normalizers.Replace(tokenizers.Regex(r"[!-/:-@\[-`{-~]"), "")
# The same without the repair of mojibake and HTML, as steps of a tokenizer.json. They apply between the special tokens
# in a text, whose spaces must stay. Without punctuation there are none, and the spaces around the text are removed.
_CLEAN_STEPS: dict[str, list[Any]] = {
    "": [],
    "whitespace": [_SPACES],
    "lower": [_SPACES, normalizers.Lowercase()],
    "canonicalize": [
        normalizers.Replace("_", " "),
        _PUNCTUATION,
        normalizers.Lowercase(),
        _SPACES,
        normalizers.Strip(),
    ],
}


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
    """Converts captions to token ids as the library of the file does. Nothing is parsed before the first caption.

    Attributes:
      name: the tokenizer's name in `text_cfg.hf_tokenizer_name`, for errors.
      file: TOKENIZER_JSON, which contains the padding and the truncation, or SPIECE_MODEL.
      data: the bytes of the file.
      context_length: number of ids per caption.
      vocab_size: number of rows of the token embedding, which the file must have as tokens.
      clean: key of `CLEAN`, what happens to a text first.
      lower: of SPIECE_MODEL: SiglipTokenizer's do_lower_case.
      eos_id: of SPIECE_MODEL: the token that ends a text.
      pad_id: of SPIECE_MODEL: the token that fills up a text.
    """

    name: str
    file: str
    data: bytes = dataclasses.field(repr=False)
    context_length: int
    vocab_size: int
    clean: str = ""
    lower: bool = True
    eos_id: int = 1
    pad_id: int = 1

    def __call__(self, texts: str | Sequence[str]) -> npt.NDArray[np.int32]:
        """Return ids (N, context_length) int32. Long captions are truncated.

        Raises:
          ValueError: an element is no string, `check` refuses the file, or a caption has a token outside `vocab_size`.
        """
        texts = [texts] if isinstance(texts, str) else texts
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"a text is {text!r:.80}: it must be a string")
        cleaned = [CLEAN[self.clean](text) for text in texts]
        encoder = _encoder(self)
        with _readable(self.file):
            rows = encoder.encode(cleaned)
        ids = np.array(rows, np.int32).reshape(len(texts), self.context_length)
        if ids.size and ids.max() >= self.vocab_size:
            text = texts[int(ids.max(axis=1).argmax())]
            raise ValueError(f"{text!r:.80} has the token {ids.max()}: the embedding has {self.vocab_size} tokens")
        return ids

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of ids of each caption with special tokens, before truncation and padding."""
        encoder = _encoder(self)
        with _readable(self.file):
            return encoder.lengths([CLEAN[self.clean](text) for text in texts])

    def cleaned(self, text: str) -> str:
        """Return a caption as its words are looked up: cleaned, and normalised by the file."""
        encoder = _encoder(self)
        with _readable(self.file):
            return encoder.normalized(CLEAN[self.clean](text))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the caption of one row of ids, without special tokens."""
        encoder = _encoder(self)
        with _readable(self.file):
            return encoder.decode([int(token) for token in ids])

    def check(self) -> None:
        """Raise ValueError if the file is damaged, has another vocabulary, or its library is not installed."""
        _encoder(self)

    @property
    def options(self) -> dict[str, Any]:
        """What determines the ids besides the bytes of the file and the model's configuration, as JSON."""
        return {"file": self.file, **{name: getattr(self, name) for name in _OPTIONS[self.file]}}

    @functools.cached_property
    def digest(self) -> str:
        """A digest of everything that determines the ids, 32 hexadecimal digits."""
        sizes = {"context_length": self.context_length, "vocab_size": self.vocab_size}
        return keys.digest({**self.options, **sizes, "sha256": hashlib.sha256(self.data).hexdigest()})

    @classmethod
    def from_options(
        cls, options: Any, read: Callable[[str], bytes], *, name: str, context_length: int, vocab_size: int
    ) -> FileTokenizer:
        """Return the tokenizer of `options`, as the property returns them.

        Args:
          options: parsed JSON.
          read: returns the bytes of a file by its name.
          name: name of the tokenizer.
          context_length: number of ids per caption.
          vocab_size: number of rows of the token embedding.

        Raises:
          ValueError: the options are invalid; the message names the key.
        """
        file = options.get("file") if isinstance(options, Mapping) else None
        if not isinstance(options, Mapping) or file not in (TOKENIZER_JSON, SPIECE_MODEL):
            raise ValueError(f"tokenizer.file is {file!r:.80}: it must be {TOKENIZER_JSON} or {SPIECE_MODEL}")
        expected = _OPTIONS[file]
        if options.keys() != {"file", *expected}:
            raise ValueError(
                f"tokenizer has the keys {sorted(options)!s:.80}: they must be {sorted({'file', *expected})}"
            )
        for key, kind in expected.items():
            if type(options[key]) is not kind:
                raise ValueError(f"tokenizer.{key} is {options[key]!r:.80}: it must be {kind.__name__}")
            if kind is int and not 0 <= options[key] < vocab_size:
                raise ValueError(f"tokenizer.{key} is {options[key]}: it must be 0 to {vocab_size - 1}")
        if options["clean"] not in CLEAN:
            raise ValueError(
                f"tokenizer.clean is {options['clean']!r:.80}: it must be one of {', '.join(map(repr, CLEAN))}"
            )
        values = {key: options[key] for key in expected}
        return cls(name, file, read(file), context_length, vocab_size, **values)

    def save(self, folder: epath.PathLike) -> None:
        """Write the files that transformers' AutoTokenizer and open_clip load, with `open_clip_kwargs`.

        The ids of AutoTokenizer equal those of this class for captions whose mojibake and HTML `clean` need not repair.
        """
        for name, data in _encoder(self).files().items():
            (epath.Path(folder) / name).write_bytes(data)

    @property
    def open_clip_kwargs(self) -> dict[str, str]:
        """open_clip's tokenizer_kwargs for the files of `save`. open_clip always repairs mojibake, HTML and spaces."""
        return {"clean": self.clean or "whitespace"}

    def check_vocabulary(self, vocabulary: Mapping[str, int]) -> None:
        """Raise ValueError unless the tokens of a file are as many as the rows of the embedding."""
        words = [i for token, i in vocabulary.items() if i < self.vocab_size or not _SENTINEL.fullmatch(token)]
        if max(words, default=-1) >= self.vocab_size or len(words) != self.vocab_size:
            raise ValueError(
                f"{self.file} of the tokenizer {self.name!r:.80} has {len(words)} tokens, but the model's embedding"
                f" (text_cfg.vocab_size) has {self.vocab_size}: they must be of the same model"
            )


@functools.lru_cache(maxsize=4)
def _encoder(tokenizer: FileTokenizer) -> _JsonEncoder | _SentencePieceEncoder:
    """Return the parsed file. It is cached per process, so that a FileTokenizer pickles as bytes."""
    return (_JsonEncoder if tokenizer.file == TOKENIZER_JSON else _SentencePieceEncoder)(tokenizer)


def parse_tokenizer_json(data: bytes) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json.

    Raises:
      ValueError: the bytes are none.
    """
    with _readable(TOKENIZER_JSON):
        parsed = tokenizers.Tokenizer.from_str(data.decode())
        growth = _growth(json.loads(parsed.normalizer.__getstate__()) if parsed.normalizer else None)
    if growth > _MAX_GROWTH:
        raise ValueError(
            f"{TOKENIZER_JSON} has replacements that make a text {growth} times as long: at most {_MAX_GROWTH} are read"
        )
    return parsed


def _growth(normalizer: Any) -> int:
    """Return how many times as long the replacements of a normalizer, from JSON, can make a text."""
    if isinstance(normalizer, list):
        return math.prod(map(_growth, normalizer))
    if not isinstance(normalizer, dict):
        return 1
    longer = len(normalizer["content"]) if normalizer.get("type") == "Replace" else 1
    return max(longer, 1) * _growth(normalizer.get("normalizers"))


@contextlib.contextmanager
def _readable(file: str) -> Iterator[None]:
    """Turn the errors of tokenizers and sentencepiece into ValueError. A panic of the former is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{file} is not a tokenizer: {reason:.120}") from None


class _JsonEncoder:
    """A tokenizer.json that states its padding and truncation."""

    def __init__(self, tokenizer: FileTokenizer) -> None:
        self._of, self._parsed = tokenizer, parse_tokenizer_json(tokenizer.data)
        padding, truncation = self._parsed.padding or {}, self._parsed.truncation or {}
        for key, length in (("padding", padding.get("length")), ("truncation", truncation.get("max_length"))):
            if length != tokenizer.context_length:
                raise ValueError(
                    f"{TOKENIZER_JSON} has {key} to {length} tokens: the model takes {tokenizer.context_length}"
                )
        tokenizer.check_vocabulary(self._parsed.get_vocab(with_added_tokens=True))

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._parsed.encode_batch_fast(texts)]

    def lengths(self, texts: list[str]) -> list[int]:
        return [len(encoding.ids) for encoding in self._whole.encode_batch_fast(texts)]

    @functools.cached_property
    def _whole(self) -> tokenizers.Tokenizer:
        """A copy that neither truncates nor pads."""
        whole = tokenizers.Tokenizer.from_str(self._parsed.to_str())
        whole.no_truncation()
        whole.no_padding()
        return whole

    def normalized(self, text: str) -> str:
        return self._parsed.normalizer.normalize_str(text) if self._parsed.normalizer else text

    def decode(self, ids: list[int]) -> str:
        return self._parsed.decode(ids, skip_special_tokens=True).strip()

    def files(self) -> dict[str, bytes]:
        document = json.loads(self._parsed.to_str())
        padding, truncation = document["padding"], document["truncation"]
        cleaning = json.loads(normalizers.Sequence(_CLEAN_STEPS[self._of.clean]).__getstate__())["normalizers"]
        own = document["normalizer"]
        steps = own["normalizers"] if own and own["type"] == "Sequence" else [own] if own else []
        if steps[: len(cleaning)] != cleaning:  # an earlier export has them already
            document["normalizer"] = {"type": "Sequence", "normalizers": [*cleaning, *steps]}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # the one that changes nothing in the file
            "model_max_length": self._of.context_length,
            "pad_token": padding["pad_token"],
            "padding_side": padding["direction"].lower(),
            "truncation_side": truncation["direction"].lower(),
            "clean_up_tokenization_spaces": False,
        }
        files = {TOKENIZER_JSON: document, "tokenizer_config.json": config}
        return {name: json.dumps(each, ensure_ascii=False, indent=2).encode() for name, each in files.items()}


class _SentencePieceEncoder:
    """A spiece.model, as transformers' SiglipTokenizer reads it."""

    def __init__(self, tokenizer: FileTokenizer) -> None:
        self._of, self._model = tokenizer, parse_spiece_model(tokenizer.data)
        count = self._model.get_piece_size()
        tokenizer.check_vocabulary({self._model.id_to_piece(i): i for i in range(count)})
        self._ids = {self._model.id_to_piece(i): i for i in (tokenizer.eos_id, tokenizer.pad_id)}
        self._ids[UNKNOWN] = self._model.piece_to_id(UNKNOWN)
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        # SentencePiece drops the first underline of a text, so each is encoded behind these pieces.
        self._prefix = len(self._model.encode(UNKNOWN))

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def lengths(self, texts: list[str]) -> list[int]:
        return [len(self._ended(text)) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids = self._ended(text, self._of.context_length - 1)
        return ids + [self._of.pad_id] * (self._of.context_length - len(ids))

    def _ended(self, text: str, limit: int | None = None) -> list[int]:
        """Return the first `limit` ids of a text and the token that ends it, unless it is there."""
        ids = [self._ids.get(piece, self._model.piece_to_id(piece)) for piece in self._pieces(text)][:limit]
        return ids if ids[-1:] == [self._of.eos_id] else [*ids, self._of.eos_id]

    def _pieces(self, text: str) -> list[str]:
        """Return the pieces of a text; a special token in it is one piece, without the spaces around it."""
        pieces: list[str] = []
        parts = self._special.split(_UNDERLINE + text.replace(_UNDERLINE, " "))
        for i, part in enumerate(parts):
            if i % 2:
                pieces.append(part)
                continue
            part = part.rstrip() if i < len(parts) - 1 else part
            part = part.lstrip() if i else part
            if part:
                pieces += self._model.encode(UNKNOWN + self.normalized(part), out_type=str)[self._prefix :]
        starts_special = len(pieces) > 1 and pieces[0] == _UNDERLINE and pieces[1] in self._ids
        return pieces[1:] if starts_special else pieces

    def normalized(self, text: str) -> str:
        text = text.lower() if self._of.lower else text
        return re.sub(r"\s+", " ", text.translate(_NO_PUNCTUATION)).strip()

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode([i for i in ids if i not in (self._of.eos_id, self._of.pad_id)]))

    def files(self) -> dict[str, bytes]:
        eos, pad = (self._model.id_to_piece(i) for i in (self._of.eos_id, self._of.pad_id))
        config = {
            "tokenizer_class": "SiglipTokenizer",
            "model_max_length": self._of.context_length,
            "do_lower_case": self._of.lower or self._of.clean in ("lower", "canonicalize"),
            "eos_token": eos,
            "pad_token": pad,
            "unk_token": UNKNOWN,
        }
        return {SPIECE_MODEL: self._of.data, "tokenizer_config.json": json.dumps(config, indent=2).encode()}


def parse_spiece_model(data: bytes) -> Any:
    """Return the SentencePieceProcessor of a spiece.model.

    Raises:
      ValueError: the bytes are none, or sentencepiece is not installed.
    """
    try:
        sentencepiece = importlib.import_module("sentencepiece")
    except ImportError:
        raise ValueError(
            f"{SPIECE_MODEL} needs sentencepiece, which is not installed: pip install 'tclip-jax[sentencepiece]'"
        ) from None
    try:
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(data)
        return model
    except Exception as error:  # a damaged model raises errors of several kinds
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{SPIECE_MODEL} is not a model of SentencePiece: {reason:.120}") from None
