"""CLIP's byte-pair tokenizer: captions to token ids, equal to open_clip's."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Protocol

import ftfy
import numpy as np
import numpy.typing as npt
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

VOCAB_SIZE = 49408
SOT = 49406
EOT = 49407
SOT_TOKEN = "<|startoftext|>"
EOT_TOKEN = "<|endoftext|>"

_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_WORD_END = "</w>"
# CLIP's pattern for text in lower case, where ignoring the case adds only the long s. The flag (?i) is not valid in
# JavaScript, where transformers.js reads tokenizer.json.
_WORDS = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Converts captions to the token ids of open_clip's tokenizer.

    One rule differs: `<start_of_text>` and `<end_of_text>` in a caption are ordinary text here, so a caption cannot end
    early.

    Attributes:
      context_length: number of ids per caption, at least 2: the start and the end token.
    """

    context_length: int = 77

    def __post_init__(self) -> None:
        if self.context_length < 2:
            raise ValueError(f"context_length {self.context_length} has no room for start and end token; use 2 or more")

    def __call__(self, texts: str | Sequence[str]) -> npt.NDArray[np.int32]:
        """Return ids (N, context_length) int32: SOT, the caption, EOT, zeros. Long captions are truncated.

        Raises:
          ValueError: an element is no string.
        """
        texts = [texts] if isinstance(texts, str) else texts
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"a text is {text!r:.80}: it must be a string")
        captions = [clean(text) for text in texts]
        ids = np.zeros((len(captions), self.context_length), np.int32)
        ids[:, 0] = SOT
        for row, encoding in zip(ids, _byte_pair_encoder().encode_batch_fast(captions), strict=True):
            caption = encoding.ids[: self.context_length - 2]
            row[1 : len(caption) + 1] = caption
            row[len(caption) + 1] = EOT
        return ids

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of ids of each caption with SOT and EOT, before truncation."""
        return [len(encoding.ids) + 2 for encoding in _byte_pair_encoder().encode_batch_fast(list(map(clean, texts)))]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the cleaned caption of one row of ids, up to EOT."""
        caption = []
        for token in map(int, ids):
            if token == EOT:
                break
            if token != SOT:
                caption.append(token)
        return _byte_pair_encoder().decode(caption).replace(_WORD_END, " ").strip()

    def save(self, folder: epath.PathLike) -> None:
        """Write the files that transformers' CLIPTokenizer, CLIPTokenizerFast and AutoTokenizer load.

        Their ids equal those of this class for captions that `clean` (ftfy, HTML entities) does not change, except
        that they pad with EOT, not with zeros.
        """
        special = {"bos_token": SOT_TOKEN, "eos_token": EOT_TOKEN, "unk_token": EOT_TOKEN, "pad_token": EOT_TOKEN}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context_length, **special}
        files = {
            "tokenizer.json": _standalone_encoder().to_str(),
            **vocabulary_files(),
            "tokenizer_config.json": json.dumps(config, indent=2),
            "special_tokens_map.json": json.dumps(special, indent=2),
        }
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_bytes(text.encode())


class TextTokenizer(Protocol):
    """What converts a model's texts to token ids: CLIP's own `Tokenizer`, or a `FileTokenizer`."""

    @property
    def context_length(self) -> int:
        """Number of ids per text."""

    def __call__(self, texts: str | Sequence[str]) -> npt.NDArray[np.int32]:
        """Return ids (N, context_length) int32."""

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of ids of each text with special tokens, before truncation and padding."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of one row of ids."""

    def save(self, folder: epath.PathLike) -> None:
        """Write the files that transformers' AutoTokenizer loads."""


def tokenizer_of(context_length: int, hf_tokenizer_name: str, stored: TextTokenizer | None = None) -> TextTokenizer:
    """Return the tokenizer of a model's texts.

    Args:
      context_length: number of ids per caption.
      hf_tokenizer_name: as in `text_cfg`, "" for CLIP's own.
      stored: the tokenizer that is stored with a model whose tokenizer is not CLIP's own.

    Raises:
      ValueError: the model has another tokenizer than CLIP's, and none is stored with it.
    """
    if not hf_tokenizer_name:
        return Tokenizer(context_length)
    if stored is None:
        raise ValueError(
            f"the model's texts are tokenized by {hf_tokenizer_name!r:.80}, which is not stored with it: import it"
            " again with --tokenizer FOLDER, which has its tokenizer.json or spiece.model, and tokenizer_config.json;"
            " its images can be encoded, and texts as token ids"
        )
    return stored


@functools.cache
def vocabulary_files() -> dict[str, str]:
    """Return the text of vocab.json and merges.txt, as transformers reads them; all models share this vocabulary."""
    vocab, merges = _vocabulary()
    lines = ["#version: 0.2", *map(" ".join, merges)]
    return {"vocab.json": json.dumps(vocab, ensure_ascii=False), "merges.txt": "\n".join(lines) + "\n"}


def is_vocabulary(name: str, text: str) -> bool:
    """Whether the text of a vocab.json or merges.txt, in any formatting, has the vocabulary of `vocabulary_files`.

    Raises:
      ValueError: the text of vocab.json is not JSON.
    """
    if name == "vocab.json":
        return bool(json.loads(text) == _vocabulary()[0])
    return text.replace("\r\n", "\n").strip() == vocabulary_files()[name].strip()


def clean(text: str) -> str:
    """Clean a caption as CLIP does: repair mojibake and HTML entities, collapse white space, lower the case."""
    # Web captions are often escaped twice.
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


@functools.cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return token -> id, and the merges by rank, numbered as in GPT-2 and CLIP."""
    table = gzip.decompress((resources.files(__package__) / _MERGES_FILE).read_bytes()).decode().split("\n")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    # The first line is a version. The file has more merges than CLIP uses.
    rows = [row.split() for row in table[1 : VOCAB_SIZE - 2 * len(alphabet) - 1]]
    merges = [(left, right) for left, right in rows]
    words = [left + right for left, right in merges]
    tokens = [*alphabet, *(letter + _WORD_END for letter in alphabet), *words, SOT_TOKEN, EOT_TOKEN]
    return {token: i for i, token in enumerate(tokens)}, merges


@functools.cache
def _byte_pair_encoder() -> tokenizers.Tokenizer:
    """Return the encoder for cleaned text. It is cached per process, so a Tokenizer pickles as one integer."""
    vocab, merges = _vocabulary()
    encoder = tokenizers.Tokenizer(models.BPE(vocab, merges, end_of_word_suffix=_WORD_END, unk_token=EOT_TOKEN))
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    encoder.decoder = decoders.ByteLevel()
    return encoder


def _standalone_encoder() -> tokenizers.Tokenizer:
    """Return a copy that also lower-cases and adds the special tokens, for libraries that read only tokenizer.json."""
    encoder = tokenizers.Tokenizer.from_str(_byte_pair_encoder().to_str())
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    encoder.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    encoder.post_processor = processors.RobertaProcessing(
        (EOT_TOKEN, EOT), (SOT_TOKEN, SOT), trim_offsets=False, add_prefix_space=False
    )
    encoder.add_special_tokens([SOT_TOKEN, EOT_TOKEN])
    return encoder
