"""A CLIP model for inference, and the fingerprint of everything that determines its embeddings."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from etils import epath
from flax.traverse_util import unflatten_dict

from tclip_jax.artifacts.files import check_size
from tclip_jax.artifacts.format import read_artifact
from tclip_jax.artifacts.manifest import MANIFEST, MAX_MANIFEST_BYTES, content_digest, parse_manifest
from tclip_jax.artifacts.pack import flatten, pack_params, repack_leaf, repack_params
from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.data.images import Picture, Preprocess, as_sequence
from tclip_jax.data.tokenizer import TextTokenizer, tokenizer_of
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.schema import check_keys
from tclip_jax.ternary.matmul import unpack
from tclip_jax.ternary.tensor import Activations, PackedTensor, TernaryTensor
from tclip_jax.ternary.uniform import UniformTensor

Embeddings = npt.NDArray[np.float32]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _forward(model: CLIP, params: Any, batch: jax.Array, method: str) -> Any:
    # Captured parameters would be compiled into the program as constants, so they are an argument.
    return model.apply({"params": params}, batch, method=method)


def _return_freed_memory() -> None:
    """Return freed memory to the system: glibc retains more than the size of a packed model."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _return_memory_of_compiling(model: CLIP, shape: tuple[int, ...], method: str) -> None:
    """Call `_return_freed_memory` once per compiled program."""
    _return_freed_memory()


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Parameters with everything needed to apply them. Models of the same shape share their compiled encoders.

    Attributes:
      config: the shape of both towers.
      preprocess: the preprocessing of images.
      params: parameter tree on the default device, packed (`PackedTensor`, `QuantizedTensor` leaves) or latent floats.
      rules: the ternary rules that fake-quantize latent floats; empty for a packed model.
      tokenizer: what tokenizes texts, if it is not CLIP's own; None if it is, or is not stored with the model.
    """

    config: CLIPConfig
    preprocess: Preprocess
    params: Any = dataclasses.field(repr=False)
    rules: TernaryRules = ()
    tokenizer: FileTokenizer | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        # Arrays stay on their devices: those of other processes are not addressable.
        placed = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), self.params)
        object.__setattr__(self, "params", placed)

    @classmethod
    def load(
        cls, folder: epath.PathLike, *, implementation: str | None = None, activations: Activations | None = None
    ) -> Model:
        """Load an artifact, packed for this device; for the arguments see `repacked`.

        Raises:
          ArtifactError: the folder is not a complete artifact.
          ValueError: the implementation cannot run on this device.
        """
        pack = functools.partial(repack_leaf, implementation=implementation, activations=activations)
        # Leaf by leaf: all trits as one byte each would take three times the memory of the packed model.
        artifact = read_artifact(folder, lambda leaf: jax.device_put(pack(leaf)))
        _return_freed_memory()
        # The rules are dropped: the weights are packed already, and untrusted regexes must not run.
        return cls(artifact.config, artifact.preprocess, artifact.params, (), artifact.tokenizer)

    def repacked(self, *, implementation: str | None = None, activations: Activations | None = None) -> Model:
        """Return the model with its ternary weights packed for this device; other parameters do not change.

        Args:
          implementation: kernel of the ternary matmul, see `tclip_jax.ternary.kernels`; None for the best one here.
          activations: "A32" gives the embeddings of the fake-quantized model. "A16" and "A8" round the activations of
            each token to int16 (bfloat16 on TPUs and GPUs) or int8 before each packed product, which is faster:
            embeddings change by about 1e-5 (with int16), or 1e-3 in cosine. None is the result of
            `tclip_jax.ternary.default_activations()`.
        """
        params = repack_params(self.params, implementation=implementation, activations=activations)
        return dataclasses.replace(self, params=params)

    @property
    def activations(self) -> Activations:
        """The activations of the packed weights, the fewest bits if they differ; "A32" without packed weights."""
        leaves = jax.tree.leaves(self.params, is_leaf=lambda leaf: isinstance(leaf, PackedTensor))
        used = {leaf.activations for leaf in leaves if isinstance(leaf, PackedTensor)}
        return next((each for each in reversed(get_args(Activations)) if each in used), "A32")

    @property
    def logit_scale(self) -> float:
        """The factor of cosine similarities before the softmax: the exponential of the parameter `logit_scale`."""
        return math.exp(self.params["logit_scale"])

    @property
    def logit_bias(self) -> float | None:
        """What a model with the sigmoid loss adds to its logits; None for a model without a bias."""
        return float(self.params["logit_bias"]) if "logit_bias" in self.params else None

    def apply_image(self, params: Any, pixels: jax.Array) -> jax.Array:
        """Encode images by a pure function, for jit, vmap, export, and grad with respect to pixels or latent weights.

        Args:
          params: `model.params`, or a tree of the same structure.
          pixels: normalised floats (N, H, W, 3), as `model.preprocess` returns them.

        Returns:
          L2-normalised embeddings, float32 (N, embed_dim).

        Raises:
          ValueError: the pixels have another shape or are not floats.
        """
        self._check_pixels(pixels)
        return CLIP(self.config, self.rules).apply({"params": params}, pixels, method="encode_image")  # type: ignore[return-value]

    def apply_text(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Encode texts by a pure function, for jit, vmap, export, and grad with respect to latent weights.

        Args:
          params: `model.params`, or a tree of the same structure.
          tokens: integers (N, context_length), as `model.tokenize` returns them.

        Returns:
          L2-normalised embeddings, float32 (N, embed_dim).

        Raises:
          ValueError: the tokens have another shape or are not integers.
        """
        self._check_tokens(tokens)
        return CLIP(self.config, self.rules).apply({"params": params}, tokens, method="encode_text")  # type: ignore[return-value]

    def tokenize(self, texts: str | Sequence[str]) -> npt.NDArray[np.int32]:
        """Return the tokens of one text or several, int32 (N, context_length).

        Raises:
          ValueError: the model's tokenizer is not CLIP's own, and is not stored with it or damaged.
        """
        return self.text_tokenizer(texts)

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """What tokenizes texts. Raises ValueError if it is not CLIP's own, and not stored with the model."""
        return tokenizer_of(self.config.text.context_length, self.config.text.hf_tokenizer_name, self.tokenizer)

    def trits(self, path: str) -> TernaryTensor:
        """Return the trits and scales of a ternary weight, packed or latent.

        Args:
          path: path of a parameter, such as "image/blocks/mlp/fc1/kernel"; `tclip params` lists them.

        Returns:
          Trits int8 (layers, K, N) for a weight of the blocks, (V, W) for the token embedding, (K, N) for the patch
          embedding with K = patch height · width · 3. In a packed model, the scale of a group without nonzero trits
          is 0.

        Raises:
          ValueError: there is no such parameter (the message names the nearest), or it is not ternary.
        """
        leaves = flatten(self.params)
        check_keys([path], leaves, "the model")
        weights = {name: leaves[name] for name in (path, f"{path}_scale") if name in leaves}
        leaf = flatten(pack_params(unflatten_dict(weights, sep="/"), self.rules)).get(path, leaves[path])
        if isinstance(leaf, PackedTensor):
            return unpack(leaf)
        if isinstance(leaf, UniformTensor):
            raise ValueError(f"{path} is not ternary: it has integers of {leaf.bits} bits")
        if not isinstance(leaf, TernaryTensor):
            raise ValueError(f"{path} is not ternary: it is {leaf.dtype} {leaf.shape}")
        return jax.tree.map(jnp.asarray, leaf)

    def encode_image(
        self, images: Picture | Sequence[Picture] | npt.NDArray[Any], *, batch_size: int = 64
    ) -> Embeddings:
        """Encode images in batches.

        Args:
          images: one image or several, as `model.preprocess` takes them: paths, PIL images, uint8 arrays (H, W, 3) or
            (N, H, W, 3) of any size; or normalised float pixels (N, H, W, 3) of the model's size.
          batch_size: images per batch.

        Returns:
          L2-normalised embeddings (N, embed_dim) float32.

        Raises:
          FileNotFoundError: there is no file at a path.
          ValueError: a file is not a usable image, an array has another shape or dtype, or `batch_size` is not
            positive.
        """
        if isinstance(images, np.ndarray | jax.Array) and images.dtype != np.uint8:
            self._check_pixels(images)
            pixels = np.asarray(images, np.float32)
            return self._batched("encode_image", len(pixels), batch_size, lambda part: pixels[part])
        pictures = as_sequence(images)
        return self._batched("encode_image", len(pictures), batch_size, lambda part: self.preprocess(pictures[part]))

    def encode_text(
        self, texts: str | Sequence[str] | npt.NDArray[Any] | jax.Array, *, batch_size: int = 64
    ) -> Embeddings:
        """Encode texts in batches.

        Args:
          texts: strings, or integer tokens (N, context_length).
          batch_size: texts per batch.

        Returns:
          L2-normalised embeddings (N, embed_dim) float32.

        Raises:
          ValueError: tokens have another shape or dtype or are not in the vocabulary, or `batch_size` is not positive.
        """
        tokens = self._checked_tokens(texts if isinstance(texts, np.ndarray | jax.Array) else self.tokenize(texts))
        return self._batched("encode_text", len(tokens), batch_size, lambda part: tokens[part])

    def _batched(
        self, method: str, count: int, batch_size: int, load: Callable[[slice], npt.NDArray[Any]]
    ) -> Embeddings:
        """Encode `count` inputs in batches padded to `batch_size`, or for fewer inputs to the next power of two."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be 1 or more")
        size = min(batch_size, 1 << max(count - 1, 0).bit_length())
        encoder = CLIP(self.config, self.rules)
        embeddings = np.empty((count, self.config.embed_dim), np.float32)
        for start in range(0, count, size):
            batch = load(slice(start, min(start + size, count)))
            padded = np.pad(batch, [(0, size - len(batch)), *[(0, 0)] * (batch.ndim - 1)])
            embeddings[start : start + size] = np.asarray(_forward(encoder, self.params, padded, method))[: len(batch)]
            _return_memory_of_compiling(encoder, padded.shape, method)
        return embeddings

    def _check_pixels(self, images: npt.NDArray[Any] | jax.Array) -> None:
        expected = (*self.config.vision.image_size, 3)
        if images.shape[1:] != expected or not jnp.issubdtype(images.dtype, np.floating):
            kind = f"{images.dtype} {images.shape}"
            raise ValueError(
                f"images are {kind}: they must be uint8 (N, H, W, 3), or normalised floats"
                f" (N, {', '.join(map(str, expected))})"
            )

    def _check_tokens(self, texts: npt.NDArray[Any] | jax.Array) -> None:
        length = self.config.text.context_length
        if texts.ndim != 2 or texts.shape[1] != length or not np.issubdtype(texts.dtype, np.integer):
            raise ValueError(f"tokens are {texts.dtype} {texts.shape}: they must be integers (N, {length})")

    def _checked_tokens(self, texts: npt.NDArray[Any] | jax.Array) -> npt.NDArray[np.int32]:
        self._check_tokens(texts)
        tokens, vocabulary = np.asarray(texts), self.config.text.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
            raise ValueError(f"tokens are {tokens.min()} to {tokens.max()}: the vocabulary is 0 to {vocabulary - 1}")
        return tokens.astype(np.int32)


def fingerprint(model: Model, path: epath.PathLike) -> str:
    """Return 32 hexadecimal digits that change with everything that determines embeddings.

    These are parameters, rules, configuration, preprocessing and tokenizer. The fingerprint of an artifact is
    computed from its checksums, so it is the same on every device and for every packing.

    Args:
      model: the model.
      path: where the model was loaded from.
    """
    manifest = epath.Path(path) / MANIFEST
    if manifest.exists():
        check_size(manifest, MAX_MANIFEST_BYTES)
        return content_digest(parse_manifest(manifest.read_bytes()))
    digest = hashlib.blake2b(f"{model!r} {jax.tree.structure(model.params)}".encode(), digest_size=16)
    if model.tokenizer:
        digest.update(model.tokenizer.digest.encode())
    for leaf in jax.tree.leaves(model.params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
