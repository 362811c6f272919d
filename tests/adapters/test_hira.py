"""HiRA: its references, and equality with peft's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pera_lightning.adapters import HiLoRA, HiRA, LoRA
from pera_lightning.adapters.hira import layers_around
from pera_lightning.injection.inject import inject
from tests.adapters.cases import IN, OUT, adapted, inputs, network, randomise, the_adapter


def stack(count: int = 3) -> nn.ModuleList:
    """A stack of equal layers, as the layers of a transformer."""
    torch.manual_seed(0)
    return nn.ModuleList(nn.ModuleDict({"up": nn.Linear(IN, OUT), "down": nn.Linear(OUT, IN)}) for _ in range(count))


def references(model: nn.Module, name: str = "up") -> list[Tensor]:
    return [the_adapter(layer[name]).reference for layer in model]


def test_weight_is_the_frozen_weight_itself() -> None:
    """No copy: a base loaded later, or sharded, is the reference."""
    layer, x = adapted(HiRA(rank=3)), inputs()
    assert the_adapter(layer).reference is None
    before = layer(x) - layer.bias
    with torch.no_grad():
        layer.weight.mul_(2.0)
    torch.testing.assert_close(layer(x) - layer.bias, 2.0 * before)


def test_rank_of_the_update_is_high() -> None:
    layer = adapted(HiRA(rank=1))
    assert torch.linalg.matrix_rank(the_adapter(layer).delta_weight(layer.weight)) == min(IN, OUT)


def test_smooth_is_the_mean_of_the_neighbours_there_are() -> None:
    model = stack()
    up = [layer["up"].weight.detach().clone() for layer in model]
    inject(model, HiRA(rank=2, reference="smooth"), targets=["up", "down"])
    expected = [(up[0] + up[1]) / 2, (up[0] + up[1] + up[2]) / 3, (up[1] + up[2]) / 2]
    for found, wanted in zip(references(model), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert references(model, "down")[0].shape == (IN, OUT)


def test_smooth_takes_neighbours_that_are_no_targets_themselves() -> None:
    model = stack()
    up = [layer["up"].weight.detach().clone() for layer in model]
    inject(model, HiRA(rank=2, reference="smooth"), targets=["1.up"])
    torch.testing.assert_close(the_adapter(model[1]["up"]).reference, (up[0] + up[1] + up[2]) / 3)


def paths_around(model: nn.Module, path: str) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[layer] for layer in layers_around(model)[path]]


def test_layers_around_are_of_the_same_role_and_shape() -> None:
    stages = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(n, n), "out": nn.Linear(n, 2)}) for n in (4, 4, 4, 8))
    assert paths_around(stages, "0.fc") == ["0.fc", "1.fc"]
    assert paths_around(stages, "1.fc") == ["0.fc", "1.fc", "2.fc"]
    assert paths_around(stages, "2.fc") == ["1.fc", "2.fc"]
    assert paths_around(stages, "3.fc") == ["3.fc"]


def test_numbers_of_other_things_than_blocks_make_no_role() -> None:
    """The two linears of one MLP in a Sequential are not the same role, those of two blocks are."""
    model = nn.Module()
    model.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(2)))
    assert paths_around(model, "blocks.0.2") == ["blocks.0.2", "blocks.1.2"]


def test_smooth_takes_the_same_slice_and_passes_over_unused_layers() -> None:
    model = stack(4)
    model[3].output_unused = True
    up = [layer["up"].weight.detach().clone() for layer in model]
    inject(model, HiRA(rank=2, reference="smooth"), ["2.up[b]"], fused={"up": {"a": 4, "b": OUT - 4}})
    torch.testing.assert_close(model[2]["up"].adapters["b"].reference, ((up[1] + up[2]) / 2)[4:])


def test_svd_keeps_the_largest_singular_values() -> None:
    model = network()
    sigma = torch.linalg.svdvals(model.proj.weight)
    inject(model, HiRA(rank=2, reference="svd", reference_rank=3), targets=["proj"])
    R = the_adapter(model.proj).reference
    torch.testing.assert_close(torch.linalg.svdvals(R)[:3], sigma[:3])
    assert torch.linalg.matrix_rank(R, rtol=1e-5) == 3
    error = (model.proj.weight - R).square().sum()  # the best there is of that rank
    torch.testing.assert_close(error, sigma[3:].square().sum())


def test_random_is_uniform_and_reproducible() -> None:
    def draw(seed: int | None, run_seed: int = 0) -> list[Tensor]:
        model = stack()
        inject(model, HiRA(rank=2, reference="random", reference_seed=seed), targets=["up"], seed=run_seed)
        return references(model)

    first = draw(1)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(1), strict=True))
    # A checkpoint does not hold R, so it may not depend on the run's seed.
    assert all(torch.equal(a, b) for a, b in zip(first, draw(1, run_seed=5), strict=True))
    assert not torch.equal(first[0], draw(2)[0])
    assert not torch.equal(first[0], first[1])
    everything = torch.cat(first)
    assert everything.min() >= 0
    assert everything.max() < 1
    assert everything.mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("reference", ["weight", "random", "smooth", "svd"])
def test_the_reference_is_never_saved_and_moves_with_the_layer(reference: str) -> None:
    method = HiRA(rank=2, reference=reference, reference_rank=2 if reference == "svd" else None)
    layer = adapted(method)
    assert not any("reference" in key for key in layer.state_dict())
    if reference != "weight":
        assert the_adapter(layer).reference.dtype == torch.float64  # .double() reached it
        assert not the_adapter(layer).reference.requires_grad


def test_one_product_in_float32_and_two_in_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr("torch.nn.functional.linear", lambda x, w, b=None: (sizes.append(w.shape), linear(x, w, b))[1])

    def products(method: HiRA | HiLoRA, dtype: torch.dtype, training: bool = True) -> int:
        sizes.clear()
        adapted(method, dtype=dtype, double=False).train(training)(inputs(dtype=dtype))
        return sum(shape == (OUT, IN) for shape in sizes)

    for method in (HiRA, HiLoRA):
        assert products(method(), torch.float32) == 1
        assert products(method(dropout=0.1), torch.float32) == 2
        assert products(method(dropout=0.1), torch.float32, training=False) == 1
        assert products(method(), torch.bfloat16) == 2


def test_hilora_is_hira_plus_lora() -> None:
    layer, x = adapted(HiLoRA(hira_rank=3, lora_rank=4, alpha=6)), inputs()
    base = torch.nn.functional.linear(x, layer.weight, layer.bias)
    total = base.clone()
    for method, part in ((HiRA(rank=3), "hira"), (LoRA(rank=4, alpha=6), "lora")):
        other = adapted(method)
        the_adapter(other).load_state_dict(copy.deepcopy(the_adapter(layer).get_submodule(part).state_dict()))
        total += other(x) - base
    torch.testing.assert_close(layer(x), total)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_peft(bias: bool) -> None:
    import peft

    ours, theirs, x = network(bias=bias).double(), network(bias=bias).double(), inputs(4)
    inject(ours, HiRA(rank=4), targets=["proj"])
    randomise(ours.double())
    theirs = peft.get_peft_model(theirs, peft.HiraConfig(r=4, hira_dropout=0.0, target_modules=["proj"])).double()
    A, B = (theirs.get_parameter(f"base_model.model.proj.hira_{name}.default") for name in "AB")
    adapter = the_adapter(ours.proj)
    with torch.no_grad():
        A.copy_(adapter.A)
        B.copy_(adapter.B)
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(adapter.A.grad, A.grad)
    torch.testing.assert_close(adapter.B.grad, B.grad)


def test_under_autocast_a_small_update_is_not_rounded_into_the_weight() -> None:
    """The base makes nothing of this input, so the update is all there is; next to a 1 in bfloat16 it would be lost."""
    model, x = network(bias=False), torch.zeros(1, IN)
    torch.nn.init.ones_(model.proj.weight)
    x[0, 0], x[0, 1] = 1.0, -1.0
    inject(model, HiRA(rank=3), targets=["proj"], seed=0)
    randomise(model, 0.02)
    wanted = model(x)
    assert 1e-4 < wanted.abs().max() < 2e-3
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), wanted, rtol=0.05, atol=1e-5)
