"""What has become NaN or infinite: losses, metrics and trained parameters, of anybody's module.

A look at a number on a GPU waits for the GPU, so losses are looked at in the first batch of an epoch and as often as
the trainer logs, parameters where a loss is not finite and wherever a checkpoint or an adapter folder is written.
Gradients are not: under mixed float16 they may overflow, and the scaler then skips the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from pera_lightning.errors import NonFiniteLossError, listed
from pera_lightning.injection.state import frozen_names
from pera_lightning.training.distributed import all_gather_object

_EVERY = 50  # batches, where the trainer logs none


def check_training_loss(trainer: Trainer, module: LightningModule, outputs: Any, batch_idx: int) -> None:
    """Raises `NonFiniteLossError` where a loss and the parameters are not finite; warns where only the loss is not."""
    if batch_idx % (trainer.log_every_n_steps or _EVERY):  # type: ignore[attr-defined]
        return
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor) or loss.isfinite().all():
        return
    where = f"a training loss is NaN or infinite in epoch {trainer.current_epoch}, batch {batch_idx}"
    if names := _not_finite(module):
        raise NonFiniteLossError(
            f"{where}, and {len(names)} trained parameters are NaN or infinite: {listed(names, 3)}; lower the learning "
            "rate, or look at the batches before"
        )
    rank_zero_warn(f"{where}; the trained parameters are finite still")


def check_parameters(module: LightningModule, *, of_all: bool = False) -> None:
    """Raises `NonFiniteLossError` where trained parameters are not finite.

    Args:
        module: an adapted module.
        of_all: whether all processes ask, each of which has a part of a sharded network.
    """
    names = _not_finite(module)
    for found in all_gather_object(names) if of_all else [names]:
        if found:
            raise NonFiniteLossError(
                f"{len(found)} trained parameters are NaN or infinite after optimizer step {module.global_step}, and "
                f"are not saved: {listed(found, 3)}; earlier checkpoints stay, lower the learning rate"
            )


def _not_finite(module: LightningModule) -> list[str]:
    frozen = frozen_names(module)  # buffers may be infinite, as masks are
    parts = (
        (n, p.to_local() if hasattr(p, "to_local") else p) for n, p in module.named_parameters() if n not in frozen
    )
    return [name for name, part in parts if part.is_floating_point() and not part.detach().isfinite().all()]


def check_metrics(trainer: Trainer) -> None:
    """Warns, after a validation or test, of metrics that are not finite."""
    found = [name for name, value in trainer.callback_metrics.items() if not value.isfinite().all()]
    if found and not trainer.sanity_checking:
        rank_zero_warn(
            f"NaN or infinite after the evaluation: {listed(found, 4)}; either not one of its examples has a label, or "
            "the network's outputs are not finite, and what monitors a NaN chooses by nothing"
        )
