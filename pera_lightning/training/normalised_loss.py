"""A loss that is one mean over an optimizer step, whatever the ranks and accumulated batches hold of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pera_lightning.training._lightning_internals import should_accumulate
from pera_lightning.training.module import AdapterModule


class StepMean:
    """Makes the gradient of an optimizer step that of Σ loss / n, over all ranks and accumulated batches.

    n counts what the loss is a sum over, tokens or examples. How many the window will have is known only at its end. So
    every batch is divided by the count of the window's first, and the gradient is corrected once, at the end; with one
    batch a step there is nothing to correct.

    Attributes:
        reference: count of the window's first batch, over all ranks; 0 outside a window.
        count: of the window so far, over all ranks.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begins a window."""
        self.reference = 0
        self.count = 0

    def loss(self, summed: Tensor, count: int, *, world: int) -> Tensor:
        """The loss to differentiate: its gradients are averaged over ranks and batches by others.

        Args:
            summed: loss of this rank's batch, summed.
            count: what it was summed over, on all ranks.
            world: ranks whose gradients are averaged.
        """
        self.reference = self.reference or max(count, 1)
        self.count += count
        return summed * (world / self.reference)

    def correction(self, batches: int) -> float:
        """What gradients are to be multiplied with at the end of the window; the next loss starts a new one.

        Args:
            batches: that Lightning divides by (`accumulate_grad_batches`).
        """
        factor = self.reference * batches / max(self.count, 1)
        self.start()
        return factor

    def state(self) -> list[int]:
        """For a checkpoint within a window."""
        return [self.reference, self.count]

    def load(self, state: list[int]) -> None:
        """Takes what `state` gave."""
        self.reference, self.count = state


class StepMeanModule(AdapterModule):
    """Base of the modules whose batches count by what is in them.

    Attributes:
        trained_with: what the data of the training said of themselves; kept in checkpoints.
        counted: the key of an unfinished window in checkpoints.
        trained: the key of `trained_with` there.
    """

    counted = "step_counts"
    trained = "training_protocol"

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        self.trained_with: dict[str, Any] | None = None
        self._step_mean = StepMean()

    def step_loss(self, summed: Tensor, own: Tensor, batch_idx: int) -> Tensor:
        """What `training_step` returns; logs `train/loss`, the mean of the batch.

        Args:
            summed: loss of this rank's batch, summed.
            own: what it was summed over.
            batch_idx: of the batch.
        """
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._step_mean.start()  # where Lightning empties the gradients; a fit stopped within a window left some
        self.check_loss(summed, batch_idx)
        world, size = self.trainer.world_size, max(int(own), 1)
        everywhere = own if world == 1 else self.trainer.strategy.reduce(own.clone(), reduce_op="sum")
        self.log("train/loss", summed.detach() / size, prog_bar=True, batch_size=size)
        return self._step_mean.loss(summed, int(everywhere), world=world)

    def on_after_backward(self) -> None:
        """Corrects the gradient at the end of the accumulation window."""
        if should_accumulate(self.trainer):
            return
        factor = self._step_mean.correction(self.trainer.accumulate_grad_batches)
        if factor != 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[self.counted] = self._step_mean.state()
        checkpoint[self.trained] = self.trained_with

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._step_mean.load(checkpoint.get(self.counted, [0, 0]))
        self.trained_with = checkpoint.get(self.trained)
