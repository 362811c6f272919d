"""A loss normalised over an optimizer step: one mean, whatever the ranks and accumulated batches hold of it.

With gradient accumulation the mean of the batches' means is not the mean over all tokens: a batch with few of them
would count as much as one with many. Here a token (or example, or image) counts the same in whichever batch it lies.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pera_lightning.training._lightning_internals import should_accumulate
from pera_lightning.training.module import AdapterModule


class NormalisedLoss:
    """Makes the gradient of an optimizer step that of Σ loss / n, over all ranks and accumulated batches.

    n counts what the loss is a sum over, tokens or examples. How many the step will have is known only at its end. So
    every batch is divided by the count of the step's first, and the gradient is corrected once, at the end; with one
    batch a step it needs no correction.

    Attributes:
        reference: count of the step's first batch, over all ranks; 0 between steps.
        count: count of the step's batches so far, over all ranks.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begins an optimizer step."""
        self.reference = 0
        self.count = 0

    def loss(self, summed: Tensor, count: int, *, world: int) -> Tensor:
        """The loss to differentiate, whose gradients others average over ranks and batches.

        Args:
            summed: sum of the losses in this rank's batch.
            count: number of tokens or examples that it sums over, on all ranks.
            world: number of ranks whose gradients are averaged.
        """
        # The average over ranks divides by `world`; what is wanted is the sum over the reference count.
        self.reference = self.reference or max(count, 1)  # the step's first batch sets it
        self.count += count  # of all batches so far, for the correction
        return summed * (world / self.reference)

    def correction(self, batches: int) -> float:
        """The factor on the gradients at the end of a step, where Lightning divided by a number of batches."""
        # Each batch was divided by the reference, and Lightning divides by their number: Σ loss / n is wanted.
        factor = self.reference * batches / max(self.count, 1)
        self.start()
        return factor

    def state(self) -> list[int]:
        """What a checkpoint within a step keeps."""
        return [self.reference, self.count]

    def load(self, state: list[int]) -> None:
        """Takes what `state` gave."""
        self.reference, self.count = state


class NormalisedLossModule(AdapterModule):
    """Base of the modules whose batches weigh by their number of labelled tokens, examples or images.

    Attributes:
        counted: key of the counts of an unfinished step in checkpoints.
    """

    counted = "step_counts"

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        self._normalised = NormalisedLoss()

    def normalised_loss(self, summed: Tensor, own: Tensor, batch_idx: int) -> Tensor:
        """What `training_step` returns for a sum over `own` tokens or examples; logs its mean as `train/loss`."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._normalised.start()  # where Lightning empties the gradients; a fit stopped within a step left some
        self.check_loss(summed, batch_idx)
        world, size = self.trainer.world_size, max(int(own), 1)  # a batch may have no label at all
        everywhere = own if world == 1 else self.trainer.strategy.reduce(own.clone(), reduce_op="sum")
        self.log("train/loss", summed.detach() / size, prog_bar=True, batch_size=size)
        return self._normalised.loss(summed, int(everywhere), world=world)

    def on_after_backward(self) -> None:
        """Corrects the gradient after the last accumulated batch of the step."""
        if should_accumulate(self.trainer):
            return
        factor = self._normalised.correction(self.trainer.accumulate_grad_batches)
        if factor != 1:  # with one batch a step it is 1
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)  # before clipping, which sees the gradient of the step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[self.counted] = self._normalised.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._normalised.load(checkpoint.get(self.counted, [0, 0]))
