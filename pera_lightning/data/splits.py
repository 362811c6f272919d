"""Seeded splits, independent of every global random state, and the file that records them.

The order comes from the raw doubles of PCG64, which numpy keeps stable, and not from `Generator.permutation`, which
it may change. The indices are saved all the same: they are the only proof of which examples a result rests on.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pera_lightning.errors import DataError
from pera_lightning.files import atomic_path, dated_path
from pera_lightning.validation import check_choice

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def held_out_size(count: int, fraction: float) -> int:
    """Number of examples to hold out of `count`, rounded up as scikit-learn and datasets do."""
    # Rounded first: 0.1 times a multiple of ten must not become one more through the last bit of a float.
    return math.ceil(round(fraction * count, 6))


def random_order(generator: np.random.Generator, count: int) -> np.ndarray:
    """The numbers below `count` in random order, of doubles that numpy keeps stable; the generator advances."""
    return np.argsort(generator.random(count), kind="stable")


def hold_out(
    indices: np.ndarray, fraction: float, generator: np.random.Generator, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples in two at random.

    Args:
        indices: (n,) numbers of the examples.
        fraction: share to hold out, between 0 and 1, both excluded; rounded up.
        generator: source of the order; it advances.
        labels: (n,) classes of these examples. With them every class gives its share (to one example), and none gives
            its last example; without them examples are drawn regardless of class.

    Returns:
        The indices kept and those held out, both sorted and neither empty.
    """
    order = random_order(generator, len(indices))
    # Drawn first: classes are stratified within this order.
    size = held_out_size(len(indices), fraction)
    if not 0 < size < len(indices):
        raise DataError(f"{len(indices)} images cannot be split: {fraction:g} held out leaves one side empty; add some")
    if labels is not None:
        order = _stratified(order, np.asarray(labels), size)
    return np.sort(indices[order[size:]]), np.sort(indices[order[:size]])


def _stratified(order: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """Reorders so that the first `size` entries have every class in proportion; ties go to who comes first."""
    # Each class gives its share, rounded down, and never its last example.
    classes, first, index, counts = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    quota = counts * (size / len(order))  # each class's share, not yet an integer
    take = np.minimum(np.floor(quota).astype(int), counts - 1)
    # What is missing then is given by the classes with the largest remainders, one example each.
    for one in np.lexsort((first, np.floor(quota) - quota)):
        if take.sum() < size and take[one] < counts[one] - 1:
            take[one] += 1
    if take.sum() < size:
        raise DataError(
            f"{len(order)} images of {len(classes)} classes are too few to hold out {size} and keep one of each class; "
            "add images"
        )
    # Number of each example among those of its class, in this order: the first `take` of a class come to the front.
    place = np.empty(len(order), dtype=int)
    place[np.argsort(index, kind="stable")] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    front = place < take[index]  # held out
    return np.concatenate([order[front], order[~front]])


def cut(
    existing: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
    stratify: bool,
) -> dict[str, np.ndarray]:
    """Completes train, validation and test by holding out what is missing of the training examples, test first.

    Args:
        existing: indices of the splits that exist; "train" always does.
        labels: classes of all examples of the training source.
        validation_fraction: share of what remains after the test split; unused where "validation" exists.
        test_fraction: share of the training examples; unused where "test" exists.
        seed: seed of the split alone.
        stratify: whether every class gives its share.

    Returns:
        Sorted indices of "train", "validation" and "test".
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    done = dict(existing)
    # Test before validation, of one generator: the order is part of what a seed means.
    for split, fraction in (("test", test_fraction), ("validation", validation_fraction)):
        if split not in done:
            own = labels[done["train"]] if stratify else None
            done["train"], done[split] = hold_out(done["train"], fraction, generator, own)
    return {split: done[split] for split in ("train", "validation", "test")}


# ---- who selects and who scores, where a test set has no labels ------------------------------------------------------

# Called with the number of validation examples and a seed; gives the indices of the examples that select and of those
# that are scored on, both sorted. None stands for a test set with labels.
Cut = Callable[[int, int], tuple[np.ndarray, np.ndarray | None]]


def full_validation(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The full validation set selects and is scored on, as AuroRA and many others do: results are too good."""
    return np.arange(count), np.arange(count)


def red(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Above 2,000 examples 1,000 select, else one half (the larger); the others are scored on.

    The protocol of RED (arXiv 2402.15179), ReFT, DeLoRA and PERA. The draw is ours: theirs are not published.
    """
    if count < 4:  # a half of one example has no correlation
        raise DataError(
            f"split protocol 'red' halves the validation set, and {count} examples are too few; give four or more, "
            "or split_protocol=full_validation"
        )
    order = random_order(np.random.Generator(np.random.PCG64(seed)), count)
    size = 1000 if count > 2000 else -(-count // 2)  # the half is rounded up
    return np.sort(order[:size]), np.sort(order[size:])


def own_test(count: int, seed: int) -> tuple[np.ndarray, None]:
    """The full validation set selects; a test set with labels, of one's own, is scored on."""
    return np.arange(count), None


SPLIT_PROTOCOLS: dict[str, Cut] = {cut.__name__: cut for cut in (full_validation, red, own_test)}


def split_protocol(name: str) -> Cut:
    """The split protocol of a name; raises `UnknownNameError` for another."""
    check_choice(name, "split_protocol", [*SPLIT_PROTOCOLS])
    return SPLIT_PROTOCOLS[name]


def selected_on_test(cut: Cut) -> bool:
    """Whether a split protocol scores on examples that selected."""
    selection, scored = cut(8, 0)  # any protocol, on a small set
    return scored is not None and bool(np.intersect1d(selection, scored).size)


def file_name(dataset: str) -> str:
    """A name that any file system holds: ``org/name`` becomes ``org--name``."""
    return re.sub(r"[^\w.-]+", "-", dataset.replace("/", "--")).strip("-.") or "dataset"


def write_split(log_dir: str | Path, dataset: str, record: Mapping[str, Any]) -> Path:
    """Writes ``<log_dir>/splits/<dataset>.json``, primitives only, in one step, so that no reader meets half of it.

    A file of that name that says something else is kept under a name with its time.
    """
    path = Path(log_dir) / "splits" / f"{file_name(dataset)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(record) + "\n").encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
        if path.is_file() and path.read_bytes() != data:
            shutil.copy2(path, dated_path(path.parent, f"{path.stem}.earlier", path.stat().st_mtime, path.suffix))
    return path


def record_run(
    trainer: Trainer | None, dataset: str, record: Callable[[], Mapping[str, Any]], stage: str | None = None
) -> None:
    """Writes a run's split into its log folder, on one process; every process must call it.

    A fit's file has the data set's name, and those of other stages the stage's too, so that none is written over it.
    Without a trainer, in a fast_dev_run or without a log folder nothing is written.
    """
    if trainer is None or trainer.fast_dev_run:
        return
    log_dir = trainer.log_dir  # a collective call: before anything that only one process does
    if log_dir is not None and trainer.is_global_zero:
        stage = getattr(stage, "value", stage)  # Lightning's enum has another name in an f-string, by Python's version
        write_split(log_dir, dataset if stage in ("fit", None) else f"{dataset}-{stage}", record())
