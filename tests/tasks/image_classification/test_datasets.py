"""The catalogue: for all eight data sets of the AuroRA paper, the sizes that the paper prints."""

import pytest

from pera_lightning.tasks.image_classification import datasets as image_datasets
from tests.tasks.image_classification.image_helpers import FakeHub, image_module, sizes


@pytest.fixture
def hub(monkeypatch):
    return FakeHub(monkeypatch)


PAPER = {  # the AuroRA paper's table of data sets
    "oxford_pets": (3312, 368, 3669),
    "stanford_cars": (7329, 815, 8041),
    "cifar10": (45000, 5000, 10000),
    "dtd": (4060, 452, 1128),
    "eurosat": (16200, 5400, 5400),
    "fgvc": (3000, 334, 3333),
    "resisc45": (18900, 6300, 6300),
    "cifar100": (45000, 5000, 10000),
}
SOURCES = {  # rows of every split at its source, written down apart from the catalogue
    "oxford_pets": {("timm/oxford-iiit-pet", "train"): 3680, ("timm/oxford-iiit-pet", "test"): 3669},
    "stanford_cars": {
        ("Multimodal-Fatima/StanfordCars_train", "train"): 8144,
        ("Multimodal-Fatima/StanfordCars_test", "test"): 8041,
    },
    "cifar10": {("Multimodal-Fatima/CIFAR10_train", "train"): 50000, ("Multimodal-Fatima/CIFAR10_test", "test"): 10000},
    "dtd": {("cansa/Describable-Textures-Dataset-DTD", "train"): 5640},
    "eurosat": {
        ("timm/eurosat-rgb", "train"): 16200,
        ("timm/eurosat-rgb", "validation"): 5400,
        ("timm/eurosat-rgb", "test"): 5400,
    },
    "fgvc": {
        ("Multimodal-Fatima/FGVC_Aircraft_train", "train"): 3334,
        ("Multimodal-Fatima/FGVC_Aircraft_test", "test"): 3333,
    },
    "resisc45": {
        ("timm/resisc45", "train"): 18900,
        ("timm/resisc45", "validation"): 6300,
        ("timm/resisc45", "test"): 6300,
    },
    "cifar100": {
        ("Multimodal-Fatima/CIFAR100_train", "train"): 50000,
        ("Multimodal-Fatima/CIFAR100_test", "test"): 10000,
    },
}


def test_the_catalogue_is_the_papers():
    assert set(image_datasets.CATALOGUE) == set(PAPER) == set(SOURCES)


@pytest.mark.parametrize("name", PAPER)
def test_split_sizes_are_the_papers(name, hub, recwarn):
    for (repository, split), count in SOURCES[name].items():
        hub.add(repository, split, [row % 2 for row in range(count)])
    data = image_module(name)
    assert sizes(data) == PAPER[name]
    assert {(repository, split) for repository, _, split in hub.asked} == set(SOURCES[name])
    assert not [warning for warning in recwarn if "examples, the paper" in str(warning.message)]


@pytest.mark.parametrize("spelling", ["OxfordPets", "oxford-pets", "OXFORD_PETS"])
def test_names_are_matched_without_case_and_hyphens(spelling):
    assert image_datasets.canonical(spelling) == "oxford_pets"


def test_another_size_of_a_source_is_said_and_split_by_the_same_fractions(hub):
    hub.add("cansa/Describable-Textures-Dataset-DTD", "train", [0, 1] * 50)
    with pytest.warns(UserWarning, match="dtd: the source has train 100 examples, the paper's has train 5640"):
        data = image_module("DTD")
    assert sizes(data) == (72, 8, 20)
