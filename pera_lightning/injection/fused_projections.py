"""What is known about other people's modules: row layouts of fused projections, and linears that are never called.

A layer whose `forward` is not called adapts nothing. Some modules read the weight of their linear instead; those are
told how to call it (`call_the_layer`) where they have a switch for it, and refused where they have none. Everything
here goes by class and module name, so that none of those libraries need be installed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

# timm modules whose `qkv` holds q, k and v in equal thirds. Others interleave heads (LeViT, TinyViT, MaxViT …).
_TIMM_THIRDS = {
    f"timm.{name}"
    for name in [
        "layers.attention",
        "layers.diff_attention",
        "layers.attention_pool2d",
        "models.vision_transformer",
        "models.beit",
        "models.coat",
        "models.convit",
        "models.davit",
        "models.edgenext",
        "models.eva",
        "models.hiera",
        "models.hieradet_sam2",
        "models.metaformer",
        "models.mvitv2",
        "models.nest",
        "models.swin_transformer",
        "models.swin_transformer_v2",
        "models.swin_transformer_v2_cr",
        "models.twins",
        "models.vision_transformer_relpos",
        "models.vision_transformer_sam",
        "models.volo",
        "models.xcit",
    ]
}
_INTERLEAVED = {"GPTNeoXAttention", "GPTNeoXSdpaAttention", "BloomAttention", "FalconAttention", "PersimmonAttention"}


def _thirds(owner: nn.Module, rows: int) -> dict[str, int] | None:
    return {"q": rows // 3, "k": rows // 3, "v": rows // 3} if rows % 3 == 0 else None


def _gpt2(owner: nn.Module, rows: int) -> dict[str, int] | None:
    # The cross-attention's c_attn holds keys and values only.
    if getattr(owner, "is_cross_attention", False):
        return {"k": rows // 2, "v": rows // 2}
    return _thirds(owner, rows)


def _grouped(owner: nn.Module, rows: int) -> dict[str, int] | None:
    """q, then k and v with fewer heads, by the owner's config."""
    config = getattr(owner, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if not heads or rows % (heads + 2 * groups):
        return None
    size = rows // (heads + 2 * groups)
    return {"q": heads * size, "k": groups * size, "v": groups * size}


def _gate_up(owner: nn.Module, rows: int) -> dict[str, int] | None:
    return {"gate": rows // 2, "up": rows // 2} if rows % 2 == 0 else None


_LAYOUTS: dict[tuple[str, str], Callable[[nn.Module, int], dict[str, int] | None]] = {
    ("GPT2Attention", "c_attn"): _gpt2,
    ("DecisionTransformerGPT2Attention", "c_attn"): _gpt2,
    ("Phi3Attention", "qkv_proj"): _grouped,
    ("Phi3MLP", "gate_up_proj"): _gate_up,
    ("GlmMLP", "gate_up_proj"): _gate_up,
}


def known_layout(owner: nn.Module, name: str, module: nn.Module, rows: int) -> dict[str, int] | None:
    """Rows of each block of a fused projection, in order, or None where the layout is not known.

    Args:
        owner: the module that holds the projection.
        name: the projection's attribute name there.
        module: the projection.
        rows: its output features.
    """
    for cls in type(owner).__mro__:
        if cls.__module__ in _TIMM_THIRDS and name == "qkv":
            return _thirds(owner, rows)
        if (cls.__name__, name) in _LAYOUTS and cls.__module__.startswith("transformers."):
            return _LAYOUTS[cls.__name__, name](owner, rows)
    return None


def interleaved_reason(owner: nn.Module, name: str) -> str:
    """Why the rows of a fused projection cannot be named although its class is known, or the empty string."""
    if type(owner).__name__ in _INTERLEAVED and name == "query_key_value":
        return f"{type(owner).__name__} interleaves the rows of its heads, so q, k and v are no blocks; adapt all rows"
    return ""


def unsupported_reason(owner: nn.Module, name: str, module: nn.Module) -> str:
    """Why a linear layer that exists is never called and cannot be made to, or the empty string."""
    if isinstance(owner, nn.MultiheadAttention):
        return (
            "nn.MultiheadAttention reads this layer's weight and never calls it, so an adapter would change nothing; "
            "use an attention with separate linear layers"
        )
    return ""


def call_the_layer(model: nn.Module, owner: nn.Module, name: str) -> str:
    """Switches off the path on which `owner` reads the weight of its linear `name` instead of calling it.

    Args:
        model: the whole model, whose other modules may share that path.
        owner: the module that holds the linear layer.
        name: the layer's attribute name there.

    Returns:
        A note for the report, or the empty string where nothing had to be done.
    """
    if isinstance(owner, nn.TransformerEncoderLayer):
        owner.activation_relu_or_gelu = 0
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder) and any(layer is owner for layer in module.layers):
                module.use_nested_tensor = False
        return "torch's fast path of TransformerEncoderLayer passes by its linear layers: switched off"
    # timm's BEiT, EVA and SwinV2 keep the bias apart and pass qkv's weight to F.linear unless this flag is set.
    separate = getattr(owner, "qkv_bias_separate", None)
    if name == "qkv" and separate is False and getattr(owner, "q_bias", None) is not None:
        owner.qkv_bias_separate = True
        return f"{type(owner).__name__} passes by its qkv layer: qkv_bias_separate=True set, which calls it"
    return ""
