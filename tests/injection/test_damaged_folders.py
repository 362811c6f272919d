"""Adapter folders that somebody cut, changed or made up: refused in one line, and the model is as it was."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pera_lightning import adapter_state_dict, inject, load_adapter, save_adapter
from pera_lightning.adapters import AuroRA, LinearMethod, LoRA, LoRALayer
from pera_lightning.errors import CheckpointError
from pera_lightning.injection.state import remember_unfrozen
from tests.injection.test_state import base

A = "0.adapters.all.A"


def saved(folder: Path, method: Any = None) -> nn.Module:
    model = base()
    inject(model, method or LoRA(rank=2), ["0"], ["3"])
    save_adapter(model, folder)
    return model


def reconfigure(folder: Path, change: Callable[[dict], Any]) -> None:
    """Changes the config, as of a version without checksums of it."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    config.pop("checksums", None)
    file.write_text(json.dumps(config))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    data = save(tensors)
    (folder / "adapter.safetensors").write_bytes(data)
    reconfigure(folder, lambda config: config.update(sha256=hashlib.sha256(data).hexdigest()))


def refused(folder: Path, match: str) -> None:
    model = base()
    model[0].bias.requires_grad_(False)
    before = [(type(m), [p.requires_grad for p in m.parameters()], sorted(vars(m))) for m in model.modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match) as caught:
        load_adapter(model, folder)
    assert len(str(caught.value).splitlines()) == 1
    assert before == [(type(m), [p.requires_grad for p in m.parameters()], sorted(vars(m))) for m in model.modules()]
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())


FIELDS = ["method", "targets", "trainable", "fused", "seed", "layers", "trained_modules", "fingerprint"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing_or_of_another_type(tmp_path: Path, field: str) -> None:
    saved(tmp_path)
    whole = (tmp_path / "adapter_config.json").read_bytes()
    reconfigure(tmp_path, lambda config: config.pop(field))
    refused(tmp_path, f"is damaged: its description of the injection has no {field}")
    deep: list = []
    for _ in range(30):
        deep = [deep]
    for junk in (None, 3.5, [{}], {"a": {"b": []}}, deep, "x\n\x1b[31m"):
        (tmp_path / "adapter_config.json").write_bytes(whole)
        reconfigure(tmp_path, lambda config, junk=junk: config.update({field: junk}))
        refused(tmp_path, f"{field}=|without end")


def test_what_is_no_description(tmp_path: Path) -> None:
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter.safetensors"
    saved(tmp_path)
    for text, match in (("[]", "holds a list"), ('{"a":' + "[" * 10**5, "is damaged"), ("1" * 5000, "is damaged")):
        config.write_text(text)
        refused(tmp_path, match)
    saved(tmp_path)
    reconfigure(tmp_path, lambda config: config.update(comment=json.loads("[" * 30 + "]" * 30)))
    refused(tmp_path, "nested or long without end")
    for wrong in (True, "1", None, [1]):
        reconfigure(tmp_path, lambda config, wrong=wrong: config.update(format=wrong))
        refused(tmp_path, "has format .*, this version reads 1")
    weights.unlink()
    os.mkfifo(weights)  # whoever reads it waits for somebody who writes
    refused(tmp_path, "adapter.safetensors is not a file")
    refused(tmp_path / "a\0b", "cannot be read|not an adapter folder")


CHANGED = {
    "a frozen weight": (lambda t: t.update({"0.weight": torch.zeros(8, 6)}), r"1 frozen weights of the base \(0\.wei"),
    "not finite": (lambda t: t[A].__setitem__((0, 1), float("nan")), f"{A} has values that are not finite"),
    "an infinite head": (lambda t: t["3.bias"].fill_(float("inf")), "3.bias has values that are not finite"),
    "a half adapter": (lambda t: t.update({A: t[A].half()}), f"{A} is torch.float16, the model's is torch.float32"),
    "integers": (lambda t: t.update({"3.bias": t["3.bias"].int()}), r"3\.bias is torch\.int32"),
    "counts as floats": (lambda t: t.update({"2.num_batches_tracked": torch.tensor(1.0)}), "tracked is torch.float32"),
    "a shape": (lambda t: t.update({A: t[A][:1].clone()}), rf"{A} is \(1, 6\), the model's is \(2, 6\)"),
    "a missing buffer": (lambda t: t.pop("2.running_mean"), "1 missing: 2.running_mean"),
    "an odd name": (lambda t: t.update({"a\nb": torch.ones(1)}), "1 unexpected: a b"),
}


@pytest.mark.parametrize(("change", "match"), CHANGED.values(), ids=CHANGED)
def test_tensors_that_do_not_fit(tmp_path: Path, change: Callable, match: str) -> None:
    saved(tmp_path)
    retensor(tmp_path, change)
    refused(tmp_path, match)


@pytest.mark.parametrize(("name", "value"), [("grid_size", 10**9), ("spline_order", 10**12), ("rank", 10**9)])
def test_hyperparameters_that_ask_for_more_than_there_is(tmp_path: Path, name: str, value: int, monkeypatch) -> None:
    saved(tmp_path, AuroRA(rank=2))
    reconfigure(tmp_path, lambda config: config["method"]["init_args"].update({name: value}))
    monkeypatch.setattr("pera_lightning.adapters.aurora.uniform_knots", lambda *_: pytest.fail("memory is taken"))
    refused(tmp_path, r"the model's is \(2, 10{6,}|rank=10{9} is larger")


def test_a_flipped_bit_in_the_config(tmp_path: Path) -> None:
    """The JSON stays valid and its values possible; a field may be taken out, or added, by hand."""
    saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    whole = file.read_text()
    file.write_text(whole.replace('"alpha": 16.0', '"alpha": 17.0'))
    refused(tmp_path, "not as they were written: method; if you changed them on purpose")
    file.write_text(whole.replace('"unfrozen":', '"unfrozem":', 1))
    refused(tmp_path, "not as they were written: unfrozen")
    config = json.loads(whole)
    del config["unfrozen"]
    file.write_text(json.dumps(config))
    load_adapter(base(), tmp_path)
    file.write_text(json.dumps({**json.loads(whole), "comment": "mine"}))
    load_adapter(base(), tmp_path)


def test_a_file_does_not_import(tmp_path: Path, monkeypatch) -> None:
    """A module that lies beside the file could be anybody's; one that was imported by its user is his."""
    saved(tmp_path / "adapter")
    (tmp_path / "lies_beside.py").write_text(
        "from pera_lightning.adapters import LoRA\nclass Own(LoRA): pass\nclass Other: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def named(name: str) -> None:
        reconfigure(tmp_path / "adapter", lambda config: config["method"].update(class_path=name))

    named("lies_beside.Own")
    refused(tmp_path / "adapter", "'lies_beside.Own' is not registered here.*import the package")
    assert "lies_beside" not in sys.modules
    for name in ("lies_beside.Other", "builtins.dict", "", "pera_lightning.adapters.method.Method"):
        named(name)
        refused(tmp_path / "adapter", "is not registered here|does not take")
    named("pera_lightning.adapters.LoRA")
    load_adapter(base(), tmp_path / "adapter")


@dataclass(frozen=True, kw_only=True)
class Unregistered(LinearMethod):
    """A method of another package: its class is there, no register knows it."""

    rank: int = 2
    scale: float = 1.0
    dropout: float = 0.0
    init: str = "default"
    layer = LoRALayer

    def __post_init__(self) -> None:
        if self.rank == 13:
            raise ZeroDivisionError("of its own making")


def test_methods_of_other_packages(tmp_path: Path) -> None:
    saved(tmp_path, Unregistered())
    load_adapter(base(), tmp_path)
    reconfigure(tmp_path, lambda config: config["method"]["init_args"].update(rank=13))
    refused(tmp_path, "Unregistered does not take the stored hyperparameters: of its own making")


def test_base_weights_that_were_unfrozen(tmp_path: Path) -> None:
    """They load, which is said, and are saved again."""
    model = saved(tmp_path / "frozen")
    model[0].bias.requires_grad_(True)
    remember_unfrozen(model)
    model[0].bias.data.fill_(7.0)
    save_adapter(model, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"also holds 1 weights of the base that were unfrozen.*0\.bias"):
        again = load_adapter(base(), tmp_path / "a")
    assert (again[0].bias == 7).all()
    assert "0.bias" in adapter_state_dict(again)
    assert not again[0].bias.requires_grad
    # A version that did not write them down.
    reconfigure(tmp_path / "a", lambda config: config.pop("unfrozen"))
    with pytest.warns(UserWarning, match=r"of an earlier version, also holds 1 frozen weights.*0\.bias"):
        assert (load_adapter(base(), tmp_path / "a")[0].bias == 7).all()


def test_a_mask_may_be_infinite(tmp_path: Path) -> None:
    def masked() -> nn.Module:
        model = base()
        model.register_buffer("mask", torch.full((2, 2), -torch.inf))
        return model

    model = masked()
    inject(model, LoRA(rank=2), ["0"])
    save_adapter(model, tmp_path)
    load_adapter(masked(), tmp_path)
