"""PERA: order and number of its products, its limits, and its exact expansion into a LoRA."""

from __future__ import annotations

import pytest
import torch

from pera_lightning.adapters import PERA, LoRA
from pera_lightning.adapters.lora import lora_output
from pera_lightning.adapters.pera import TERMS, expand, number_of_pairs, pairs
from tests.adapters.cases import IN, OUT, adapted, inputs, the_adapter


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ("full", [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]),
        ("square", [(0, 0), (1, 1), (2, 2)]),
        ("cross", [(0, 1), (0, 2), (1, 2)]),
        ("linear", []),
    ],
)
def test_order_of_the_pairs(terms: str, expected: list[tuple[int, int]]) -> None:
    """Saved coefficients mean what they mean by this order."""
    assert number_of_pairs(3, terms) == len(expected)
    if expected:
        i, j = pairs(3, terms)
        assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected


def test_expanded_rows_are_products_in_that_order() -> None:
    A, B, h = torch.tensor([[2.0, 3.0], [5.0, 7.0]]), torch.tensor([[11.0, 13.0]]), torch.tensor([1.0, 10.0, 100.0])
    big_a, big_b = expand(A, B, h, "full")
    assert big_a.tolist() == [[2, 3], [5, 7], [4, 9], [100, 210], [2500, 4900]]
    assert big_b.tolist() == [[11, 13, 121, 143, 169]]


def test_linear_is_lora_gradient_for_gradient() -> None:
    ours, lora = adapted(PERA(rank=4, alpha=6, terms="linear")), adapted(LoRA(rank=4, alpha=6))
    assert ours.state_dict().keys() == lora.state_dict().keys()
    lora.load_state_dict(ours.state_dict())
    for layer in (ours, lora):
        layer(inputs()).square().sum().backward()
    assert torch.equal(ours(inputs()), lora(inputs()))
    for name in "AB":
        one, other = (getattr(the_adapter(layer), name).grad for layer in (ours, lora))
        assert torch.equal(one, other)


def test_zero_coefficients_leave_lora() -> None:
    ours, lora = adapted(PERA(rank=4, alpha=6)), adapted(LoRA(rank=4, alpha=6))
    torch.nn.init.zeros_(the_adapter(ours).h)
    for name in "AB":
        getattr(the_adapter(lora), name).data.copy_(getattr(the_adapter(ours), name))
    torch.testing.assert_close(ours(inputs()), lora(inputs()))


@pytest.mark.parametrize("terms", TERMS)
def test_expanded_factors_are_a_lora(terms: str) -> None:
    layer = adapted(PERA(rank=4, alpha=6, terms=terms))
    adapter = the_adapter(layer)
    A, B = adapter.expanded()
    assert len(A) == B.shape[1] == 4 + number_of_pairs(4, terms)
    base = torch.nn.functional.linear(inputs(), layer.weight, layer.bias)
    torch.testing.assert_close(layer(inputs()), base + lora_output(inputs(), A, B, 1.5))


@pytest.mark.parametrize(("terms", "bound"), [("full", 2 * 3 + 3), ("square", 2 * 3), ("cross", 3 + 3), ("linear", 3)])
def test_rank_of_the_update(terms: str, bound: int) -> None:
    """Higher than LoRA's 3, and within 2 r + r (r - 1) / 2; a random point attains it."""
    layer = adapted(PERA(rank=3, terms=terms))
    assert torch.linalg.matrix_rank(the_adapter(layer).delta_weight(layer.weight)) == min(bound, IN, OUT)


def test_left_out_terms_have_no_storage() -> None:
    sizes = {t: sum(p.numel() for p in the_adapter(adapted(PERA(rank=4, terms=t))).parameters()) for t in TERMS}
    linear = 4 * (IN + OUT)
    assert sizes == {"full": linear + 10, "square": linear + 4, "cross": linear + 6, "linear": linear}
    assert the_adapter(adapted(PERA(rank=4, terms="linear"))).h is None
    assert the_adapter(adapted(PERA(rank=1, terms="cross"))).h is None


def test_initial_values() -> None:
    default = the_adapter(adapted(PERA(rank=8), spread=None))
    assert default.A.abs().max() > 0
    assert not default.B.any()
    assert not default.h.any()
    gaussian = the_adapter(adapted(PERA(rank=8, init="gaussian_b", init_std=0.5), spread=None))
    assert not gaussian.A.any()
    assert not gaussian.h.any()
    assert gaussian.B.std().item() == pytest.approx(0.5, rel=0.2)
