"""A model over all devices of all processes, as an evaluation uses it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, PartitionSpec

from tclip_jax.data.images import Preprocess, normalize
from tclip_jax.data.tokenizer import EOT, VOCAB_SIZE, Tokenizer
from tclip_jax.inference.model import Embeddings, Model
from tclip_jax.keys import recipe
from tclip_jax.models.clip import CLIP
from tclip_jax.parallel.mesh import make_mesh, shard_batch
from tclip_jax.parallel.sharding import tree_shardings

_BUCKET = 16  # lengths of token rows are multiples of it, so that few shapes are compiled


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode_images(clip: CLIP, preprocess: Preprocess, params: Any, pixels: jax.Array) -> jax.Array:
    images = normalize(pixels, preprocess.mean, preprocess.std)
    return _on_every_process(clip.apply({"params": params}, images, method="encode_image"))


@functools.partial(jax.jit, static_argnums=0)
def _encode_texts(clip: CLIP, params: Any, tokens: jax.Array) -> jax.Array:
    return _on_every_process(clip.apply({"params": params}, tokens, method="encode_text"))


def _on_every_process(embeddings: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(embeddings, PartitionSpec())


class Encoder:
    """Encodes batches of one shape, their rows over the devices; every process gets all embeddings.

    Attributes:
      batch_size: rows over all devices: what was asked for, rounded up to divide over them.
      dtype: of the computation. In float32 products are computed at the highest precision, also on a TPU.
      made_by: everything but the weights that decides the embeddings, as of `keys.recipe`.
    """

    def __init__(
        self,
        model: Model,
        *,
        batch_size: int = 128,
        dtype: Literal["float32", "bfloat16"] = "float32",
        mesh: Mesh | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be 1 or more")
        if model.config.text.vocab_size < VOCAB_SIZE:
            raise ValueError(f"the model knows {model.config.text.vocab_size} tokens: the tokenizer has {VOCAB_SIZE}")
        self.preprocess = model.preprocess
        self.dtype = dtype
        self.made_by = recipe(
            dtype=dtype,
            activations=model.activations,
            preprocess=model.preprocess,
            context_length=model.config.text.context_length,
        )
        self._mesh = mesh or make_mesh()
        self.batch_size = self._whole(batch_size)
        self._clip = CLIP(model.config, model.rules, jnp.dtype(dtype))
        self._params = jax.tree.map(_placed, model.params, tree_shardings(model.params, self._mesh))
        self._text = model.config.text

    def images(self, pixels: npt.NDArray[np.uint8]) -> jax.Array:
        """L2-normalised embeddings (batch_size, D) float32 of this process's rows (b, H, W, 3) and all others'.

        Returns before they are computed, so that the next batch can be prepared meanwhile.
        """
        return self._run(_encode_images, self.preprocess, batch=pixels)

    def texts(self, texts: Sequence[str]) -> Embeddings:
        """L2-normalised embeddings (N, D) of texts that are the same on every process."""
        tokens = Tokenizer(self._text.context_length)(texts)
        lengths = self._lengths(tokens)
        rows = min(self.batch_size, self._whole(1 << max(len(texts) - 1, 0).bit_length()))
        share = rows // jax.process_count()
        own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        order = np.argsort(lengths, kind="stable")
        embeddings = []
        for start in range(0, len(texts), rows):
            part = order[start : start + rows]
            batch = np.zeros((rows, lengths[part[-1]]), np.int32)
            batch[: len(part)] = tokens[part, : batch.shape[1]]
            embeddings.append(np.asarray(self._run(_encode_texts, batch=batch[own]))[: len(part)])
        return np.concatenate(embeddings)[np.argsort(order)]

    def _run(self, encode: Any, *static: Any, batch: npt.NDArray[Any]) -> jax.Array:
        precision = "highest" if self.dtype == "float32" else "default"
        with jax.set_mesh(self._mesh), jax.default_matmul_precision(precision):
            return encode(self._clip, *static, self._params, shard_batch({"batch": batch}, self._mesh)["batch"])

    def _lengths(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Columns of each row that the tower must see: under a causal mask nothing after the end counts."""
        length = self._text.context_length
        if self._text.no_causal_mask or self._text.pool_type != "argmax":
            return np.full(len(tokens), length)
        ends = (tokens == EOT).argmax(axis=1) + 1
        return np.minimum(-(-ends // _BUCKET) * _BUCKET, length)

    def _whole(self, rows: int) -> int:
        return -(-rows // self._mesh.size) * self._mesh.size


def _placed(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """The parameter on the mesh; from NumPy where it is on one device alone, which another process cannot see."""
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    return jax.device_put(np.asarray(leaf), sharding)
