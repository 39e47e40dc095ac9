"""What a model must be like for the devices along the mesh axis `tensor` to share its products."""

from __future__ import annotations

from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules, find_quantizer


def check_tensor(config: CLIPConfig, rules: TernaryRules, tensor: int) -> None:
    """Checks that `tensor` devices share whole heads, and inputs in whole groups of weights that share a scale.

    Raises:
      ValueError: where they do not, naming the tower or the parameter, and both numbers.
    """
    if tensor == 1:
        return
    for tower, shape in (("image", config.vision), ("text", config.text)):
        hidden = int(shape.width * shape.mlp_ratio)
        for what, count in ((f"{shape.heads} heads", shape.heads), (f"{hidden} hidden units", hidden)):
            if count % tensor:
                raise ValueError(f"mesh tensor={tensor} does not divide the {what} of the {tower} tower")
        for name, inputs in (("attention/out", shape.width), ("mlp/fc2", hidden)):
            path = f"{tower}/blocks/{name}/kernel"
            quantizer = find_quantizer(path, rules)
            if quantizer is None:
                continue
            group = inputs if isinstance(quantizer.group, str) else min(quantizer.group, inputs)
            if inputs // tensor % group:
                raise ValueError(
                    f"{path}: {inputs} inputs over mesh tensor={tensor} are {inputs // tensor} on a device, "
                    f"not a multiple of its quantizer's group {group}"
                )
