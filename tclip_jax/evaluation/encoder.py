"""A model on all devices of all processes, and the embeddings of a whole data source."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, PartitionSpec

from tclip_jax.data.eval_batches import eval_batches, log_bad_samples
from tclip_jax.data.images import Preprocess, normalize
from tclip_jax.data.sources import Source
from tclip_jax.data.tokenizer import EOT, VOCAB_SIZE, tokenizer_of
from tclip_jax.inference.model import Embeddings, Model
from tclip_jax.keys import recipe
from tclip_jax.models.clip import CLIP
from tclip_jax.parallel.agreement import allgather_json
from tclip_jax.parallel.mesh import make_mesh, shard_batch
from tclip_jax.parallel.sharding import tree_shardings

_BUCKET = 16  # token lengths are rounded up to a multiple of this, so that few shapes are compiled

Reduce = Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]
Progress = Callable[[int], Any]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode_images(clip: CLIP, preprocess: Preprocess, params: Any, pixels: jax.Array) -> jax.Array:
    images = normalize(pixels, preprocess.mean, preprocess.std)
    return _replicated(clip.apply({"params": params}, images, method="encode_image"))


@functools.partial(jax.jit, static_argnums=0)
def _encode_texts(clip: CLIP, params: Any, tokens: jax.Array) -> jax.Array:
    return _replicated(clip.apply({"params": params}, tokens, method="encode_text"))


def _replicated(embeddings: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(embeddings, PartitionSpec())


class Encoder:
    """Encodes batches of one fixed shape, sharded over all devices. Every process gets all embeddings.

    Args:
      model: the model; its parameters are placed on the mesh.
      batch_size: rows over all devices.
      dtype: dtype of the computation. float32 uses the highest matmul precision, also on a TPU.
      mesh: the devices; None for all.

    Attributes:
      preprocess: the preprocessing of the model.
      batch_size: the argument, rounded up to a multiple of the number of devices.
      dtype: the argument.
      made_by: what determines the embeddings besides the weights, for `keys.recipe`.

    Raises:
      ValueError: `batch_size` is not positive, or the model's vocabulary is smaller than the tokenizer's.
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
        if not model.config.text.hf_tokenizer_name and model.config.text.vocab_size < VOCAB_SIZE:
            raise ValueError(
                f"the model's vocabulary has {model.config.text.vocab_size} tokens, but the tokenizer has {VOCAB_SIZE}"
            )
        self.preprocess = model.preprocess
        self.dtype = dtype
        self.made_by = recipe(
            dtype=dtype,
            activations=model.activations,
            preprocess=model.preprocess,
            context_length=model.config.text.context_length,
            **({"tokenizer": model.tokenizer.digest} if model.tokenizer else {}),
        )
        self._mesh = mesh or make_mesh()
        self.batch_size = self._round_up(batch_size)
        self._clip = CLIP(model.config, model.rules, jnp.dtype(dtype))
        self._params = jax.tree.map(_place, model.params, tree_shardings(model.params, self._mesh))
        self._text, self._tokenizer = model.config.text, model.tokenizer

    def images(self, pixels: npt.NDArray[np.uint8]) -> jax.Array:
        """Encode a batch of images. The call returns before the devices finish, so the caller can load the next batch.

        Args:
          pixels: the rows of this process (batch_size / processes, H, W, 3).

        Returns:
          L2-normalised embeddings (batch_size, D) float32 of the rows of all processes.
        """
        return self._run(_encode_images, self.preprocess, batch=pixels)

    def texts(self, texts: Sequence[str]) -> Embeddings:
        """Return the L2-normalised embeddings (N, D) of texts, which must be the same on every process."""
        text = self._text
        tokens = tokenizer_of(text.context_length, text.hf_tokenizer_name, self._tokenizer)(texts)
        lengths = self._lengths(tokens)
        rows = min(self.batch_size, self._round_up(1 << max(len(texts) - 1, 0).bit_length()))
        local_rows = rows // jax.process_count()
        local = slice(jax.process_index() * local_rows, (jax.process_index() + 1) * local_rows)
        order = np.argsort(lengths, kind="stable")
        embeddings = []
        for start in range(0, len(texts), rows):
            part = order[start : start + rows]
            batch = np.zeros((rows, lengths[part[-1]]), np.int32)
            batch[: len(part)] = tokens[part, : batch.shape[1]]
            embeddings.append(np.asarray(self._run(_encode_texts, batch=batch[local]))[: len(part)])
        return np.concatenate(embeddings)[np.argsort(order)]

    def _run(self, encode: Any, *static: Any, batch: npt.NDArray[Any]) -> jax.Array:
        precision = "highest" if self.dtype == "float32" else "default"
        with jax.set_mesh(self._mesh), jax.default_matmul_precision(precision):
            return encode(self._clip, *static, self._params, shard_batch({"batch": batch}, self._mesh)["batch"])

    def _lengths(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Return how many columns of each row affect its embedding: with a causal mask, those up to the end token."""
        length = self._text.context_length
        if self._text.no_causal_mask or self._text.pool_type != "argmax":
            return np.full(len(tokens), length)
        ends = (tokens == EOT).argmax(axis=1) + 1
        return np.minimum(-(-ends // _BUCKET) * _BUCKET, length)

    def _round_up(self, rows: int) -> int:
        return -(-rows // self._mesh.size) * self._mesh.size


def _place(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    # Via NumPy: an array on a single device is not addressable by the other processes.
    return jax.device_put(np.asarray(leaf), sharding)


class ImageRecords(NamedTuple):
    """The metadata of all records of a source, in its order: lists of length N.

    Attributes:
      names: record names.
      labels: a class index, or a 0/1 vector over the classes.
      captions: the captions of each image.
      readable: whether the image could be decoded.
    """

    names: list[str]
    labels: list[Any]
    captions: list[list[str]]
    readable: list[bool]


def encode_source(
    encoder: Encoder, source: Source, reduce: Reduce = np.asarray, progress: Progress = lambda images: None
) -> tuple[ImageRecords, npt.NDArray[Any]]:
    """Encode every image of a source once, split over all processes, and reduce each batch to save memory.

    Args:
      encoder: the model.
      source: the images.
      reduce: function from embeddings (B, D) float32 to the values (B, …) to keep, such as class predictions.
      progress: called with the number of images encoded since the last call.

    Returns:
      The records without their images, and the values (N, …), both on every process. The value of an image that could
      not be decoded is that of a black image.

    Raises:
      ValueError: the source is empty, or embeddings are not finite.
    """
    if not len(source):
        raise ValueError("the source has no images")
    values: list[npt.NDArray[Any]] = []
    local_records: list[list[Any]] = []
    pending: jax.Array | None = None
    for batch in eval_batches(
        source,
        preprocess=encoder.preprocess,
        batch_size=encoder.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
        running = encoder.images(batch["image"])
        # Fetching blocks, so each result is fetched after the next batch is dispatched: the devices are never idle.
        if pending is not None:
            values.append(_fetch(pending, reduce))
            progress(encoder.batch_size)
        pending = running
        columns = (*(batch[key].tolist() for key in ("index", "label", "weight")), batch["name"], batch["captions"])
        local_records += [
            [index, name, label, captions, weight > 0]
            for index, label, weight, name, captions in zip(*columns, strict=True)
        ]
    assert pending is not None
    values.append(_fetch(pending, reduce))
    log_bad_samples()
    progress(len(source) - encoder.batch_size * (len(values) - 1))
    # Rows that pad the last batch have index -1.
    records = sorted(record for records in allgather_json(local_records) for record in records if record[0] >= 0)
    return ImageRecords(*map(list, list(zip(*records, strict=True))[1:])), np.concatenate(values)[: len(source)]


def _fetch(embeddings: jax.Array, reduce: Reduce) -> npt.NDArray[Any]:
    host = np.asarray(embeddings)
    if not np.isfinite(host).all():
        raise ValueError("the model's embeddings are not finite")
    return reduce(host)
