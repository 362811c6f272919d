"""Injection: what is trained, what is counted, what is refused, and that an error changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pera_lightning.adapters import PERA, AdaptedLinear, AuroRA, FullFineTuning, HiRA, LinearProbe, LoRA, Method
from pera_lightning.errors import AlreadyInjectedError, ConfigurationError, NoTargetMatched, PeraError
from pera_lightning.injection.inject import adapter_parameter_names, inject, injection_of, trained_parameter_names


class Net(nn.Module):
    """Tied embeddings, a fused projection, a norm, buffers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.qkv = nn.Linear(16, 48)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.norm = nn.BatchNorm1d(16)
        self.decoder = nn.Linear(16, 11, bias=False)
        self.decoder.weight = self.embed.weight
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3))

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(ids)).chunk(3, dim=-1)
        x = q * k.sigmoid() + v
        return self.head(self.norm(x + self.down(self.up(x).tanh())))


FUSED = {"qkv": {"q": 16, "k": 16, "v": 16}}
BASE = sum(p.numel() for p in Net().parameters())


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def test_freezes_all_but_adapters_and_heads() -> None:
    model = Net()
    report = inject(model, LoRA(rank=2), targets=["up", "down"], trainable=["head"])
    adapters = {f"{layer}.adapters.all.{name}" for layer in ("up", "down") for name in "AB"}
    heads = {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
    assert trained(model) == adapters | heads == trained_parameter_names(model)
    assert adapter_parameter_names(model) == adapters
    assert report.adapter_parameters == 2 * 2 * (16 + 32)
    assert report.trainable_parameters == report.adapter_parameters + 2 * 16 + 16 * 3 + 3
    assert report.total_parameters == BASE + report.adapter_parameters
    assert report.percent == pytest.approx(100 * report.trainable_parameters / report.total_parameters)


def test_trains_heads_that_were_frozen_before() -> None:
    model = Net().requires_grad_(False)
    inject(model, LoRA(rank=2), targets="up", trainable="head")
    assert trained(model) == {f"up.adapters.all.{n}" for n in "AB"} | {n for n in trained(model) if "head." in n}
    assert model.head[1].weight.requires_grad


def test_only_what_is_trained_changes_in_a_step() -> None:
    torch.manual_seed(0)
    model = Net()
    inject(model, PERA(rank=2), targets=["qkv[q,v]", "up"], trainable=["head"], fused=FUSED)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(11)).square().sum().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained(model)


@pytest.mark.parametrize("head", ["decoder", "embed"])
def test_tied_parameters_stay_tied(head: str) -> None:
    model = Net()
    inject(model, LoRA(rank=2), targets=["up"], trainable=[head])
    assert model.decoder.weight is model.embed.weight
    assert model.embed.weight.requires_grad  # shared with the head, so trained
    frozen = Net()
    report = inject(frozen, LoRA(rank=2), targets=["decoder"])
    assert frozen.decoder.weight is frozen.embed.weight
    assert not frozen.embed.weight.requires_grad
    assert report.total_parameters == BASE + report.adapter_parameters  # counted once


def test_twice_with_the_same_arguments_changes_nothing() -> None:
    model = Net()
    arguments: dict[str, Any] = {"targets": ["qkv[q]", "up"], "trainable": ["head"], "fused": FUSED}
    report = inject(model, LoRA(rank=2), **arguments)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert inject(model, LoRA(rank=2), **arguments) is report
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LoRA(rank=3), {"targets": ["up"]}),
        (PERA(rank=2), {"targets": ["up"]}),
        (LoRA(rank=2), {"targets": ["down"]}),
        (LoRA(rank=2), {"targets": ["up"], "trainable": ["head"]}),
        (LinearProbe(), {"trainable": ["head"]}),
    ],
)
def test_another_injection_is_refused(method: Method, options: dict[str, Any]) -> None:
    model = Net()
    inject(model, LoRA(rank=2), targets=["up"])
    keys = list(model.state_dict())
    with pytest.raises(AlreadyInjectedError, match=r"has LoRA\(rank=2.* on \['up'\] already"):
        inject(model, method, **options)
    assert list(model.state_dict()) == keys


def test_injection_into_a_part_then_the_whole_is_refused() -> None:
    model = nn.ModuleDict({"net": Net()})
    inject(model["net"], LoRA(rank=2), targets=["up"])
    with pytest.raises(AlreadyInjectedError, match="part of this model"):
        inject(model, LoRA(rank=2), targets=["down"])


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        (LoRA(rank=2), {"targets": ["up", "dwon"]}, NoTargetMatched, "closest: down"),
        (LoRA(rank=2), {"targets": []}, ConfigurationError, r"LoRA adapts linear layers: name them in targets"),
        (LoRA(rank=2), {"targets": ["up"], "trainable": ["haed"]}, NoTargetMatched, "trainable: 'haed'.*head"),
        (LoRA(rank=2), {"targets": ["up"], "trainable": ["up"]}, ConfigurationError, "up is a target and part of 'up'"),
        (
            LoRA(rank=2),
            {"targets": ["up", "re:head.1"], "trainable": ["head"]},
            ConfigurationError,
            "head.1 is a target and part of 'head', which is trained in full",
        ),
        (LoRA(rank=17), {"targets": ["down", "up"]}, ConfigurationError, "rank=17 is larger than up .* at most 16"),
        (HiRA(reference="svd", reference_rank=17), {"targets": ["up"]}, ConfigurationError, "reference_rank=17"),
        (LoRA(rank=2), {"targets": ["up", "qkv[q]"]}, NoTargetMatched, "give fused="),
        (LoRA(rank=2), {"targets": ["up", "norm"]}, PeraError, "BatchNorm1d is not a linear layer"),
        (
            LoRA(rank=2),
            {"targets": ["up", "qkv[training]"], "fused": {"qkv": {"training": 48}}},
            ConfigurationError,
            "this name cannot be used",
        ),
        (LoRA(rank=2), {"targets": ["up"], "trainable": ["codes"]}, ConfigurationError, "codes.weight is torch.int32"),
        (LinearProbe(), {}, ConfigurationError, "LinearProbe trains the modules named in trainable"),
        ("LoRA", {"targets": ["up"]}, ConfigurationError, "method='LoRA': an adapter method"),
        (LoRA, {"targets": ["up"]}, ConfigurationError, "an adapter method such as"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(
    method: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Net()
    model.codes = nn.Module()  # a quantised module, whose weights cannot be trained
    model.codes.weight = nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False)

    def snapshot() -> list[Any]:
        return [
            list(model.state_dict()),
            trained(model),
            [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()],
        ]

    before = snapshot()
    with pytest.raises(error, match=message) as caught:
        inject(model, method, **options)
    assert "\n" not in str(caught.value)
    assert snapshot() == before
    assert injection_of(model) is None
    inject(model, LoRA(rank=2), targets=["up"])  # and it can still be adapted


def test_linear_probe_trains_the_head_only() -> None:
    model = Net()
    report = inject(model, LinearProbe(), targets=["up"], trainable=["head"])
    assert trained(model) == {name for name, _ in model.named_parameters() if name.startswith("head.")}
    assert report.adapter_parameters == 0
    assert report.notes[0] == "targets are not used by LinearProbe"
    assert type(model.up) is nn.Linear


def test_full_fine_tuning_trains_everything() -> None:
    model = Net().requires_grad_(False)
    report = inject(model, FullFineTuning())
    assert all(p.requires_grad for p in model.parameters())
    assert report.percent == 100.0


def test_report_prints_what_was_done() -> None:
    model = nn.Sequential(*(nn.ModuleDict({"qkv": nn.Linear(8, 24), "fc": nn.Linear(8, 8)}) for _ in range(12)))
    report = inject(model.eval(), LoRA(rank=2), targets=["qkv[q,v]", "fc"], fused={"qkv": {"q": 8, "k": 8, "v": 8}})
    assert report.matched["3.qkv"] == ("q", "v")
    assert report.matched["3.fc"] == ("all",)
    assert report.shapes["3.qkv"] == (24, 8)
    text = str(report)
    assert "Injected LoRA(rank=2, alpha=16.0" in text
    assert "*.qkv  12 x  24 x 8  slices q, v" in text
    assert f"trainable {report.trainable_parameters:,}" in text
    assert f"{report.percent:.4f} %" in text
    assert "in eval mode" in text
    assert len(text.splitlines()) == 5


def test_the_spec_repeats_the_injection() -> None:
    from pera_lightning.adapters import method_from_spec

    torch.manual_seed(0)
    model, other = Net(), None
    other = copy.deepcopy(model)
    inject(model, AuroRA(rank=2), targets=["qkv[q,v]"], trainable=["head"], fused=FUSED, seed=3)
    spec = injection_of(model).spec()
    wanted = ("targets", "trainable", "fused", "seed")
    inject(other, method_from_spec(spec["method"]), **{name: spec[name] for name in wanted})
    assert injection_of(other).spec() == spec
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_mark_travels_with_copies() -> None:
    model = Net()
    inject(model, LoRA(rank=2), targets=["up"])
    other = copy.deepcopy(model)
    assert injection_of(other) == injection_of(model)
    assert isinstance(other.up, AdaptedLinear)
    assert trained_parameter_names(other) == trained_parameter_names(model)


# --- published parameter counts, on the meta device ---

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def llama(version: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        2: LlamaConfig(),  # its defaults are LLaMA-2-7B's
        3: LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
    }[version]
    return LlamaForCausalLM(config)


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1))


def vision(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=0)


@pytest.fixture(scope="module")
def on_meta() -> Callable[..., nn.Module]:
    """Builds a model on the meta device once, and copies it then."""
    built: dict[Any, nn.Module] = {}

    def build(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
        if (make, *args) not in built:
            with torch.device("meta"):
                built[make, *args] = make(*args)
        return copy.deepcopy(built[make, *args])

    return build


@pytest.mark.parametrize(
    ("version", "method", "percent"),
    [
        (3, LoRA(rank=16), 0.3513),
        (3, HiRA(rank=32), 0.7002),
        (3, PERA(rank=2), 0.0441),
        (3, PERA(rank=32), 0.7012),
        (2, LoRA(rank=32), 0.8256),
        (2, PERA(rank=32), 0.8269),
    ],
    ids=str,
)
def test_percent_of_llama(on_meta: Any, version: int, method: Method, percent: float) -> None:
    report = inject(on_meta(llama, version), method, targets=LLAMA_TARGETS)
    assert round(report.percent, 4) == percent
    assert len(report.matched) == 32 * 5


@pytest.mark.parametrize(
    ("make", "args", "targets", "method", "count"),
    [
        (llama, (3,), LLAMA_TARGETS, AuroRA(rank=2), 3_542_144),
        (vision, ("vit_base_patch16_224",), ["attn.qkv[q,v]"], AuroRA(rank=2), 74_208),
        (vision, ("vit_large_patch16_224",), ["attn.qkv[q,v]"], AuroRA(rank=2), 197_568),
        (roberta, (), ["query", "value"], AuroRA(rank=2), 74_208),
        (roberta, (), ["query", "value"], PERA(rank=8), 295_776),
    ],
)
def test_number_of_trained_parameters(
    on_meta: Any, make: Any, args: tuple, targets: list[str], method: Method, count: int
) -> None:
    report = inject(on_meta(make, *args), method, targets=targets)
    assert report.adapter_parameters == report.trainable_parameters == count


def test_another_seed_is_another_injection() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    report = inject(model, LoRA(rank=2), ["0"], seed=1)
    assert inject(model, LoRA(rank=2), ["0"]) is report
    assert inject(model, LoRA(rank=2), ["0"], seed=1) is report
    with pytest.raises(AlreadyInjectedError, match="with seed 2"):
        inject(model, LoRA(rank=2), ["0"], seed=2)
