"""What the exports as LoRA share, to PEFT and to diffusers: what can be exported, its updates, and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from pera_lightning.adapters.base import LowRankUpdate
from pera_lightning.errors import ConfigurationError, listed, megabytes
from pera_lightning.export.folder import check_output_folder
from pera_lightning.export.low_rank import low_rank_updates
from pera_lightning.injection.inject import Injection, adapter_parameter_names, injection_of
from pera_lightning.injection.state import find_injected, frozen_names
from pera_lightning.merging.linearised import linearised
from pera_lightning.merging.merge import adapted_layers, merged_layers
from pera_lightning.merging.merge_error import Forward, MergeError, batch_list, measure, measuring_notes, merge_error
from pera_lightning.validation import check_in_range, check_positive_int


@dataclass
class LoraReport:
    """What an export as LoRA wrote."""

    folder: Path
    size: int = 0  # bytes of its tensors
    ranks: dict[str, int] = field(default_factory=dict)  # path of each layer to the rank of its LoRA
    errors: dict[str, float] = field(default_factory=dict)  # relative error of each layer that was cut by SVD
    heads: tuple[str, ...] = ()  # paths of the modules trained in full that go with it
    mode: str | None = None  # how AuroRA's nonlinear layers became linear; None without such layers
    merge_error: MergeError | None = None  # of these linear maps; None where it was not measured
    max_lora_rank: int | None = None  # `--max-lora-rank` of vLLM; None for other readers
    notes: list[str] = field(default_factory=list)  # one line for each thing that a reader should know

    def __str__(self) -> str:
        ranks = listed(map(str, sorted(set(self.ranks.values()))))
        how = "exact" if self.mode is None else f"of the {self.mode} linear maps"
        lines = [
            f"Wrote {self.folder} ({megabytes(self.size)}): LoRA of rank {ranks} on {len(self.ranks)} layers"
            + ("" if self.errors else f", {how}")
        ]
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            mean = sum(self.errors.values()) / len(self.errors)
            lines.append(
                f"  cut by SVD: relative error {mean:.3g} on average over {len(self.errors)} layers, at worst "
                f"{self.errors[worst]:.3g} ({worst})"
            )
        if self.heads:
            lines.append(f"  with the heads {', '.join(self.heads)}")
        if self.merge_error is not None:
            lines.append(f"  {self.merge_error}")
        if self.max_lora_rank is not None:
            lines.append(f"  vLLM needs --max-lora-rank {self.max_lora_rank}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def check_export(folder: str | Path, *, rank: int | None, max_error: float, overwrite: bool) -> None:
    """Raises `ConfigurationError` for values out of range, and for a folder that exists."""
    if rank is not None:
        check_positive_int(rank, "rank")
    check_in_range(max_error, "max_error", ge=0)
    check_output_folder(folder, overwrite=overwrite)


def exportable(model: nn.Module, what: str, *, heads: bool) -> tuple[nn.Module, Injection]:
    """The injected part of a model, of which an export as LoRA holds all that was trained.

    Args:
        model: injected, or a model that contains an injected one.
        what: the export, in words: "a PEFT folder".
        heads: whether it holds modules trained in full.

    Raises:
        ConfigurationError: for a model with nothing to export, or with something that the file would not hold.
    """
    # One injected part, with adapters that are not merged, and values on this process.
    parts = [module for module in model.modules() if injection_of(module) is not None]
    if not parts:
        raise ConfigurationError(f"{type(model).__name__} has no adapters: call inject first")
    if len(parts) > 1:
        raise ConfigurationError(f"{type(model).__name__} has several injected parts: export each of them")
    root = parts[0]
    mark: Injection = injection_of(root)  # type: ignore[assignment]
    layers = dict(adapted_layers(root))
    if not layers:
        name = type(mark.method).__name__
        raise ConfigurationError(f"{name} adapts no layers, and {what} holds LoRA layers: export merged weights")
    if merged_layers(root):
        raise ConfigurationError("the adapters are merged: call unmerge first")
    for path, layer in layers.items():
        if any(p.is_meta or isinstance(p, DTensor) for p in layer.adapters.parameters()):
            raise ConfigurationError(f"{path} is sharded or on the meta device: export on one process, with weights")
    # Readers look layers up by name, one place each.
    paths = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
    if twice := [path for path, layer in layers.items() if paths[id(layer)] > 1]:
        places = f"{listed(twice, 3)} is used in several places"
        raise ConfigurationError(f"{places}, of which {what} adapts one: export merged weights")
    # Whatever else was trained would be lost.
    names = {name for name, _ in root.named_parameters(remove_duplicate=False)}  # a tied weight has two names
    kept = names - frozen_names(root) - adapter_parameter_names(root)
    held = tuple(f"{head}." for head in mark.trained_modules) if heads else ()
    if loose := sorted(name for name in kept if not name.startswith(held)):
        trained = f"{len(loose)} weights were trained that {what} cannot hold"
        raise ConfigurationError(f"{trained}: {listed(loose, 3)}; export merged weights")
    return root, mark


def linear_updates(
    model: nn.Module,
    folder: str | Path,
    rank: int | None,
    max_error: float,
    *,
    mode: str | None = None,
    batches: Iterable[Any] | None = None,
    measure_on: Iterable[Any] | None = None,
    forward: Forward | None = None,
) -> tuple[dict[str, LowRankUpdate], LoraReport]:
    """The updates of a model as LoRAs, by layer, and a report that the export completes; the model stays as it was.

    The options are those of `export_peft`.

    Raises:
        NotMergeableError: where an update is not a LoRA, or its error is too large.
        ConfigurationError: for batches that would not act.
    """
    fit, held_out = batch_list(batches), batch_list(measure_on)
    measured = held_out or fit  # better batches that the fit has not seen
    if mode is None and measured:
        raise ConfigurationError("batches act with mode='static' or 'calibrated' only: leave them out")
    before = measure(model, measured, forward)
    # Only within the context do AuroRA's layers have a matrix.
    with linearised(model, mode, fit, forward) as notes:
        error = merge_error(before, measure(model, measured, forward))
        updates, errors = low_rank_updates(find_injected(model)[1], rank, max_error)  # type: ignore[index]
    notes = [*notes, *measuring_notes(mode, error, held_out)]
    return updates, LoraReport(Path(folder), errors=errors, mode=mode, merge_error=error, notes=notes)
