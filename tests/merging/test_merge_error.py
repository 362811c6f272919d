"""The error of a merge against plain loops, how models are called, and how batches are taken."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pera_lightning.errors import ConfigurationError
from pera_lightning.merging.merge_error import (
    ROWS,
    Measured,
    MergeError,
    batch_list,
    call,
    evaluating,
    measure,
    merge_error,
    on_device,
)


def outputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the numbers ---


def test_the_change_is_the_relative_norm_over_all_batches() -> None:
    """One norm over everything, so a batch of small outputs does not count as much as one of large ones."""
    before = [outputs(4, 3), 100 * outputs(2, 3, seed=1)]
    after = [before[0] + 0.5, before[1] - 2.0]
    changed = size = 0.0
    for y, other in zip(before, after, strict=True):
        for one, new in zip(y.flatten().tolist(), other.flatten().tolist(), strict=True):
            changed += (new - one) ** 2
            size += one**2
    found = merge_error(Measured(before, [1.0, 3.0]), Measured(after, [2.0, 7.0]))
    assert found.outputs == pytest.approx(math.sqrt(changed / size), rel=1e-6)
    assert (found.loss_before, found.loss_after, found.batches) == (2.0, 4.5, 2)


def test_a_change_of_nothing_and_from_nothing() -> None:
    zero, one = Measured([torch.zeros(2, 2)], [None]), Measured([torch.ones(2, 2)], [None])
    assert merge_error(one, one).outputs == 0.0
    assert merge_error(zero, zero).outputs == 0.0
    assert merge_error(zero, one).outputs == math.inf
    assert merge_error(one, zero).outputs == 1.0
    assert merge_error(Measured([], []), Measured([], [])) is None
    assert math.isnan(merge_error(one, Measured([torch.full((2, 2), math.nan)], [None])).outputs)


@pytest.mark.parametrize("losses", [[None, None], [1.0, None]])
def test_without_a_loss_for_every_batch_there_is_none(losses: list[float | None]) -> None:
    y = [outputs(2, 2) for _ in losses]
    found = merge_error(Measured(y, losses), Measured(y, losses))
    assert (found.loss_before, found.loss_after, found.batches) == (None, None, len(losses))


def test_in_words() -> None:
    assert str(MergeError(0.01234, None, None, 3)) == (
        "outputs changed by 0.0123 (relative, on 3 batches); the loss was not measured, the batches have no labels"
    )
    assert str(MergeError(1.5, 0.5, 2.25, 2)).endswith("(relative, on 2 batches); loss 0.5000 before, 2.2500 after")


# --- measuring ---


def test_the_rows_that_are_kept_are_spread_over_the_batch() -> None:
    rows = 3 * ROWS + 1
    y = torch.arange(rows).float()[:, None].expand(rows, 2)
    (kept,) = measure(nn.Identity(), [y.reshape(1, rows, 2)]).outputs
    assert kept.shape == (ROWS, 2)
    index = kept[:, 0].tolist()
    assert (index[0], index[-1]) == (0, rows - 1)
    assert {b - a for a, b in itertools.pairwise(index)} <= {3.0, 4.0}


@pytest.mark.parametrize("rows", [1, 2, ROWS - 1, ROWS])
def test_all_rows_of_a_small_batch_are_kept_in_order(rows: int) -> None:
    y = outputs(rows, 3)
    assert torch.equal(measure(nn.Identity(), [y]).outputs[0], y)


def test_every_position_of_a_sequence_is_a_row() -> None:
    y = outputs(2, 5, 7)
    assert torch.equal(measure(nn.Identity(), [y]).outputs[0], y.view(10, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_outputs_are_kept_in_float32(dtype: torch.dtype) -> None:
    (kept,) = measure(nn.Identity(), [outputs(3, 2).to(dtype)]).outputs
    assert kept.dtype == torch.float32


def test_measuring_leaves_modes_and_gradients_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2)).train()
    model[2].eval()
    x = outputs(9, 3)
    first, second = measure(model, [x]), measure(model, [x])
    assert torch.equal(first.outputs[0], second.outputs[0])  # without dropout
    assert not first.outputs[0].requires_grad
    assert [m.training for m in model.modules()] == [True, True, True, False]
    with pytest.raises(RuntimeError, match="shapes"):
        measure(model, [outputs(9, 4)])
    assert [m.training for m in model.modules()] == [True, True, True, False]
    with evaluating(model):
        assert not any(m.training for m in model.modules())


def test_a_forward_of_ones_own_gives_outputs_or_outputs_and_loss() -> None:
    model, batch = nn.Identity(), {"x": outputs(4, 2)}
    only = measure(model, [batch], lambda m, b: m(b["x"]))
    both = measure(model, [batch, batch], lambda m, b: (m(b["x"]), m(b["x"]).square().mean()))
    assert only.losses == [None]
    assert both.losses == [pytest.approx(batch["x"].square().mean().item())] * 2
    assert torch.equal(only.outputs[0], both.outputs[1])


def test_a_language_model_gives_logits_and_loss() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=2)).eval()
    tokens = torch.arange(12).view(2, 6)
    found = measure(model, [{"input_ids": tokens, "labels": tokens}])
    wanted = model(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(found.outputs[0], wanted.logits.detach().view(12, 40))
    assert found.losses == [pytest.approx(wanted.loss.item())]
    assert measure(model, [{"input_ids": tokens}]).losses == [None]
    assert measure(model, [(tokens,)]).outputs[0].shape == measure(model, [tokens]).outputs[0].shape == (12, 40)
    hidden, loss = call(model.model, tokens)
    assert hidden.shape == (2, 6, 16)
    assert loss is None


# --- calling ---


class Gives(nn.Module):
    """Gives back what it is told to, and remembers what it was called with."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value, self.seen = value, ()

    def forward(self, *args: Any, **keywords: Any) -> Any:
        self.seen = (args, keywords)
        return self.value


def test_how_a_batch_is_handed_over() -> None:
    y, one, two = outputs(2, 2), outputs(1), outputs(3)
    for batch, args, keywords in (
        ({"a": one, "b": two}, (), {"a": one, "b": two}),
        ((one, two), (one, two), {}),
        ([one, two], (one, two), {}),
        (one, (one,), {}),
        ("text", ("text",), {}),
    ):
        model = Gives(y)
        found, loss = call(model, batch)
        assert found is y
        assert loss is None
        assert model.seen == (args, keywords)


def test_what_is_read_of_an_output() -> None:
    y, other, loss = outputs(2, 2), outputs(2, 3), torch.tensor(2.5)
    assert call(Gives(SimpleNamespace(logits=y, last_hidden_state=other, loss=loss)), ()) == (y, loss)
    assert call(Gives(SimpleNamespace(logits=None, last_hidden_state=other)), ()) == (other, None)
    assert call(Gives((y, other)), ()) == (y, None)
    assert call(Gives([y]), ()) == (y, None)


@pytest.mark.parametrize(
    ("given", "kind"), [({"logits": 1}, "dict"), (None, "NoneType"), (3.0, "float"), (("a",), "tuple")]
)
def test_an_output_that_is_not_known(given: Any, kind: str) -> None:
    message = rf"^Gives gives a {kind} without a known tensor: give forward=function\(model, batch\)"
    with pytest.raises(ConfigurationError, match=message):
        call(Gives(given), ())


def test_tensors_are_moved_wherever_they_are_in_a_batch() -> None:
    moved = on_device({"x": torch.ones(2), "rest": [(torch.ones(1), "text"), 3]}, torch.device("meta"))
    assert moved["x"].is_meta
    assert moved["rest"][0][0].is_meta
    assert (moved["rest"][0][1], moved["rest"][1]) == ("text", 3)


# --- taking ---


def test_batches_are_taken_once_and_run_twice() -> None:
    assert batch_list(None) == []
    assert batch_list(iter([1, 2])) == [1, 2]
    loader = torch.utils.data.DataLoader(outputs(4, 2), batch_size=3)
    assert [len(batch) for batch in batch_list(loader)] == [3, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(2), r"batches is one Tensor: give a list of batches, \[batch\]"),
        ({"x": 1}, "batches is one dict"),
        ("batches", "batches is one str"),
        (3, "batches is one int"),
        ([], "batches has no batch: give at least one"),
        (iter(()), "batches has no batch"),
    ],
)
def test_what_is_no_list_of_batches(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        batch_list(given)


# --- padding, and batches of loaders ---


def test_padding_does_not_count() -> None:
    """The same rows, padded more and with other padding, give the same outputs to compare."""

    class Tokens(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return nn.functional.one_hot(input_ids, 9).float()

    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    more = torch.cat([ids, torch.full((2, 4), 7)], 1)
    longer = torch.cat([mask, torch.zeros(2, 4, dtype=torch.long)], 1)
    few, many = (
        measure(Tokens(), [{"input_ids": i, "attention_mask": m}]).outputs[0] for i, m in ((ids, mask), (more, longer))
    )
    assert len(few) == 5
    assert torch.equal(few, many)


def test_images_with_labels_are_told_what_to_do() -> None:
    """A model cannot be called with what a DataLoader gives."""
    with pytest.raises(ConfigurationError, match=r"Linear, called with the 2 members of a batch, says: "):
        call(nn.Linear(3, 2), (torch.ones(1, 3), torch.tensor([0])))


def test_a_module_that_knows_its_batches_is_asked() -> None:
    class Module(nn.Module):
        model = nn.Linear(3, 2)

        def outputs_and_loss(self, network: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            logits = network(batch[0])
            return logits, nn.functional.cross_entropy(logits, batch[1])

    measured = measure(Module(), [(torch.ones(2, 3), torch.tensor([0, 1]))])
    assert measured.losses[0] is not None
