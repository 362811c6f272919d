"""The loss of each example that has one label as a whole: cross-entropy, or the squared error of a regression."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pera_lightning.data.batching import IGNORE
from pera_lightning.errors import ConfigurationError


def example_losses(outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Losses (B,) in float32, each times the weight of its class, and 0 for an example without a label.

    Nothing here depends on values, so that memory can be computed without them.

    Args:
        outputs: (B, C), any floating type; one output is the value of a regression.
        labels: (B,), classes or values; -100 for an example without one.
        weights: (C,) weights of the classes; by default 1.
    """
    outputs = outputs.float()
    # By `where` and ignore_index, not by selecting: shapes stay those of the batch.
    if outputs.shape[1] == 1:
        return (outputs[:, 0] - labels.float()).square().where(labels != IGNORE, 0.0)
    return F.cross_entropy(outputs, labels, weights, ignore_index=IGNORE, reduction="none")


def check_weights(weights: Any, num_labels: int | None) -> None:
    """Raises `ConfigurationError` for class weights other than "balanced" or a positive number a class."""
    if weights is None:
        return
    if num_labels == 1:
        raise ConfigurationError(f"class_weights={weights!r}: a regression has no classes; leave them out")
    if weights == "balanced":
        return
    numbers = isinstance(weights, (list, tuple)) and all(
        isinstance(w, (int, float)) and not isinstance(w, bool) and 0 < w < math.inf for w in weights
    )
    if not numbers or not weights:
        raise ConfigurationError(f"class_weights={weights!r}: 'balanced', or a positive number a class, is needed")
    if num_labels is not None and len(weights) != num_labels:
        raise ConfigurationError(f"class_weights has {len(weights)} numbers, and there are {num_labels} classes")
