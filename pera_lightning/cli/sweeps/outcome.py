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
        "best", or the best file by another name; "last" where none is kept as the best, else the newest file. And
        ``name``, ``mode`` ("min" or "max") and ``score`` of the selection, None where nothing was selected. A metric
        that was NaN left an infinite score, which becomes None.

    Raises:
        CheckpointError: for a missing or damaged checkpoint.
    """
    folder = run / "checkpoints"
    files = sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    if not files:
        raise CheckpointError(f"{folder} has no checkpoint to test: the trainer needs a ModelCheckpoint")
    # A checkpoint says which file each callback holds for the best; of several callbacks that of best.ckpt counts.
    best = folder / "best.ckpt"
    source = best if best in files else files[-1]
    states = read_checkpoint(source).get("callbacks") or {}
    try:
        if (chosen := _selected(states, folder, files)) is not None:
            return chosen
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{source} is damaged: its callbacks do not tell the best file ({what})") from None
    names = [name for name in ("best", "last") if folder / f"{name}.ckpt" in files]
    return names[0] if names else str(files[-1]), None


def _selected(states: Mapping[str, Any], folder: Path, files: list[Path]) -> tuple[str, dict[str, Any]] | None:
    """The best file and its selection, by what the callbacks of a run have saved; None where nothing was selected."""
    for key, state in sorted(states.items(), key=lambda item: _best_of(item[1]) != "best.ckpt"):
        if not _best_of(state):
            continue
        best = folder / _best_of(state)
        # The callback's key in the file holds its options: ModelCheckpoint{'monitor': …, 'mode': 'max', …}.
        if best in files and (found := _KEEPER.fullmatch(key)):
            score, mode = float(state["best_model_score"]), literal_eval(found[1]).get("mode", "min")
            chosen = {"name": state["monitor"], "mode": mode, "score": score if isfinite(score) else None}
            return "best" if best.stem == "best" else str(best), chosen
    return None


def _best_of(state: Any) -> str:
    """The name of the file that a ModelCheckpoint holds for the best by a metric, by its state; "" for others."""
    if not isinstance(state, Mapping) or not state.get("monitor") or state.get("best_model_score") is None:
        return ""
    return Path(state["best_model_path"]).name


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
