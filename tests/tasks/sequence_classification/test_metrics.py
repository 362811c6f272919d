"""GLUE's metrics against plain loops, in batches, with examples that have no label, and where they have no value."""

import math

import pytest
import torch

from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.sequence_classification.metrics import (
    Scores,
    average_ranks,
    check_metrics,
    default_metrics,
    matthews,
)


def counted(predictions, labels):
    """True and false positives and negatives, class 1 being positive."""
    pairs = list(zip(predictions, labels, strict=True))
    return [pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]


def plain_f1(predictions, labels):
    tp, fp, fn, _ = counted(predictions, labels)
    return 2 * tp / (2 * tp + fp + fn)


def plain_binary_matthews(predictions, labels):
    tp, fp, fn, tn = counted(predictions, labels)
    return (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def plain_matthews(predictions, labels, classes):
    """The correlation of the two as vectors of class membership, example by example."""
    n = len(labels)
    p = [[float(x == k) for k in range(classes)] for x in predictions]
    t = [[float(x == k) for k in range(classes)] for x in labels]

    def covariance(a, b):
        means = [[sum(row[k] for row in side) / n for k in range(classes)] for side in (a, b)]
        return sum((a[i][k] - means[0][k]) * (b[i][k] - means[1][k]) for i in range(n) for k in range(classes))

    return covariance(p, t) / math.sqrt(covariance(p, p) * covariance(t, t))


def plain_pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return over / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def plain_ranks(x):
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def filled(names, outputs, labels, num_labels, size=7):
    """Scores of the labelled examples of batches, the last one short; losses are the numbers of the examples."""
    scores = Scores(names, names[0], num_labels)
    losses = torch.arange(len(labels)).float()
    for parts in zip(outputs.split(size), labels.split(size), losses.split(size), strict=True):
        known = parts[1] != -100
        scores.update(*(part[known] for part in parts))
    return scores


@pytest.mark.parametrize("classes", [2, 3])
def test_classification(classes):
    generator = torch.Generator().manual_seed(classes)
    outputs, labels = torch.randn(40, classes, generator=generator), torch.arange(40) * 5 // 3 % classes
    labels[::6] = labels[-9:] = -100  # the last batch has none at all
    names = ("accuracy", "f1", "matthews") if classes == 2 else ("accuracy", "matthews")
    scores = filled(names, outputs, labels, classes)
    known = [k for k in range(40) if labels[k] != -100]
    p, t = [int(outputs[k].argmax()) for k in known], [int(labels[k]) for k in known]
    values = scores.compute()
    assert scores.n() == len(known) < 30
    assert values["accuracy"].item() == pytest.approx(sum(a == b for a, b in zip(p, t, strict=True)) / len(known))
    assert values["matthews"].item() == pytest.approx(plain_matthews(p, t, classes))
    assert values["loss"].item() == pytest.approx(sum(known) / len(known))
    assert values["metric"] == values["accuracy"]
    if classes == 2:
        assert values["f1"].item() == pytest.approx(plain_f1(p, t))
        assert values["matthews"].item() == pytest.approx(plain_binary_matthews(p, t))


def test_regression():
    """Values of STS-B with ties, in float32 far from zero, where sums of squares would lose digits."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(50, generator=generator) * 10).round() / 2
    outputs = 1000 + (labels + torch.randn(50, generator=generator)).round()[:, None]
    labels[::7] = -100.0
    scores = filled(("pearson", "spearman"), outputs, labels, 1)
    known = labels != -100
    x, y = outputs[known, 0].tolist(), labels[known].tolist()
    values = scores.compute()
    assert values["pearson"].item() == pytest.approx(plain_pearson(x, y), abs=1e-6)
    assert values["spearman"].item() == pytest.approx(plain_pearson(plain_ranks(x), plain_ranks(y)), abs=1e-6)
    assert abs(values["pearson"] - values["spearman"]) > 1e-4
    assert scores.n() == int(known.sum())


def test_ties_have_the_mean_of_their_ranks():
    assert average_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]


def test_matthews_of_a_model_that_says_one_thing_is_zero():
    """As scikit-learn has it; torchmetrics gives 0.0256 for this CoLA model that accepts every sentence."""
    assert matthews(torch.tensor([[0, 322], [0, 721]])).item() == 0
    assert matthews(torch.tensor([[0, 0], [10, 20]])).item() == 0
    assert matthews(torch.tensor([[7, 0], [0, 5]])).item() == 1
    assert matthews(torch.tensor([[0, 7], [5, 0]])).item() == -1


def test_a_constant_has_no_correlation():
    scores = filled(("pearson", "spearman"), torch.ones(9, 1), torch.arange(9.0), 1)
    values = scores.compute()
    assert values["pearson"].isnan()
    assert values["spearman"].isnan()
    assert values["loss"].item() == 4


def test_the_metric_that_selects_need_not_be_the_first():
    scores = Scores(("f1", "accuracy"), "accuracy", 2)
    scores.update(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 0, 1]), torch.zeros(3))
    values = scores.compute()
    assert values["metric"] == values["accuracy"] != values["f1"]
    assert default_metrics(1)[0] == "pearson"


@pytest.mark.parametrize(
    ("names", "selection", "labels", "error", "text"),
    [
        (("acuracy",), "acuracy", 2, ConfigurationError, "there are accuracy, f1, matthews; closest: accuracy"),
        (("accuracy",), "accuracy", 1, ConfigurationError, "'accuracy' does not fit one output, a regression"),
        (("pearson",), "pearson", 2, ConfigurationError, "'pearson' does not fit 2 classes"),
        (("accuracy", "f1"), "f1", 3, ConfigurationError, "'f1' does not fit 3 classes"),
        (("accuracy",), "f1", 2, ConfigurationError, "'f1' does not fit 2 classes with the metrics accuracy"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(names, selection, labels, error, text):
    with pytest.raises(error, match=text):
        check_metrics(names, selection, labels)


@pytest.mark.parametrize("labels", [1, 2])
def test_an_output_that_is_no_number_leaves_none(labels):
    """Its likeliest class would be the first, and a mean would leave its loss out."""
    scores = Scores(default_metrics(labels), default_metrics(labels)[0], labels)
    outputs = torch.randn(4, labels, generator=torch.Generator().manual_seed(0))
    outputs[1] = torch.nan
    scores.update(outputs, torch.tensor([0, 1, 0, 1]), outputs.sum(1))
    assert all(value.isnan() for value in scores.compute().values())
    assert scores.n() == 4
