"""The eight image data sets of the AuroRA paper: where each is, how it is split, and how large that makes it.

The AuroRA paper (NeurIPS 2025) follows the protocol of FourierFT: where a source has no validation split, a tenth of
its training examples becomes one; DTD, which has one split only, first gives a fifth to the test set. The held-out part
is rounded up. FourierFT drew its split without a seed, so the examples themselves cannot be those of the papers; the
sizes are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VALIDATION_FRACTION = 0.1
TEST_FRACTION = 0.2


@dataclass(frozen=True)
class HubSplit:
    """One split of one data set of the hub."""

    repository: str
    split: str


@dataclass(frozen=True)
class CatalogueEntry:
    """Where the splits of a data set are, and how many examples they have after splitting.

    Attributes:
        train: source of the training split.
        validation: source of the validation split; None if it is cut from `train`.
        test: source of the test split; None if it is cut from `train`, before the validation split.
        sizes: examples of train, validation and test after splitting, as in the paper.
        classes: number of classes.
    """

    train: HubSplit
    validation: HubSplit | None
    test: HubSplit | None
    sizes: tuple[int, int, int]
    classes: int

    def source_rows(self) -> dict[str, int]:
        """Examples that each source has before anything is cut from it: ``{"train": …, "test": …}``."""
        train, validation, test = self.sizes
        rows = {"train": train + (validation if self.validation is None else 0) + (test if self.test is None else 0)}
        if self.validation is not None:
            rows["validation"] = validation
        if self.test is not None:
            rows["test"] = test
        return rows


def _pair(train: str, test: str, sizes: tuple[int, int, int], classes: int) -> CatalogueEntry:
    """A training and a test split, which may be two repositories."""
    return CatalogueEntry(HubSplit(train, "train"), None, HubSplit(test, "test"), sizes, classes)


def _three(repository: str, sizes: tuple[int, int, int], classes: int) -> CatalogueEntry:
    """A repository with its own three splits."""
    train, validation, test = (HubSplit(repository, split) for split in ("train", "validation", "test"))
    return CatalogueEntry(train, validation, test, sizes, classes)


CATALOGUE: dict[str, CatalogueEntry] = {
    "oxford_pets": _pair("timm/oxford-iiit-pet", "timm/oxford-iiit-pet", (3312, 368, 3669), 37),
    "stanford_cars": _pair(
        "Multimodal-Fatima/StanfordCars_train", "Multimodal-Fatima/StanfordCars_test", (7329, 815, 8041), 196
    ),
    "cifar10": _pair("Multimodal-Fatima/CIFAR10_train", "Multimodal-Fatima/CIFAR10_test", (45000, 5000, 10000), 10),
    "dtd": CatalogueEntry(
        HubSplit("cansa/Describable-Textures-Dataset-DTD", "train"), None, None, sizes=(4060, 452, 1128), classes=47
    ),
    "eurosat": _three("timm/eurosat-rgb", (16200, 5400, 5400), 10),
    "fgvc": _pair(
        "Multimodal-Fatima/FGVC_Aircraft_train", "Multimodal-Fatima/FGVC_Aircraft_test", (3000, 334, 3333), 100
    ),
    "resisc45": _three("timm/resisc45", (18900, 6300, 6300), 45),
    "cifar100": _pair("Multimodal-Fatima/CIFAR100_train", "Multimodal-Fatima/CIFAR100_test", (45000, 5000, 10000), 100),
}


def canonical(name: str) -> str | None:
    """The catalogue's spelling of `name`, whatever its case, hyphens and underscores; None for a name that it lacks."""

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    return {plain(known): known for known in CATALOGUE}.get(plain(name))


def count_note(name: str, rows: Mapping[str, int]) -> str | None:
    """Says if a source has other counts than the paper's.

    Args:
        name: a name of the catalogue.
        rows: number of examples of each source that was found, by the keys of `CatalogueEntry.source_rows`.

    Returns:
        One line with the counts given and expected, or None if they agree.
    """
    expected = CATALOGUE[name].source_rows()
    if dict(rows) == expected:
        return None

    def counts(of: Mapping[str, int]) -> str:
        return ", ".join(f"{split} {of[split]}" for split in expected)

    return (
        f"{name}: the source has {counts(rows)} rows, the paper's has {counts(expected)}; it is split by the same "
        "fractions, but results are not comparable with the paper's"
    )
