"""The metrics of GLUE over an entire set: accuracy, F1, Matthews, Pearson and Spearman, and the mean loss.

Matthews is 0 where all predictions, or all labels, are alike, as in scikit-learn, by which GLUE is scored; torchmetrics
1.9 gives another number there (0.03 for a CoLA model that accepts every sentence). Correlations keep all values and are
computed in float64; they are NaN where one side is constant, and ties have the mean of their ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassConfusionMatrix
from torchmetrics.utilities import dim_zero_cat

from pera_lightning.errors import ConfigurationError, closest, listed

CLASSIFICATION = ("accuracy", "f1", "matthews")
REGRESSION = ("pearson", "spearman")


def matthews(confusion: Tensor) -> Tensor:
    """Matthews correlation of a confusion matrix (C, C), labels down and predictions across (Gorodkin 2004).

    (c s - Σ tₖ pₖ) / √((s² - Σ pₖ²) (s² - Σ tₖ²)), with s examples, c of them right, tₖ of class k, pₖ predicted as k.
    """
    counts = confusion.double()  # (C, C); of integers the products below would overflow
    labelled, predicted, s = counts.sum(1), counts.sum(0), counts.sum()
    spread = (s**2 - predicted @ predicted) * (s**2 - labelled @ labelled)
    return torch.where(spread > 0, (counts.trace() * s - labelled @ predicted) / spread.sqrt(), 0.0)


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson correlation of two vectors (N,) of float64; NaN where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x.norm() * y.norm())).clamp(-1, 1)


def average_ranks(x: Tensor) -> Tensor:
    """Ranks (N,) from 1 on in float64; ties have the mean of their ranks."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)  # sorted
    # Of equal values the ranks end at their cumulated count; half of what lies before the last is their mean.
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place]


class Matthews(MulticlassConfusionMatrix):
    """`matthews` of predictions and labels, both (N,)."""

    def compute(self) -> Tensor:
        return matthews(super().compute().cpu())  # not every device has float64


class Correlation(Metric):
    """`pearson` of predictions and labels, both (N,), or with `ranked` Spearman's, which is that of their ranks."""

    full_state_update = False

    def __init__(self, ranked: bool = False) -> None:
        super().__init__()
        self.ranked = ranked
        for name in ("predictions", "labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        self.predictions.append(predictions.float())  # type: ignore[union-attr,operator]
        self.labels.append(labels.float())  # type: ignore[union-attr,operator]

    def compute(self) -> Tensor:
        x, y = (dim_zero_cat(values).cpu().double() for values in (self.predictions, self.labels))
        return pearson(average_ranks(x), average_ranks(y)) if self.ranked else pearson(x, y)


def default_metrics(num_labels: int) -> tuple[str, ...]:
    """What is measured if the data do not say; the first one selects."""
    return REGRESSION if num_labels == 1 else ("accuracy",)


def check_metrics(names: Sequence[str], selection: str, num_labels: int) -> None:
    """Raises `ConfigurationError` for metrics that do not exist, or not for so many labels."""
    # F1 is that of label 1, as in GLUE, so three classes have none.
    fitting = REGRESSION if num_labels == 1 else [n for n in CLASSIFICATION if n != "f1" or num_labels == 2]
    for name in (*names, selection):
        if name not in fitting or name not in names:
            what = "one output, a regression" if num_labels == 1 else f"{num_labels} classes"
            raise ConfigurationError(
                f"metric {name!r} does not fit {what} with the metrics {listed(names)}; there are {listed(fitting)}"
                f"{closest(name, fitting)}"
            )


def metric(name: str, num_labels: int) -> Metric:
    """A metric of predictions (class numbers, or values of a regression) and labels, both (N,), by its name."""
    makers = {
        "accuracy": lambda: MulticlassAccuracy(num_labels, average="micro"),
        "f1": BinaryF1Score,
        "matthews": lambda: Matthews(num_labels),
        "pearson": Correlation,
        "spearman": lambda: Correlation(ranked=True),
    }
    return makers[name]()


class Scores(nn.Module):
    """All metrics of one set, each example counted once, over several processes too.

    Args:
        names: names of the metrics.
        selection: name of the one that is also called "metric".
        num_labels: number of classes, 1 for a regression.
    """

    def __init__(self, names: Sequence[str], selection: str, num_labels: int) -> None:
        super().__init__()
        check_metrics(names, selection, num_labels)
        self.selection, self.num_labels = selection, num_labels
        self.metrics = nn.ModuleDict({name: metric(name, num_labels) for name in names})
        self.loss, self.count = MeanMetric(nan_strategy="disable"), SumMetric()

    def update(self, outputs: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Takes the labelled examples of a batch: outputs (N, num_labels), labels (N,), losses (N,); N may be 0."""
        predictions = decided(outputs)
        for measured in self.metrics.values():
            # Correlations take nothing too: processes exchange their values, and one may have padding only.
            if len(predictions) or isinstance(measured, Correlation):
                measured.update(predictions, labels)
        self.loss.update(losses)
        self.count.update(len(predictions))

    def compute(self) -> dict[str, Tensor]:
        """The mean loss, the metrics, and "metric"; of all processes, which must all call it.

        If an output is NaN, so is all of it: the likeliest of such classes would be the first.
        """
        loss = self.loss.compute()
        values = {name: measured.compute().float().to(loss.device) for name, measured in self.metrics.items()}
        # A NaN loss says that some output was NaN.
        values = {name: value.where(~loss.isnan(), torch.nan) for name, value in values.items()}
        return {"loss": loss, **values, "metric": values[self.selection]}

    def n(self) -> int:
        """Examples with a label, of all processes, which must all call it."""
        return int(self.count.compute())


def decided(outputs: Tensor) -> Tensor:
    """Outputs (B, C) -> the likeliest class (B,), or of a single output its value (B,)."""
    return outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(-1)
