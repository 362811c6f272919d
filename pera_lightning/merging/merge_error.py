"""The error of a merge: how far the outputs and the loss of a model on some batches are from those before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pera_lightning.errors import ConfigurationError, shorten

ROWS = 256  # rows of outputs that are kept of a batch

# Called with the model and a batch; gives the outputs (..., C), or them and the mean loss.
Forward = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, Tensor | None]"]


@dataclass(frozen=True)
class MergeError:
    """What a merge changed, measured on batches; a number, not an exception.

    Attributes:
        outputs: ‖y' − y‖ / ‖y‖ over the outputs of all batches, y before and y' after.
        loss_before: mean loss of the batches before; None where the model or its batches give none.
        loss_after: mean loss of the batches after; None without one before.
        batches: number of batches.
    """

    outputs: float
    loss_before: float | None
    loss_after: float | None
    batches: int

    def __str__(self) -> str:
        number = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        text = f"outputs changed by {self.outputs:.3g} (relative, on {number})"
        if self.loss_before is None:
            return f"{text}; the loss was not measured, the batches have no labels"
        return f"{text}; loss {self.loss_before:.4f} before, {self.loss_after:.4f} after"


@dataclass(frozen=True)
class Measured:
    """Outputs (rows, C) in float32 on the CPU, and the mean loss, batch by batch."""

    outputs: list[Tensor]
    losses: list[float | None]


def call(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
    """The outputs and the loss of a model for a batch, as most models take and give them.

    A LightningModule of this package takes its own batches. Else a mapping is handed over as keywords, a tuple or list
    as positions, anything else as the one argument. Of what comes back, `logits` (else `last_hidden_state`, else the
    first member, or the tensor itself) and `loss` are read.

    Raises:
        ConfigurationError: where no tensor comes back.
    """
    if hasattr(model, "outputs_and_loss"):  # a module of this package
        return model.outputs_and_loss(model.model, batch)
    if isinstance(batch, Mapping):
        given = model(**batch)
    elif isinstance(batch, (tuple, list)):
        try:
            given = model(*batch)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            called = f"{type(model).__name__}, called with the {len(batch)} members of a batch"
            says = f"{called}, says: {shorten(str(error))[:150]}"
            raise ConfigurationError(f"{says}; give forward=function(model, batch)") from error
    else:
        given = model(batch)
    loss = getattr(given, "loss", None)
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(given, name, None), Tensor):
            return getattr(given, name), loss
    # transformers' heads give logits, its bare models hidden states; others a tensor, or a tuple that begins with one.
    first = given[0] if isinstance(given, (tuple, list)) else given
    if not isinstance(first, Tensor):
        gives = f"{type(model).__name__} gives a {type(given).__name__} without a known tensor"
        raise ConfigurationError(f"{gives}: give forward=function(model, batch) -> outputs, or (outputs, loss)")
    return first, loss


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors moved, also within mappings, tuples and lists."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: on_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [on_device(value, device) for value in batch]
    return batch


@torch.no_grad()
def measure(model: nn.Module, batches: Sequence[Any], forward: Forward | None = None) -> Measured:
    """Runs a model in eval mode over batches; of each, at most 256 evenly spaced rows of the outputs are kept."""
    outputs, losses = [], []
    with evaluating(model):
        for batch in batches:
            given = (forward or call)(model, on_device(batch, device_of(model)))
            y, loss = given if isinstance(given, tuple) else (given, None)
            rows = unpadded(y, batch)
            # The same rows before and after, of all lengths of a batch.
            index = torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)), device=rows.device).round().long()
            outputs.append(rows[index].float().cpu())  # (at most 256, C)
            losses.append(None if loss is None else float(loss))
    return Measured(outputs, losses)


def unpadded(values: Tensor, batch: Any) -> Tensor:
    """(..., C) as (n, C), without padding where the batch is a mapping with an ``attention_mask`` of that shape."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None  # (batch, tokens), 0 for padding
    if mask is not None and mask.shape == values.shape[:-1]:
        return values[mask.to(values.device).bool()]
    return values.reshape(-1, values.shape[-1])


def merge_error(before: Measured, after: Measured) -> MergeError | None:
    """The change from one measurement to another on the same batches; None without batches."""
    # Sums in float64: outputs of bfloat16 models are many, and their changes small.
    pairs = [(y.double(), other.double()) for y, other in zip(before.outputs, after.outputs, strict=True)]
    if not pairs:
        return None
    changed, size = sum(float((b - a).square().sum()) for a, b in pairs), sum(float(a.square().sum()) for a, _ in pairs)
    losses = [
        None if None in values else math.fsum(values) / len(values)  # type: ignore[arg-type]
        for values in (before.losses, after.losses)
    ]
    return MergeError(math.sqrt(changed / size) if size else math.inf if changed else 0.0, *losses, batches=len(pairs))


def measuring_notes(mode: str | None, error: MergeError | None, held_out: Sequence[Any]) -> list[str]:
    """What a reader should know of the error of an approximate merge or export.

    Args:
        mode: "static" or "calibrated"; None for an exact one, which needs no note.
        error: its error, where that was measured.
        held_out: batches to measure on that were not calibrated with.
    """
    if mode is not None and error is None:
        return [f"the error of the {mode} merge was not measured: give batches"]
    if mode == "calibrated" and not held_out:
        return ["the error was measured on the batches of the calibration: measure_on takes others"]
    return []


def batch_list(batches: Iterable[Any] | None) -> list[Any]:
    """Batches as a list, since they are run more than once; none for None."""
    if batches is None:
        return []
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ConfigurationError(f"batches is one {type(batches).__name__}: give a list of batches, [batch]")
    if not (found := list(batches)):
        raise ConfigurationError("batches has no batch: give at least one")
    return found


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context every module of a model is in eval mode; each has its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]  # train() would reach frozen parts too
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
