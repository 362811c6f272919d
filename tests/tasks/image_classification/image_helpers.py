"""What the image tests share: a small data module, folders of small photographs, and a hub in memory."""

import datasets
import numpy as np
from PIL import Image

from pera_lightning.tasks.image_classification.data import ImageDataModule

SMALL = {"image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}


def image_module(dataset, stage=None, **arguments):
    data = ImageDataModule(str(dataset), **{**SMALL, **arguments})
    data.prepare_data()
    data.setup(stage)
    return data


def sizes(data):
    return tuple(data.split_record()["sizes"].values())


def fill(folder, count=1, suffix=".png", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 10, 12, 3), dtype=np.uint8)
    for number in range(count):
        Image.fromarray(pixels[number]).save(folder / f"{number:02d}{suffix}")


def class_folders(root):
    """Three class folders: 12, 6 and 6 photographs, some of them deeper or in upper case, with other files between."""
    fill(root / "cat", 11)
    fill(root / "cat" / "more", 1)
    fill(root / "dog", 6, ".JPG")
    fill(root / "eel", 6)
    (root / "cat" / "notes.txt").write_text("no photograph")
    (root / "cat" / "._00.png").write_text("left by a Mac")
    (root / ".cache").mkdir()
    return root


def split_folders(root, validation="val"):
    for split, count in (("train", 4), (validation, 1), ("test", 2)):
        for name in ("cat", "dog"):
            fill(root / split / name, count)
    return root


class FakeHub:
    """Answers `datasets.load_dataset` from memory, and keeps what was asked for."""

    def __init__(self, monkeypatch):
        self.tables, self.asked = {}, []
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, repository, config_name=None, *, split):
        self.asked.append((repository, config_name, split))
        return self.tables[repository, split]

    def add(self, repository, split, labels, names=("a", "b"), kind=None, images=None, columns=("image", "label")):
        kind = kind or datasets.ClassLabel(names=list(names))
        images = [None] * len(labels) if images is None else images
        features = datasets.Features({columns[0]: datasets.Image(), columns[1]: kind})
        table = datasets.Dataset.from_dict({columns[0]: images, columns[1]: labels}, features=features)
        self.tables[repository, split] = table


def photographs(count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 10, 12, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]
