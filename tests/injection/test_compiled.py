"""Files of networks with compiled parts fit plain ones, and the reverse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pera_lightning import inject, load_adapter, save_adapter
from pera_lightning.adapters import HiRA, LoRA
from pera_lightning.injection import adapter_folder

METHOD = HiRA(rank=2, reference="random", dropout=0.0)  # its reference is drawn anew from a seed and the layer's name


class Net(nn.Module):
    """Two linears in a part that is compiled, one that is compiled itself, and a head."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.fc, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, 3)
        if compiled:
            for name in ("net", "fc", "head"):
                setattr(self, name, torch.compile(getattr(self, name), backend="eager"))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.net(x)))


def adapted(compiled: bool, method=METHOD, targets=("net.0", "fc")) -> Net:
    model = Net(compiled)
    inject(model, method, targets, ["head"], seed=0)
    return model


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("injected", [True, False])
def test_an_adapter_folder_fits_both(tmp_path: Path, compiled: bool, injected: bool) -> None:
    model = adapted(compiled)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 if p.requires_grad else 0)
    save_adapter(model, tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert "_orig_mod" not in text + str([*load_file(tmp_path / "adapter.safetensors")])
    assert list(json.loads(text)["layers"]) == ["net.0", "fc"]
    again = load_adapter(adapted(not compiled) if injected else Net(not compiled), tmp_path)
    x = torch.randn(4, 8)
    torch.testing.assert_close(again(x), model(x))


def test_a_folder_of_before_with_the_wrappers_in_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(True, LoRA(rank=2), [r"re:net\._orig_mod\.0", "fc._orig_mod"])
    with monkeypatch.context() as before:
        before.setattr(adapter_folder, "plain_state", dict)
        before.setattr(adapter_folder, "plain_description", dict)
        save_adapter(model, tmp_path)
    assert list(json.loads((tmp_path / "adapter_config.json").read_text())["layers"]) == [
        "net._orig_mod.0",
        "fc._orig_mod",
    ]
    x = torch.randn(4, 8)
    for base in (Net(False), Net(True)):
        torch.testing.assert_close(load_adapter(base, tmp_path)(x), model(x))
