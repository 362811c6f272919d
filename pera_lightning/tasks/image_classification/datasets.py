"""The eight image data sets of the AuroRA paper: where each is, how it is split, and how large that makes it.

The AuroRA paper (NeurIPS 2025) follows the protocol of FourierFT: where a source has no validation split, a tenth of
its training examples becomes one; DTD, which has one split only, first gives a fifth to the test set. What is held out
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
        splits: the splits that the source has; "train" is one. The others are cut from it, "test" before "validation".
        sizes: examples of train, validation and test after splitting, as in the paper.
        classes: number of classes.
    """

    splits: Mapping[str, HubSplit]
    sizes: tuple[int, int, int]
    classes: int

    def source_sizes(self) -> dict[str, int]:
        """Examples that each source has before anything is cut from it: ``{"train": …, "test": …}``."""
        sizes = dict(zip(("train", "validation", "test"), self.sizes, strict=True))
        lacking = sum(size for split, size in sizes.items() if split not in self.splits)
        return {split: sizes[split] + lacking * (split == "train") for split in self.splits}


def _entry(sizes: tuple[int, int, int], classes: int, **repositories: str) -> CatalogueEntry:
    """An entry whose splits have the same names in their repositories."""
    return CatalogueEntry({split: HubSplit(name, split) for split, name in repositories.items()}, sizes, classes)


_MF = "Multimodal-Fatima"
_PETS, _EUROSAT, _RESISC = "timm/oxford-iiit-pet", "timm/eurosat-rgb", "timm/resisc45"
CATALOGUE: dict[str, CatalogueEntry] = {
    "oxford_pets": _entry((3312, 368, 3669), 37, train=_PETS, test=_PETS),
    "stanford_cars": _entry((7329, 815, 8041), 196, train=f"{_MF}/StanfordCars_train", test=f"{_MF}/StanfordCars_test"),
    "cifar10": _entry((45000, 5000, 10000), 10, train=f"{_MF}/CIFAR10_train", test=f"{_MF}/CIFAR10_test"),
    "dtd": _entry((4060, 452, 1128), 47, train="cansa/Describable-Textures-Dataset-DTD"),
    "eurosat": _entry((16200, 5400, 5400), 10, train=_EUROSAT, validation=_EUROSAT, test=_EUROSAT),
    "fgvc": _entry((3000, 334, 3333), 100, train=f"{_MF}/FGVC_Aircraft_train", test=f"{_MF}/FGVC_Aircraft_test"),
    "resisc45": _entry((18900, 6300, 6300), 45, train=_RESISC, validation=_RESISC, test=_RESISC),
    "cifar100": _entry((45000, 5000, 10000), 100, train=f"{_MF}/CIFAR100_train", test=f"{_MF}/CIFAR100_test"),
}


def canonical(name: str) -> str | None:
    """The catalogue's spelling of `name`, whatever its case, hyphens and underscores; None for a name that it lacks."""

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    return {plain(known): known for known in CATALOGUE}.get(plain(name))


def count_note(name: str, found: Mapping[str, int]) -> str | None:
    """Says in one line if the sources of a data set of the catalogue have other sizes than the paper's, by split."""
    expected = CATALOGUE[name].source_sizes()
    if dict(found) == expected:
        return None

    def counts(of: Mapping[str, int]) -> str:
        return ", ".join(f"{split} {of[split]}" for split in expected)

    return (
        f"{name}: the source has {counts(found)} examples, the paper's has {counts(expected)}; it is split by the same "
        "fractions, but results are not comparable with the paper's"
    )
