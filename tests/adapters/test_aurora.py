"""AuroRA: its spline, its modes and its ablations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pera_lightning.adapters import AuroRA
from pera_lightning.adapters.aurora import ACTIVATIONS, bspline_basis, static_inference, uniform_knots
from pera_lightning.errors import NotMergeableError
from pera_lightning.injection.inject import inject
from tests.adapters.cases import adapted, inputs, network, the_adapter


@pytest.mark.parametrize(("size", "order", "ends"), [(5, 3, (-1.0, 1.0)), (4, 2, (0.0, 3.0)), (1, 1, (-2.0, -1.0))])
def test_basis_is_a_partition_of_unity_inside_the_grid(size: int, order: int, ends: tuple[float, float]) -> None:
    knots = uniform_knots(size, order, ends)
    assert len(knots) == size + 2 * order + 1
    torch.testing.assert_close(knots[[order, -order - 1]], torch.tensor(ends, dtype=torch.float64))
    z = torch.linspace(*ends, 101, dtype=torch.float64)[:-1]
    basis = bspline_basis(z, knots, order)
    assert basis.shape == (100, size + order)
    assert (basis >= 0).all()
    torch.testing.assert_close(basis.sum(-1), torch.ones(100, dtype=torch.float64))


def test_basis_is_zero_outside_the_knots() -> None:
    knots = uniform_knots(5, 3, (-1.0, 1.0))
    far = torch.tensor([-50.0, knots[0] - 1e-6, knots[-1], 50.0], dtype=torch.float64)
    assert not bspline_basis(far, knots, 3).any()


def test_cubic_basis_has_its_known_values() -> None:
    """A uniform cubic B-spline is 1/6, 4/6 and 1/6 at its inner knots."""
    basis = bspline_basis(torch.tensor([0.0]), torch.arange(-2.0, 3.0), 3)
    torch.testing.assert_close(basis, torch.tensor([[4 / 6]]))
    assert bspline_basis(torch.tensor([1.0]), torch.arange(-2.0, 3.0), 3).item() == pytest.approx(1 / 6)


@pytest.mark.parametrize("train_mode", ["dynamic", "static"])
@pytest.mark.parametrize("inference_mode", ["dynamic", "static"])
def test_modes(train_mode: str, inference_mode: str) -> None:
    layer, x = adapted(AuroRA(rank=3, train_mode=train_mode, inference_mode=inference_mode)), inputs()
    adapter = the_adapter(layer)
    s, B, A, sigma = adapter.scale, adapter.B, adapter.A, adapter.anl
    wanted = {"dynamic": s * sigma(x @ A.T) @ B.T, "static": s * x @ sigma(A.T) @ B.T}
    assert not torch.allclose(wanted["dynamic"], wanted["static"])
    for training, mode in ((True, train_mode), (False, inference_mode)):
        layer.train(training)
        torch.testing.assert_close(layer(x) - F.linear(x, layer.weight, layer.bias), wanted[mode])


def test_static_inference_is_for_the_context_only() -> None:
    model = network()
    inject(model, AuroRA(rank=3), targets=["proj"])
    torch.nn.init.normal_(the_adapter(model.proj).B)
    model.eval()
    x = inputs(dtype=torch.float32)
    before = model(x)
    with static_inference(model) as changed:
        assert changed == 1
        assert not torch.allclose(model(x), before)
    assert torch.equal(model(x), before)
    with pytest.raises(ZeroDivisionError), static_inference(model):
        1 / 0  # noqa: B018
    assert torch.equal(model(x), before)
    static = adapted(AuroRA(rank=3, inference_mode="static"))
    with static_inference(static) as changed:
        assert changed == 0
    assert the_adapter(static).inference_mode == "static"


def test_dynamic_inference_says_how_to_merge() -> None:
    layer = adapted(AuroRA(train_mode="static"))
    with pytest.raises(NotMergeableError, match=r"not a linear map: take the mode 'calibrated' \(.*\), or 'static'"):
        the_adapter(layer).delta_weight(layer.weight)


def test_activations_differ() -> None:
    outputs = []
    for name in ACTIVATIONS:
        layer = adapted(AuroRA(rank=3, activation=name))
        outputs.append(layer(inputs()))
    for k, one in enumerate(outputs):
        assert not any(torch.allclose(one, other) for other in outputs[:k])


def test_ablations_have_no_storage() -> None:
    full, spline, fixed = (
        the_adapter(adapted(AuroRA(rank=3, **kept))) for kept in ({}, {"fixed": False}, {"learnable": False})
    )
    assert spline.anl.self_projection is None
    assert fixed.anl.spline_weight is None
    assert fixed.anl.grid is None
    count = {name: sum(p.numel() for p in a.parameters()) for name, a in (("all", full), ("s", spline), ("f", fixed))}
    assert count["all"] - count["s"] == 3 * 3
    assert count["all"] - count["f"] == 3 * 8


def test_sigma_is_exact_in_low_precision() -> None:
    """A spline in bfloat16 is coarse: σ runs in float32, also under autocast."""
    sigma = the_adapter(adapted(AuroRA(rank=3), double=False)).anl
    z = torch.randn(64, 3).bfloat16()
    wanted = sigma(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sigma(z.float()), wanted)
        assert torch.equal(sigma(z), wanted.bfloat16())
    assert torch.equal(sigma(z), wanted.bfloat16())


def test_initial_values() -> None:
    adapter = the_adapter(adapted(AuroRA(rank=8), spread=None))
    assert not adapter.B.any()
    assert adapter.A.std().item() == pytest.approx((2 / (8 + 10)) ** 0.5, rel=0.3)
    assert adapter.anl.self_projection.std().item() == pytest.approx((2 / 16) ** 0.5, rel=0.3)
    assert 0.08 < adapter.anl.spline_weight.abs().max() <= 0.1
