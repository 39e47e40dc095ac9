"""Ternary CLIP in PyTorch whose weights stay packed at two bits, for inference; it needs torch and safetensors alone.

`load` gives the exported model, and `replace_linears` puts its weights into a model of open_clip or transformers.
"""

from tclip_torch.clip import CLIP, load
from tclip_torch.linear import PackedEmbedding, PackedLinear, default_activations
from tclip_torch.replace import replace_linears

__all__ = ["CLIP", "PackedEmbedding", "PackedLinear", "default_activations", "load", "replace_linears"]
