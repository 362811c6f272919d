"""A test on several processes measures what a test on one does: every image once, however they come out."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from pera_lightning.adapters import AuroRA
from pera_lightning.data.distributed_sampler import padded_shard
from pera_lightning.tasks.image_classification.data import ImageDataModule
from tests.training.distributed.ddp_helpers import Randomise, make, seeded

pytestmark = pytest.mark.filterwarnings("error:.*it is recommended to use .Trainer.devices=1.*")


class Sizes(Callback):
    """How many batches each process had."""

    def __init__(self, folder):
        self.folder, self.batches = folder, 0

    def on_test_batch_end(self, trainer, pl_module, *_):
        self.batches += 1

    def on_test_end(self, trainer, pl_module):
        (self.folder / f"batches{trainer.global_rank}").write_text(str(self.batches))


def evaluated(folder, network, data, world):
    """results.json, what `validate` returns, the rows of predictions.csv, and the batches of each rank."""
    folder.mkdir()
    seeded()
    trainer = make(folder, world, AuroRA(rank=2), callbacks=[Start(), Sizes(folder)])
    (measured,) = trainer.validate(network(), datamodule=data(), verbose=False)
    trainer.test(network(), datamodule=data(), verbose=False)
    trainer.predict(network(), datamodule=data(), return_predictions=False)
    with (folder / "predictions" / "predictions.csv").open(newline="") as file:
        predictions = list(csv.DictReader(file))
    return SimpleNamespace(
        results=json.loads((folder / "results.json").read_text()),
        measured=measured,
        predictions=predictions,
        batches=[int((folder / f"batches{rank}").read_text()) for rank in range(world)],
    )


class Start(Randomise):
    on_validation_start = on_test_start = on_predict_start = Randomise.on_fit_start


def assert_same(one, several):
    assert several.results["n"] == one.results["n"]
    for name, value in one.results["metrics"].items():
        exact = "loss" not in name  # counts; sums of losses are rounded in another order
        assert several.results["metrics"][name] == pytest.approx(value, rel=0 if exact else 1e-6), name
    assert several.results["accuracy_per_class"] == one.results["accuracy_per_class"]
    assert set(one.results["accuracy_per_class"]) == {"test", "test_static"}
    assert several.measured == pytest.approx(one.measured, rel=1e-6)
    assert [row["id"] for row in several.predictions] == [row["id"] for row in one.predictions]
    assert [row["label"] for row in several.predictions] == [row["label"] for row in one.predictions]
    assert len(set(several.batches)) == 1


@pytest.mark.parametrize("world", [2, 3])
def test_every_image_counts_once(vit, tmp_path, world):
    """A hundred and seven test images and forty-three to validate, neither a multiple of 2 or 3, in batches of 16."""
    from tests.tasks.image_classification.vision_helpers import module

    def data():
        return ImageDataModule(
            "digits",
            classes=[2, 4, 6],
            transform="none",
            image_size=8,
            mean=[0.5] * 3,
            std=[0.5] * 3,
            interpolation="nearest",
            eval_batch_size=16,
        )

    known = data()
    known.setup()
    counts = known.split_record()["sizes"]
    assert all(counts[split] % n for split in ("validation", "test") for n in (2, 3))

    def network():
        return module(vit, num_classes=None)

    one, several = (evaluated(tmp_path / str(n), network, data, n) for n in (1, world))
    assert_same(one, several)
    assert several.results["n"] == counts["test"] == len(several.predictions)


def unlabelled(item):
    return (item[0], torch.tensor(-100), *item[2:])


class Few(LightningDataModule):
    """So few images that a process has none but padding."""

    num_classes = 3

    def __init__(self, count):
        super().__init__()
        self.count = count

    def _loader(self, ids=False):
        from tests.tasks.image_classification.vision_helpers import Images

        images = Images(self.count, ids=ids)
        return DataLoader(**padded_shard(images, self.trainer, unlabelled), batch_size=2)

    val_dataloader = test_dataloader = _loader

    def predict_dataloader(self):
        return self._loader(ids=True)


@pytest.mark.parametrize("count", [1, 5])
def test_processes_with_nothing_but_padding(vit, tmp_path, count):
    """One image: two processes have padding only. Five in batches of two: the last batch of a process is padding."""
    from tests.tasks.image_classification.vision_helpers import module

    one, three = (evaluated(tmp_path / str(n), lambda: module(vit), lambda: Few(count), n) for n in (1, 3))
    assert_same(one, three)
    assert three.results["n"] == count
