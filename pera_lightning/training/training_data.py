"""What adapters were trained with, kept in their checkpoints, and whether the data of a run agree with it.

The names of the classes in their order, what the data say of themselves (data set, split, seed), and a hash of each
training example. Without them a test whose folders are called otherwise, or whose split was drawn otherwise, would give
a number like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from pera_lightning.errors import CheckpointError, PeraError, listed, shorten
from pera_lightning.injection.inject import Injection, injection_of, update_injection
from pera_lightning.injection.state import find_injected
from pera_lightning.training import _lightning_internals as internals


def injection_in(module: nn.Module) -> Injection | None:
    """What was injected into a module, or a part of it."""
    found = find_injected(module)
    return injection_of(found[1]) if found else None


def description_of(data: Any, asks: Iterable[str] = ("class_names",)) -> Mapping[str, Any]:
    """What a data module says of its data; somebody else's by the attributes `asks` and ``protocol()``."""
    describe = getattr(data, "description", None)
    if callable(describe):
        return describe()
    given = {name: value for name in asks if (value := getattr(data, name, None)) is not None}
    said = {name: value() if callable(value) else value for name, value in given.items()}
    protocol = getattr(data, "protocol", None)
    return {**said, "protocol": protocol()} if callable(protocol) else said


def _said(data: Any) -> dict[str, Any]:
    """What a data module says of its class names, as texts, and of itself, as primitives.

    Somebody else's may use these words for other things: what is not of that form counts as nothing said.
    """
    try:
        said: Any = description_of(data)
    except PeraError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {shorten(str(error))}"
        rank_zero_warn(f"checkpoints do not say what was trained on: {type(data).__name__} does not tell ({what})")
        return {}
    if not isinstance(said, Mapping):
        return {}
    protocol = _primitive(said.get("protocol"))
    return {
        "class_names": class_names_in(said),
        "protocol": protocol if isinstance(protocol, dict) or protocol is None else {"protocol": protocol},
    }


def class_names_in(said: Mapping[str, Any]) -> list[str]:
    """The names of the classes in what data say of themselves, as texts; none where they say none."""
    names = _primitive(said.get("class_names"))
    return [str(name) for name in names] if isinstance(names, list) else []


def _primitive(value: Any) -> Any:
    """A value as a checkpoint and JSON hold it; what is neither is told by its text."""
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _primitive(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_primitive(item) for item in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def _hashes(data: Any, split: str) -> torch.Tensor | None:
    """The hashes of a split's examples, of a data module that tells them: (n,) int64."""
    tell = getattr(data, "example_hashes", None)
    found = tell(split) if callable(tell) else None
    return torch.from_numpy(found) if isinstance(found, np.ndarray) and found.dtype == np.int64 else None


def note_training_data(trainer: Trainer, module: LightningModule) -> None:
    """Keeps what a fit is trained with, for its checkpoints; says where a resumed fit goes on with other examples."""
    found = find_injected(module)
    if found is None:
        return
    data = getattr(trainer, "datamodule", None)
    said, hashes = _said(data), _hashes(data, "train")
    examples, before = None if hashes is None else hashes.unique(), injection_of(found[1])
    if trainer.ckpt_path is not None and before is not None:
        _compare_examples(before.trained_examples, examples)
    update_injection(
        found[1],
        class_names=tuple(said.get("class_names", ())) or None,
        trained_on=said.get("protocol"),
        trained_examples=examples,
    )


def _compare_examples(before: torch.Tensor | None, now: torch.Tensor | None) -> None:
    if before is None or now is None or torch.equal(before, now):
        return
    new = int((~torch.isin(now, before)).sum())
    rank_zero_warn(
        f"this fit goes on with other training examples than its checkpoint's: {new} of {len(now)} are new, and "
        f"{len(before) - len(now) + new} of {len(before)} are left out"
    )


def number_classes_alike(module: nn.Module, saved: Mapping[str, Any], source: str) -> None:
    """Has the data of a run number the classes as a checkpoint does, by their names.

    Args:
        module: the run's module; without a trainer and a data module that has class names nothing is done.
        saved: the checkpoint's description of its injection.
        source: where it comes from, for the message.

    Raises:
        CheckpointError: where the data have other classes, naming them.
    """
    data = getattr(internals.attached_trainer(module), "datamodule", None)  # type: ignore[arg-type]
    names, renumber = saved.get("class_names"), getattr(data, "number_classes", None)
    own = _said(data).get("class_names", [])
    if not names or not own or own == list(names):
        return
    new, missing = [n for n in own if n not in names], [n for n in names if n not in own]
    if new or missing:
        parts = [f"have {listed(map(repr, new))}, which it does not know"] if new else []
        parts += [f"lack {listed(map(repr, missing))}"] if missing else []
        differ, advice = f"the data {', and '.join(parts)}", "give them the same names" if new else "give data of all"
        raise CheckpointError(f"{source} was trained on other classes: {differ}; {advice}")
    if renumber is None:
        raise CheckpointError(
            f"{source} numbers the classes {listed(map(repr, names), 4)}, the data {listed(map(repr, own), 4)}: give "
            "them in the same order"
        )
    renumber(list(names))
    if hasattr(module, "agree"):
        module.agree()


def trained_on_at_test(module: LightningModule) -> dict[str, Any]:
    """What a result says of the training: the data, and how many of the examples tested on were trained on."""
    mark = injection_in(module)
    known = None if mark is None else mark.trained_examples
    hashes = None if known is None else _hashes(module.trainer.datamodule, "test")  # type: ignore[attr-defined]
    count = None if hashes is None else int(torch.isin(hashes, known).sum())
    if count:
        rank_zero_warn(
            f"{count} of {len(hashes)} test examples were trained on: the checkpoint's split is another, or the data "
            "have examples twice; results.json says so too"
        )
    names = None if mark is None or mark.class_names is None else list(mark.class_names)
    trained_on = None if mark is None else mark.trained_on
    return {"class_names": names, "trained_on": trained_on, "test_examples_trained_on": count}
