"""Merging whole models: the report, what is kept, and that unmerging undoes it all.

What each method merges to is in adapters/test_contract_merging.py, what is refused in test_merging_refusals.py, what a
merged model does in test_merged_models.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning import inject, merge, merge_and_unload, unmerge
from pera_lightning.adapters import PERA, AuroRA, HiRA, LinearProbe, LoRA, Method
from pera_lightning.errors import ConfigurationError
from pera_lightning.injection.inject import injection_of
from pera_lightning.merging.merge import adapted_layers, merged_layers
from tests.merging.helpers import adapted, base, equal, inputs, moved, weights

CAST = [torch.bfloat16, torch.float16, torch.float64]


# --- the report ---


def test_the_report_of_an_exact_merge() -> None:
    model = adapted()
    report = merge(model)
    assert (report.layers, report.mode, report.merge_error, report.notes) == (2, "exact", None, [])
    assert str(report) == "Merged 2 layers"
    again = merge(model)
    assert (again.layers, again.notes) == (0, ["the adapters are merged already"])
    assert "note: the adapters are merged already" in str(again)


def test_the_error_of_an_exact_merge_is_rounding() -> None:
    report = merge(adapted(), batches=[inputs(), inputs(9)])
    assert report.merge_error.outputs < 1e-6
    assert report.merge_error.batches == 2
    assert "outputs changed by" in str(report)


def test_the_error_of_a_static_merge_is_the_change_of_the_outputs() -> None:
    model, x = adapted(AuroRA(rank=2)), inputs()
    before = model(x)
    report = merge(model, mode="static", batches=[x])
    assert report.mode == "static"
    assert report.merge_error.outputs == pytest.approx(((model(x) - before).norm() / before.norm()).item(), rel=1e-5)
    assert report.merge_error.outputs > 0.01
    assert report.notes == []
    assert str(report).startswith("Merged 2 layers, static\n")


def test_a_error_that_was_not_measured_is_told() -> None:
    report = merge(adapted(AuroRA(rank=2)), mode="static")
    assert report.notes == ["the error of the static merge was not measured: give batches"]


def test_the_batches_of_the_calibration_flatter_it_and_the_report_says_so() -> None:
    same = merge(adapted(AuroRA(rank=2)), mode="calibrated", batches=[inputs(200)])
    assert any("measured on the batches of the calibration: measure_on takes others" in note for note in same.notes)
    model, x = adapted(AuroRA(rank=2)), inputs(9) + 1.0
    before = model(x)
    held_out = merge(model, mode="calibrated", batches=[inputs(200)], measure_on=iter([x]))
    assert held_out.merge_error.batches == 1
    assert held_out.merge_error.outputs == pytest.approx(((model(x) - before).norm() / before.norm()).item(), rel=1e-4)
    assert not any("measure_on" in note for note in held_out.notes)


def test_labelled_batches_give_the_loss() -> None:
    def forward(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        y = model(batch[0])
        return y, F.mse_loss(y, batch[1])

    model, x, target = adapted(AuroRA(rank=2)), inputs(), torch.ones(5, 4)
    wanted = F.mse_loss(model(x), target).item()
    report = merge(model, mode="static", batches=[(x, target)], forward=forward)
    assert report.merge_error.loss_before == pytest.approx(wanted)
    assert report.merge_error.loss_after == pytest.approx(F.mse_loss(model(x), target).item())
    assert f"loss {wanted:.4f} before" in str(report)


# --- whole models ---


def test_only_the_adapted_layers_change() -> None:
    model = adapted(targets=("2",))
    start = weights(model)
    merge(model)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])]
    assert changed == ["2.weight"]
    assert merged_layers(model) == ["2"]
    assert [path for path, _ in adapted_layers(model)] == ["2"]
    unmerge(model)
    assert equal(weights(model), start)
    assert merged_layers(model) == []


def test_a_module_that_is_used_twice_is_merged_once() -> None:
    layer = nn.Linear(6, 6)
    model = nn.ModuleDict({"one": nn.Sequential(layer), "two": nn.Sequential(layer)})
    inject(model, LoRA(rank=2), ["one.0"])
    nn.init.normal_(layer.adapters["all"].B)
    start, wanted = layer.weight.clone(), layer.weight + layer.adapters["all"].delta_weight(layer.weight)
    assert merge(model).layers == 1
    assert torch.equal(layer.weight, wanted)
    assert unmerge(model) == 1
    assert torch.equal(layer.weight, start)


def test_a_part_of_a_larger_model_and_two_injected_parts() -> None:
    one, two = adapted(), adapted(PERA(rank=2))
    whole, x = nn.ModuleDict({"one": one, "two": two}), inputs()
    before = one(x), two(x)
    assert merge(whole["one"]).layers == 2
    assert merged_layers(whole) == ["one.0", "one.2"]
    assert merge(whole).layers == 2  # what was left
    for model, wanted in zip((one, two), before, strict=True):
        torch.testing.assert_close(model(x), wanted)
    assert unmerge(whole) == 4
    assert torch.equal(one(x), before[0])
    merge_and_unload(whole)
    assert injection_of(one) is None
    assert injection_of(two) is None


def test_methods_that_were_injected_side_by_side() -> None:
    """AuroRA in one part makes the other part's LoRA no less exact."""
    whole, x = nn.ModuleDict({"one": adapted(), "two": adapted(AuroRA(rank=2))}), inputs()
    before = whole["one"](x)
    assert merge(whole, mode="static").layers == 4
    torch.testing.assert_close(whole["one"](x), before)


def test_modes_gradients_and_trained_heads_stay() -> None:
    model = adapted(AuroRA(rank=2))
    model[0].train()
    modes = [module.training for module in model.modules()]
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    merge(model, mode="calibrated", batches=[inputs(100)])
    assert [module.training for module in model.modules()] == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    merge_and_unload(model)
    assert all(p.requires_grad is name.startswith("4.") for name, p in model.named_parameters())


def test_merging_does_not_depend_on_autocast() -> None:
    """As in a hook of a bf16-mixed run: products in bfloat16 would lose most of the update."""
    model, other = adapted(), adapted()
    merge(model)
    with torch.autocast("cpu", torch.bfloat16):
        merge(other)
    assert equal(weights(model), weights(other))


# --- what is kept ---


def test_only_the_rows_of_blocks_are_kept_and_on_the_cpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12))
    inject(model, LoRA(rank=2), ["0[q]"], fused={"0": {"q": 3, "k": 3, "v": 6}})
    merge(model)
    kept = kept_tensors(model[0])
    assert [(tuple(tensor.shape), tensor.device.type) for tensor in kept] == [((3, 6), "cpu")]


def kept_tensors(layer: nn.Module) -> list[Tensor]:
    """Tensors of a layer that are neither parameters nor buffers."""
    found = []
    for value in vars(layer).values():
        for rows in getattr(value, "__dict__", {}).values():
            found += [t for t in rows.values() if isinstance(t, Tensor)] if isinstance(rows, dict) else []
    return found


def test_without_the_base_nothing_is_kept_and_unmerge_says_so() -> None:
    model, x = adapted(), inputs()
    before = model(x)
    merge(model, keep_base=False)
    torch.testing.assert_close(model(x), before)
    assert kept_tensors(model[0]) == []
    merged = weights(model)
    with pytest.raises(
        ConfigurationError, match=r"2 layers were merged with keep_base=False .*: 0, 2; build the model"
    ):
        unmerge(model)
    assert equal(weights(model), merged)
    merge_and_unload(model)


def test_unmerge_changes_nothing_where_one_layer_was_not_kept() -> None:
    whole = nn.ModuleDict({"one": adapted(), "two": adapted()})
    merge(whole["one"])
    merge(whole["two"], keep_base=False)
    merged = weights(whole)
    with pytest.raises(ConfigurationError, match=r"2 layers were merged .*: two\.0, two\.2"):
        unmerge(whole)
    assert equal(weights(whole), merged)
    assert len(merged_layers(whole)) == 4


@pytest.mark.parametrize("method", [LoRA(rank=2), HiRA(rank=2)], ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_merged_model_is_unmerged_by_itself(method: Method, copied: Callable) -> None:
    model, x = adapted(method), inputs()
    before = model(x)
    merge(model)
    other = copied(model)
    assert torch.equal(other(x), model(x))
    assert unmerge(other) == 2
    assert torch.equal(other(x), before)
    assert merged_layers(model) == ["0", "2"]
    unmerge(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", CAST, ids=str)
def test_a_merged_model_that_is_cast_unmerges_to_the_cast_base(dtype: torch.dtype) -> None:
    model, other = adapted(), adapted().to(dtype)
    merge(model)
    unmerge(model.to(dtype))
    assert equal(weights(model), weights(other))


def test_calibrated_and_static_unmerge_restores_the_bias_and_the_dynamic_update() -> None:
    model, x = adapted(AuroRA(rank=2)), inputs()
    start, before = weights(model), model(x)
    for options in ({"mode": "calibrated", "batches": [inputs(200)]}, {"mode": "static"}):
        report = merge(model, **options)
        assert report.layers == 2
        assert merge(model, **options).layers == 0
        assert not torch.equal(model(x), before)
        assert torch.equal(model[0].bias, start["0.bias"]) is (options["mode"] == "static")
        assert unmerge(model) == 2
        assert equal(weights(model), start)
        assert torch.equal(model(x), before)


# --- merge and unload ---


def test_unloading_a_model_that_was_merged_keeps_what_it_computes() -> None:
    model, x = adapted(AuroRA(rank=2)), inputs()
    merge(model, mode="calibrated", batches=[inputs(200)])
    wanted = model(x)
    merge_and_unload(model)
    assert torch.equal(model(x), wanted)
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == list(base().state_dict())


def test_unloading_keeps_hooks_and_takes_a_new_adapter() -> None:
    model, seen = adapted(), []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    merge_and_unload(model)
    model(inputs())
    assert seen == ["hook"]
    inject(model, PERA(rank=3), ["2"])
    assert merge(model).layers == 1


def test_unloading_a_probe_only_removes_the_mark() -> None:
    model = base()
    inject(model, LinearProbe(), [], ["4"])
    start = weights(model)
    assert merge_and_unload(model) is model
    assert injection_of(model) is None
    assert equal(weights(model), start)


# --- against peft ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hira_merges_as_peft_does(dtype: torch.dtype) -> None:
    """The same weight in float32. In low precision peft rounds BA, W ⊙ BA and the sum, and we the sum only."""
    import peft

    def linear() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"proj": nn.Linear(64, 48)}).to(dtype)

    ours, theirs = linear(), peft.get_peft_model(linear(), peft.HiraConfig(r=4, target_modules=["proj"]))
    inject(ours, HiRA(rank=4), ["proj"])
    adapter, layer = ours["proj"].adapters["all"], theirs.base_model.model["proj"]
    with torch.no_grad():
        for name in "AB":
            getattr(adapter, name).normal_(std=0.3)
            theirs.get_parameter(f"base_model.model.proj.hira_{name}.default").copy_(getattr(adapter, name))
    start = ours["proj"].weight.double()
    exact = start * (1 + adapter.B.double() @ adapter.A.double())
    merge(ours)
    layer.merge()
    mine, peers = ours["proj"].weight.double(), layer.base_layer.weight.double()
    if dtype == torch.float32:
        torch.testing.assert_close(mine, peers, rtol=1e-6, atol=1e-7)
    else:
        torch.testing.assert_close(mine, peers, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
        assert (mine - exact).norm() < (peers - exact).norm()
    unmerge(ours)
    assert torch.equal(ours["proj"].weight.double(), start)


def test_parts_merge_one_after_the_other_each_in_its_own_mode() -> None:
    """What is merged already does not keep the rest from it, and an exact merge is not called static."""
    model = nn.ModuleDict({"one": base(), "two": base(1)})
    moved(model["one"], targets=["0"])
    inject(model["two"], HiRA(rank=2), ["0"])
    assert merge(model["one"], mode="static").layers == 1
    assert merge(model).mode == "exact"
    assert (model["one"][0].merged, model["two"][0].merged) == ("static", "exact")
    assert unmerge(model) == 2
    merge(model, mode="static")
    assert (model["one"][0].merged, model["two"][0].merged) == ("static", "exact")
