"""A merged model: it is evaluated, compiled and saved, and neither trained nor loaded into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pera_lightning import (
    AdapterInjection,
    adapter_state_dict,
    load_adapted,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from pera_lightning.adapters import HiRA, LoRA, Method
from pera_lightning.errors import ConfigurationError
from tests.merging.helpers import adapted, base, equal, inputs, weights

# --- running and training a merged model ---


def test_a_merged_model_is_evaluated_and_not_trained() -> None:
    model, x = adapted(), inputs()
    before = model(x)
    merge(model)
    torch.testing.assert_close(model(x), before)  # with gradients on, as the head's owner may want them
    with torch.no_grad():
        torch.testing.assert_close(model.train()(x), before)
    with pytest.raises(ConfigurationError, match="merged, and training would not change them: call unmerge"):
        model(x)
    unmerge(model)
    model(x).sum().backward()
    assert model[0].adapters["all"].B.grad is not None


@pytest.mark.parametrize("method", [LoRA(rank=2), HiRA(rank=2)], ids=str)
def test_a_compiled_model_follows(method: Method) -> None:
    torch._dynamo.reset()
    model, x = adapted(method), inputs()
    before, B = model(x), model[0].adapters["all"].B.detach().clone()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), before)
    for _ in range(2):
        merge(model)
        model[0].adapters["all"].B.data.zero_()  # is resting
        torch.testing.assert_close(compiled(x), before)
        unmerge(model)
        assert not torch.allclose(compiled(x), before)  # and acts again
        model[0].adapters["all"].B.data.copy_(B)
        torch.testing.assert_close(compiled(x), before)


# --- saving and loading ---


def test_the_adapter_of_a_merged_model_is_saved_as_ever(tmp_path: Path) -> None:
    model, x = adapted(), inputs()
    before, state = model(x), weights(model)
    plain_state = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    merge(model)
    assert equal(adapter_state_dict(model), plain_state)
    save_adapter(model, tmp_path)
    again = load_adapter(base(), tmp_path).eval()
    assert torch.equal(again(x), before)
    assert equal(weights(again), state)


class Foreign(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = base()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def trainer(folder: Path) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = AdapterInjection(LoRA(rank=2), ["net.0", "net.2"], ["net.4"], seed=0)
    return Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=folder, callbacks=[callback], **quiet)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(inputs(8), torch.arange(8) % 4), batch_size=4)


def test_a_merged_module_under_the_trainer(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(Foreign(), loader())
    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)
    module = load_adapted(Foreign(), path)
    adapted_loss = trainer(tmp_path).test(module, loader(), verbose=False)[0]["test/loss"]
    merge(module)
    merged_loss = trainer(tmp_path).test(module, loader(), verbose=False)[0]["test/loss"]
    assert merged_loss == pytest.approx(adapted_loss, rel=1e-5)
    merged = weights(module)
    with pytest.raises(ConfigurationError, match="training would not change them: call unmerge"):
        trainer(tmp_path).fit(module.train(), loader())
    refusal = "cannot be loaded into merged adapters: call unmerge first"
    for load in (
        lambda: trainer(tmp_path).fit(module, loader(), ckpt_path=path),
        lambda: trainer(tmp_path).test(module, loader(), ckpt_path=path, verbose=False),
        lambda: load_adapted(module, path),
    ):
        with pytest.raises(ConfigurationError, match=refusal):
            load()
    assert equal(weights(module), merged)
    unmerge(module)
    trainer(tmp_path).fit(module.train(), loader())
