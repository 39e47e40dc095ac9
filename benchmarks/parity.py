"""Differences of JAX from open_clip and transformers: `python -m benchmarks.parity [--quick] [--json]`.

Compares random models of every preset, one at a time: embeddings of both towers, gradients of the contrastive loss, and
the bytes of export → import → export. Compares pixels and tokens with open_clip. Exits with 1 if a figure is over its
budget. Needs the extra `torch`. ViT-L-14 takes most of the time, and 9.4 GiB of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from tclip_jax.data.images import Preprocess, normalize, preprocess
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.inference.load import load_model
from tclip_jax.inference.model import Model
from tclip_jax.interop.export import export_model
from tclip_jax.interop.hugging_face import from_hugging_face
from tclip_jax.interop.hugging_face_config import hugging_face_config
from tclip_jax.interop.open_clip import from_open_clip
from tclip_jax.losses.contrastive import info_nce
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS, model_cfg
from tclip_jax.numerics.inputs import compare_pixels, compare_tokens, sample_batch, sample_images, sample_texts
from tclip_jax.numerics.torch_side import import_torch, library_inputs

Array = npt.NDArray[Any]
LIBRARIES = ("open_clip", "transformers")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured value and its upper bound, or lower bound for a cosine."""

    model: str
    name: str
    value: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.value >= self.budget if self.name.endswith("cosine") else self.value <= self.budget


def torch_model(library: str, config: CLIPConfig) -> Any:
    """Return a random model of the library, with noise, so that no weight is exactly at its initial 0 or 1."""
    torch = import_torch()
    torch.manual_seed(0)
    if library == "open_clip":
        import open_clip

        module = open_clip.CLIP(**config.to_open_clip())
    else:
        import transformers

        module = transformers.CLIPModel(transformers.CLIPConfig(**hugging_face_config(config)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return module.eval()


def to_params(library: str, tensors: dict[str, Any], config: CLIPConfig) -> dict[str, Any]:
    """Convert tensors with the library's names to a parameter tree."""
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    return from_open_clip(arrays if library == "open_clip" else from_hugging_face(arrays, config), config)


def torch_loss(library: str, module: Any, pixels: Array, tokens: Array) -> tuple[list[Array], Any]:
    """Return the embeddings of both towers, of length 1, and the contrastive loss with its graph."""
    torch = import_torch()
    images, ids = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2), torch.from_numpy(np.array(tokens)).long()
    if library == "open_clip":
        image, text, scale = module(images, ids)
    else:
        out = module(pixel_values=images, input_ids=ids)
        image, text, scale = out.image_embeds, out.text_embeds, module.logit_scale.exp()
    logits, labels = scale * image @ text.T, torch.arange(len(pixels))
    entropy = torch.nn.functional.cross_entropy
    return [image.detach().numpy(), text.detach().numpy()], (entropy(logits, labels) + entropy(logits.T, labels)) / 2


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
def jax_loss(
    clip: CLIP, params: Any, pixels: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return loss and embeddings, and the gradients of the parameters."""
    image, text, scale = clip.apply({"params": params}, pixels, tokens)  # type: ignore[misc]
    return info_nce(image, text, scale), (image, text)


def model_figures(preset: str, library: str, batch: int) -> Iterator[Figure]:
    """Compare embeddings and gradients of one preset with one library."""
    config = CLIPConfig.from_open_clip(model_cfg(preset))
    pixels, tokens = sample_batch(Model(config, Preprocess(config.vision.image_size), {}), batch)
    module = torch_model(library, config)
    theirs, loss = torch_loss(library, module, pixels, tokens)
    loss.backward()
    del loss
    their_gradients = to_params(library, {name: weight.grad for name, weight in module.named_parameters()}, config)
    module.zero_grad()
    params = to_params(library, dict(module.state_dict()), config)
    del module
    gc.collect()
    with jax.default_matmul_precision("highest"):
        # Recomputing the blocks does not change gradients, and reduces the memory of ViT-L-14.
        (_, ours), our_gradients = jax_loss(CLIP(config, remat=True), params, pixels, tokens)
    for tower, our, their in zip(("image", "text"), ours, theirs, strict=True):
        a, b = np.float64(our), np.float64(their)
        cosine = np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        yield Figure(preset, f"{library}: {tower} embeddings, max |Δ|", float(abs(a - b).max()), 1e-5)
        yield Figure(preset, f"{library}: {tower} embeddings, least cosine", float(cosine.min()), 0.999999)
    yield Figure(preset, f"{library}: gradients, largest error", gradient_error(our_gradients, their_gradients), 1e-4)


def gradient_error(ours: Any, theirs: Any) -> float:
    """Return the largest max |Δ| / max(max |g| of the tensor, 1e-3 · max |g| of all tensors) over all tensors."""
    largest = max(abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    errors = jax.tree.map(lambda a, b: abs(np.asarray(a) - b).max() / max(abs(b).max(), 1e-3 * largest), ours, theirs)
    return float(max(jax.tree.leaves(errors)))


def export_figures(preset: str) -> Iterator[Figure]:
    """Count the files that differ between an export and the export of its import."""
    config = CLIPConfig.from_open_clip(model_cfg(preset))
    params = to_params("open_clip", dict(torch_model("open_clip", config).state_dict()), config)
    with tempfile.TemporaryDirectory() as folder:
        first, second = (pathlib.Path(folder) / name for name in ("first", "second"))
        export_model(first, config=config, preprocess=Preprocess(config.vision.image_size), params=params)
        del params
        model = load_model(first)
        export_model(second, config=model.config, preprocess=model.preprocess, params=model.params)
        names = {path.name for path in [*first.iterdir(), *second.iterdir()]}
        differ = sum(not _same_bytes(first / name, second / name) for name in names)
    yield Figure(preset, "files that export → import → export changes", differ, 0)


def _same_bytes(a: pathlib.Path, b: pathlib.Path) -> bool:
    return a.exists() and b.exists() and a.read_bytes() == b.read_bytes()


def input_figures(texts: int, images: int) -> Iterator[Figure]:
    """Count captions with other tokens than open_clip's; measure the difference of pixels."""
    captions, pictures = sample_texts(texts), sample_images(images)
    p = Preprocess(224)
    tokens, pixels = library_inputs(p, 77, captions, pictures)
    ours = [normalize(preprocess(picture, p), p.mean, p.std) for picture in pictures]
    row = compare_tokens("tokens", Tokenizer(77)(captions), tokens, captions)
    yield Figure("inputs", f"open_clip: captions of {texts:,} with other tokens", row.differ, 0)
    exact = compare_pixels("pixels", ours, pixels, pictures)
    yield Figure("inputs", f"open_clip: pixels of {images} images, max |Δ|", exact.max_abs, 0)


def figures(quick: bool) -> Iterator[Figure]:
    """Yield each figure as soon as it is measured."""
    yield from input_figures(5000, 200)
    for preset in ("tiny",) if quick else [name for name in PRESETS if "SigLIP" not in name]:
        for library in LIBRARIES:
            yield from model_figures(preset, library, batch=4)
            gc.collect()
        yield from export_figures(preset)


def main() -> int:
    """Print a line per figure, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the preset 'tiny'; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Palette images with Transparency")
    import_torch()
    measured = []
    for figure in figures(args.quick):
        measured.append(figure)
        mark = "" if figure.passed else "  OVER"
        print(f"{figure.model:20}{figure.name:50}{figure.value:>12.7g}  budget {figure.budget:g}{mark}", flush=True)
    passed = all(figure.passed for figure in measured)
    if args.json:
        print(json.dumps({"passed": passed, "figures": [dataclasses.asdict(figure) for figure in measured]}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
