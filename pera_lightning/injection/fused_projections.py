"""What is known about other people's modules: layouts of fused projections, and linears that are never called.

A layer whose `forward` is not called adapts nothing. Some modules read the weight of their linear instead; those are
told how to call it (`call_the_layer`) where they have a switch for it, and refused otherwise. Everything here goes by
class and module name, so that none of those libraries need be installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

# timm modules whose `qkv` holds q, k and v in equal thirds. Others interleave heads (LeViT, TinyViT, MaxViT …).
_TIMM_THIRDS = re.compile(
    r"timm\.layers\.(attention|attention_pool2d|diff_attention)"
    r"|timm\.models\.(beit|coat|convit|davit|edgenext|eva|hiera|hieradet_sam2|metaformer|mvitv2|nest"
    r"|swin_transformer(_v2|_v2_cr)?|twins|vision_transformer(_relpos|_sam)?|volo|xcit)"
)
_INTERLEAVED = {"GPTNeoXAttention", "GPTNeoXSdpaAttention", "BloomAttention", "FalconAttention", "PersimmonAttention"}
Sizes = dict[str, int]


def _equal(features: int, *names: str) -> Sizes | None:
    return None if features % len(names) else dict.fromkeys(names, features // len(names))


def _gpt2(owner: nn.Module, features: int) -> Sizes | None:
    # The cross-attention's c_attn holds keys and values only.
    return _equal(features, "k", "v") if getattr(owner, "is_cross_attention", False) else _equal(features, *"qkv")


def _grouped(owner: nn.Module, features: int) -> Sizes | None:
    """q, then k and v with fewer heads, by the owner's config."""
    config = getattr(owner, "config", None)
    heads = getattr(config, "num_attention_heads", None)  # of queries
    groups = getattr(config, "num_key_value_heads", None) or heads  # of keys and values
    if not heads or features % (heads + 2 * groups):
        return None
    size = features // (heads + 2 * groups)  # of one head
    return {"q": heads * size, "k": groups * size, "v": groups * size}


# By the class of transformers that owns the projection, and the projection's name there.
_LAYOUTS: dict[tuple[str, str], Callable[[nn.Module, int], Sizes | None]] = {
    ("GPT2Attention", "c_attn"): _gpt2,
    ("DecisionTransformerGPT2Attention", "c_attn"): _gpt2,
    ("Phi3Attention", "qkv_proj"): _grouped,
    ("Phi3MLP", "gate_up_proj"): lambda owner, features: _equal(features, "gate", "up"),
    ("GlmMLP", "gate_up_proj"): lambda owner, features: _equal(features, "gate", "up"),
}


def known_sizes(owner: nn.Module, name: str, features: int) -> Sizes | None:
    """Size of each slice of a fused projection, in order, or None where the layout is not known.

    Args:
        owner: the module that holds the projection; a subclass has the layout of its base.
        name: the projection's attribute name there.
        features: number of the projection's output features.
    """
    # transformers and timm need not be installed: their classes are told by name.
    for cls in type(owner).__mro__:
        if name == "qkv" and _TIMM_THIRDS.fullmatch(cls.__module__):
            return _equal(features, *"qkv")
        if (cls.__name__, name) in _LAYOUTS and cls.__module__.startswith("transformers."):
            return _LAYOUTS[cls.__name__, name](owner, features)
    return None


def interleaves_heads(owner: nn.Module, name: str) -> bool:
    """Whether q, k and v alternate head by head in the projection `name` of `owner`, so that none is a slice."""
    return type(owner).__name__ in _INTERLEAVED and name == "query_key_value"


def call_the_layer(model: nn.Module, owner: nn.Module, name: str) -> str:
    """Switches off the path on which `owner` reads the weight of its linear `name` instead of calling it.

    Args:
        model: the entire model, whose other modules may share that path.
        owner: the module that holds the linear layer.
        name: the layer's attribute name there.

    Returns:
        A note for the report, or the empty string where nothing had to be done.
    """
    # torch's encoder layer computes with the weights of its linears where it can.
    if isinstance(owner, nn.TransformerEncoderLayer):
        owner.activation_relu_or_gelu = 0  # "another activation", for which torch has no fast path
        for module in model.modules():
            # The encoder has a fast path of its own, taken with a padding mask.
            if isinstance(module, nn.TransformerEncoder) and any(layer is owner for layer in module.layers):
                module.use_nested_tensor = False
        return "torch's fast path of TransformerEncoderLayer passes by its linear layers: switched off"
    # timm's BEiT, EVA and SwinV2 keep the bias apart and pass qkv's weight to F.linear unless this flag is set.
    separate = getattr(owner, "qkv_bias_separate", None)
    if name == "qkv" and separate is False and getattr(owner, "q_bias", None) is not None:
        owner.qkv_bias_separate = True
        return f"{type(owner).__name__} passes by its qkv layer: qkv_bias_separate=True set, which calls it"
    return ""
