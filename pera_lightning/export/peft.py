"""Export to PEFT: a folder with a plain LoRA that `peft.PeftModel.from_pretrained` loads, or vLLM serves.

LoRA, MoSLoRA, PERA (of rank r(r + 3)/2 for all terms) and static AuroRA are LoRAs exactly, calibrated AuroRA is one
with `lora_bias` where the base has biases; the rest is cut to a rank by SVD. Trained heads travel as `modules_to_save`.
peft's LoRA is s · (B A x + b) with s = lora_alpha / r, so the constant of a calibration is divided by s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

import torch
from safetensors.torch import save as dump_tensors
from torch import nn

from pera_lightning.adapters.base import ALL, LowRankUpdate
from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.export import vllm
from pera_lightning.export.folder import output_folder
from pera_lightning.export.lora import LoraReport, check_export, exportable, linear_updates
from pera_lightning.export.low_rank import MAX_ERROR
from pera_lightning.export.peft_config import lora_config, lora_tensors
from pera_lightning.export.peft_names import WEIGHTS_FILE, heads, plain_modules
from pera_lightning.injection.inject import Injection
from pera_lightning.merging.merge import MergeOptions, adapted_layers
from pera_lightning.validation import check_choice, renamed

TARGETS = ("peft", "vllm")
_CONFIG_ROOM = 1 << 20  # bytes


@renamed("method", "mode")
def export_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    base_name: str,
    base_revision: str | None = None,
    rank: int | None = None,
    max_error: float = MAX_ERROR,
    target: str = "peft",
    overwrite: bool = False,
    **options: Unpack[MergeOptions],
) -> LoraReport:
    """Writes the adapters of a model as a PEFT folder of plain LoRA; the model stays as it is.

    Args:
        model: injected, or a model that contains an injected one; not merged.
        folder: made, in full or not at all.
        base_name: name of the base on a hub, or its folder; goes into the config.
        base_revision: branch, tag or commit of the base on the hub.
        rank: cuts larger updates, and those of no low rank, to this rank by SVD.
        max_error: largest relative error that is taken of a layer then.
        target: "peft", or "vllm", which refuses what vLLM does not take.
        overwrite: replaces an earlier export.
        options: `mode`, `batches`, `measure_on` and `forward`, for AuroRA, as in `pera_lightning.merge`.

    Returns:
        What was written, to print.

    Raises:
        NotMergeableError: where an update is not a LoRA, or its error is too large.
        ConfigurationError: where a PEFT folder would hold nothing, or not all that was trained, or `folder` exists.
        CheckpointError: where the disk has no room.
    """
    # What can be refused is refused first: a calibration takes minutes.
    check_choice(target, "target", TARGETS)
    if not str(base_name or "").strip():
        raise ConfigurationError(f"base_name={base_name!r}: the base's name on a hub, or its folder, is needed")
    check_export(folder, rank=rank, max_error=max_error, overwrite=overwrite)
    root, mark = exportable(model, "a PEFT folder", heads=True)
    if target == "vllm":
        vllm.check_model(root, mark)
    # The updates as LoRAs, by layer.
    updates, report = linear_updates(model, folder, rank, max_error, **options)
    if target == "vllm":
        updates, report.max_lora_rank, notes = vllm.served_updates(updates, mark)
        report.notes += notes
    # Config and tensors by peft's names, with the heads.
    saved = heads(mark.trained_modules, plain_modules(root))
    config = lora_config(root, mark, updates, base_name, base_revision)
    # In memory, since the disk's room is checked against the size.
    data = dump_tensors(lora_tensors(root, updates, saved), metadata={"format": "pt"})
    report.size, report.heads = len(data), tuple(saved)
    report.ranks = {path: update.rank for path, update in updates.items()}
    report.notes += _notes(root, mark, updates, saved)
    with output_folder(folder, overwrite=overwrite, needed=len(data) + _CONFIG_ROOM) as made:
        config.save_pretrained(str(made))
        (made / WEIGHTS_FILE).write_bytes(data)
    return report


def _notes(root: nn.Module, mark: Injection, updates: Mapping[str, LowRankUpdate], saved: Sequence[str]) -> list[str]:
    """What peft makes of the folder that a reader may not expect."""
    notes, layers = [], dict(adapted_layers(root))
    if fused := [path for path, layer in layers.items() if ALL not in layer.slices]:
        notes.append(
            f"{len(fused)} fused projections are adapted in some slices only; the LoRA is zero in the others, which "
            "training it further in peft would change"
        )
    if any(update.bias is not None for update in updates.values()):
        notes.append("the constants are lora_bias, which load_peft of this package does not take back")
        if bare := [path for path, layer in layers.items() if layer.bias is None]:
            notes.append(
                f"the constants need lora_bias=True, and {len(bare)} adapted layers have no bias ({listed(bare, 2)}): "
                "peft predicts with this folder, but refuses to merge it; export merged weights for that"
            )
    if more := [path for path in saved if path not in mark.trained_modules]:
        notes.append(f"peft takes {listed(more, 3)} for a head as well, so it is in the folder, unchanged")
    # Heads are trained in float32 over a base of any dtype.
    dtypes = {p.dtype for path in saved for p in root.get_submodule(path).parameters()}
    if torch.float32 in dtypes and torch.float32 not in {layer.weight.dtype for layer in layers.values()}:
        notes.append("the heads are float32, and peft loads them in the base's dtype: load the base in float32")
    # Statistics of norms are in no PEFT folder, but for those within a head.
    norms = [path for path, module in plain_modules(root).items() if getattr(module, "running_mean", None) is not None]
    norms = [path for path in norms if not f"{path}.".startswith(tuple(f"{head}." for head in saved))]
    if norms:
        what = f"running statistics of norms ({listed(norms, 2)})"
        notes.append(f"{what} stay behind: if they changed in training, export merged weights")
    return notes
