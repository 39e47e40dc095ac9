"""CLIP with packed weights in PyTorch, built from an exported folder alone."""

import pathlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tclip_torch.linear import PackedAttention
from tclip_torch.weights import Weights


def load(folder: str | pathlib.Path, activations: str | None = None) -> "CLIP":
    """Return the model of a folder that `tclip export --to torch` wrote.

    Args:
      folder: the folder, such as release/torch.
      activations: "A32" is exact; "A16" and "A8" round the activations of each token to integers. None selects A16 on
        CPUs with AVX2 or more, if the native kernel was built, otherwise A32.

    Raises:
      ValueError: a file is not that of an export, or is damaged; the message names it.
      OSError: a file cannot be read.
    """
    return CLIP(Weights(folder, activations))


class CLIP(nn.Module):
    """Both towers of a CLIP model, for inference; parameters have no gradient.

    Attributes:
      visual: the image tower.
      text: the text tower.
      logit_scale: the factor of similarities.
      preprocess_cfg: size, mean and standard deviation of the images, with the names of open_clip.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        cfg = weights.config["model_cfg"]
        try:
            self.visual = Vision(weights, cfg["vision_cfg"], cfg["embed_dim"], cfg.get("quick_gelu", False))
            self.text = Text(weights, cfg["text_cfg"], cfg["embed_dim"], cfg.get("quick_gelu", False))
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"config.json: model_cfg is not that of a CLIP model: {error!r:.200}") from None
        self.logit_scale = weights.tensor("logit_scale", ()).exp().item()
        self.preprocess_cfg = weights.config.get("preprocess_cfg", {})
        self.requires_grad_(False).eval()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed normalised pixels (N, 3, H, W) as (N, embed_dim), of length 1."""
        return functional.normalize(self.visual(pixels), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed token ids (N, T), T at most the context length, as (N, embed_dim), of length 1."""
        return functional.normalize(self.text(tokens), dim=-1)

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images and texts."""
        return self.encode_image(pixels), self.encode_text(tokens)


class Vision(nn.Module):
    """The image tower: pixels (N, 3, H, W) to embeddings that are not normalised."""

    def __init__(self, weights: Weights, cfg: dict[str, Any], embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width, patch, size = cfg["width"], cfg["patch_size"], cfg["image_size"]
        height, breadth = (size, size) if isinstance(size, int) else size
        tokens = 1 + (height // patch) * (breadth // patch)
        self.size, self.patch = (height, breadth), patch
        self.pool_type = cfg.get("pool_type", "tok")
        self.norm_first = self.pool_type == "avg" and not cfg.get("final_ln_after_pool", False)
        self.conv1 = _parameter(weights, "visual.conv1.weight", (width, 3, patch, patch))
        self.class_embedding = _parameter(weights, "visual.class_embedding", (width,))
        self.positional_embedding = _parameter(weights, "visual.positional_embedding", (tokens, width))
        self.ln_pre = nn.Identity() if cfg.get("no_ln_pre") else _norm(weights, "visual.ln_pre", width)
        heads = width // cfg["head_width"]
        self.blocks = _blocks(weights, "visual.transformer.resblocks", cfg, heads, False, quick_gelu)
        self.ln_post = _norm(weights, "visual.ln_post", width)
        self.proj = _parameter(weights, "visual.proj", (width, embed_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        if tuple(pixels.shape[1:]) != (3, *self.size):
            raise ValueError(
                f"pixels are {tuple(pixels.shape)}: the model takes (N, 3, {self.size[0]}, {self.size[1]})"
            )
        x = functional.conv2d(pixels, self.conv1, stride=self.patch).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.blocks(self.ln_pre(x))
        x = self.ln_post(x) if self.norm_first else x
        x = x[:, 1:].mean(1) if self.pool_type == "avg" else x[:, 0]
        return (x if self.norm_first else self.ln_post(x)) @ self.proj


class Text(nn.Module):
    """The text tower: token ids (N, T) to embeddings that are not normalised."""

    def __init__(self, weights: Weights, cfg: dict[str, Any], embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width, self.context_length = cfg["width"], cfg["context_length"]
        self.pool_type = cfg.get("pool_type", "argmax")
        self.token_embedding = weights.embedding("token_embedding.weight", (cfg["vocab_size"], width))
        self.positional_embedding = _parameter(weights, "positional_embedding", (self.context_length, width))
        causal = not cfg.get("no_causal_mask", False)
        self.blocks = _blocks(weights, "transformer.resblocks", cfg, cfg["heads"], causal, quick_gelu)
        self.ln_final = _norm(weights, "ln_final", width)
        self.projection = _parameter(weights, "text_projection", (width, embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[-1]
        if tokens.ndim != 2 or not 0 < length <= self.context_length:
            raise ValueError(f"tokens are {tuple(tokens.shape)}: the model takes (N, T), T ≤ {self.context_length}")
        x = self.blocks(self.token_embedding(tokens) + self.positional_embedding[:length])
        # The token that ends a text has the largest id.
        end = tokens.argmax(-1) if self.pool_type == "argmax" else torch.full_like(tokens[:, 0], length - 1)
        return self.ln_final(x[torch.arange(len(x), device=x.device), end]) @ self.projection


class Block(nn.Module):
    """A pre-norm block: x + attention(ln_1(x)), then x + mlp(ln_2(x)), each times LayerScale if the model has it."""

    def __init__(
        self, weights: Weights, name: str, cfg: dict[str, Any], heads: int, causal: bool, quick_gelu: bool
    ) -> None:
        super().__init__()
        width, hidden = cfg["width"], int(cfg["width"] * cfg.get("mlp_ratio", 4.0))
        self.causal, self.quick_gelu = causal, quick_gelu
        self.ln_1, self.ln_2 = (_norm(weights, f"{name}.{norm}", width) for norm in ("ln_1", "ln_2"))
        in_proj = weights.linear(f"{name}.attn.in_proj_weight", f"{name}.attn.in_proj_bias", (3 * width, width))
        self.attn = PackedAttention(in_proj, _linear(weights, f"{name}.attn.out_proj", (width, width)), heads)
        self.c_fc = _linear(weights, f"{name}.mlp.c_fc", (hidden, width))
        self.c_proj = _linear(weights, f"{name}.mlp.c_proj", (width, hidden))
        scaled = cfg.get("ls_init_value") is not None
        for each in ("ls_1", "ls_2"):
            setattr(self, each, _parameter(weights, f"{name}.{each}.gamma", (width,)) if scaled else None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.attn(y, y, y, is_causal=self.causal)
        x = x + (y if self.ls_1 is None else y * self.ls_1)
        y = self.c_fc(self.ln_2(x))
        y = self.c_proj(y * torch.sigmoid(1.702 * y) if self.quick_gelu else functional.gelu(y))
        return x + (y if self.ls_2 is None else y * self.ls_2)


def _blocks(
    weights: Weights, name: str, cfg: dict[str, Any], heads: int, causal: bool, quick_gelu: bool
) -> nn.Sequential:
    if cfg["width"] % heads:
        raise ValueError(f"config.json: width {cfg['width']} is not divisible by {heads} heads")
    blocks = (Block(weights, f"{name}.{i}", cfg, heads, causal, quick_gelu) for i in range(cfg["layers"]))
    return nn.Sequential(*blocks)


def _linear(weights: Weights, name: str, shape: tuple[int, int]) -> nn.Module:
    return weights.linear(f"{name}.weight", f"{name}.bias", shape)


def _norm(weights: Weights, name: str, width: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, device="meta")
    norm.weight, norm.bias = (_parameter(weights, f"{name}.{part}", (width,)) for part in ("weight", "bias"))
    return norm


def _parameter(weights: Weights, name: str, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(weights.tensor(name, shape), requires_grad=False)
