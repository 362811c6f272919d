"""Cross-entropy of tokens, with logits only at labels.

The logits are the memory peak of training with a large vocabulary: 2,048 tokens of 128,256 are 1 GiB in float32, and
the loss keeps as much again. So the model is asked for the positions that some example of the batch has a label for,
and the cross-entropy is taken in chunks that are computed again in the backward.
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
        ignore: target that counts for nothing.
        chunk: tokens taken at a time.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for some, target in zip(logits.split(chunk), targets.split(chunk), strict=True):  # (chunk, V), (chunk,)
        if torch.is_grad_enabled() and logits.requires_grad:
            # Only the chunk's logits are saved; its float32 copy and softmax are computed again in the backward.
            total = total + checkpoint(_summed, some, target, ignore, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _summed(some, target, ignore)
    return total


def _summed(logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore, reduction="sum")
