import pytest
import torch
from torch import nn

from pera_lightning import inject
from pera_lightning.adapters import PERA, FullFineTuning, HiRA, LinearProbe
from pera_lightning.training.optimizers import parameter_groups, with_own_rate

RATES = {"lr": 0.1, "head_lr": 0.2, "weight_decay": 0.3}


def network():
    return nn.ModuleDict(
        {"body": nn.Linear(6, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 2), "head2": nn.Linear(6, 2)}
    )


def described(model):
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        g["name"]: (g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]])
        for g in parameter_groups(model, **RATES)
    }


def test_adapters_and_heads():
    model = network()
    inject(model, PERA(rank=2), ["body"], ["head"])
    path = "body.adapters.all"
    assert described(model) == {
        "adapter": (0.1, 0.3, [f"{path}.A", f"{path}.B"]),
        "adapter_no_decay": (0.1, 0.0, [f"{path}.h"]),
        "head": (0.2, 0.3, ["head.weight"]),
        "head_no_decay": (0.2, 0.0, ["head.bias"]),
    }


def test_the_injected_part_may_be_inside_another_module():
    model = nn.ModuleDict({"inner": network()})
    inject(model["inner"], HiRA(rank=2), ["body"], ["head"])
    groups = described(model)
    assert groups["head"][2] == ["inner.head.weight"]
    assert groups["adapter"][2] == ["inner.body.adapters.all.A", "inner.body.adapters.all.B"]


def test_a_head_s_name_is_no_prefix():
    """head2 is not part of head."""
    model = network()
    inject(model, FullFineTuning(), [], ["head"])
    groups = described(model)
    assert groups["head"][2] == ["head.weight"]
    assert groups["base"][:2] == (0.1, 0.3)
    assert groups["base"][2] == ["body.weight", "head2.weight"]
    assert groups["base_no_decay"] == (0.1, 0.0, ["body.bias", "norm.weight", "norm.bias", "head2.bias"])


def test_a_probe_has_a_head_only():
    model = network()
    inject(model, LinearProbe(), [], ["head"])
    assert list(described(model)) == ["head", "head_no_decay"]


def test_without_an_injection_everything_trained_is_base():
    model = network()
    model["body"].requires_grad_(False)
    groups = described(model)
    assert sorted(groups) == ["base", "base_no_decay"]
    assert groups["base"][2] == ["head.weight", "head2.weight"]


@pytest.mark.parametrize("trainable", [[], ["head"], ["head", "norm"]])
def test_every_trained_parameter_once(trainable):
    model = network()
    inject(model, PERA(rank=2), ["body"], trainable)
    held = [p for g in parameter_groups(model, **RATES) for p in g["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in held}) == len(held) == len(trained)
    assert {id(p) for p in held} == {id(p) for p in trained}


def test_the_groups_suit_adamw():
    model = network()
    inject(model, PERA(rank=2), ["body"], ["head"])
    assert len(torch.optim.AdamW(parameter_groups(model, **RATES)).param_groups) == 4


def test_a_part_with_a_rate_of_its_own_is_taken_out_of_every_group():
    model = nn.ModuleDict({"one": network(), "two": network()})
    inject(model, PERA(rank=2), ["one.body", "two.body"])
    names = {id(p): n for n, p in model.named_parameters()}
    groups = with_own_rate(parameter_groups(model, **RATES), model["two"].parameters(), name="two", lr=0.01)
    assert [(g["name"], g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups] == [
        ("adapter", 0.1, 0.3, ["one.body.adapters.all.A", "one.body.adapters.all.B"]),
        ("two_adapter", 0.01, 0.3, ["two.body.adapters.all.A", "two.body.adapters.all.B"]),
        ("adapter_no_decay", 0.1, 0.0, ["one.body.adapters.all.h"]),
        ("two_adapter_no_decay", 0.01, 0.0, ["two.body.adapters.all.h"]),
    ]
    assert with_own_rate(groups, [], name="none", lr=1.0) == groups
