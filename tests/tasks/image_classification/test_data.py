"""The image data module: the catalogue's sizes, digits, classes, arguments and Lightning's hooks."""

import ast
import inspect
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from pera_lightning.errors import ConfigurationError, DataError, UnknownNameError
from pera_lightning.tasks.image_classification import data as images
from pera_lightning.tasks.image_classification import hub as image_hub
from pera_lightning.tasks.image_classification import sources as image_sources
from pera_lightning.tasks.image_classification.data import ImageDataModule
from tests.tasks.image_classification.image_helpers import (
    SMALL,
    FakeHub,
    class_folders,
    image_module,
    photographs,
    sizes,
)


@pytest.fixture
def flat(tmp_path):
    return class_folders(tmp_path / "pets")


@pytest.fixture
def hub(monkeypatch):
    return FakeHub(monkeypatch)


# ---- digits ---------------------------------------------------------------------------------------------------------


def test_digits_batches():
    data = image_module("digits", transform="none", interpolation="nearest", batch_size=16, eval_batch_size=5)
    assert sizes(data) == (1293, 144, 360)
    assert data.num_classes == 10
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (16, 3, 8, 8)
    assert images.dtype == torch.float32
    assert labels.shape == (16,)
    assert labels.dtype == torch.int64
    assert images.min() == -1
    assert images.max() == 1
    assert torch.equal(images[:, 0], images[:, 1])
    assert len(next(iter(data.val_dataloader()))[1]) == len(next(iter(data.test_dataloader()))[1]) == 5
    images, labels, ids = next(iter(data.predict_dataloader()))
    assert isinstance(ids, list)
    assert len(ids) == 5
    from sklearn.datasets import load_digits

    assert labels.tolist() == load_digits().target[[int(one) for one in ids]].tolist()
    assert set(np.concatenate([batch[1] for batch in data.val_dataloader()])) == set(range(10))


def test_classes_are_kept_in_the_order_given_and_stay_in_their_split():
    all_ten = image_module("digits")
    some = image_module("digits", classes=[7, 5])
    assert some.class_names == ["7", "5"]
    assert some.num_classes == 2
    rows = some.split_record()["indices"]
    everything = all_ten.split_record()["indices"]
    labels = all_ten._sources["train"].labels
    for split in ("train", "validation", "test"):
        expected = [row for row in everything[split]["rows"] if labels[row] in (5, 7)]
        assert rows[split]["rows"] == expected
    _, new, ids = next(iter(some.predict_dataloader()))
    assert new.tolist() == [0 if labels[int(one)] == 7 else 1 for one in ids]


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([5, 12], DataError, "no class 12; there are 0, 1, 2"),
        (["five", 5], DataError, "no class 'five'"),
        ([5, 5], ConfigurationError, "twice"),
        ([5], DataError, "at least two classes; chosen: 5"),
        ([], DataError, "chosen: none"),
    ],
)
def test_bad_classes(classes, error, message):
    with pytest.raises(error, match=message):
        image_module("digits", classes=classes)


def test_classes_by_name_and_by_number(flat):
    assert image_module(flat, classes=["eel", "cat"]).class_names == ["eel", "cat"]
    assert image_module(flat, classes=[2, 0]).class_names == ["eel", "cat"]
    with pytest.raises(DataError, match=r"classes=\[0, 3\]: no class 3; there are numbers 0 to 2"):
        image_module(flat, classes=[0, 3])
    with pytest.raises(DataError, match="no class 'dgo'; there are cat, dog, eel; closest: dog"):
        image_module(flat, classes=["cat", "dgo"])


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: an integer of at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size=0: an integer of at least 1"),
        ({"num_workers": -1}, "num_workers=-1: an integer of at least 0"),
        ({"split_seed": -1}, "split_seed=-1: an integer of at least 0"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1.0: a number in \(0, 1\)"),
        ({"test_fraction": 0.0}, r"test_fraction=0.0: a number in \(0, 1\)"),
        ({"image_size": 0}, "image_size"),
        ({"transform": "fancy"}, "transform='fancy' does not exist; one of fourierft"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule("digits", **arguments)


def test_arguments_that_would_be_ignored_are_refused(flat):
    for name in ("digits", "dtd", str(flat)):
        for argument in ("config_name", "image_column", "label_column", "train_split", "validation_split"):
            with pytest.raises(ConfigurationError, match=f"{argument}: for data sets of the hub"):
                ImageDataModule(name, **{argument: "x"}).prepare_data()
    with pytest.raises(ConfigurationError, match=r"validation_fraction=0.2 would do nothing: eurosat has its own"):
        ImageDataModule("eurosat", validation_fraction=0.2).prepare_data()


def test_unknown_data_set_is_suggested():
    with pytest.raises(
        UnknownNameError, match=r"unknown data set 'cifar1000'; there are oxford_pets.*closest: cifar10"
    ):
        ImageDataModule("cifar1000").prepare_data()


def test_training_batches_are_shuffled_and_others_are_not():
    data = image_module("digits", transform="none", interpolation="nearest", batch_size=1293)
    torch.manual_seed(0)
    order = [next(iter(data.train_dataloader()))[1].tolist() for _ in range(2)]
    assert order[0] != order[1]
    assert sorted(order[0]) == sorted(order[1])
    for loader in (data.val_dataloader, data.test_dataloader):
        assert torch.equal(next(iter(loader()))[0], next(iter(loader()))[0])


def test_drop_last():
    data = image_module("digits", batch_size=1000, drop_last=True)
    assert len(data.train_dataloader()) == 1
    assert len(data.val_dataloader()) == 1
    assert len(image_module("digits", batch_size=1000).train_dataloader()) == 2
    with pytest.raises(ConfigurationError, match="drop_last leaves no batch: 1293 training images"):
        image_module("digits", batch_size=2000, drop_last=True).train_dataloader()


def test_before_setup_it_says_so():
    data = ImageDataModule("digits", **SMALL)
    for ask in (lambda: data.num_classes, lambda: data.class_names, data.train_dataloader):
        with pytest.raises(ConfigurationError, match=r"after setup\(\); call it first"):
            ask()


# ---- Lightning ------------------------------------------------------------------------------------------------------


class Probe(L.LightningModule):
    """The smallest module, with a data configuration as timm's models have one."""

    @property
    def data_config(self):
        return {"input_size": (3, 6, 6), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bicubic"}

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3 * 6 * 6, 10)
        self.seen = []

    def training_step(self, batch, _):
        images, labels = batch
        self.seen.append(labels.tolist())
        return torch.nn.functional.cross_entropy(self.head(images.flatten(1)), labels)

    def validation_step(self, batch, _):
        self.training_step(batch, _)

    def predict_step(self, batch, _):
        return batch[2]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _trainer(folder, **arguments):
    options = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "limit_predict_batches": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", default_root_dir=folder, logger=False, **{**options, **quiet, **arguments})


@pytest.mark.filterwarnings("ignore")
def test_a_fit_asks_the_model_and_records_the_split(tmp_path):
    data, probe = ImageDataModule("digits"), Probe()
    data.setup()
    with pytest.raises(ConfigurationError, match="needs image_size, mean, std, and no model with a data_config says"):
        data.train_dataloader()
    trainer = _trainer(tmp_path)
    trainer.fit(probe, data)
    assert len(probe.seen[-1]) == 50
    record = json.loads((tmp_path / "splits" / "digits.json").read_text())
    assert record == data.split_record()
    assert record["dataset"] == "digits"
    assert record["seed"] == 0
    assert record["sizes"]["test"] == 360
    assert len(record["indices"]["train"]["rows"]) == 1293
    assert record["classes"][9] == "9"
    assert trainer.predict(probe, data)[0] == [str(row) for row in record["indices"]["test"]["rows"][:50]]


@pytest.mark.filterwarnings("ignore")
def test_fast_dev_run_leaves_no_file(tmp_path):
    _trainer(tmp_path, fast_dev_run=1).fit(Probe(), ImageDataModule("digits"))
    assert not (tmp_path / "splits").exists()


def test_only_one_process_writes_and_all_ask_for_the_folder(tmp_path):
    asked = []

    class Trainer(SimpleNamespace):
        @property
        def log_dir(self):
            asked.append(self.is_global_zero)
            return tmp_path

    data = ImageDataModule("digits")
    data.trainer = Trainer(is_global_zero=False, fast_dev_run=0)
    data.setup("fit")
    assert asked == [False]
    assert not (tmp_path / "splits").exists()
    data.trainer = Trainer(is_global_zero=True, fast_dev_run=0)
    data.setup("fit")
    assert (tmp_path / "splits" / "digits.json").exists()


def test_several_processes_share_what_is_not_trained_on(flat):
    """Of 24 photographs 5 are to test on: two processes have three each, the sixth without a label."""
    data = image_module(flat, transform="fourierft", eval_batch_size=2, batch_size=2)
    whole = [name for batch in data.predict_dataloader() for name in batch[2]]
    count = sizes(data)[2]
    assert count == len(whole) == 5
    names, labels, validated = [], [], []
    for rank in (0, 1):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        batches = list(data.predict_dataloader())
        names.append([name for batch in batches for name in batch[2]])
        labels.append(torch.cat([batch[1] for batch in batches]).tolist())
        assert torch.equal(torch.cat([batch[1] for batch in data.test_dataloader()]), torch.tensor(labels[-1]))
        validated.append(sum(len(batch[1]) for batch in data.val_dataloader()))
        assert len([row for batch in data.train_dataloader() for row in batch[1]]) == sizes(data)[0]  # Lightning's
    assert names == [whole[::2], [*whole[1::2], whole[-1]]]
    assert [k for own in labels for k in own if k == -100] == labels[1][-1:] == [-100]
    assert validated == [-(-sizes(data)[1] // 2)] * 2


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("mps", False), ("cuda", True)])
def test_memory_is_pinned_for_accelerators(device, pinned):
    data = image_module("digits")
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    assert data.val_dataloader().pin_memory is pinned


def test_setup_is_done_once(flat, monkeypatch):
    data = image_module(flat)
    source = data._sources["train"]
    monkeypatch.setattr(image_sources, "folder_sources", None)
    data.setup("fit"), data.setup("predict")
    assert data._sources["train"] is source


def test_batches_depend_on_the_seed_alone(flat):
    def run(num_workers, seed):
        torch.manual_seed(seed)
        loader = image_module(flat, num_workers=num_workers, batch_size=4).train_dataloader()
        return torch.cat([images for images, _ in loader])

    for workers in (0, 1):
        assert torch.equal(run(workers, 0), run(workers, 0))
        assert not torch.equal(run(workers, 0), run(workers, 1))


def test_what_workers_get_pickles(flat, hub):
    hub.add("org/name", "train", [0, 1] * 10, images=photographs(20))
    for name in (flat, "org/name", "digits"):
        part = image_module(name).predict_dataloader().dataset
        again = pickle.loads(pickle.dumps(part))
        assert torch.equal(part[0][0], again[0][0])
        assert part[0][1:] == again[0][1:]


def test_the_command_line_parses_it():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    given = [
        "--data=pera_lightning.tasks.image_classification.data.ImageDataModule",
        "--data.dataset=digits",
        "--data.classes=[9, 5]",
    ]
    given += ["--data.mean=[0.5, 0.5, 0.5]", "--data.validation_fraction=0.2", "--data.image_size=8"]
    data = ImageDataModule(**parser.parse_args(given).data.init_args.as_dict())
    assert data.classes == [9, 5]
    assert data.fractions["validation"] == 0.2
    named = parser.parse_args([*given, "--data.classes=[cat, dog]"])
    assert named.data.init_args.classes == ["cat", "dog"]


def test_heavy_libraries_are_imported_where_they_are_used():
    plain = "from pera_lightning.tasks.image_classification import datasets, transforms"
    code = f"import sys, pera_lightning.data.splits\n{plain}\nprint('torch' in sys.modules, 'timm' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
    heavy = {"timm", "datasets", "torchvision", "sklearn", "PIL", "huggingface_hub"}
    for module in (images, image_sources, image_hub):
        imports = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.Import)]
        froms = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ImportFrom)]
        roots = {alias.name for node in imports for alias in node.names} | {node.module for node in froms}
        assert not {root.split(".")[0] for root in roots} & heavy
