"""Put packed weights into a model of open_clip or transformers, in the place of its float ones."""

import math
import pathlib
from typing import Any, NamedTuple

import torch
from torch import nn

from tclip_torch.linear import PackedAttention
from tclip_torch.weights import Weights


class Source(NamedTuple):
    """Where a tensor of a model is in the folder.

    Attributes:
      name: open_clip's name of the tensor that contains it.
      third: which third of the rows it is; None for all.
      transposed: whether the model stores the transpose.
    """

    name: str
    third: int | None = None
    transposed: bool = False


def replace_linears(model: nn.Module, folder: str | pathlib.Path, activations: str | None = None) -> nn.Module:
    """Replace the weights of a CLIP model by those of an exported folder, ternary ones packed.

    Linear layers, attention and the token embedding become layers of this package; the other parameters get the values
    of the folder, in their dtype and on their device. Float weights that were replaced are freed, and no parameter has
    a gradient any more. A model that does not fit is refused before it is changed.

    Args:
      model: an `open_clip.CLIP`, as of `open_clip.create_model`, or a transformers `CLIPModel`, in float32 or bfloat16.
      folder: as in `tclip_torch.load`.
      activations: as in `tclip_torch.load`.

    Returns:
      The same model, in evaluation mode.

    Raises:
      TypeError: the model is of another class or dtype, or has no weights yet (the meta device).
      ValueError: as of `tclip_torch.load`; or the model has other shapes, names or options than the exported one.
    """
    weights = Weights(folder, activations)
    state = model.state_dict()
    sources = _sources(model, weights)
    _check(state, sources, weights)
    layers, replaced = _packed_layers(model, sources, weights)
    values = {key: _value(state[key], source, weights) for key, source in sources.items() if key not in replaced}
    for key, value in values.items():
        path, _, name = key.rpartition(".")
        setattr(model.get_submodule(path), name, nn.Parameter(value, requires_grad=False))
    for path, layer in layers.items():
        like = state[next(key for key in sources if key.startswith(f"{path}."))]
        model.set_submodule(path, layer.to(like.device, like.dtype))
    return model.requires_grad_(False).eval()


def _sources(model: nn.Module, weights: Weights) -> dict[str, Source]:
    """Return the source of each tensor of the model, whose options must be those of the export."""
    cfg: dict[str, Any] = weights.config["model_cfg"]
    kind: Any = model  # attributes of the libraries' classes
    try:
        vision, text = cfg["vision_cfg"], cfg["text_cfg"]
        heads = vision["width"] // vision["head_width"], text["heads"]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"config.json: model_cfg is not that of a CLIP model: {error!r:.200}") from None
    if hasattr(model, "visual") and hasattr(model, "transformer"):
        towers = kind.visual.transformer.resblocks, kind.transformer.resblocks
        pool = vision.get("pool_type", "tok")
        options = [
            ("heads", tuple(blocks[0].attn.num_heads for blocks in towers), heads),
            ("quick_gelu", type(towers[0][0].mlp.gelu).__name__ == "QuickGELU", cfg.get("quick_gelu", False)),
            ("vision pool_type", kind.visual.pool_type, pool),
            ("text pool_type", kind.text_pool_type, text.get("pool_type", "argmax")),
            ("no_causal_mask", kind.attn_mask is None, text.get("no_causal_mask", False)),
        ]
        if pool == "avg":
            after = vision.get("final_ln_after_pool", False)
            options.append(("final_ln_after_pool", kind.visual.final_ln_after_pool, after))
        sources = {name: Source(name) for name in weights.names}
    elif hasattr(model, "vision_model") and hasattr(model, "text_model"):
        if not weights.config.get("transformers"):
            raise ValueError("transformers' CLIPModel cannot express the exported model: use open_clip, or load")
        configs = kind.config.vision_config, kind.config.text_config
        eos = kind.config.text_config.eos_token_id  # 2 selects the largest id
        act = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
        options = [
            ("num_attention_heads", tuple(each.num_attention_heads for each in configs), heads),
            ("hidden_act", tuple(each.hidden_act for each in configs), (act, act)),
            ("layer_norm_eps", tuple(each.layer_norm_eps for each in configs), (1e-5, 1e-5)),
            ("eos_token_id", eos, 2 if eos == 2 else text["vocab_size"] - 1),
        ]
        try:
            sources = {key: Source(*source) for key, source in weights.config["transformers"].items()}
        except (TypeError, AttributeError) as error:
            raise ValueError(f"config.json: transformers does not name the tensors of CLIPModel: {error}") from None
    else:
        raise TypeError(f"{type(model).__name__} is not open_clip's CLIP or transformers' CLIPModel")
    for option, actual, expected in options:
        if actual != expected:
            raise ValueError(f"the model has {option} {actual}: the exported one has {expected}")
    return sources


def _check(state: dict[str, torch.Tensor], sources: dict[str, Source], weights: Weights) -> None:
    for names, what in ((sources.keys() - state.keys(), "lacks"), (state.keys() - sources.keys(), "has, in excess,")):
        if names:
            raise ValueError(f"the model {what} {min(names)}: it is not of the exported shape ({len(names)} names)")
    for key, source in sources.items():
        shape, tensor = weights.shape(source.name), state[key]
        if source.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        # The logit scale may be an array of one number.
        fits = tensor.numel() == math.prod(shape) == 1 or tuple(tensor.shape) == (
            shape[::-1] if source.transposed else shape
        )
        if not fits:
            raise ValueError(f"{key} of the model has shape {tuple(tensor.shape)}: the exported one has {shape}")
        if tensor.is_meta or tensor.dtype not in (torch.float32, torch.bfloat16):
            where = "on the meta device, without values" if tensor.is_meta else str(tensor.dtype)
            raise TypeError(f"{key} of the model is {where}: packed layers need torch.float32 or torch.bfloat16")


def _value(like: torch.Tensor, source: Source, weights: Weights) -> torch.Tensor:
    """Return the values of a float parameter, in the dtype and on the device of the model's."""
    value = weights.tensor(source.name)
    value = value if source.third is None else value.chunk(3)[source.third]
    value = value.T if source.transposed else value
    return value.reshape(like.shape).to(like.device, like.dtype).contiguous()


def _packed_layers(
    model: nn.Module, sources: dict[str, Source], weights: Weights
) -> tuple[dict[str, nn.Module], set[str]]:
    """Return the new layers by the path of the module that they replace, and the tensors that they hold."""
    layers: dict[str, nn.Module] = {}
    replaced: set[str] = set()
    for path, module in model.named_modules():
        keys = {key for key in sources if key.startswith(f"{path}.")} if path else set()
        names = {sources[key].name for key in keys}
        if replaced.issuperset(keys) or not names & weights.packed.keys():
            continue
        if isinstance(module, nn.MultiheadAttention):
            in_proj = weights.linear(f"{path}.in_proj_weight", f"{path}.in_proj_bias")
            out_proj = weights.linear(f"{path}.out_proj.weight", f"{path}.out_proj.bias")
            layers[path] = PackedAttention(in_proj, out_proj, module.num_heads, module.batch_first)
        elif isinstance(module, nn.Linear):
            weight, bias = sources[f"{path}.weight"], sources[f"{path}.bias"]
            layers[path] = weights.linear(weight.name, bias.name, third=weight.third)
        elif isinstance(module, nn.Embedding):
            layers[path] = weights.embedding(sources[f"{path}.weight"].name)
        else:
            continue
        replaced |= keys
    if left := sorted(
        name for name in {s.name for k, s in sources.items() if k not in replaced} & weights.packed.keys()
    ):
        raise ValueError(f"{left[0]} is packed, and the model has no linear layer, attention or embedding for it")
    return layers, replaced
