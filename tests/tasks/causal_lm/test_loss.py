"""The summed cross-entropy against a plain loop, what it keeps for the backward, and the mean of a step."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pera_lightning.tasks.causal_lm.loss import CHUNK, summed_loss
from pera_lightning.training.normalised_loss import NormalisedLoss

N, V = 11, 7


def case(dtype=torch.float32, n=N, ignored=(0, 4, 10)):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(n, V, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (n,), generator=generator)
    targets[list(ignored)] = -100
    return logits, targets


def plain(logits, targets):
    """Value and gradient in double precision, one token after the other."""
    value, gradient = 0.0, torch.zeros(logits.shape, dtype=torch.float64)
    for k, target in enumerate(targets.tolist()):
        if target != -100:
            logs = logits[k].detach().double().log_softmax(-1)
            value -= logs[target].item()
            gradient[k] = logs.exp()
            gradient[k, target] -= 1
    return value, gradient


@pytest.mark.parametrize("chunk", [1, 2, 3, 10, 11, 12, CHUNK])
def test_value_and_gradient_of_a_plain_loop(chunk):
    logits, targets = case()
    value, gradient = plain(logits, targets)
    loss = summed_loss(logits, targets, chunk=chunk)
    (0.5 * loss).backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(logits.grad.double(), 0.5 * gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype):
    logits, targets = case(dtype)
    value, gradient = plain(logits, targets)
    loss = summed_loss(logits, targets, chunk=4)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-2, atol=1e-4)


def test_without_gradient():
    logits, targets = case()
    value, _ = plain(logits, targets)
    assert summed_loss(logits.detach(), targets, chunk=3).item() == pytest.approx(value, rel=1e-6)
    with torch.no_grad():
        assert not summed_loss(logits, targets).requires_grad


def test_no_label_at_all_is_zero_with_a_graph():
    logits, targets = case(ignored=range(N))
    loss = summed_loss(logits, targets, chunk=4)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_another_mark_for_no_label():
    logits, targets = case()
    same = torch.where(targets == -100, V, targets)
    assert summed_loss(logits, same, ignore=V).item() == summed_loss(logits, targets).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_logits_size_is_kept_but_the_logits(dtype):
    """cross_entropy alone keeps the log-probabilities, in float32."""
    logits, targets = case(dtype, n=40)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = summed_loss(logits, targets, chunk=8)
    others = {address: size for address, size in kept.items() if address != logits.untyped_storage().data_ptr()}
    assert sum(others.values()) <= targets.untyped_storage().nbytes() + 64
    loss.backward()


# ---- the mean of a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[5], [5, 1, 12], [1, 100], [0, 3, 0], [3, 0], [0], [0, 0]], ids=str)
@pytest.mark.parametrize("batches", [1, 3, 4])
def test_the_gradient_is_of_the_sum_over_all_tokens(counts, batches):
    """A window may be shorter than `batches`; Lightning divides by `batches` all the same."""
    sums = [torch.tensor(2.0 + k, dtype=torch.float64) for k in range(len(counts))]
    mean = NormalisedLoss()
    for _ in range(2):  # the second window starts from nothing
        accumulated = sum(mean.loss(s, n, world=1) / batches for s, n in zip(sums, counts, strict=True))
        whole = accumulated * mean.correction(batches)
        assert whole.item() == pytest.approx(sum(s.item() for s in sums) / max(sum(counts), 1))
        assert mean.state() == [0, 0]


def test_ranks_are_averaged_by_others():
    """Two ranks with 3 and 9 tokens, then 4 and 0: each knows the tokens of both."""
    ranks = [NormalisedLoss(), NormalisedLoss()]
    sums = [[6.0, 1.0], [30.0, 0.0]]
    averaged = 0.0
    for k, tokens in enumerate((12, 4)):
        losses = [r.loss(torch.tensor(sums[i][k]), tokens, world=2) / 2 for i, r in enumerate(ranks)]
        averaged += sum(losses).item() / 2
    factors = {r.correction(2) for r in ranks}
    assert len(factors) == 1
    assert averaged * factors.pop() == pytest.approx(37 / 16)


def test_one_batch_a_step_needs_no_correction():
    mean = NormalisedLoss()
    assert mean.loss(torch.tensor(8.0), 4, world=1).item() == 2
    assert mean.correction(1) == 1


def test_the_state_in_the_middle_of_a_window():
    mean, other = NormalisedLoss(), NormalisedLoss()
    mean.loss(torch.tensor(1.0), 4, world=1)
    other.load(mean.state())
    for one in (mean, other):
        one.loss(torch.tensor(1.0), 6, world=1)
    assert mean.correction(2) == other.correction(2) == 0.8


def test_a_window_that_was_never_finished_is_forgotten():
    mean = NormalisedLoss()
    mean.loss(torch.tensor(1.0), 4, world=1)
    mean.start()
    mean.loss(torch.tensor(1.0), 7, world=1)
    assert mean.correction(1) == 1
