"""The contract of every per-linear method: what merges, to the last bit, and what says that it does not."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning import inject, merge, merge_and_unload, unmerge
from pera_lightning.adapters import AdaptedLayer, LinearMethod, LowRankUpdate
from pera_lightning.adapters.adapted_layer import base_weight
from pera_lightning.errors import NotMergeableError
from pera_lightning.injection.inject import injection_of
from pera_lightning.merging.linearised import linearised
from tests.adapters import reference
from tests.adapters.cases import (
    IN,
    OUT,
    PATHS,
    adapted,
    adapters_of,
    case_id,
    cases,
    every_method,
    every_path,
    inputs,
    network,
    randomise,
    the_adapter,
)

KINDS = ["linear", "no-bias", "conv1d", "rows"]
# How far a merged layer's outputs, of about 1 to 10, may be from the adapted one's: the adapted layer rounds the two
# products and their sum, the merged one rounds the weight.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 0.08, torch.float16: 0.01}
# Each kind of layer and each precision once: no code looks at both.
every_kind = pytest.mark.parametrize(("kind", "dtype"), zip(KINDS, CLOSE, strict=True), ids=KINDS)


def plain(kind: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A model of one linear layer, "proj", of some kind."""
    if kind != "conv1d":
        return network(bias=kind != "no-bias", out=3 * OUT if kind == "rows" else OUT, dtype=dtype)
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(proj=Conv1D(OUT, IN))).to(dtype)


def injected(method: LinearMethod, kind: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The same, adapted, with updates large enough to be seen in every precision; adapters are float32."""
    model = plain(kind, dtype)
    fused = {"proj": {"q": OUT, "k": OUT, "v": OUT}} if kind == "rows" else None
    inject(model, method, ["proj[q,v]" if kind == "rows" else "proj"], fused=fused, seed=0)
    randomise(model, 0.3)
    return model.eval()


def dynamic(method: LinearMethod) -> bool:
    return getattr(method, "inference_mode", "") == "dynamic"


def how(method: LinearMethod) -> str | None:
    """The method of merging that must be asked for."""
    return "static" if dynamic(method) else None


def bits(layer: nn.Module) -> list[Tensor]:
    return [value.clone() for name, value in layer.state_dict().items() if ".adapters." not in name]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


# --- merge and unmerge ---


@every_path
@every_kind
def test_merge_and_unmerge(method: LinearMethod, kind: str, dtype: torch.dtype) -> None:
    model, x = injected(method, kind, dtype), inputs(6, dtype).view(2, 3, IN)
    start, before = bits(model), model(x)
    with torch.no_grad(), linearised(model, how(method)):
        adapted_output, expected = model(x), expected_weight(model.proj)
    report = merge(model, mode=how(method))
    assert (report.layers, report.merge_error) == (1, None)
    assert torch.equal(base_weight(model.proj), expected)  # one cast of a sum in (at least) float32, bit for bit
    assert not torch.equal(model.proj.weight, start[0])
    assert model.proj.weight.dtype == dtype
    assert model.proj.bias is None or torch.equal(model.proj.bias, start[1])
    torch.testing.assert_close(model(x), adapted_output, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    if kind == "rows":
        assert torch.equal(model.proj.weight[OUT : 2 * OUT], start[0][OUT : 2 * OUT])
        assert torch.equal(model(x)[..., OUT : 2 * OUT], before[..., OUT : 2 * OUT])

    merged = bits(model)
    assert merge(model, mode=how(method)).layers == 0  # twice is once
    assert same(bits(model), merged)
    assert unmerge(model) == 1
    assert same(bits(model), start)
    assert torch.equal(model(x), before)
    assert unmerge(model) == 0
    merge(model, mode=how(method))
    assert same(bits(model), merged)


@torch.no_grad()
def expected_weight(layer: AdaptedLayer) -> Tensor:
    """W + ΔW of every block, added in float64 or, for a base in low precision, float32, and cast once."""
    weight = base_weight(layer)
    wide = torch.float64 if weight.dtype in (torch.float32, torch.float64) else torch.float32
    out = weight.to(wide, copy=True)
    for block, adapter in layer.adapters.items():
        rows = layer.slices[block]
        delta = adapter.delta_weight(weight[rows])
        assert delta.dtype in (torch.float32, torch.float64)
        out[rows] += delta.to(wide)
    return out.to(weight.dtype)


@every_path
def test_the_merged_weight_is_the_references(method: LinearMethod) -> None:
    """Against plain loops: the reference's output for unit vectors, of a static map, is its matrix."""
    model = injected(method, "linear")
    adapter, weight = the_adapter(model.proj), base_weight(model.proj).clone()
    tensors = dict(adapter.named_parameters()) | dict(adapter.named_buffers())
    static = dataclasses.replace(method, inference_mode="static") if dynamic(method) else method
    columns = reference.output(static, tensors, torch.eye(IN, dtype=torch.float64), weight, None)
    merge(model, mode=how(method))
    torch.testing.assert_close(base_weight(model.proj).double(), columns.T, rtol=1e-5, atol=1e-5)


# --- merge and unload ---


@every_path
@pytest.mark.parametrize(("kind", "merged_before"), [("linear", False), ("rows", True), ("conv1d", False)])
def test_unloading_leaves_no_trace(method: LinearMethod, kind: str, merged_before: bool) -> None:
    model, bare, x = injected(method, kind), plain(kind), inputs(4, torch.float32)
    layer, weight = model.proj, model.proj.weight
    with linearised(model, how(method)):
        wanted = model(x)
    if merged_before:
        merge(model, mode=how(method))
    assert merge_and_unload(model, **({} if merged_before else {"method": how(method)})) is model
    assert model.proj is layer
    assert model.proj.weight is weight
    assert type(model.proj) is type(bare.proj)
    assert list(model.state_dict()) == list(bare.state_dict())
    assert vars(model.proj).keys() == vars(bare.proj).keys()
    assert str(model) == str(bare)
    assert injection_of(model) is None
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    pickled = pickle.dumps(model)
    assert b"pera" not in pickled
    assert torch.equal(pickle.loads(pickled)(x), model(x))
    inject(model, method, ["proj"])  # as any other model


# --- what a method says about itself ---


@every_path
def test_the_claims_of_a_method_are_true(method: LinearMethod) -> None:
    model = injected(method, "linear").double()
    layer, x = model.proj, inputs()
    adapter, before = the_adapter(layer), bits(model)
    assert method.merging in ("exact", "approximate")
    if dynamic(method):
        assert method.merging == "approximate"
        for refused in (adapter.low_rank_update, lambda: adapter.delta_weight(layer.weight), lambda: merge(model)):
            with pytest.raises(NotMergeableError, match="take the mode 'calibrated'"):
                refused()
        assert same(bits(model), before)
        assert not layer.merged
    with linearised(model, how(method)):
        delta = adapter.delta_weight(layer.weight)
        assert not delta.requires_grad
        assert adapter.delta_bias() is None
        torch.testing.assert_close(layer(x) - F.linear(x, layer.weight, layer.bias), x @ delta.T)
    assert not dynamic(method) or adapter.inference_mode == "dynamic"


@every_method
def test_the_export_rank_is_the_updates(method: LinearMethod) -> None:
    layer, x = adapted(method), inputs()
    adapter = the_adapter(layer)
    with linearised(layer, how(method)):
        if method.export_rank is None:
            with pytest.raises(NotMergeableError, match=f"the update of {type(adapter).__name__} is not a product"):
                adapter.low_rank_update()
            return
        update: LowRankUpdate = adapter.low_rank_update()
        rank = method.export_rank
        assert update.rank == rank
        assert (update.A.shape, update.B.shape, update.bias) == ((rank, IN), (OUT, rank), None)
        assert not update.A.requires_grad or update.A is adapter.A  # a LoRA is what it is
        torch.testing.assert_close(update.scale * (x @ update.A.T) @ update.B.T, adapter.delta_output(x))
        torch.testing.assert_close(adapter.delta_weight(layer.weight), update.scale * update.B @ update.A)


def test_each_registered_layer_method_claims_something() -> None:
    """HiRA's updates alone have full rank; every other method here is a LoRA of some rank."""
    none = {type(method).__name__ for method in cases() if method.export_rank is None}
    assert none == {"HiRA", "HiLoRA"}


# --- merged adapters rest ---


@pytest.mark.parametrize("method", [m for m in PATHS if not dynamic(m)], ids=case_id)
def test_merged_adapters_rest(method: LinearMethod) -> None:
    model, x = injected(method, "rows"), inputs(4, torch.float32)
    merge(model)
    before = model(x)
    for adapter in adapters_of(model):
        for parameter in adapter.parameters():
            parameter.data.fill_(7.0)
    assert torch.equal(model(x), before)
