"""The calibrated merge: the fit against numpy, the order of the layers, and how many passes it takes."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pera_lightning import merge
from pera_lightning.adapters import AdaptedLayer, AuroRA
from pera_lightning.adapters.aurora import AuroRALayer
from pera_lightning.errors import NotMergeableError
from pera_lightning.merging.calibration import Moments
from pera_lightning.merging.linearised import linearised
from tests.merging.helpers import WIDTH, Stack, adapters, moved, tokens

RIDGE, TINY = 1e-3, 1e-6  # by default; and what keeps the fit on z well-posed


def ridge_regression(x: list[list[float]], y: list[list[float]], ridge: float, towards: np.ndarray) -> np.ndarray:
    """argmin over N of Σ_t |y_t - N x_t|² + ridge · mean(x²) · n · |N - towards|², as one larger system for numpy."""
    width, height = len(x[0]), len(y[0])
    weight = math.sqrt(ridge * math.fsum(v * v for row in x for v in row) / width)
    left = x + [[weight if j == i else 0.0 for j in range(width)] for i in range(width)]
    right = y + [[weight * towards[k][i] for k in range(height)] for i in range(width)]
    return np.linalg.lstsq(np.array(left), np.array(right), rcond=None)[0].T


@torch.no_grad()
def fit(adapter: AuroRALayer, x: Tensor, *, constant: bool, ridge: float = RIDGE) -> tuple[np.ndarray, np.ndarray]:
    """N and c of σ(A x) ≈ N x + c for inputs x (n, in), by numpy and plain loops, from the formula."""
    x = x.reshape(-1, x.shape[-1])
    A, rows = adapter.A.double().numpy(), x.double().tolist()
    sigma = adapter.anl(x @ adapter.A.T).double().tolist()
    mean_x = [math.fsum(row[i] for row in rows) / len(rows) if constant else 0.0 for i in range(len(rows[0]))]
    mean_s = [math.fsum(row[k] for row in sigma) / len(rows) if constant else 0.0 for k in range(len(A))]
    rows = [[v - m for v, m in zip(row, mean_x, strict=True)] for row in rows]
    sigma = [[v - m for v, m in zip(row, mean_s, strict=True)] for row in sigma]
    z = [[math.fsum(a * v for a, v in zip(line, row, strict=True)) for line in A.tolist()] for row in rows]
    M = ridge_regression(z, sigma, TINY, np.zeros((len(A), len(A))))
    N = ridge_regression(rows, sigma, max(ridge, TINY), M @ A)
    return N, np.array(mean_s) - N @ np.array(mean_x)


def update_of(adapter: AuroRALayer, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """ΔW = s · B N and Δb = s · B c."""
    B = adapter.scale * adapter.B.detach().double()
    N, c = (torch.from_numpy(value) for value in fit(adapter, x, **options))
    return (B @ N).float(), (B @ c).float()


def seen(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[Tensor]]:
    """The inputs that every adapted layer gets while something runs, by path."""
    inputs: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, path=path: inputs.setdefault(path, []).append(args[0]))
        for path, layer in model.named_modules()
        if isinstance(layer, AdaptedLayer)
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return inputs


# --- the fit ---


def one_layer(method: AuroRA | None = None, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return moved(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=bias)), method, ["0"])


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "origin"])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3])
def test_the_fit_is_numpys(ridge: float, constant: bool) -> None:
    both = [one_layer(AuroRA(rank=rank))[0].adapters["all"].double() for rank in (3, 2)]
    x = tokens(50).double() * torch.tensor([1.0, 0.1, 5.0, 1.0, 1.0, 1.0]) + 0.5
    moments = Moments(both)
    with torch.no_grad():
        for part in (slice(0, 7), slice(7, 8), slice(8, 50)):  # batches of several lengths
            moments.add(x[part])
        for index, adapter in enumerate(both):
            N, c, unexplained = moments.fit(index, ridge, constant)
            wanted = fit(adapter, x, constant=constant, ridge=ridge)
            assert N.dtype == c.dtype == torch.float64
            np.testing.assert_allclose(N.numpy(), wanted[0], rtol=1e-6, atol=1e-8)
            np.testing.assert_allclose(c.numpy(), wanted[1], rtol=1e-6, atol=1e-8)
            assert constant or not c.any()
            sigma = adapter.anl(x @ adapter.A.T)
            left = (sigma - x @ N.T - c).square().sum()
            total = (sigma - sigma.mean(0) * constant).square().sum()
            assert unexplained == pytest.approx((left / total).item(), rel=1e-6)


@pytest.mark.parametrize("bias", [True, False], ids=["constant", "origin"])
def test_directions_that_never_occur(bias: bool) -> None:
    """Fewer tokens than features, all the same token, or zeros: nothing explodes, and what occurs is met."""
    line = torch.linspace(-0.1, 0.1, 9)[:, None] * torch.ones(WIDTH)
    for x in (tokens(3), tokens(1).expand(50, WIDTH), torch.zeros(9, WIDTH), line):
        model = one_layer(AuroRA(rank=2, learnable=False), bias=bias)
        before = model(x)
        with linearised(model, "calibrated", [x]):
            assert model[0].adapters["all"].low_rank_update().delta_weight().abs().max() < 50
            torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_a_linear_update_is_found_exactly(bias: bool) -> None:
    """ReLUs that are all open: σ(z) = H z on these inputs."""
    model = moved(Stack(2, bias=bias), AuroRA(rank=2, activation="relu", learnable=False))
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()
    x = tokens().abs()
    before = model(x)
    report = merge(model, mode="calibrated", batches=[x])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert report.merge_error.outputs < 1e-5


METHODS = [AuroRA(rank=2), AuroRA(rank=3, activation="relu"), AuroRA(rank=2, fixed=False)]


@pytest.mark.parametrize("method", METHODS, ids=["tanh", "relu", "spline"])
def test_calibrated_beats_static_and_leaving_the_adapter_out(method: AuroRA) -> None:
    """On inputs that were not calibrated with."""
    held_out = tokens(500, seed=9)
    errors = {}
    for how, options in (("static", {}), ("calibrated", {"batches": [tokens(2000)]})):
        errors[how] = merge(moved(Stack(3), method), mode=how, measure_on=[held_out], **options).merge_error.outputs
    assert errors["calibrated"] < 0.6 * errors["static"]
    assert errors["calibrated"] < 0.8 * without_adapters(moved(Stack(3), method), held_out)


@pytest.mark.parametrize("method", METHODS, ids=["tanh", "relu", "spline"])
def test_through_the_origin_a_layer_still_gains(method: AuroRA) -> None:
    """Without a bias σ's constant has no place, and a stack can go far wrong; a layer alone gains all the same."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)), tokens(1000)
    errors = {}
    for how, batches in (("static", None), ("calibrated", [x])):
        model = moved(copy.deepcopy(plain), method, ["0"])
        errors[how] = merge(model, mode=how, batches=batches, measure_on=[x]).merge_error.outputs
    assert errors["calibrated"] < min(errors["static"], without_adapters(moved(plain, method, ["0"]), x))


@torch.no_grad()
def without_adapters(model: nn.Module, x: Tensor) -> float:
    """Relative change of the outputs where the adapters are left out."""
    before = model(x)
    for adapter in adapters(model).values():
        adapter.B.zero_()
    return ((model(x) - before).norm() / before.norm()).item()


@pytest.mark.parametrize("seed", range(3))
def test_many_equal_tokens(seed: int) -> None:
    """As a layer of a time embedding gets: their centred moments are rounding, of either sign."""
    model, x = one_layer(), 10 * tokens(1, seed).expand(3001, WIDTH)
    before = model(x)
    with linearised(model, "calibrated", [x]):
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


# --- layer after layer ---


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_each_layer_sees_the_linear_maps_before_it(bias: bool) -> None:
    model, x = moved(Stack(3, bias=bias)), tokens()
    dynamic = seen(model, lambda: model(x))
    with linearised(model, "calibrated", [x]):
        inputs = seen(model, lambda: model(x))
        for path, adapter in adapters(model).items():
            layer = path.partition(".")[0]
            weight, constant = update_of(adapter, inputs[layer][0], constant=bias)
            found = adapter.low_rank_update()
            torch.testing.assert_close(found.delta_weight(), weight, rtol=1e-4, atol=1e-5)
            assert found.rank == 2
            assert (found.bias is None) is not bias
            if bias:
                torch.testing.assert_close(found.bias, constant, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(inputs["proj2"][0], dynamic["proj2"][0])  # else the order would not matter


def test_the_constant_goes_into_the_bias_of_the_base_and_none_is_made() -> None:
    model, x = moved(Stack(1)), tokens()
    start = model.proj0.bias.clone()
    with linearised(model, "calibrated", [x]):
        constant = adapters(model)["proj0.adapters.all"].delta_bias()
        linear = model(x)
    merge(model, mode="calibrated", batches=[x])
    torch.testing.assert_close(model.proj0.bias - start, constant)
    assert constant.abs().max() > 0.01
    torch.testing.assert_close(model(x), linear)
    bare = moved(Stack(1, bias=False))
    merge(bare, mode="calibrated", batches=[x])
    assert bare.proj0.bias is None


def test_batches_add_up() -> None:
    updates = []
    for batches in ([tokens()], list(tokens().split([1, 99, 200])), [tokens().view(3, 20, 5, WIDTH)]):
        model = moved(Stack())
        with linearised(model, "calibrated", batches):
            updates.append([adapter.low_rank_update().delta_weight() for adapter in adapters(model).values()])
    for other in updates[1:]:
        torch.testing.assert_close(other, updates[0], rtol=1e-4, atol=1e-5)


def test_the_ridge_pulls_towards_a_fit_on_what_the_adapter_sees() -> None:
    sizes = []
    for ridge in (1e-6, 1.0, 1e6):
        model = moved(Stack(1))
        adapter = adapters(model)["proj0.adapters.all"]
        on_z = torch.linalg.svd(adapter.A)[2][2:]  # (in - r, in): directions that A does not see
        with linearised(model, "calibrated", [tokens()], ridge=ridge):
            sizes.append((adapter.low_rank_update().A @ on_z.T).norm().item())
    assert sizes[0] > 1.5 * sizes[1] > 1e3 * sizes[2]


def test_row_blocks_are_fitted_each_for_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 12))
    moved(model, targets=["0[q,v]"], fused={"0": {"q": 3, "k": 3, "v": 6}})
    start, x = model[0].bias.clone(), tokens()
    with linearised(model, "calibrated", [x]):
        for adapter in adapters(model).values():
            weight, constant = update_of(adapter, x, constant=True)
            torch.testing.assert_close(adapter.delta_weight(model[0].weight), weight, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(adapter.delta_bias(), constant, rtol=1e-4, atol=1e-5)
        linear = model(x)
    merge(model, mode="calibrated", batches=[x])
    torch.testing.assert_close(model(x), linear)
    assert torch.equal(model[0].bias[3:6], start[3:6])
    assert not torch.equal(model[0].bias[:3], start[:3])


# --- which layers run when ---


class Attention(nn.Module):
    """q, k and v from one tensor, then o; an embedding before and a head after, which count the passes."""

    def __init__(self, repeats: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        self.repeats = repeats

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(self.repeats):
            x = x + self.o_proj(torch.sigmoid(self.q_proj(x) * self.k_proj(x)) * self.v_proj(x))
        return self.head(x)


def calls(model: nn.Module, run: Callable[[], Any]) -> Counter[str]:
    """How often each submodule runs."""
    counted: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, path=path: counted.update([path]))
        for path, module in model.named_children()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return counted


def calibrated(model: nn.Module, batches: list[Any], **options: Any) -> None:
    with linearised(model, "calibrated", batches, **options):
        pass


def test_each_group_takes_one_more_pass_that_stops_at_it() -> None:
    """Three batches: one pass each to see the order, one as far as q, k and v, and one as far as o."""
    model = moved(Attention())
    batches = list(tokens().split(100))
    counted = calls(model, lambda: calibrated(model, batches))
    assert counted == {"embed": 9, "q_proj": 6, "k_proj": 6, "v_proj": 6, "o_proj": 3, "head": 3}


def test_a_layer_that_runs_twice_is_fitted_to_both_inputs() -> None:
    """Of q, k and v as linear as they will be, and of itself as it is still."""
    model, x = moved(Attention(repeats=2)), tokens()
    with linearised(model, "calibrated", [x]):
        adapter = adapters(model)["o_proj.adapters.all"]
        found = adapter.low_rank_update().delta_weight()
        adapter.inference_mode = "dynamic"
        inputs = seen(model, lambda: model(x))["o_proj"]
        assert len(inputs) == 2
        weight, _ = update_of(adapter, torch.cat(inputs), constant=True)
        first, _ = update_of(adapter, inputs[0], constant=True)
    torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-5)
    assert (found - first).norm() > 0.05 * found.norm()


class Routed(nn.Module):
    """Each batch goes to the expert that its sign names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj_in, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.expert_proj = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        expert = self.expert_proj[int(x.sum() > 0)]
        return self.out(torch.tanh(expert(torch.tanh(self.proj_in(x)))))


def test_experts_are_fitted_to_their_own_batches() -> None:
    model = moved(Routed())
    batches = [sign * batch.abs() for batch, sign in zip(tokens(400).split(100), (1, -1, -1, 1), strict=True)]
    with linearised(model, "calibrated", batches):
        inputs = seen(model, lambda: [model(batch) for batch in batches])
        for path, adapter in adapters(model).items():
            layer = path.removesuffix(".adapters.all")
            assert len(inputs[layer]) == (4 if layer == "proj_in" else 2)
            weight, _ = update_of(adapter, torch.cat(inputs[layer]), constant=True)
            torch.testing.assert_close(adapter.low_rank_update().delta_weight(), weight, rtol=1e-4, atol=1e-5)


def test_layers_that_no_batch_reaches_are_named() -> None:
    model = moved(Routed())
    with pytest.raises(NotMergeableError, match=r"^1 layers do not run for any batch: expert_proj\.1$"):
        merge(model, mode="calibrated", batches=[-tokens().abs()])
    assert all(adapter.inference_mode == "dynamic" for adapter in adapters(model).values())


class Sometimes(nn.Module):
    """Adds a second layer to the first for some batches only; both get the same input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj_a, self.proj_b, self.proj_c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj_a(x)
        return self.proj_c(torch.tanh(y + self.proj_b(x) if x.sum() > 0 else y))


def test_a_layer_that_joins_in_a_later_batch_is_fitted_to_its_own_input() -> None:
    x = tokens().abs()
    updates = []
    for batches in ([x, -x], [-x, x]):
        model = moved(Sometimes())
        with linearised(model, "calibrated", batches):
            updates.append(adapters(model)["proj_b.adapters.all"].low_rank_update().delta_weight())
    found, changed = (update.norm().item() for update in (updates[0], updates[1] - updates[0]))
    assert changed < 0.5 * found


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((4, WIDTH), math.nan), "NaN or infinite inputs"),
        (torch.full((4, WIDTH), math.inf), "NaN or infinite inputs"),
        (tokens(0), "padding only, no token"),
    ],
)
def test_inputs_that_say_nothing(x: Tensor, message: str) -> None:
    with pytest.raises(NotMergeableError, match=f"the calibration batches give proj0 {message}"):
        merge(moved(Stack()), mode="calibrated", batches=[x])


def test_few_tokens_are_told() -> None:
    for rows, told in ((WIDTH, True), (20 * WIDTH, False)):
        notes = merge(moved(Stack()), mode="calibrated", batches=[tokens(rows)]).notes
        assert any(f"{rows} tokens, few for {WIDTH} input features" in note for note in notes) is told
