"""Linear updates for a while: how the model is called for them, what is left afterwards, and every precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning import adapter_state_dict, inject, merge
from pera_lightning.adapters import AuroRA, LoRA
from pera_lightning.merging.linearised import linearised
from tests.merging.helpers import WIDTH, Stack, adapters, moved, tokens

# --- how the model is called, and what is left ---


def test_batches_that_are_mappings_and_a_call_of_ones_own() -> None:
    class Named(Stack):
        def forward(self, *, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    batches: list[Any] = [{"x": tokens(), "mask": None}]
    updates = []
    for model, given, forward in (
        (moved(Stack()), [tokens()], None),
        (moved(Named()), batches, None),
        (moved(Named()), [("unused", tokens())], lambda model, batch: model(x=batch[1])),
    ):
        with linearised(model, "calibrated", given, forward):
            updates.append([adapter.low_rank_update().delta_weight() for adapter in adapters(model).values()])
    assert all(torch.equal(a, b) for other in updates[1:] for a, b in zip(other, updates[0], strict=True))


def test_padding_is_left_out() -> None:
    class Masked(Stack):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(x)

    x, mask = tokens(40).view(4, 10, WIDTH), torch.ones(4, 10, dtype=torch.long)
    mask[:, 6:] = 0
    updates = []
    for padding in (0.0, 99.0):
        model = moved(Masked())
        padded = torch.where(mask.bool()[..., None], x, torch.tensor(padding))
        with linearised(model, "calibrated", [{"x": padded, "attention_mask": mask}]) as notes:
            updates.append([a.low_rank_update().delta_weight() for a in adapters(model).values()])
        assert any("fitted to 24 tokens" in note for note in notes)
    torch.testing.assert_close(updates[0], updates[1])


def test_a_model_in_training_mode_is_calibrated_as_in_evaluation() -> None:
    method = AuroRA(rank=2, dropout=0.5, train_mode="static")
    updates = []
    for training in (False, True):
        model = moved(Stack(dropout=0.5), method).train(training)
        with linearised(model, "calibrated", [tokens()]):
            updates.append([adapter.low_rank_update().delta_weight() for adapter in adapters(model).values()])
        assert all(module.training is training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*updates, strict=True))


@pytest.mark.parametrize("how", ["static", "calibrated"])
@pytest.mark.parametrize("error", [False, True], ids=["", "error"])
def test_the_model_is_dynamic_again_afterwards(how: str, error: bool) -> None:
    model, x = moved(Stack()), tokens()
    model.proj1.train()
    modes, before, keys = [m.training for m in model.modules()], model(x), list(model.state_dict())
    adapter_keys, spec = list(adapter_state_dict(model)), str(model)
    batches = [x] if how == "calibrated" else []
    try:
        with linearised(model, how, batches):
            assert {adapter.inference_mode for adapter in adapters(model).values()} == {how}
            assert not torch.allclose(model.eval()(x), before)
            assert list(model.state_dict()) == keys  # a calibration is not saved
            assert list(adapter_state_dict(model)) == adapter_keys
            model.proj1.train()
            for module, mode in zip(model.modules(), modes, strict=True):
                module.training = mode
            if error:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert error
    assert str(model) == spec
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model(x), before)
    assert not any(buffer is not None for a in adapters(model).values() for buffer in a._buffers.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pass_that_fails_leaves_no_hook() -> None:
    model = moved(Stack())
    with (
        pytest.raises(RuntimeError, match=r"size|shapes"),
        linearised(model, "calibrated", [tokens(), tokens()[:, :5]]),
    ):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(adapter.inference_mode == "dynamic" for adapter in adapters(model).values())


def test_static_layers_stay_static() -> None:
    model = nn.ModuleDict({"one": moved(Stack()), "two": moved(Stack(), AuroRA(rank=2, inference_mode="static"))})
    with linearised(model, "static"):
        assert {a.inference_mode for a in adapters(model).values()} == {"static"}
    assert {a.inference_mode for a in adapters(model["one"]).values()} == {"dynamic"}
    assert {a.inference_mode for a in adapters(model["two"]).values()} == {"static"}
    other = moved(Stack(), AuroRA(rank=2, inference_mode="static"))
    with linearised(other, None) as notes:  # nothing to do
        assert notes == []


def test_other_adapters_of_the_model_are_left_alone() -> None:
    """LoRA in one part is linear already: it is neither fitted nor changed."""
    whole = nn.Sequential(Stack(), nn.Linear(3, WIDTH), moved(Stack()))
    inject(whole[0], LoRA(rank=2), ["re:.*proj.*"])
    before = copy.deepcopy(whole[0].state_dict())
    with linearised(whole, "calibrated", [tokens()]):
        assert all(torch.equal(value, before[name]) for name, value in whole[0].state_dict().items())


# --- precision ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["static", "calibrated"])
def test_in_every_precision(dtype: torch.dtype, how: str) -> None:
    model, x = moved(Stack().to(dtype)), tokens(100).to(dtype)
    batches = [x] if how == "calibrated" else []
    with torch.no_grad(), linearised(model, how, batches):
        linear = model(x)
    merge(model, mode=how, batches=[x])
    limit = 20 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-5  # adapters are float32
    assert (model(x) - linear).norm() < limit * linear.norm()
    assert {p.dtype for a in adapters(model).values() for p in a.parameters()} == {torch.float32}


def test_the_fit_of_a_low_precision_base_is_near_the_exact_one() -> None:
    updates = []
    for dtype in (torch.float32, torch.bfloat16):
        model = moved(Stack().to(dtype))
        with linearised(model, "calibrated", [tokens(1000).to(dtype)]):
            updates.append([adapter.low_rank_update().delta_weight() for adapter in adapters(model).values()])
    for exact, rounded in zip(*updates, strict=True):
        assert (exact - rounded).norm() < 0.05 * exact.norm()


def test_gradients_are_not_kept() -> None:
    model = moved(Stack())
    with linearised(model, "calibrated", [tokens().requires_grad_()]):
        update = adapters(model)["proj0.adapters.all"].low_rank_update()
        assert not any(t.requires_grad for t in (update.A, update.B, update.bias))
    assert F.mse_loss(model(tokens()), torch.zeros(300, 3)).requires_grad
