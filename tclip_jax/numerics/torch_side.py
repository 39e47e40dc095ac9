"""Run models and preprocessing of open_clip and transformers, and record the taps with forward hooks.

Only this file of the folder imports torch, and only inside functions.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from etils import epath
from PIL import Image

from tclip_jax.artifacts.pack import pack_params
from tclip_jax.data.images import Preprocess
from tclip_jax.inference.model import Model
from tclip_jax.interop.checkpoints import find_weights
from tclip_jax.interop.metadata import HUGGING_FACE, OPEN_CLIP
from tclip_jax.interop.open_clip import is_timm, to_open_clip
from tclip_jax.interop.reader import read_json
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.text import pooled_position
from tclip_jax.models.timm_cfg import to_timm
from tclip_jax.numerics.golden import Recording
from tclip_jax.numerics.taps import Taps, tap_names
from tclip_jax.storage import is_local

# module path in open_clip and in transformers -> tap
_OPEN_CLIP_TAPS = {
    "visual.conv1": "image/patch_embedding",
    "visual.transformer.resblocks": "image/blocks",
    "visual.ln_post": "image/ln_post",
    "token_embedding": "text/token_embedding",
    "transformer.resblocks": "text/blocks",
    "ln_final": "text/ln_final",
}
_TRANSFORMERS_TAPS = {
    "vision_model.embeddings.patch_embedding": "image/patch_embedding",
    "vision_model.encoder.layers": "image/blocks",
    "vision_model.post_layernorm": "image/ln_post",
    "visual_projection": "image/projection",
    "text_model.embeddings.token_embedding": "text/token_embedding",
    "text_model.encoder.layers": "text/blocks",
    "text_model.final_layer_norm": "text/ln_final",
    "text_projection": "text/projection",
}
_SIGLIP_TAPS = {
    "vision_model.embeddings.patch_embedding": "image/patch_embedding",
    "vision_model.encoder.layers": "image/blocks",
    "vision_model.post_layernorm": "image/ln_post",
    "vision_model.head": "image/projection",
    "text_model.embeddings.token_embedding": "text/token_embedding",
    "text_model.encoder.layers": "text/blocks",
    "text_model.final_layer_norm": "text/ln_final",
    "text_model.head": "text/projection",
}
_TIMM_TAPS = {
    "visual.trunk.patch_embed.proj": "image/patch_embedding",
    "visual.trunk.blocks": "image/blocks",
    "visual.trunk.norm": "image/ln_post",
}
_BRANCHES = {"attn": "attention", "self_attn": "attention", "mlp": "mlp"}
_TRANSFORMERS = {"clip": "CLIPModel", "siglip": "SiglipModel"}


def library_of(path: epath.PathLike) -> str:
    """Return the library that loads a local folder: 'open_clip', 'transformers', or '' if neither does."""
    folder = epath.Path(path)
    if not is_local(folder) or not folder.is_dir():
        return ""
    try:
        _, described = find_weights(folder)
    except FileNotFoundError:
        return ""
    if described == OPEN_CLIP:
        return "open_clip"
    return "transformers" if read_json(folder / described).get("model_type") in _TRANSFORMERS else ""


@functools.cache
def import_torch() -> Any:
    """Return the torch module, prepared so that open_clip can be imported.

    Raises:
      ValueError: torch or torchvision is not installed.
    """
    try:
        torch = importlib.import_module("torch")
        _repair_torchvision(torch)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: PyTorch comparisons need pip install 'tclip-jax[torch]'") from None
    return torch


@functools.cache
def _repair_torchvision(torch: Any) -> Any:
    """Define the operators without which torchvision's CUDA build cannot be imported with a CPU build of torch.

    The operators exist as long as the returned library, which the cache keeps alive.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


def load_torch(folder: epath.PathLike) -> Any:
    """Load an open_clip or transformers folder with that library, in float32 on the CPU."""
    import_torch()
    if library_of(folder) == "open_clip":
        open_clip = importlib.import_module("open_clip")
        return open_clip.create_model(f"local-dir:{folder}", precision="fp32").eval()
    transformers = importlib.import_module("transformers")
    model = _TRANSFORMERS[read_json(epath.Path(folder) / HUGGING_FACE)["model_type"]]
    return getattr(transformers, model).from_pretrained(folder, dtype="float32").eval()


def build_torch(model: Model) -> Any:
    """Return open_clip's model with the weights of `model`, ternary weights dequantised, on the CPU.

    Raises:
      ValueError: open_clip cannot build the model.
    """
    torch, open_clip = import_torch(), importlib.import_module("open_clip")
    state = to_open_clip(pack_params(model.params, model.rules), model.config)
    if is_timm(model.config) and to_timm(model.config.vision) is None:
        raise ValueError("open_clip has no image tower of this shape: compare with a folder of transformers")
    cfg = model.config.to_open_clip()
    module = (open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP)(**cfg)
    module.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in state.items()})
    return module.eval()


def record_torch(
    module: Any, config: CLIPConfig, pixels: npt.NDArray[np.float32], tokens: npt.NDArray[np.int32]
) -> Recording:
    """Record the activations of an open_clip or transformers model, with the names and shapes of `collect_taps`.

    Args:
      module: a model from `load_torch` or `build_torch`.
      config: the model's configuration.
      pixels: normalised images (B, H, W, 3) float32.
      tokens: token ids (B, T) int32.
    """
    torch = import_torch()
    images, ids = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2), torch.from_numpy(np.array(tokens)).long()
    taps: Taps = {}
    with torch.no_grad(), _hooks(module, _tap_paths(module), taps):
        if hasattr(module, "visual"):
            taps["image/projection"] = module.encode_image(images).float().numpy()
            taps["text/projection"] = module.encode_text(ids).float().numpy()
        else:
            module(pixel_values=images, input_ids=ids)
        scale = float(module.logit_scale.exp())
    patches = taps["image/patch_embedding"]
    taps["image/patch_embedding"] = patches.reshape(*patches.shape[:2], -1).transpose(0, 2, 1)
    # open_clip normalises all tokens and then pools one; our tap is the pooled token.
    if taps["image/ln_post"].ndim == 3 and config.vision.pool_type == "tok":
        taps["image/ln_post"] = taps["image/ln_post"][:, 0]
    end_B = np.asarray(pooled_position(jnp.asarray(tokens), config.text))
    taps["text/ln_final"] = taps["text/ln_final"][np.arange(len(tokens)), end_B]
    for tower in ("image", "text"):
        embedding = torch.from_numpy(taps[f"{tower}/projection"])
        taps[f"{tower}/embedding"] = torch.nn.functional.normalize(embedding, dim=-1).numpy()
    ordered = dict.fromkeys(name for name in tap_names(config) if name in taps)
    return Recording(pixels, tokens, {name: taps[name] for name in ordered | taps}, scale, _environment(module))


def _tap_paths(module: Any) -> dict[str, str]:
    """Return the paths of a model's parts, and the names of their taps."""
    if not hasattr(module, "visual"):
        return _SIGLIP_TAPS if type(module).__name__ == "SiglipModel" else _TRANSFORMERS_TAPS
    image, text = (
        {path: name for path, name in _OPEN_CLIP_TAPS.items() if name.startswith(tower)} for tower in ("image", "text")
    )
    prefix = "text." if hasattr(module, "text") else ""
    return (_TIMM_TAPS if hasattr(module.visual, "trunk") else image) | {prefix + p: name for p, name in text.items()}


@contextlib.contextmanager
def _hooks(module: Any, paths: Mapping[str, str], taps: Taps) -> Iterator[None]:
    handles = []

    def keep(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        taps[name] = value.float().numpy().copy()

    def tap(part: Any, name: str) -> None:
        handles.append(part.register_forward_hook(lambda _module, _args, output: keep(name, output)))

    for path, name in paths.items():
        part = module.get_submodule(path)
        if not name.endswith("/blocks"):
            tap(part, name)
            continue
        embedded = name.replace("blocks", "embedded")
        handles.append(part[0].register_forward_pre_hook(lambda _module, args, name=embedded: keep(name, args[0])))
        for i, block in enumerate(part):
            tap(block, f"{name}/{i}")
            for child, branch in block.named_children():
                if child in _BRANCHES:
                    tap(branch, f"{name}/{i}/{_BRANCHES[child]}")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def library_inputs(
    preprocess: Preprocess,
    context_length: int,
    texts: Sequence[str],
    images: Sequence[Image.Image],
    folder: epath.PathLike | None = None,
) -> tuple[npt.NDArray[np.int32], list[npt.NDArray[np.float32]]]:
    """Tokenize texts and preprocess images with open_clip or transformers.

    Args:
      preprocess: the preprocessing of the images in open_clip.
      context_length: number of tokens of a text.
      texts: the texts.
      images: the images.
      folder: a folder that transformers loads; None selects open_clip.

    Returns:
      Token ids (N, context_length) int32, and normalised pixels (H, W, 3) float32 of every image.
    """
    import_torch()
    if folder is None:
        open_clip = importlib.import_module("open_clip")
        tokens = open_clip.tokenizer.SimpleTokenizer(context_length=context_length)(list(texts)).numpy()
        return tokens.astype(np.int32), library_pixels(preprocess, images)
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder)
    batch = _padded(tokenizer, texts, context_length)
    # transformers pads with another token than open_clip; the mask sets its padding to 0.
    return (batch["input_ids"] * batch["attention_mask"]).astype(np.int32), library_pixels(preprocess, images, folder)


def library_pixels(
    preprocess: Preprocess, images: Sequence[Image.Image], folder: epath.PathLike | None = None
) -> list[npt.NDArray[np.float32]]:
    """Preprocess images as `library_inputs` does."""
    import_torch()
    if folder is None:
        transform = importlib.import_module("open_clip.transform")
        prepare = transform.image_transform_v2(transform.PreprocessCfg(**preprocess.to_open_clip()), is_train=False)
        return [prepare(image).numpy().transpose(1, 2, 0) for image in images]
    processor = importlib.import_module("transformers").AutoImageProcessor.from_pretrained(folder, backend="pil")
    return [processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0) for image in images]


def library_texts(
    library: str, folder: epath.PathLike, context_length: int, texts: Sequence[str]
) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Clean and tokenize texts with the tokenizer in a folder, which is not CLIP's own.

    Args:
      library: "open_clip" or "transformers".
      folder: a local folder that the library loads.
      context_length: number of tokens of a text.
      texts: the texts.

    Returns:
      The texts as their words are looked up, and token ids (N, context_length) int32 with the library's padding.
    """
    import_torch()
    if library == "open_clip":
        wrapped = importlib.import_module("open_clip").get_tokenizer(f"local-dir:{folder}")
        tokenizer, cleaned = wrapped.tokenizer, [wrapped.clean_fn(text) for text in texts]
        tokens = wrapped(list(texts), context_length).numpy()
    else:
        tokenizer, cleaned = importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder), list(texts)
        tokens = _padded(tokenizer, texts, context_length)["input_ids"]
    if hasattr(tokenizer, "canonicalize_text"):  # SiglipTokenizer
        cleaned = [tokenizer.canonicalize_text(text) for text in cleaned]
    elif normalizer := tokenizer.backend_tokenizer.normalizer:
        cleaned = [normalizer.normalize_str(text) for text in cleaned]
    return cleaned, tokens.astype(np.int32)


def _padded(tokenizer: Any, texts: Sequence[str], length: int) -> Any:
    return tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="np")


def _environment(module: Any) -> dict[str, str]:
    """Return the libraries, the precision, and whether PyTorch may use TF32."""
    torch, library = import_torch(), type(module).__module__.split(".")[0]
    backends = torch.backends
    return {
        "run by": f"{library} on PyTorch {torch.__version__}, precision {torch.get_float32_matmul_precision()}",
        "TF32": f"matmul {backends.cuda.matmul.allow_tf32}, cuDNN {backends.cudnn.allow_tf32}",
    }
