"""Export to diffusers: a LoRA file for `load_lora_weights`; merged weights are in `diffusers_pipeline.py`.

A LoRA file of diffusers holds A and B of linear layers of the UNet and the text encoders, and nothing else. What is a
LoRA exactly and what is cut by SVD is as for PEFT, see `low_rank.py`.

Shapes: in, out features of a layer; R rank of its update.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from torch import Tensor, nn

from pera_lightning.adapters.base import LowRankUpdate
from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.export.folder import output_folder
from pera_lightning.export.lora import LoraReport, check_export, exportable, linear_updates
from pera_lightning.export.low_rank import MAX_ERROR, padded
from pera_lightning.merging.merge import MergeOptions, adapted_layers
from pera_lightning.validation import renamed

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_ROOM = 1 << 20  # bytes of names
# Of a text encoder diffusers reads these only. transformers 5 has dropped "text_model." in one class of two.
_TEXT_LAYER = re.compile(r"(?:text_model\.)?(encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12]))")


@renamed("method", "mode")
def export_diffusers(
    model: nn.Module,
    folder: str | Path,
    *,
    rank: int | None = None,
    max_error: float = MAX_ERROR,
    overwrite: bool = False,
    **options: Unpack[MergeOptions],
) -> LoraReport:
    """Writes the adapters of an SDXL network as a LoRA file of diffusers; the network stays as it is.

    Args:
        model: injected network with a child `unet` and, where they are adapted, `text_encoder` and `text_encoder_2`;
            or a module that contains it. Not merged.
        folder: made, in full or not at all, with ``pytorch_lora_weights.safetensors``.
        rank: cuts larger updates, and those of no low rank, to this rank by SVD.
        max_error: largest relative error that is taken of a layer then.
        overwrite: replaces an earlier export.
        options: `mode`, `batches`, `measure_on` and `forward`, for AuroRA, as in `pera_lightning.merge`.

    Returns:
        What was written, to print.

    Raises:
        NotMergeableError: where an update is not a LoRA, or its error is too large.
        ConfigurationError: for another network, or where a LoRA file would not hold all that was trained, or `folder`
            exists.
        CheckpointError: where the disk has no room.
    """
    # What can be refused is refused before a calibration.
    check_export(folder, rank=rank, max_error=max_error, overwrite=overwrite)
    root, _ = exportable(model, "a LoRA file of diffusers", heads=False)
    check_sdxl(root)
    names = {path: _name(path) for path, _ in adapted_layers(root)}
    try:
        from diffusers import StableDiffusionXLPipeline  # need not be installed
    except ImportError:
        message = "the export to diffusers needs diffusers: pip install 'pera-lightning[diffusion]'"
        raise ConfigurationError(message) from None
    linear, report = linear_updates(model, folder, rank, max_error, **options)
    # One rank and no scale within a component, by diffusers' names.
    updates = as_diffusers(linear)
    tensors = _tensors(updates, names)
    report.ranks = {path: update.rank for path, update in updates.items()}
    report.size = sum(tensor.nbytes for layers in tensors.values() for tensor in layers.values())
    grown = [path for path, update in linear.items() if update.rank < report.ranks[path]]
    report.notes += _notes(root, updates, grown)
    with output_folder(folder, overwrite=overwrite, needed=report.size + _ROOM) as made:
        own = {f"{component}_lora_layers": layers for component, layers in tensors.items()}
        StableDiffusionXLPipeline.save_lora_weights(made, **own)
    return report


def as_diffusers(updates: Mapping[str, LowRankUpdate]) -> dict[str, LowRankUpdate]:
    """The same updates with scale 1 everywhere and, within each component, one rank; by the path of the layer.

    Diffusers 0.32 reads no alpha from such a file: the rank of a component's first layer becomes the alpha of all.
    Newer versions read it from metadata that others, such as ComfyUI, do not know. With the scale in B and one rank in
    a component, alpha = rank is right for every reader, and nothing has to be carried.
    """
    plain = {path: replace(each, B=each.B * each.scale, scale=1.0) for path, each in updates.items()}
    even: dict[str, LowRankUpdate] = {}
    for component in dict.fromkeys(map(_component, plain)):  # each is read by itself
        even |= padded({path: each for path, each in plain.items() if _component(path) == component})
    return even


def _tensors(updates: Mapping[str, LowRankUpdate], names: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """Each component's tensors by diffusers' names: A (R, in), B (out, R); constants (out,) where one has any."""
    constant = {_component(path) for path, update in updates.items() if update.bias is not None}
    tensors: dict[str, dict[str, Tensor]] = {}
    for path, update in updates.items():
        component = _component(path)
        # The forms that every reader takes: of a UNet peft's, of text encoders the one that diffusers turns into it.
        is_unet = component == "unet"
        down, up = ("lora_A", "lora_B") if is_unet else ("lora_linear_layer.down", "lora_linear_layer.up")
        name, own = names[path], tensors.setdefault(component, {})
        own[f"{name}.{down}.weight"], own[f"{name}.{up}.weight"] = update.A, update.B
        if component in constant:
            own[f"{name}.{up}.bias"] = update.B.new_zeros(len(update.B)) if update.bias is None else update.bias
    # safetensors refuses shared memory.
    return {c: {k: v.detach().clone().contiguous() for k, v in own.items()} for c, own in tensors.items()}


def _component(path: str) -> str:
    return path.partition(".")[0]


def _name(path: str) -> str:
    """What diffusers calls a layer within its component; raises `ConfigurationError` where a file cannot hold it."""
    component, _, inside = path.partition(".")
    if component == "unet":  # any linear layer
        return inside
    layer = _TEXT_LAYER.fullmatch(inside)
    if layer is None:
        held = "layers of the UNet, and attention (q_proj …) and MLP (fc1, fc2) of the text encoders"
        raise ConfigurationError(f"{path} is adapted, and a LoRA file of diffusers holds {held}: export merged weights")
    return f"text_model.{layer[1]}"


def check_sdxl(network: nn.Module) -> None:
    """Raises `ConfigurationError` for a network without a UNet of SDXL, or with more than a pipeline takes."""
    children = dict(network.named_children())
    if "unet" not in children or set(children) - set(COMPONENTS):
        raise ConfigurationError(
            f"{type(network).__name__} has the components {listed(children, 4) or 'none'}, and an SDXL network has "
            f"{', '.join(COMPONENTS)}, the text encoders only where they are adapted: see SDXLNetwork"
        )
    # SDXL alone has text and time embeddings of this kind.
    kind = getattr(getattr(children["unet"], "config", None), "addition_embed_type", None)
    if kind != "text_time":
        given = f"the unet is a {type(children['unet']).__name__} with addition_embed_type={kind!r}"
        raise ConfigurationError(f"{given}, and SDXL's has 'text_time': export other networks as peft or merged")


def _notes(root: nn.Module, updates: Mapping[str, LowRankUpdate], grown: Sequence[str]) -> list[str]:
    """What a reader of the file may stumble on, such as the layers whose rank was `grown` to their component's."""
    notes = []
    if grown:
        notes.append(f"{len(grown)} layers have a smaller rank and are filled up with zeros: readers take one rank")
    constant = {_component(path) for path, update in updates.items() if update.bias is not None}
    if constant:
        notes.append("the constants of the calibration are lora_B.bias, which ComfyUI and others leave out")
    bare = [path for path, layer in adapted_layers(root) if _component(path) in constant and layer.bias is None]
    if bare:
        notes.append(
            f"{len(bare)} adapted layers have no bias ({listed(bare, 2)}): diffusers makes images with this file, but "
            "fuse_lora refuses it; export merged weights for that"
        )
    return notes
