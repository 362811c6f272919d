"""The outcome of a run: the checkpoint to test, the score it was selected by, and its results."""

from __future__ import annotations

import json
import re
from ast import literal_eval
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from pera_lightning.cli.sweeps.plan import flattened
from pera_lightning.errors import CheckpointError
from pera_lightning.training.checkpoint_io import read_checkpoint

_KEEPER = re.compile(r"\w+(\{.*\})")  # a ModelCheckpoint's key in a checkpoint
_SHORT = 80  # letters; longer facts of a protocol, such as prompts, are in results.json


def tested_checkpoint(run: Path) -> tuple[str, dict[str, Any] | None]:
    """The checkpoint of a finished fit that is to be tested, and the score it was selected by.

    Returns:
        "best"; of a fit that names its files otherwise, the best file; "last" where none is kept as the best, else the
        newest file. And ``name``, ``mode`` and ``score`` of the selection, None where nothing was selected.

    Raises:
        CheckpointError: where there is no checkpoint, or a damaged one.
    """
    folder = run / "checkpoints"
    files = sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    if not files:
        raise CheckpointError(f"{folder} has no checkpoint to test: the trainer needs a ModelCheckpoint")
    best = folder / "best.ckpt"
    if best in files:
        return "best", selection(read_checkpoint(best), best.name)
    # Any checkpoint says which file its callback holds for the best.
    checkpoint = read_checkpoint(files[-1])
    for _, state in keepers(checkpoint):
        best = folder / Path(state["best_model_path"]).name
        if best in files:
            return str(best), selection(read_checkpoint(best), best.name)
    return ("last" if folder / "last.ckpt" in files else str(files[-1])), None


def keepers(checkpoint: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Key and state of each ModelCheckpoint of a checkpoint that selects by a metric."""
    return [
        (key, state)
        for key, state in (checkpoint.get("callbacks") or {}).items()
        if isinstance(state, Mapping) and state.get("monitor") and state.get("best_model_score") is not None
    ]


def selection(checkpoint: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The score by which a file was kept as the best.

    Args:
        checkpoint: content of the file.
        name: name of the file.

    Returns:
        ``name`` of the metric, ``mode`` ("min" or "max") and ``score``; None where it was not selected. A
        ModelCheckpoint whose metric was NaN stores an infinite score, which becomes None.
    """
    for key, state in keepers(checkpoint):
        if Path(state["best_model_path"]).name == name and (found := _KEEPER.fullmatch(key)):
            # The callback's key in the file holds its options: ModelCheckpoint{'monitor': …, 'mode': 'max', …}.
            mode = literal_eval(found[1]).get("mode", "min")
            score = float(state["best_model_score"])
            return {"name": state["monitor"], "mode": mode, "score": score if isfinite(score) else None}
    return None


def read_results(file: Path) -> dict[str, Any]:
    """The metrics, parameters, method and short facts of the protocol in a run's `results.json`.

    A value that is not a number, such as Pearson's r of equal predictions, becomes None.
    """
    result = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda name: None)
    metrics = result.get("metrics") or {}
    facts = {key: value for key, value in flattened(result.get("protocol") or {}).items() if key != "checkpoint"}
    # Neither prompts nor the items of lists.
    short = [k for k, v in facts.items() if len(str(v)) <= _SHORT and not any(map(str.isdecimal, k.split(".")))]
    return {
        "metrics": {name: None if value is None else float(value) for name, value in metrics.items()},
        "trainable_parameters": result.get("trainable_parameters"),
        "method": result.get("method"),
        "protocol": {key: facts[key] for key in short},
        "selected_on_test": any(k.rpartition(".")[2] == "selected_on_test" and v is True for k, v in facts.items()),
    }
