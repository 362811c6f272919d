"""Optimizer steps of the module for sentences: one mean over the examples of a step, class weights, resuming."""

from contextlib import suppress

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from pera_lightning.adapters import PERA
from tests.tasks.sequence_classification.classifier_helpers import (
    Sentences,
    fit,
    module,
    randomise,
    save_tiny,
    sentences,
    trained,
)


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """An encoder without dropout."""
    folder = tmp_path_factory.mktemp("still")
    return save_tiny(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


class Steps(Callback):
    """Gradients of every optimizer step, from random adapters, and the logged losses of the batches."""

    def __init__(self):
        self.gradients, self.losses = [], []

    def on_train_start(self, trainer, pl_module):
        randomise(pl_module)

    def on_train_batch_end(self, trainer, *_):
        self.losses.append(trainer.logged_metrics["train/loss"].item())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        own = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append(own)


def run(folder, path, rows, batch_size, classes=2, **options):
    seen = Steps()
    network = module(path, lr=1e-12, lr_schedule="constant", **options.pop("module", {}))
    data = Sentences([rows], classes=classes, batch_size=batch_size)
    fit(folder, network, data, callbacks=[seen], limit_val_batches=0, **options)
    return network, seen


def by_hand(network, rows, weights=None):
    """Gradients of Σ w l / N, row after row without padding."""
    network.eval()
    network.zero_grad()
    total = 0.0
    for row in rows:
        out = network.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        if len(out) == 1:
            total = total + (out[0] - row["label"]) ** 2
        else:
            total = total - out.log_softmax(-1)[row["label"]] * (1 if weights is None else weights[row["label"]])
    (total / len(rows)).backward()
    return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}, total.item() / len(rows)


def assert_close(one, other):
    assert one.keys() == other.keys()
    assert one
    for name, value in one.items():
        largest = value.abs().max().item()
        assert largest > 1e-4, name  # a gradient of zero shows nothing
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(("batch_size", "window"), [(7, 1), (3, 3), (1, 7)])
def test_a_step_is_one_mean_over_its_examples(still, tmp_path, classes, batch_size, window):
    """Seven rows in one batch; in 3, 3 and 1; one at a time."""
    rows = sentences(7, classes)
    network, seen = run(tmp_path, still, rows, batch_size, classes, accumulate_grad_batches=window)
    expected, loss = by_hand(network, rows)
    assert len(seen.gradients) == 1
    assert_close(expected, seen.gradients[0])
    sizes = [min(batch_size, 7 - k) for k in range(0, 7, batch_size)]
    assert sum(x * n for x, n in zip(seen.losses, sizes, strict=True)) / 7 == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("weights", [[0.2, 5.0, 1.0], "balanced"])
def test_class_weights_multiply_the_losses_of_their_examples(still, tmp_path, weights):
    rows = sentences(9, 3)
    for row in rows[:3]:
        row["label"] = 2
    options = {"module": {"class_weights": weights}, "accumulate_grad_batches": 3}
    network, seen = run(tmp_path, still, rows, 4, 3, **options)
    counts = [sum(row["label"] == k for row in rows) for k in range(3)]
    assert len(set(counts)) > 1
    numbers = weights if weights != "balanced" else [9 / (3 * n) for n in counts]
    expected, _ = by_hand(network, rows, numbers)
    assert_close(expected, seen.gradients[0])


def test_fillers_without_a_label_have_no_part_in_a_step(still, tmp_path):
    rows = sentences(6, 2)
    filled = [*rows[:4], *({**row, "label": -100} for row in rows[:3]), *rows[4:]]
    network, seen = run(tmp_path, still, filled, 3, accumulate_grad_batches=3)
    expected, _ = by_hand(network, rows)
    assert_close(expected, seen.gradients[0])


def test_validation_is_without_class_weights(still, tmp_path):
    rows = sentences(8, 2)
    values = []
    for weights in (None, [0.1, 7.0]):
        network = module(still, lr=1e-12, class_weights=weights)
        trainer = fit(tmp_path, network, Sentences([rows]))
        values.append(trainer.callback_metrics["val/loss"].item())
    assert values[0] == values[1]


class Stop(Callback):
    """Writes a checkpoint after so many batches, and stops the fit."""

    def __init__(self, after, path):
        self.left, self.path = after, path

    def on_train_batch_end(self, trainer, *_):
        self.left -= 1
        if not self.left:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [5, 6, 7])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, after):
    """With all dropout, shuffled, in the second epoch; after its first two batches in the middle of a window."""
    path = save_tiny(tmp_path / "model")
    rows = sentences(15, 2)

    def start(ckpt=None, callbacks=()):
        network = module(path, head_dropout=0.3, class_weights=[1.0, 2.0])
        data = Sentences([rows], batch_size=4, shuffle=True)
        options = {"method": PERA(rank=2, dropout=0.2), "max_epochs": 3, "accumulate_grad_batches": 3}
        with suppress(KeyboardInterrupt, SystemExit):
            fit(tmp_path, network, data, ckpt=ckpt, callbacks=callbacks, **options)
        return trained(network)

    whole, written = start(), tmp_path / "stopped.ckpt"
    part = start(callbacks=[Stop(after, written)])
    resumed = start(ckpt=written)
    assert not torch.equal(part["model.classifier.weight"], whole["model.classifier.weight"])
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
