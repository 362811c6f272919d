"""What `export_peft` asks of a model and of its base's name."""

import pytest
import torch

from pera_lightning import export_peft, inject
from pera_lightning.adapters import (
    LoRA,
)
from pera_lightning.errors import ConfigurationError
from tests.export.peft_models import (
    adapted,
)


def test_parts_that_were_injected_apart_are_exported_apart(tmp_path):
    model = torch.nn.ModuleDict({"one": torch.nn.Sequential(torch.nn.Linear(4, 4)), "two": torch.nn.Linear(4, 4)})
    inject(model.one, LoRA(rank=2), ["0"])
    model.two = torch.nn.Sequential(torch.nn.Linear(4, 4))
    inject(model.two, LoRA(rank=2), ["0"])
    with pytest.raises(ConfigurationError, match="ModuleDict has several injected parts: export each of them"):
        export_peft(model, tmp_path / "out", base_name="base")


@pytest.mark.parametrize("name", [None, "  "])
def test_a_base_without_a_name(tmp_path, name):
    with pytest.raises(ConfigurationError, match="the base's name on a hub, or its folder, is needed"):
        export_peft(adapted("llama", LoRA(rank=2)), tmp_path / "out", base_name=name)
