"""What merging refuses: which message, and that nothing has changed then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pera_lightning import inject, merge, merge_and_unload, unmerge
from pera_lightning.adapters import AuroRA, HiRA, LinearProbe, LoRA, LowRankUpdate, Method
from pera_lightning.adapters.lora import LoRALayer
from pera_lightning.errors import ConfigurationError, NotMergeableError, PeraError, UnknownNameError
from pera_lightning.merging.merge import merged_layers

every_keep = pytest.mark.parametrize("keep_base", [True, False])


def adapted(method: Method | None = None, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three layers, adapted, in eval mode; all updates are far from zero."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=bias) for _ in range(3))).to(dtype)
    return moved(model, method or LoRA(rank=2), ["0", "1", "2"])


def moved(model: nn.Module, method: Method, targets: list[str]) -> Any:
    inject(model, method, targets)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.4 * torch.randn_like(p))
    return model.eval()


def state(model: nn.Module) -> dict[str, Any]:
    """All that a refused merge could have changed; compared by `unchanged`."""
    modules = list(model.named_modules())
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "attributes": {f"{path}:{key}" for path, module in modules for key in vars(module) if key != "merged"},
        "modes": [getattr(module, "inference_mode", None) for _, module in modules],
        "merged": merged_layers(model),
    }


def unchanged(model: nn.Module, before: dict[str, Any]) -> bool:
    after = state(model)
    pairs = zip(before["tensors"].values(), after["tensors"].values(), strict=True)
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs) and all(
        before[key] == after[key] for key in ("attributes", "modes", "merged")
    )


# --- weights that cannot be changed by themselves ---


def test_tied_embeddings_of_a_language_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    model = moved(LlamaForCausalLM(config), LoRA(rank=2), ["lm_head", "q_proj"])
    before = state(model)
    message = r"^lm_head shares its weight \(model\.embed_tokens\.weight and lm_head\.weight are one tensor\): .*untie"
    for options in ({}, {"keep_base": False}):
        with pytest.raises(NotMergeableError, match=message):
            merge(model, **options)
    assert unchanged(model, before)


def test_an_untied_head_of_the_same_values_merges() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "head": nn.Linear(8, 8, bias=False)})
    model["head"].weight = nn.Parameter(model["embed"].weight.detach().clone())
    assert merge(moved(model, LoRA(rank=2), ["head"])).layers == 1


@pytest.mark.parametrize("tie", ["parameter", "memory"])
def test_two_layers_with_one_weight(tie: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight if tie == "parameter" else nn.Parameter(model[0].weight.data)
    moved(model, LoRA(rank=2), ["1"])
    before = state(model)
    with pytest.raises(NotMergeableError, match=r"^1 shares its weight \(0\.weight and 1\.weight are one tensor\)"):
        merge(model)
    assert unchanged(model, before)


def test_a_shared_bias_matters_where_the_merge_has_a_constant() -> None:
    """A constant would be added twice; without one, the biases stay as they are."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    moved(model, AuroRA(rank=2), ["0", "1"])
    before = state(model)
    with pytest.raises(NotMergeableError, match=r"^0 shares its bias \(0\.bias and 1\.bias are one tensor\)"):
        merge(model, mode="calibrated", batches=[torch.randn(50, 8)])
    assert unchanged(model, before)
    assert merge(model, mode="static").layers == 2


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_tensor_that_is_computed_at_every_call(name: str) -> None:
    """Weight normalisation and pruning would compute it anew, and the update would be gone."""
    model = nn.Sequential(nn.Linear(8, 8))
    if name == "weight":
        nn.utils.weight_norm(model[0])
    else:
        prune.l1_unstructured(model[0], "bias", amount=0.5)
    moved(model, AuroRA(rank=2), ["0"])
    model(torch.randn(2, 8))
    with pytest.raises(NotMergeableError, match=f"the {name} of 0 is computed at every call .* a plain parameter"):
        merge(model, mode="calibrated", batches=[torch.randn(50, 8)])


def test_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    inject(model, LoRA(rank=2), ["0"])
    with pytest.raises(NotMergeableError, match="0 is sharded or on the meta device: merge on one process"):
        merge(model)


# --- values ---


@every_keep
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_adapters(value: float, keep_base: bool) -> None:
    model = adapted()
    model[2].adapters["all"].A.data[0, 0] = value
    before = state(model)
    with pytest.raises(NotMergeableError, match=r"the adapter of 2 has NaN or infinite values in all\.A"):
        merge(model, keep_base=keep_base)
    assert unchanged(model, before)


@every_keep
@pytest.mark.parametrize("method", [LoRA(rank=2), HiRA(rank=2)], ids=str)
def test_values_that_float16_cannot_hold(method: Method, keep_base: bool) -> None:
    """The last of three layers overflows: the first two are as they were."""
    model = adapted(method, dtype=torch.float16)
    model[2].adapters["all"].B.data.mul_(1e7)
    before = state(model)
    with pytest.raises(
        NotMergeableError, match=r"merging 2 gives values that torch\.float16 cannot hold: merge a float32"
    ):
        merge(model, keep_base=keep_base)
    assert unchanged(model, before)
    with pytest.raises(NotMergeableError, match="float16"):
        merge_and_unload(model)
    assert unchanged(model, before)
    assert merge(model.float()).layers == 3


@every_keep
def test_a_constant_that_float16_cannot_hold(keep_base: bool) -> None:
    model = adapted(AuroRA(rank=2), dtype=torch.float16)
    model[0].bias.data.fill_(60000.0)
    model[0].adapters["all"].B.data.fill_(300.0)
    model[0].adapters["all"].anl.spline_weight.data.fill_(9.0)
    before = state(model)
    x = torch.randn(50, 8).half()
    with pytest.raises(NotMergeableError, match=r"merging 0 gives values that torch\.float16 cannot hold"):
        # the layers after the first are given inputs of their own, since its outputs overflow too
        merge(model, mode="calibrated", batches=[x], forward=alone, keep_base=keep_base)
    assert unchanged(model, before)


def alone(model: nn.Sequential, x: Tensor) -> Tensor:
    """Runs each layer on the same inputs."""
    return torch.stack([layer(x) for layer in model])


def test_an_interrupted_merge_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = adapted(), []
    before, whole = state(model), LoRALayer.low_rank_update

    def interrupted(adapter: LoRALayer) -> LowRankUpdate:
        calls.append(adapter)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(adapter)

    monkeypatch.setattr(LoRALayer, "low_rank_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(model)
    monkeypatch.undo()
    assert unchanged(model, before)
    assert merge(model).layers == 3


# --- AuroRA ---


def test_a_dynamic_update_says_which_modes_there_are() -> None:
    model = adapted(AuroRA(rank=2))
    before = state(model)
    for call in (merge, merge_and_unload):
        with pytest.raises(NotMergeableError, match=r"take the mode 'calibrated' \(a fit on batches\), or 'static'"):
            call(model)
    assert unchanged(model, before)


def test_a_calibration_that_fails_leaves_the_model_dynamic() -> None:
    model = adapted(AuroRA(rank=2))
    before = state(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        merge(model, mode="calibrated", batches=[torch.randn(4, 7)])
    assert unchanged(model, before)


# --- options ---


def batches() -> list[Tensor]:
    return [torch.randn(50, 8)]


WRONG: list[tuple[Callable[[], Any], type[PeraError], str]] = [
    (lambda: merge(nn.Linear(3, 3)), ConfigurationError, "Linear cannot be merged: it has no adapters, call inject"),
    (lambda: merge_and_unload(nn.Linear(3, 3)), ConfigurationError, "it has no adapters, call inject"),
    (lambda: merge(adapted(), mode="exact"), UnknownNameError, "mode='exact' does not exist; one of static, cal"),
    (lambda: merge(adapted(), mode="calibrate"), UnknownNameError, "closest: calibrated"),
    (lambda: merge(adapted(), mode="static"), ConfigurationError, "acts on AuroRA with dynamic inference only"),
    (
        lambda: merge(adapted(AuroRA(rank=2, inference_mode="static")), mode="static"),
        ConfigurationError,
        "acts on AuroRA with dynamic inference only: leave it out",
    ),
    (lambda: merge(adapted(AuroRA(rank=2)), mode="calibrated"), ConfigurationError, "'calibrated' needs batches"),
    (
        lambda: merge(adapted(AuroRA(rank=2)), mode="calibrated", measure_on=batches()),
        ConfigurationError,
        "'calibrated' needs batches",
    ),
    (
        lambda: merge(adapted(AuroRA(rank=2)), mode="static", ridge=0.1),
        ConfigurationError,
        r"ridge=0.1 acts with mode='calibrated' only",
    ),
    (
        lambda: merge(adapted(AuroRA(rank=2)), mode="calibrated", batches=batches(), ridge=-1.0),
        ConfigurationError,
        "ridge=-1.0: a number of at least 0",
    ),
    (lambda: merge(adapted(), batches=batches()[0]), ConfigurationError, r"batches is one Tensor: .*\[batch\]"),
    (lambda: merge(adapted(), batches={"x": 1}), ConfigurationError, "batches is one dict"),
    (lambda: merge(adapted(), batches=5), ConfigurationError, "batches is one int"),
    (lambda: merge(adapted(), measure_on="val"), ConfigurationError, "batches is one str"),
    (lambda: merge(adapted(), batches=[]), ConfigurationError, "batches has no batch: give at least one"),
    (lambda: merge(adapted(), batches=iter(())), ConfigurationError, "batches has no batch"),
    (lambda: merge_and_unload(adapted(), keep_base=True), ConfigurationError, "keeps no base: leave keep_base out"),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_options_that_do_not_fit(call: Callable[[], Any], kind: type[PeraError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_probe_adapts_no_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, LinearProbe(), [], ["0"])
    with pytest.raises(ConfigurationError, match="Sequential cannot be merged: its method adapts no layers"):
        merge(model)


@pytest.mark.parametrize("call", [merge, merge_and_unload])
def test_another_mode_than_the_one_that_it_is_merged_in(call: Callable[..., Any]) -> None:
    model = adapted(AuroRA(rank=2))
    merge(model, mode="static")
    before = state(model)
    with pytest.raises(ConfigurationError, match=r"merged in another mode \(static\): call unmerge first"):
        call(model, mode="calibrated", batches=batches())
    assert unchanged(model, before)
    unmerge(model)
    call(model, mode="calibrated", batches=batches())
