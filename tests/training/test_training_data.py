"""What a checkpoint says of its data, and that a run with other classes or another split is told apart."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from pera_lightning import load_adapted, load_adapter
from pera_lightning.errors import CheckpointError
from pera_lightning.tasks.image_classification.data import ImageDataModule
from pera_lightning.tasks.image_classification.module import ImageClassificationModule
from pera_lightning.training.training_data import injection_in
from tests.tasks.image_classification.image_helpers import SMALL, fill
from tests.tasks.image_classification.vision_helpers import ForeignData, make_trainer, save_tiny_vit


def data_of(dataset: str | Path, **arguments) -> ImageDataModule:
    options = {"transform": "none", "batch_size": 8, "validation_fraction": 0.2, "test_fraction": 0.3, **SMALL}
    return ImageDataModule(str(dataset), **{**options, **arguments})


def network_of(run: Path) -> ImageClassificationModule:
    return ImageClassificationModule(str(run / "vit"), lr=0.01)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A fit on three class folders: photographs, a base, a checkpoint and the adapter folder."""
    folder = tmp_path_factory.mktemp("trained")
    save_tiny_vit(folder / "vit")
    for seed, name in enumerate(("cat", "dog", "emu")):
        fill(folder / "pets" / name, 20, seed=seed)
    trainer = make_trainer(folder, limit_val_batches=0)
    trainer.fit(network_of(folder), datamodule=data_of(folder / "pets"))
    trainer.save_checkpoint(folder / "best.ckpt")
    return folder


def result_of(run: Path, folder: Path, data: ImageDataModule) -> dict:
    make_trainer(folder).test(network_of(run), datamodule=data, ckpt_path=str(run / "best.ckpt"), verbose=False)
    return json.loads((folder / "results.json").read_text())


def test_files_say_what_was_trained_on(run):
    about = torch.load(run / "best.ckpt", weights_only=True)["pera_lightning"]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for said in (about, config):
        assert said["class_names"] == ["cat", "dog", "emu"]
        assert (said["trained_on"]["dataset"], said["trained_on"]["split_seed"]) == (str(run / "pets"), 0)
        assert said["trained_on"]["sizes"] == {"train": 33, "validation": 9, "test": 18}
    assert len(about["trained_examples"]) == 33
    again = load_adapted(ImageClassificationModule, run / "best.ckpt")
    assert again.trained_class_names() == ["cat", "dog", "emu"]  # and they are in what is saved of it
    assert again.trained_with == about["trained_on"]
    plain = network_of(run)
    plain.hparams["num_classes"] = 3
    plain.configure_model()
    load_adapter(plain.model, run / "adapter")
    assert injection_in(plain).class_names == ("cat", "dog", "emu")


def test_the_same_data_give_a_result_that_says_so(run, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trained on")
        result = result_of(run, tmp_path, data_of(run / "pets"))
    assert result["class_names"] == ["cat", "dog", "emu"]
    assert result["trained_on"]["sizes"]["train"] == 33
    assert result["test_examples_trained_on"] == 0


def test_classes_in_another_order_are_numbered_by_their_names(run, tmp_path):
    expected = result_of(run, tmp_path, data_of(run / "pets"))
    other = result_of(run, tmp_path / "other", data_of(run / "pets", classes=["emu", "cat", "dog"]))
    assert other["metrics"] == pytest.approx(expected["metrics"])
    assert other["accuracy_per_class"] == expected["accuracy_per_class"]


def test_a_reloaded_module_numbers_the_classes_of_a_test_without_checkpoint(run, tmp_path):
    expected = result_of(run, tmp_path, data_of(run / "pets"))
    again = load_adapted(ImageClassificationModule, run / "best.ckpt")
    data = data_of(run / "pets", classes=["dog", "emu", "cat"])
    values = make_trainer(tmp_path / "other").test(again, datamodule=data, verbose=False)
    assert values[0]["test/accuracy"] == pytest.approx(expected["metrics"]["test/accuracy"])


def test_other_classes_are_refused_by_their_names(run, tmp_path):
    (tmp_path / "pets").mkdir()
    for old, new in (("cat", "cat"), ("dog", "dogs"), ("emu", "emu")):
        (tmp_path / "pets" / new).symlink_to(run / "pets" / old)
    with pytest.raises(CheckpointError, match=r"other classes: the data have 'dogs', which it does not .* lack 'dog'"):
        result_of(run, tmp_path, data_of(tmp_path / "pets"))
    (tmp_path / "pets" / "dogs").unlink()
    with pytest.raises(CheckpointError, match="other classes: the data lack 'dog'"):  # not a word about shapes
        result_of(run, tmp_path, data_of(tmp_path / "pets"))


def test_another_split_says_how_many_test_examples_were_trained_on(run, tmp_path):
    data = data_of(run / "pets", split_seed=1)
    with pytest.warns(UserWarning, match=r"\d+ of 18 test examples were trained on"):
        result = result_of(run, tmp_path, data)
    trained = data_of(run / "pets")
    trained.setup("fit")
    rows = {
        name: set(one.split_record()["indices"][name]["rows"]) for name, one in (("train", trained), ("test", data))
    }
    assert result["test_examples_trained_on"] == len(rows["train"] & rows["test"]) > 0


def test_a_resumed_fit_says_that_its_examples_are_others(run, tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=0, limit_train_batches=1)
    with pytest.warns(UserWarning, match=r"other training examples than its checkpoint's: \d+ of 33 are new, and \d+"):
        trainer.fit(network_of(run), datamodule=data_of(run / "pets", split_seed=1), ckpt_path=str(run / "best.ckpt"))


def test_predictions_on_ones_own_images_need_no_data_set(run, tmp_path):
    fill(tmp_path / "photos", 2, seed=7)
    fill(tmp_path / "photos" / "dog", 1, seed=8)
    fill(tmp_path / "more", 1, seed=9)
    for place in (str(tmp_path / "photos"), [str(tmp_path / "photos"), str(tmp_path / "more" / "00.png")]):
        data = data_of("not/there", predict_folder=place)
        network = network_of(run)
        network.evaluated_checkpoint = str(run / "best.ckpt")  # as the command line does
        make_trainer(tmp_path).predict(network, datamodule=data, ckpt_path=network.evaluated_checkpoint)
        with (tmp_path / "predictions" / "predictions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["label"] for row in rows} <= {"cat", "dog", "emu"}
        known = {row["id"]: row["known_label"] for row in rows}
        if isinstance(place, str):
            assert known == {"00.png": "", "01.png": "", "dog/00.png": "dog"}
        else:
            assert (known[place[1]], known[f"{place[0]}/dog/00.png"], len(known)) == ("", "dog", 4)


def test_contents_tell_examples_apart(run, tmp_path):
    """A photograph that is called otherwise is the same; one of its size and name with other pixels is not."""
    data = data_of(run / "pets")
    data.setup("fit")
    one = data.example_hashes("train")
    assert len(np.unique(one)) == 33
    for number, name in enumerate(("cat", "dog", "emu")):
        for file in sorted((run / "pets" / name).iterdir()):
            target = tmp_path / f"breed {number}" / f"photo {file.name}"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    moved = data_of(tmp_path)
    moved.setup("fit")
    assert set(moved.example_hashes("train")) == set(one)


class Foreign(ForeignData):
    """Somebody else's data module, whose words mean other things."""

    def __init__(self, names: object, protocol: object = None, hashes: object = None) -> None:
        super().__init__(3)
        self.class_names, self._protocol, self._hashes = names, protocol, hashes

    def protocol(self) -> object:
        return self._protocol

    def example_hashes(self, split: str) -> object:
        return self._hashes


def fitted_on(folder: Path, data: ForeignData):
    save_tiny_vit(folder / "vit")
    trainer = make_trainer(folder, limit_val_batches=0, limit_train_batches=1)
    network = network_of(folder)
    trainer.fit(network, datamodule=data)
    trainer.save_checkpoint(folder / "best.ckpt")
    return network, torch.load(folder / "best.ckpt", weights_only=True)["pera_lightning"]


def test_what_others_say_is_kept_as_primitives(tmp_path):
    names = np.array(["a", "b", "c"])
    _, about = fitted_on(tmp_path, Foreign(names, {"path": Path("x"), "n": np.int64(3), "of": (1, None)}, [1, 2]))
    assert (about["class_names"], about["trained_on"]) == (["a", "b", "c"], {"path": "x", "n": 3, "of": [1, None]})
    assert "trained_examples" not in about
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["trained_on"]["n"] == 3


@pytest.mark.parametrize("protocol", ["standard", None, 3])
def test_other_words_are_no_error(tmp_path, protocol):
    _, about = fitted_on(tmp_path, Foreign(3, protocol))
    assert about["class_names"] is None
    assert about["trained_on"] == (None if protocol is None else {"protocol": protocol})


def test_other_peoples_classes_in_another_order_are_refused_in_memory_too(tmp_path):
    network, _ = fitted_on(tmp_path, Foreign(["a", "b", "c"]))
    with pytest.raises(CheckpointError, match="numbers the classes 'a', 'b', 'c', the data 'c', 'b', 'a'"):
        make_trainer(tmp_path).test(network, datamodule=Foreign(["c", "b", "a"]), verbose=False)
