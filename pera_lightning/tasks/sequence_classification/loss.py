"""The loss of each example, which has one label: cross-entropy, or the squared error of a regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_lightning.data.batching import IGNORE
from pera_lightning.errors import ConfigurationError, DataError, listed


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
    if weights is None or (weights == "balanced" and num_labels != 1):
        return
    numbers = weights if isinstance(weights, (list, tuple)) and num_labels != 1 else ()
    right = all(isinstance(w, (int, float)) and not isinstance(w, bool) and 0 < w < math.inf for w in numbers)
    if not numbers or not right or len(numbers) != (num_labels or len(numbers)):
        what = "a regression has no classes" if num_labels == 1 else f"there are {num_labels or 'some'} classes"
        raise ConfigurationError(
            f"class_weights={weights!r}, and {what}: 'balanced', or a positive number a class, is needed"
        )


def balanced_weights(counts: Sequence[int] | None, names: Sequence[str]) -> Tensor:
    """Weights (C,) that give each class an equal share of the training loss, n / (C nₖ); their mean over examples is 1.

    Args:
        counts: training examples of each class; None where the data do not say them.
        names: names of the classes.

    Raises:
        ConfigurationError: without counts.
        DataError: where a class has no training example.
    """
    if counts is None:
        raise ConfigurationError(
            "class_weights='balanced' needs the data's class_counts, and there are none; give a list"
        )
    if none := [str(names[k]) if k < len(names) else str(k) for k, count in enumerate(counts) if not count]:
        raise DataError(f"no training example of {listed(none)}, so the classes cannot be weighed; raise train_limit")
    return torch.tensor([sum(counts) / (len(counts) * count) for count in counts])
