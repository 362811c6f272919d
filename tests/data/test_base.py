"""The handshake of module and data module, in whichever order and with whichever of the two is somebody else's."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from pera_lightning import ImageDataModule
from pera_lightning.data.base import TaskDataModule
from pera_lightning.errors import CheckpointError, ConfigurationError
from pera_lightning.training.module import AdapterModule
from tests.tasks.image_classification.vision_helpers import ForeignData, loader, make_trainer, module


class Asking(AdapterModule):
    asks = ("num_classes", "class_names")

    def data_requirements(self):
        return {"image_size": 8}


def attached(data, network):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(network)
    trainer.datamodule, data.trainer, network.trainer = data, trainer, trainer
    return data


def test_a_data_module_asks_the_module_of_its_trainer():
    assert TaskDataModule().requirements() == {}
    assert attached(TaskDataModule(), Asking()).requirements() == {"image_size": 8}
    theirs = LightningModule()
    assert attached(TaskDataModule(), theirs).requirements() == {}
    theirs.data_config = {"mean": 0.5}
    assert attached(TaskDataModule(), theirs).requirements() == {"data_config": {"mean": 0.5}}


def test_a_module_asks_the_data_of_its_trainer():
    class Described(TaskDataModule):
        def description(self):
            return {"num_classes": 7, "more": True}

    network = Asking()
    attached(Described(), network)
    assert network.data_description() == {"num_classes": 7, "more": True}
    attached(ForeignData(2), network)
    assert network.data_description() == {"num_classes": 2, "class_names": ["class a", "class b"]}


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_memory_is_pinned_for_cuda(device, pinned):
    class Strategy:
        root_device = torch.device(device)

    class Stub:
        strategy = Strategy()

    data = TaskDataModule()
    assert not data.make_loader([1]).pin_memory
    data.trainer, data.num_workers = Stub(), 2
    made = data.make_loader([1, 2, 3], batch_size=3)
    assert (made.pin_memory, made.num_workers, made.batch_size) == (pinned, 2, 3)


def test_the_number_of_classes_is_settled_before_the_network_is_built(vit, tmp_path):
    network = module(vit, num_classes=None)
    with pytest.raises(ConfigurationError, match="num_classes is not given, and no data module with num_classes is"):
        network.configure_model()
    make_trainer(tmp_path, max_epochs=0).fit(network, datamodule=ForeignData(4))
    assert (network.hparams["num_classes"], network.class_names[3]) == (4, "class d")
    assert network.model.head.out_features == 4
    with pytest.raises(ConfigurationError, match="num_classes=4, but the data has num_classes=3: leave it out, or ma"):
        make_trainer(tmp_path, max_epochs=0).fit(network, datamodule=ForeignData(3))
    with pytest.raises(CheckpointError, match="trained on other classes: the data lack 'class d'"):
        make_trainer(tmp_path).test(network, datamodule=ForeignData(3))
    make_trainer(tmp_path, max_epochs=0).fit(network, loader(4, classes=4))
    assert network.class_names is None


def test_images_are_prepared_as_the_module_requires(vit, tmp_path):
    data, network = ImageDataModule("digits", classes=[0, 1, 2]), module(vit)
    make_trainer(tmp_path, max_epochs=0).fit(network, datamodule=data)
    assert (data.preprocessing().size, data.preprocessing().mean) == ((8, 8), (0.1, 0.2, 0.3))
    assert network.class_names == ["0", "1", "2"]
