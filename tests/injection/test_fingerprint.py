"""The fingerprint: every frozen tensor of a base tells it from another, whatever its precision."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pera_lightning import inject, load_adapter, save_adapter
from pera_lightning.adapters import FullFineTuning, LinearProbe, LoRA
from pera_lightning.errors import CheckpointError
from pera_lightning.injection.fingerprint import differing, not_comparable, weight_hash
from pera_lightning.injection.inject import injection_of


class Net(nn.Module):
    """An adapted layer, others that are not, a norm with buffers, an embedding tied to a decoder, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm = nn.BatchNorm1d(16)
        self.decoder = nn.Linear(16, 11, bias=False)
        self.decoder.weight = self.embed.weight
        self.register_buffer("cache", torch.arange(3.0), persistent=False)
        self.head = nn.Linear(16, 3)


def saved(folder: Path) -> Path:
    model = Net()
    inject(model, LoRA(rank=2), ["up"], ["head"])
    return save_adapter(model, folder)


def test_it_covers_what_is_frozen_and_nothing_else() -> None:
    model = Net()
    inject(model, LoRA(rank=2), ["up"], ["head"])
    mark = injection_of(model)
    assert set(mark.fingerprint) == {"up"}
    norm = {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert set(mark.rest_of_base) == {"embed.weight", "down.weight", "down.bias", *norm}
    model = Net()
    inject(model, FullFineTuning())
    assert injection_of(model).fingerprint == injection_of(model).rest_of_base == {}


def test_a_probe_adapts_no_layer_and_has_one() -> None:
    model = Net()
    inject(model, LinearProbe(), trainable=["head"])
    mark = injection_of(model)
    assert set(mark.fingerprint) == {"embed.weight", "up.weight", "down.weight"}
    assert {"up.bias", "norm.weight"} < set(mark.rest_of_base)


@pytest.mark.parametrize("change", ["down.weight", "down.bias", "embed.weight", "norm.bias"])
def test_another_base_is_refused_by_the_names_that_differ(tmp_path: Path, change: str) -> None:
    saved(tmp_path)
    other = Net()
    with torch.no_grad():
        other.get_parameter(change).add_(0.01)  # as merging another adapter would
    with pytest.raises(CheckpointError, match=rf"another base: 1 of 9 frozen tensors differ: {change}; none of them"):
        load_adapter(other, tmp_path)
    assert injection_of(other) is None
    load_adapter(other, tmp_path, check_base=False)


def test_copies_that_round_apart_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """Neither a bfloat16 nor a float16 copy has the values of which both are: they cannot be told from another base."""
    original = Net()
    half, model = copy.deepcopy(original).half(), original.bfloat16()
    inject(model, LoRA(rank=2), ["up"], ["head"])
    save_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match="Rounding alone makes them differ: load it in the type that was trained"):
        load_adapter(half, tmp_path)
    other = Net()
    torch.nn.init.normal_(other.up.weight)  # float32, and not the question
    with pytest.raises(CheckpointError, match=r"frozen tensors differ: up$"):
        load_adapter(other, tmp_path)


def test_a_layer_that_one_base_lacks_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    other = Net()
    other.extra = nn.Linear(2, 2, bias=False)
    with pytest.raises(CheckpointError, match=r"differ: extra\.weight"):
        load_adapter(other, tmp_path)


def test_what_the_file_holds_need_not_be_the_bases(tmp_path: Path) -> None:
    """Buffers, and base parameters that other code has trained, are loaded from it."""
    model = Net()
    inject(model, LoRA(rank=2), ["up"], ["head"])
    model.down.requires_grad_(True).weight.data.fill_(2.0)
    model.norm.running_mean.fill_(3.0)
    save_adapter(model, tmp_path)
    other = Net()
    other.down.weight.data.fill_(7.0)
    other.norm.running_mean.fill_(8.0)
    with pytest.warns(UserWarning, match=r"also holds 2 weights of the base that were unfrozen .*\(down.weight, down"):
        load_adapter(other, tmp_path)
    assert (other.down.weight == 2).all()
    assert (other.norm.running_mean == 3).all()


def test_a_folder_of_an_earlier_version_says_what_was_not_compared(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["rest_of_base"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = Net()
    other.down.weight.data.fill_(7.0)
    with pytest.warns(UserWarning, match="earlier version .* whether the 8 other frozen tensors are those trained on"):
        load_adapter(other, tmp_path)


def agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not differing({"a": weight_hash(one)}, {"a": weight_hash(other)})


@pytest.mark.parametrize("cast", [torch.Tensor.bfloat16, torch.Tensor.half, torch.Tensor.double])
def test_copies_in_another_precision_agree(cast: Callable) -> None:
    weight = torch.randn(50, 70)
    assert agree(weight, cast(weight))
    assert agree(cast(weight), weight)
    assert not agree(cast(weight), weight * 1.02)  # an Instruct version of the same base


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(4, 3, 5, 5),
        torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 9).T,
        torch.randn(7),
        torch.tensor(3.0),
        torch.randint(-100, 100, (9, 4), dtype=torch.int8),
        torch.tensor(5),
        torch.randn(8, 4).to(torch.float8_e4m3fn),
        torch.randn(3, 3, dtype=torch.complex64),
        torch.tensor([True, False, True, True, False]),  # drawn, it would be all True once in 32 times
        torch.empty(0, 3),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}",
)
def test_every_kind_of_tensor_has_a_hash(weight: torch.Tensor) -> None:
    assert agree(weight, weight.clone(memory_format=torch.contiguous_format))
    if weight.numel():
        assert not agree(weight, torch.ones_like(weight.float()).sub(3).to(weight.dtype))
    assert weight_hash(weight).partition(":")[0] == "x".join(map(str, weight.shape))


def test_shape_and_bias_count() -> None:
    weight = torch.randn(5, 5)
    assert weight_hash(weight, torch.zeros(5)) != weight_hash(weight, torch.ones(5))
    assert not agree(weight, weight.T)
    assert not agree(torch.zeros(3, 4), torch.zeros(4, 3))


def test_values_that_are_not_known_are_not_compared() -> None:
    """On the meta device, and where one side is quantised, which packs a tensor into another shape."""
    real, meta, packed = torch.randn(4, 3), torch.empty(4, 3, device="meta"), torch.ones(6, 1, dtype=torch.uint8)
    for other in (meta, packed):
        assert agree(real, other)
        assert not_comparable({"a": weight_hash(real)}, {"a": weight_hash(other)}) == ["a"]
    assert not agree(torch.empty(4, 4, device="meta"), real)
    assert not_comparable({"a": weight_hash(real)}, {"a": weight_hash(real)}) == []


def test_a_transposed_weight_is_not_copied() -> None:
    """Flattening one of a large base would cost its size in memory."""
    weight = copy.deepcopy(torch.randn(2000, 1000)).T
    with torch.profiler.profile(profile_memory=True) as run:
        weight_hash(weight)
    assert sum(event.self_cpu_memory_usage for event in run.key_averages()) < weight.numel()
