"""What all runs share unless their config says otherwise: the logger, the checkpoints, the folder of a run.

A config holds its experiment only. A run logs into ``runs/NAME``, named by its config's file, keeps ``best.ckpt`` by
the `selection_metric` of its module and ``last.ckpt``, and notes the learning rates. `PeraCLI` takes the logger from
here before a config is parsed, and the rest, which depends on the config, after it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor

from pera_lightning.cli.words import config_file

FOLDER = Path("runs")  # below the working directory
_CALLBACKS = "lightning.pytorch.callbacks."


def default_folder(words: Sequence[str]) -> Path:
    """The folder of a run by its first config: below ``runs``, the path from a folder ``configs`` on, or its name."""
    file = config_file(words)
    if file is None:
        return FOLDER / "run"
    *folders, name = file.with_suffix("").parts
    # Papers repeat names (pera/roberta_base_rte, aurora/roberta_base_rte): folders below configs/ tell them apart.
    below = folders[len(folders) - folders[::-1].index("configs") :] if "configs" in folders else ()
    return FOLDER.joinpath(*below, name)


def default_logger(folder: Path) -> dict[str, Any]:
    """TensorBoard's logger of a folder; without a version, so that the next run of the name uses it again."""
    names = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
    return {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": names}


def complete(config: Any, folder: Path, *, evaluates: bool = False) -> None:
    """Adds to a parsed config, in place, the callbacks and the root folder that it leaves out.

    A config with a checkpoint callback of its own, as every ``config.yaml`` of a run has, gets no other.

    Args:
        config: parsed config of one command.
        folder: folder of the run, where the logger has none.
        evaluates: whether the command is of a run that exists.
    """
    trainer = config["trainer"]
    if trainer is None or trainer["barebones"]:  # the second refuses loggers and checkpoints
        return
    _choose_version(_first(trainer["logger"]), config.get("ckpt_path"), evaluates)
    given = trainer["callbacks"] or []
    given = given if isinstance(given, list) else [given]
    classes = [cls for callback in given if isinstance(cls := class_of(callback), type)]
    # The module's class says which metric selects; it is not built yet.
    added: list[dict[str, Any]] = []
    if trainer["enable_checkpointing"] is not False and not any(issubclass(cls, Checkpoint) for cls in classes):
        model = config.get("model") or {}
        selection = getattr(class_of(model), "selection_metric", None) if model.get("class_path") else None
        added += checkpoints(selection)
    # The monitor of learning rates refuses a trainer without a logger.
    if trainer["logger"] not in (False, []) and not any(issubclass(cls, LearningRateMonitor) for cls in classes):
        added.append({"class_path": f"{_CALLBACKS}LearningRateMonitor", "init_args": {"logging_interval": "step"}})
    if added:
        parser = ArgumentParser(exit_on_error=False)  # fills in what each class has by default
        parser.add_argument("--callbacks", type=list[Callback])
        trainer["callbacks"] = [*given, *parser.parse_object({"callbacks": added})["callbacks"]]
    # SLURM's checkpoint and what is written without a logger lie with the run too.
    if trainer["default_root_dir"] is None:
        trainer["default_root_dir"] = _root(trainer["logger"], folder)


def checkpoints(selection: tuple[str, str] | None) -> list[dict[str, Any]]:
    """The checkpoint callbacks of a run: ``last.ckpt``, and ``best.ckpt`` by a metric and "max" or "min" if given."""
    common = {"enable_version_counter": False}
    if selection is None:
        # The end of an epoch is also where max_steps ends, and needs no validation.
        kept = [{"filename": "last", "save_on_train_epoch_end": True}]
    else:
        monitor, mode = selection
        # A callback of its own: save_last of the first would keep the checkpoint of the last improvement.
        kept = [{"filename": "best", "monitor": monitor, "mode": mode}, {"filename": "last"}]
    return [{"class_path": f"{_CALLBACKS}ModelCheckpoint", "init_args": {**one, **common}} for one in kept]


def class_of(config: Any) -> Any:
    """The class, or the function that makes one, that a parsed config's ``class_path`` names."""
    return resolve_name(config["class_path"])


def _first(logger: Any) -> Any:
    """The config of the first logger; None without one."""
    logger = (logger or [None])[0] if isinstance(logger, list) else logger
    return logger if hasattr(logger, "get") else None


def _choose_version(logger: Any, checkpoint: Any, evaluates: bool) -> None:
    """Has a logger that counts its versions take the one that a checkpoint is of, in place; new runs get a new one."""
    init = (logger.get("init_args") or {}) if logger else {}
    if not init.get("save_dir") or "version" not in init or init["version"] is not None:
        return
    place, given = Path(init["save_dir"], str(init.get("name") or "")), str(checkpoint or "")
    if given in ("best", "last"):
        files = [*place.glob(f"version_*/checkpoints/{given}*.ckpt")]
    elif given in ("none", ""):
        files = [*place.glob("version_*/checkpoints/*.ckpt")] if evaluates else []
    else:
        files = [Path(given)]
    runs = [file.absolute().parent.parent for file in files if file.absolute().parent.name == "checkpoints"]
    numbers = [re.fullmatch(r"version_(\d+)", run.name) for run in runs if run.parent.resolve() == place.resolve()]
    init["version"] = max((int(number[1]) for number in numbers if number), default=None)


def _root(logger: Any, folder: Path) -> str | None:
    """The folder that the logger writes into, for what Lightning writes beside it; None for loggers without one."""
    if logger is False:
        return str(folder)
    first = _first(logger)
    init = (first.get("init_args") or {}) if first else {}
    if not init.get("save_dir") or not init.get("name"):
        return None
    version = init.get("version")
    if version is None:  # the logger counts its versions itself, and only once it is built
        return None
    return str(Path(init["save_dir"], init["name"], f"version_{version}" if isinstance(version, int) else version))
