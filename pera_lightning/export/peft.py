"""Export to PEFT: a folder with a plain LoRA that `peft.PeftModel.from_pretrained` loads, or vLLM serves.

LoRA, MoSLoRA, PERA (of rank r(r + 3)/2 for all terms) and static AuroRA are LoRAs exactly, calibrated AuroRA is one
with `lora_bias` where the base has biases; the rest is cut to a rank by SVD. Trained heads travel as `modules_to_save`.
peft's LoRA is s · (B A x + b) with s = lora_alpha / r, so the constant of a calibration is divided by s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as dump_tensors
from torch import nn
from torch.distributed.tensor import DTensor

from pera_lightning.adapters.base import AdaptedLayer, LowRankUpdate
from pera_lightning.adapters.method import check_choice, check_number, check_rank
from pera_lightning.drift import Drift, Forward, drift, measure, taken
from pera_lightning.errors import ConfigurationError, listed, megabytes
from pera_lightning.export import vllm
from pera_lightning.export.folder import check_output_folder, output_folder
from pera_lightning.export.low_rank import MAX_ERROR, low_rank_updates
from pera_lightning.export.peft_config import lora_config, lora_tensors
from pera_lightning.export.peft_names import WEIGHTS_FILE, heads, plain_modules
from pera_lightning.injection import Injection, adapter_parameter_names, injection_of
from pera_lightning.merging import adapted_layers, linearised, merged_layers
from pera_lightning.state import find_injected, frozen_names

TARGETS = ("peft", "vllm")
_CONFIG_ROOM = 1 << 20  # bytes


@dataclass
class PeftReport:
    """What an export to PEFT wrote.

    Attributes:
        folder: where.
        size: bytes of its tensors.
        ranks: path of each layer to the rank of its LoRA.
        errors: path of each layer that was cut by SVD to its relative error; empty where all are exact.
        heads: paths of the modules that travel whole.
        method: how AuroRA's nonlinear layers became linear maps; None where there were none.
        drift: how far the linear maps are from them; None where it was not measured.
        max_lora_rank: what vLLM is to be started with; None for peft.
        notes: one line for each thing that a reader should know.
    """

    folder: Path
    size: int
    ranks: dict[str, int]
    errors: dict[str, float] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    method: str | None = None
    drift: Drift | None = None
    max_lora_rank: int | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        how = "exact" if self.method is None else f"of the {self.method} linear maps"
        lines = [
            f"Wrote {self.folder} ({megabytes(self.size)}): LoRA of rank {listed(map(str, ranks))} "
            f"on {len(self.ranks)} layers" + ("" if self.errors else f", {how}")
        ]
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            lines.append(
                f"  cut by SVD: relative error {sum(self.errors.values()) / len(self.errors):.3g} on average over "
                f"{len(self.errors)} layers, at worst {self.errors[worst]:.3g} ({worst})"
            )
        if self.heads:
            lines.append(f"  with the heads {', '.join(self.heads)}")
        if self.drift is not None:
            lines.append(f"  {self.drift}")
        if self.max_lora_rank is not None:
            lines.append(f"  vLLM needs --max-lora-rank {self.max_lora_rank}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def export_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    base_name: str,
    base_revision: str | None = None,
    rank: int | None = None,
    max_error: float = MAX_ERROR,
    method: str | None = None,
    batches: Iterable[Any] | None = None,
    measure_on: Iterable[Any] | None = None,
    forward: Forward | None = None,
    target: str = "peft",
    overwrite: bool = False,
) -> PeftReport:
    """Writes the adapters of a model as a PEFT folder of plain LoRA; the model stays as it is.

    Args:
        model: injected, or a model that contains an injected one; not merged.
        folder: made, whole or not at all.
        base_name: name of the base on a hub, or its folder, for the config.
        base_revision: branch, tag or commit of the base on the hub.
        rank: cuts larger updates, and those of no low rank, to this rank by SVD.
        max_error: the largest relative error of a layer that is taken then.
        method: for AuroRA with dynamic inference: "static" or "calibrated", as in `pera_lightning.merge`.
        batches: inputs of the model, to calibrate with and, without `measure_on`, to measure the drift on.
        measure_on: other inputs to measure the drift on.
        forward: how the model is called, see `pera_lightning.drift.call` for the default.
        target: "peft", or "vllm", which refuses what vLLM does not take.
        overwrite: replaces an earlier export.

    Returns:
        What was written, to print.

    Raises:
        NotMergeableError: where an update is no LoRA, or its error is too large.
        ConfigurationError: where there is nothing that a PEFT folder can hold, it would not be all, or `folder` exists.
        CheckpointError: where the disk has no room.
    """
    check_choice(target, "target", TARGETS)
    if rank is not None:
        check_rank(rank)
    check_number(max_error, "max_error", low=-1e-300, allowed="a relative error of at least 0")
    if not str(base_name or "").strip():
        raise ConfigurationError(f"base_name={base_name!r}: the base's name on a hub, or its folder, is needed")
    check_output_folder(folder, overwrite=overwrite)
    fit, held_out = taken(batches), taken(measure_on)
    if method is None and (fit or held_out):
        raise ConfigurationError("batches act with method='static' or 'calibrated' only: leave them out")
    root, mark = _exportable(model)
    if target == "vllm":
        vllm.check_model(root, mark)
    measured = held_out or fit
    before = measure(model, measured, forward) if method and measured else None
    with linearised(model, method, fit, forward) as notes:
        after = measure(model, measured, forward) if before else None
        found = low_rank_updates(root, rank, max_error)
    errors = {path: each.error for path, each in found.items() if each.error is not None}
    updates = {path: each.update for path, each in found.items()}
    notes = [*notes, *_method_notes(method, measured=bool(measured), held_out=bool(held_out))]
    max_lora_rank = None
    if target == "vllm":
        updates, max_lora_rank, more = vllm.served_updates(updates, mark)
        notes += more
    saved = heads(mark.trained_modules, plain_modules(root))
    config = lora_config(root, mark, updates, base_name, base_revision)
    tensors = lora_tensors(root, updates, saved)
    notes += _notes(root, mark, updates, saved)
    data = dump_tensors(tensors, metadata={"format": "pt"})
    with output_folder(folder, overwrite=overwrite, needed=len(data) + _CONFIG_ROOM) as made:
        config.save_pretrained(str(made))
        (made / WEIGHTS_FILE).write_bytes(data)
    return PeftReport(
        folder=Path(folder),
        size=len(data),
        ranks={path: update.rank for path, update in updates.items()},
        errors=errors,
        heads=tuple(saved),
        method=method,
        drift=drift(before, after) if before and after else None,
        max_lora_rank=max_lora_rank,
        notes=notes,
    )


def _exportable(model: nn.Module) -> tuple[nn.Module, Injection]:
    """The injected part of a model; raises where a PEFT folder cannot hold all that was trained."""
    found = find_injected(model)
    if found is None:
        raise ConfigurationError(f"{type(model).__name__} has no adapters: call inject first")
    root = found[1]
    if len([module for module in model.modules() if injection_of(module) is not None]) > 1:
        raise ConfigurationError(f"{type(model).__name__} has several injected parts: export each of them")
    mark: Injection = injection_of(root)  # type: ignore[assignment]
    layers = dict(adapted_layers(root))
    if not layers:
        raise ConfigurationError(
            f"{type(mark.method).__name__} adapts no layers, and a PEFT folder holds LoRA layers: export merged "
            "weights, or the adapter folder of this package"
        )
    if merged_layers(root):
        raise ConfigurationError("the adapters are merged: call unmerge first")
    for path, layer in layers.items():
        if any(p.is_meta or isinstance(p, DTensor) for p in layer.adapters.parameters()):
            raise ConfigurationError(f"{path} is sharded or on the meta device: export on one process, with weights")
    paths = Counter(id(module) for module in plain_modules(root).values() if isinstance(module, AdaptedLayer))
    twice = [path for path, layer in layers.items() if paths[id(layer)] > 1]
    if twice:
        raise ConfigurationError(
            f"{listed(twice, 3)} is used in several places, of which peft would adapt one: export merged weights"
        )
    ours = adapter_parameter_names(root)
    kept = {name for name, _ in root.named_parameters(remove_duplicate=False)} - frozen_names(root) - ours
    loose = sorted(name for name in kept if not name.startswith(tuple(f"{head}." for head in mark.trained_modules)))
    if loose:
        raise ConfigurationError(
            f"{len(loose)} weights of the base were trained too, which a PEFT folder cannot hold: {listed(loose, 3)}; "
            "export merged weights"
        )
    return root, mark


def _method_notes(method: str | None, *, measured: bool, held_out: bool) -> list[str]:
    if method is not None and not measured:
        return [f"the drift of the {method} linear maps was not measured: give batches"]
    if method == "calibrated" and not held_out:
        return ["the drift was measured on the batches of the calibration: measure_on takes others"]
    return []


def _notes(root: nn.Module, mark: Injection, updates: Mapping[str, LowRankUpdate], saved: Sequence[str]) -> list[str]:
    notes = []
    layers = dict(adapted_layers(root))
    if blocks := [path for path, layer in layers.items() if "all" not in layer.blocks]:
        notes.append(
            f"{len(blocks)} fused projections are adapted in some rows only; the LoRA is zero in the others, which "
            "training it further in peft would change"
        )
    if any(update.bias is not None for update in updates.values()):
        notes.append("the constants are lora_bias, which load_peft of this package does not take back")
        bare = [path for path, layer in layers.items() if layer.bias is None]
        if bare:
            notes.append(
                f"the constants need lora_bias=True, and {len(bare)} adapted layers have no bias ({listed(bare, 2)}): "
                "peft predicts with this folder, but refuses to merge it; export merged weights for that"
            )
    if more := [path for path in saved if path not in mark.trained_modules]:
        notes.append(f"peft takes {listed(more, 3)} for a head as well, so it is in the folder, unchanged")
    dtypes = {p.dtype for path in saved for p in root.get_submodule(path).parameters()}
    base = {layer.weight.dtype for layer in layers.values()}
    if dtypes - base and torch.float32 in dtypes:
        notes.append("the heads are float32, and peft loads them in the base's dtype: load the base in float32")
    norms = [path for path, module in plain_modules(root).items() if getattr(module, "running_mean", None) is not None]
    norms = [path for path in norms if not any(f"{path}.".startswith(f"{head}.") for head in saved)]
    if norms:
        notes.append(
            f"running statistics of norms ({listed(norms, 2)}) stay behind: if they changed in training, export merged "
            "weights"
        )
    return notes
