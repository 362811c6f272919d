"""Cross-entropy of tokens, with logits only where there is a label, and one mean over the whole optimizer step.

The logits are the memory peak of training with a large vocabulary: 2,048 tokens of 128,256 are 1 GiB in float32, and
the loss keeps as much again. So the model is asked for the positions that some row of the batch has a label for, and
the cross-entropy is taken in chunks that are computed again in the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 512  # tokens; 128,256 x 512 in float32 are 250 MiB


def summed_loss(logits: Tensor, targets: Tensor, *, ignore: int = -100, chunk: int = CHUNK) -> Tensor:
    """Σ -log p(target) in float32, over targets that are not `ignore`.

    Args:
        logits: (N, V), any floating type; only these are kept for the backward, no copy in float32.
        targets: (N,) int64.
        ignore: the target that counts for nothing.
        chunk: rows taken at a time.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for part, target in zip(logits.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled() and logits.requires_grad:
            total = total + checkpoint(_part, part, target, ignore, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _part(part, target, ignore)
    return total


def _part(logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore, reduction="sum")


class StepMean:
    """Makes the gradient of an optimizer step that of Σ loss / Σ tokens, over all ranks and accumulated batches.

    How many tokens the window will have is known only at its end. So every batch is divided by the tokens of the
    window's first, and the gradient is corrected once, at the end; with one batch a step there is nothing to correct.

    Attributes:
        reference: tokens of the window's first batch, over all ranks; 0 outside a window.
        tokens: of the window so far, over all ranks.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begins a window."""
        self.reference = 0
        self.tokens = 0

    def loss(self, summed: Tensor, tokens: int, *, world: int) -> Tensor:
        """The loss to differentiate: its gradients are averaged over ranks and batches by others.

        Args:
            summed: loss of this rank's batch, summed over its tokens.
            tokens: labelled tokens of this batch over all ranks.
            world: ranks whose gradients are averaged.
        """
        self.reference = self.reference or max(tokens, 1)
        self.tokens += tokens
        return summed * (world / self.reference)

    def correction(self, batches: int) -> float:
        """What gradients are to be multiplied with at the end of the window; the next loss starts a new one.

        Args:
            batches: that Lightning divides by (`accumulate_grad_batches`).
        """
        factor = self.reference * batches / max(self.tokens, 1)
        self.start()
        return factor

    def state(self) -> list[int]:
        """For a checkpoint within a window."""
        return [self.reference, self.tokens]

    def load(self, state: list[int]) -> None:
        """Takes what `state` gave."""
        self.reference, self.tokens = state
