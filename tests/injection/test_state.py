"""The adapter folder: what is in it, what it refuses, and that nothing half written looks whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pera_lightning import adapter_state_dict, inject, load_adapter, merge, merge_and_unload, save_adapter
from pera_lightning.adapters import PERA, AuroRA, FullFineTuning, HiRA, LinearProbe, LoRA, Method, MoSLoRA
from pera_lightning.errors import CheckpointError, ConfigurationError
from pera_lightning.injection.inject import injection_of
from pera_lightning.injection.state import check_state, forgive_missing_base, frozen_names, remember_unfrozen

METHODS = [
    LoRA(rank=2),
    LoRA(rank=2, init="pissa"),
    PERA(rank=2),
    HiRA(rank=2),
    HiRA(rank=2, reference="random", reference_seed=5),
    HiRA(rank=2, reference="svd", reference_rank=2),
    AuroRA(rank=2),
    MoSLoRA(rank=2),
    LinearProbe(),
    FullFineTuning(),
]


def base(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 4))


def adapted(method: Method) -> nn.Sequential:
    """A model whose trained tensors and running statistics have moved."""
    model = base()
    inject(model, method, ["0"] if method.needs_targets else [], ["3"])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    model.train()(torch.randn(32, 6) + 1)
    return model.eval()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_round_trip_into_a_plain_base(tmp_path: Path, method: Method) -> None:
    model, x = adapted(method), torch.randn(5, 6)
    save_adapter(model, tmp_path / "a")
    again = load_adapter(base(), tmp_path / "a").eval()
    assert torch.equal(again(x), model(x))
    assert injection_of(again).method == method


def test_round_trip_into_an_injected_base(tmp_path: Path) -> None:
    model = adapted(LoRA(rank=2))
    save_adapter(model, tmp_path)
    other = base()
    inject(other, LoRA(rank=2), ["0"], ["3"])
    load_adapter(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_what_is_saved(tmp_path: Path) -> None:
    model = adapted(PERA(rank=2))
    save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    tensors = load_file(tmp_path / "adapter.safetensors")
    expected = {"0.adapters.all.A", "0.adapters.all.B", "0.adapters.all.h", "3.weight", "3.bias"}
    buffers = {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
    assert set(tensors) == expected | buffers == set(adapter_state_dict(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["method"]["init_args"]["rank"] == 2
    assert config["targets"] == ["0"]
    assert config["layers"] == {"0": ["all"]}
    assert config["fingerprint"]["0"].startswith("8x6:")


def test_a_part_of_a_larger_model(tmp_path: Path) -> None:
    """Names in the folder are relative to the injected part, so it fits the bare network."""
    wrapper = nn.ModuleDict({"net": adapted(LoRA(rank=2))})
    save_adapter(wrapper, tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(load_adapter(base(), tmp_path).eval()(x), wrapper["net"](x))


def test_tied_heads_are_saved(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head, self.same = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.same.weight = self.head.weight

    model = Tied()
    inject(model, LoRA(rank=2), ["body"], ["head"])
    model.head.weight.data.fill_(2.0)
    save_adapter(model, tmp_path)
    loaded = load_adapter(Tied(), tmp_path)
    assert (loaded.same.weight == 2).all()
    assert loaded.same.weight is loaded.head.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_base_in_another_precision_is_the_same_base(tmp_path: Path, dtype: torch.dtype) -> None:
    save_adapter(adapted(LoRA(rank=2)), tmp_path)
    loaded = load_adapter(base().to(dtype), tmp_path)
    assert loaded[0].weight.dtype == dtype
    assert loaded[0].adapters["all"].A.dtype == torch.float32


def test_another_base(tmp_path: Path) -> None:
    save_adapter(adapted(LoRA(rank=2)), tmp_path)
    with pytest.raises(CheckpointError, match="another base: 1 of 6 frozen tensors differ: 0"):
        load_adapter(base(1), tmp_path)
    load_adapter(base(1), tmp_path, check_base=False)


def test_another_base_of_a_probe(tmp_path: Path) -> None:
    save_adapter(adapted(LinearProbe()), tmp_path)
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter(base(1), tmp_path)


def test_another_number_of_classes(tmp_path: Path) -> None:
    save_adapter(adapted(LoRA(rank=2)), tmp_path)
    other = base()
    other[3] = nn.Linear(8, 7)
    with pytest.raises(CheckpointError, match=r"3\.weight is \(4, 8\), the model's is \(7, 8\); .*number of classes"):
        load_adapter(other, tmp_path)


def test_another_method(tmp_path: Path) -> None:
    save_adapter(adapted(LoRA(rank=2)), tmp_path)
    other = base()
    inject(other, LoRA(rank=3), ["0"], ["3"])
    with pytest.raises(CheckpointError, match=r"LoRA\(rank=2.*the model has LoRA\(rank=3"):
        load_adapter(other, tmp_path)


def test_nothing_injected(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no adapters: call inject first"):
        save_adapter(base(), tmp_path)


def test_no_folder_suggests_one(tmp_path: Path) -> None:
    save_adapter(adapted(LoRA(rank=2)), tmp_path / "adapter")
    with pytest.raises(
        CheckpointError, match=r"is not an adapter folder: adapter.safetensors is missing; closest: adapter"
    ):
        load_adapter(base(), tmp_path / "adaptr")


@pytest.mark.parametrize("file", ["adapter.safetensors", "adapter_config.json"])
def test_damaged_files(tmp_path: Path, file: str) -> None:
    save_adapter(adapted(LoRA(rank=2)), tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_adapter(base(), tmp_path)


def test_files_of_two_savings(tmp_path: Path) -> None:
    """As after a crash between the two files: the config knows the tensors it was written for."""
    save_adapter(adapted(LoRA(rank=2)), tmp_path / "one")
    save_adapter(adapted(PERA(rank=2)), tmp_path / "two")
    os.replace(tmp_path / "two" / "adapter.safetensors", tmp_path / "one" / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="not the file its config was written for"):
        load_adapter(base(), tmp_path / "one")


def test_a_newer_format(tmp_path: Path) -> None:
    save_adapter(adapted(LoRA(rank=2)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        load_adapter(base(), tmp_path)


def test_a_reloaded_adapter_can_be_trained(tmp_path: Path) -> None:
    save_adapter(adapted(HiRA(rank=2)), tmp_path)
    loaded: nn.Module = load_adapter(base(), tmp_path)
    loaded(torch.randn(4, 6)).sum().backward()
    moved: dict[str, Tensor] = {n: p.grad for n, p in loaded.named_parameters() if p.grad is not None}
    assert set(moved) == {"0.adapters.all.A", "0.adapters.all.B", "3.weight", "3.bias"}


def test_a_plain_base_that_does_not_fit_is_left_alone(tmp_path: Path) -> None:
    save_adapter(adapted(LoRA(rank=2)), tmp_path)
    wide = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 9))
    wide[0].load_state_dict(base()[0].state_dict())
    for other, message in ((base(1), "another base"), (wide, "number of classes"), (nn.Sequential(), "does not have")):
        before = [(type(m), [p.requires_grad for p in m.parameters()]) for m in other.modules()]
        with pytest.raises(CheckpointError, match=message):
            load_adapter(other, tmp_path)
        assert before == [(type(m), [p.requires_grad for p in m.parameters()]) for m in other.modules()]


def test_only_the_frozen_base_is_forgiven() -> None:
    """A trained tensor below a module of another name is not mistaken for a frozen one of the root."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.gate = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    model = Root()
    inject(model, LinearProbe(), [], ["gate"])
    model.register_load_state_dict_post_hook(forgive_missing_base)
    model.load_state_dict({"gate.weight": torch.ones(3, 3), "gate.bias": torch.ones(3)})
    with pytest.raises(RuntimeError, match=r"gate\.weight"):
        model.load_state_dict({"gate.bias": torch.ones(3)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_trained_on_a_low_precision_base(tmp_path: Path, dtype: torch.dtype) -> None:
    model = base().to(dtype)
    inject(model, LoRA(rank=2), ["0"])
    save_adapter(model, tmp_path)
    load_adapter(base(), tmp_path)


def test_a_tensor_too_many() -> None:
    model = adapted(LoRA(rank=2))
    with pytest.raises(CheckpointError, match="x does not fit this model: 1 unexpected: more"):
        check_state(model, {**adapter_state_dict(model), "more": torch.ones(1)}, "x")


def test_what_other_code_trains_is_not_frozen() -> None:
    model = adapted(LoRA(rank=2))
    model[0].bias.requires_grad_(True)
    assert frozen_names(model) == {"0.weight", "2.weight", "2.bias"}
    assert "0.bias" in adapter_state_dict(model)


def test_a_base_tensor_tied_to_the_head_is_the_heads() -> None:
    model = nn.ModuleDict({"embed": nn.Linear(4, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model["head"].weight = model["embed"].weight
    inject(model, LoRA(rank=2), ["body"], ["head"])
    assert remember_unfrozen(model) == []
    model["embed"].bias.requires_grad_(True)
    assert remember_unfrozen(model) == ["embed.bias"]


@pytest.mark.parametrize("options", [{}, {"keep_base": False}], ids=["", "not kept"])
def test_merged_adapters_are_saved_and_not_loaded_into(tmp_path: Path, options: dict[str, bool]) -> None:
    """The folder is that of the unmerged model, and its tensors would not act in a merged one."""
    model = adapted(HiRA(rank=2))
    save_adapter(model, tmp_path / "before")
    merge(model, **options)
    save_adapter(model, tmp_path / "after")
    for name in ("adapter.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    merged = {name: value.clone() for name, value in model.state_dict().items()}
    for whole in (model, nn.ModuleDict({"net": model})):
        with pytest.raises(ConfigurationError, match="cannot be loaded into merged adapters: call unmerge first"):
            load_adapter(whole, tmp_path / "after")
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())


def test_what_was_merged_and_unloaded_is_another_base(tmp_path: Path) -> None:
    model = adapted(LoRA(rank=2))
    save_adapter(model, tmp_path)
    plain = merge_and_unload(model)
    with pytest.raises(CheckpointError, match="was trained on another base: 1 of 6 frozen tensors differ: 0"):
        load_adapter(plain, tmp_path)
    with pytest.raises(ConfigurationError, match="has no adapters: call inject first"):
        save_adapter(plain, tmp_path)
