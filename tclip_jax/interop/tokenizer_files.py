"""Read the tokenizer in the folder of a SigLIP, by the metadata of open_clip and transformers.

    open_clip_config.json        text_cfg: tokenizer_kwargs, tokenizer_mode
    tokenizer_config.json        tokenizer_class, which decides the file; special tokens, padding, truncation
    special_tokens_map.json      special tokens, of older versions of transformers
    tokenizer.json, spiece.model the vocabulary

What the metadata states becomes part of the tokenizer.json that is kept, so that no other file is needed to read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from etils import epath
from tokenizers import normalizers

from tclip_jax.artifacts.files import MAX_OTHER_BYTES
from tclip_jax.data.file_tokenizer import (
    CLEAN,
    SPIECE_MODEL,
    TOKENIZER_JSON,
    UNKNOWN,
    FileTokenizer,
    parse_spiece_model,
    parse_tokenizer_json,
)
from tclip_jax.interop.metadata import HUGGING_FACE, OPEN_CLIP
from tclip_jax.interop.reader import check_object, read_json
from tclip_jax.models.config import TextConfig

TOKENIZER_CONFIG, _SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"

_SIGLIP = "SiglipTokenizer"
_GEMMA = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": UNKNOWN,
    "padding_side": "left",
}
# The defaults of transformers' classes, without "Fast" in their names.
_DEFAULTS: dict[str, dict[str, Any]] = {
    _SIGLIP: {"eos_token": "</s>", "pad_token": "</s>", "unk_token": UNKNOWN, "do_lower_case": True},
    "GemmaTokenizer": _GEMMA,
    "Siglip2Tokenizer": _GEMMA,
    "T5Tokenizer": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": UNKNOWN},
    "PreTrainedTokenizer": {},
    "TokenizersBackend": {},
}
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")
_SIDES = ("left", "right")


def read_tokenizer(folder: epath.Path, library: str, text: TextConfig) -> FileTokenizer | None:
    """Return the tokenizer in a folder; None if it has no file of one, or the model has CLIP's own.

    Args:
      folder: a folder of open_clip or transformers.
      library: OPEN_CLIP if open_clip cleans the texts, HUGGING_FACE if transformers reads them as they are.
      text: the text tower.

    Raises:
      ValueError: the metadata has a value that is not supported, the file is damaged, too large or has another
        vocabulary than the embedding, or sentencepiece is not installed. One line names file and key.
    """
    if not text.hf_tokenizer_name or not any((folder / name).exists() for name in (TOKENIZER_JSON, SPIECE_MODEL)):
        return None
    clean = _open_clip_clean(folder / OPEN_CLIP) if library == OPEN_CLIP else ""
    stated = _stated(folder)
    kind = _class(folder, stated)
    path = folder / TOKENIZER_CONFIG
    length = stated.get("model_max_length")
    # open_clip passes the context length of the model, and transformers' processor this one.
    if library == HUGGING_FACE and isinstance(length, int) and length < text.context_length:
        raise ValueError(
            f"{path}: model_max_length is {length}: it must be the model's context length, {text.context_length}"
        )
    file = SPIECE_MODEL if kind == _SIGLIP else TOKENIZER_JSON
    data = _read(folder / file)
    try:
        if kind == _SIGLIP:
            options = _siglip_options(path, _DEFAULTS[kind] | stated, data)
        else:
            data, options = _resolved(path, kind, stated, data, text.context_length), {}
        tokenizer = FileTokenizer(
            text.hf_tokenizer_name, file, data, text.context_length, text.vocab_size, clean, **options
        )
        tokenizer.check()
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(folder)) else f"{folder}: {error}") from None
    return tokenizer


def _open_clip_clean(path: epath.Path) -> str:
    model = read_json(path).get("model_cfg") or {}
    check_object(f"{path}: model_cfg", model)
    text = model.get("text_cfg") or {}
    check_object(f"{path}: text_cfg", text)
    return stated_clean(str(path), text)


def stated_clean(path: str, text: Mapping[str, Any]) -> str:
    """Return how open_clip cleans texts, a key of CLEAN, by its text_cfg.

    Raises:
      ValueError: a value is not supported; the message begins with `path` and names the key.
    """
    kwargs = text.get("tokenizer_kwargs") or {}
    check_object(f"{path}: text_cfg.tokenizer_kwargs", kwargs)
    if text.get("tokenizer_mode"):
        raise ValueError(f"{path}: text_cfg.tokenizer_mode is {text['tokenizer_mode']!r:.80}: only null is read")
    for key, value in kwargs.items():
        if key != "clean" and not (key in ("strip_sep_token", "language") and not value):
            raise ValueError(f"{path}: text_cfg.tokenizer_kwargs.{key:.40} is {value!r:.80}: only clean is read")
    clean = kwargs.get("clean", "whitespace")
    if not isinstance(clean, str) or not clean or clean not in CLEAN:
        known = ", ".join(name for name in CLEAN if name)
        raise ValueError(f"{path}: text_cfg.tokenizer_kwargs.clean is {clean!r:.80}: it must be one of {known}")
    return clean


def _stated(folder: epath.Path) -> dict[str, Any]:
    """Return tokenizer_config.json, with the special tokens of special_tokens_map.json; {} without them."""
    stated = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).exists() else {}
    # As in transformers: newer files have added_tokens_decoder, and no use for the other file.
    if "added_tokens_decoder" not in stated and (folder / _SPECIAL_TOKENS).exists():
        stated |= read_json(folder / _SPECIAL_TOKENS)
    return {key: value for key, value in stated.items() if value is not None}


def _class(folder: epath.Path, stated: Mapping[str, Any]) -> str:
    """Return the class of transformers that reads the folder, a key of _DEFAULTS; its file exists."""
    kind, path = stated.get("tokenizer_class"), folder / TOKENIZER_CONFIG
    if (
        kind is None
        and (folder / HUGGING_FACE).exists()
        and read_json(folder / HUGGING_FACE).get("model_type") == "siglip"
    ):
        kind = _SIGLIP  # transformers' default for this type of models
    if kind is None:
        raise ValueError(f"{path}: tokenizer_class is missing: it says how the tokenizer beside it is read")
    name = kind.removesuffix("Fast") if isinstance(kind, str) else ""
    if name not in _DEFAULTS:
        raise ValueError(
            f"{path}: tokenizer_class is {kind!r:.80}: only {', '.join(_DEFAULTS)} are read, also with Fast at the end"
        )
    file = SPIECE_MODEL if name == _SIGLIP else TOKENIZER_JSON
    if not (folder / file).exists():
        raise ValueError(f"{folder / file} is missing: the tokenizer_class {kind} is read from it")
    return name


def _read(path: epath.Path) -> bytes:
    size = path.stat().length
    if size > MAX_OTHER_BYTES:
        raise ValueError(f"{path} has {size} bytes: at most {MAX_OTHER_BYTES} are read")
    return path.read_bytes()


def _content(path: epath.Path, key: str, token: Any) -> str:
    """Return the text of a special token, which is a string or an object with its `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str) or not text:
        raise ValueError(f"{path}: {key} is {token!r:.80}: it must be a token")
    return text


def _side(path: epath.Path, key: str, value: Any) -> str:
    if value not in _SIDES:
        raise ValueError(f"{path}: {key} is {value!r:.80}: it must be left or right")
    return str(value)


def _siglip_options(path: epath.Path, stated: Mapping[str, Any], data: bytes) -> dict[str, Any]:
    """Return the options of FileTokenizer for a spiece.model that SiglipTokenizer reads."""
    only = {
        "legacy": (True,),
        "sp_model_kwargs": ({},),
        "padding_side": ("right",),
        "truncation_side": ("right",),
        "split_special_tokens": (False,),
        "do_lower_case": (True, False),
    }
    for key, values in only.items():
        if key in stated and not any(type(stated[key]) is type(each) and stated[key] == each for each in values):
            raise ValueError(f"{path}: {key} is {stated[key]!r:.80}: only {' and '.join(map(repr, values))} is read")
    tokens = {key: _content(path, key, stated[key]) for key in ("eos_token", "pad_token", "unk_token")}
    if tokens["unk_token"] != UNKNOWN:
        raise ValueError(f"{path}: unk_token is {tokens['unk_token']!r:.80}: it must be {UNKNOWN}")
    decoder = stated.get("added_tokens_decoder", {})
    check_object(f"{path}: added_tokens_decoder", decoder)
    lists = {"added_tokens_decoder": list(decoder.values())}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        lists[key] = stated.get(key, [])
        if not isinstance(lists[key], list):
            raise ValueError(f"{path}: {key} is {lists[key]!r:.80}: it must be a list of tokens")
    for key, added in lists.items():
        for token in added:
            if _content(path, key, token) not in tokens.values():
                raise ValueError(f"{path}: {key} has {token!r:.80}: only the tokens of {SPIECE_MODEL} are read")
    model = parse_spiece_model(data)
    ids = {key: model.piece_to_id(token) for key, token in tokens.items()}
    for key, token in tokens.items():
        if model.id_to_piece(ids[key]) != token:
            raise ValueError(f"{path}: {key} is {token!r:.80}, which {SPIECE_MODEL} does not have")
    return {"lower": stated["do_lower_case"], "eos_id": ids["eos_token"], "pad_id": ids["pad_token"]}


def _resolved(path: epath.Path, kind: str, stated: Mapping[str, Any], data: bytes, length: int) -> bytes:
    """Return a tokenizer.json with what tokenizer_config.json changes in it, which pads and truncates to `length`.

    The file alone says which tokens begin and end a text: transformers then ignores add_bos_token and add_eos_token.
    """
    parsed = parse_tokenizer_json(data)
    padding, truncation = parsed.padding or {}, parsed.truncation or {}
    sides = {"padding_side": padding, "truncation_side": truncation}
    inner = {key: section["direction"] for key, section in sides.items() if section}
    stated = {**_DEFAULTS[kind], **inner, **stated}
    if stated.get("split_special_tokens"):
        raise ValueError(f"{path}: split_special_tokens is true: only false is read")
    _mark_special(path, stated, parsed)
    if kind == "Siglip2Tokenizer" and '"Lowercase"' not in json.dumps(json.loads(parsed.to_str())["normalizer"]):
        own = [parsed.normalizer] if parsed.normalizer else []
        parsed.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    token = stated.get("pad_token", padding.get("pad_token"))
    if token is None:
        raise ValueError(f"{path}: pad_token is missing: texts are padded with it")
    token = _content(path, "pad_token", token)
    pad_id = parsed.token_to_id(token)
    if pad_id is None:
        raise ValueError(f"{path}: pad_token is {token!r:.80}, which {TOKENIZER_JSON} does not have")
    padding_side, truncation_side = (_side(path, key, stated.get(key, "right")) for key in sides)
    parsed.enable_padding(length=length, pad_id=pad_id, pad_token=token, direction=padding_side)
    parsed.enable_truncation(length, direction=truncation_side)
    return parsed.to_str().encode()


def _mark_special(path: epath.Path, stated: Mapping[str, Any], parsed: tokenizers.Tokenizer) -> None:
    """Make the special tokens special that tokenizer.json has as mere words. Others are none of the embedding's."""
    decoder = stated.get("added_tokens_decoder", {})
    check_object(f"{path}: added_tokens_decoder", decoder)
    named = [("added_tokens_decoder", token) for token in decoder.values()]
    named += [(key, stated[key]) for key in _TOKENS if key in stated]
    known = {token.content for token in parsed.get_added_tokens_decoder().values()}
    for key, token in named:
        content = _content(path, key, token)
        if content in known or parsed.token_to_id(content) is None:
            continue
        flags = {flag: bool(token[flag]) for flag in _FLAGS if flag in token} if isinstance(token, Mapping) else {}
        parsed.add_special_tokens([tokenizers.AddedToken(content, special=True, **flags)])
        known.add(content)
