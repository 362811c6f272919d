"""What a fit does to the folder that it logs into: it is alone there, and an earlier run's files are moved aside first.

A fit that goes on from a checkpoint of its folder goes on in place. One that starts from the beginning finds what an
earlier run has left: the command line moves that run, all of its folder, to ``NAME.earlier-DATE-TIME`` beside it,
before a logger opens its files, and back if the fit is refused before it trains. Around other people's trainers, whose
folder may be a whole project, only what this package wrote is moved, into ``earlier-DATE-TIME`` within it.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pera_lightning.errors import ConfigurationError
from pera_lightning.files import dated_path
from pera_lightning.injection.adapter_folder import CONFIG_FILE
from pera_lightning.injection.state import METADATA
from pera_lightning.training.checkpoint_files import local_file
from pera_lightning.training.folder_lock import FILE as LOCK
from pera_lightning.training.folder_lock import FolderLock

_ADAPTER, _CONFIG = "adapter", "config.yaml"
_RESULTS, _PREDICTIONS = ("results.json", "results-*.json"), ("predictions", "predictions-*")
_IMAGES = ("images*", "test_images*", "validation*")  # of DreamBooth


class _Move(NamedTuple):
    folder: Path
    aside: Path
    entries: list[str]  # those that were moved
    stays: frozenset[str] | None  # what may lie in the folder besides, where all else was moved


class RunFolder:
    """The folder of a fit, for the callback and for the command line.

    Attributes:
        run: names the run in its checkpoints, so that another's are told apart; None for a run of earlier versions.
    """

    def __init__(self) -> None:
        self.run: str | None = secrets.token_hex(8)
        self._lock = FolderLock()
        self._claimed = False  # by the command line, which gives it free itself
        self._moved: _Move | None = None  # until the training starts
        self._used: Path | None = None  # where this callback has trained before

    # --- on the command line, around the fit; on the first process ---

    def claim(self, folder: Path, *, fresh: bool, keep: Iterable[str] = (), reads: Mapping[str, Any] = {}) -> None:
        """Locks the folder of a command's fit, and moves an earlier run aside.

        Args:
            folder: what the trainer logs into.
            fresh: whether the fit starts from the beginning.
            keep: entries that stay in the folder.
            reads: paths that the command reads, by their options.

        Raises:
            ConfigurationError: where another fit is at work there, the folder cannot be written, or the command reads
                what it would move.
        """
        self._take(folder)
        self._claimed = True
        if not fresh:
            return
        ours, saved = _ours(folder), _matching(folder, ("checkpoints/*.ckpt",))
        stays: frozenset[str] | None
        if not _is_a_run_alone(folder):  # other runs, or a project, lie there too
            others = [name for name in ("checkpoints", _CONFIG) if (folder / name).exists()]
            entries, stays = [*ours, *others] if ours or saved else [], None
        elif saved or _matching(folder, (_ADAPTER, *_RESULTS, *_PREDICTIONS, *_IMAGES)):
            stays = frozenset((LOCK, *keep))
            entries = [name for name in _names(folder) if name not in stays]
        else:
            return
        for option, path in reads.items():
            if any(Path(path).resolve().is_relative_to((folder / name).resolve()) for name in entries):
                self._lock.release()
                raise ConfigurationError(
                    f"{option} is {path}, of the earlier run in {folder}, which this one would take the place of: give "
                    "it a folder of its own (--trainer.logger.init_args.name NAME)"
                )
        if entries:
            self._move(folder, entries, stays)

    def copy_back(self, name: str) -> None:
        """Copies a file that the command reads, and that was moved aside, to its place."""
        if self._moved is not None and name in self._moved.entries:
            shutil.copy2(self._moved.aside / name, self._moved.folder / name)

    def close(self, trainer: Trainer) -> None:
        """Gives the folder free after the command; an earlier run comes back where this one did not train."""
        if not self._claimed:
            return
        if self._moved is not None:
            for logger in trainer.loggers:  # else its writer might go on in the earlier run's folder
                logger.finalize("failed")
            for name in self._moved.entries if self._moved.stays is None else _names(self._moved.folder):
                if name not in (self._moved.stays or ()):
                    _remove(self._moved.folder / name)  # of the fit that was refused
            self._move_back()
        self._claimed = False
        self._lock.release()

    # --- in the callback ---

    def enter(self, trainer: Trainer) -> None:
        """Locks the folder of a trainer that begins to fit; every process must call it, all are refused together."""
        folder, refusal = logged_into(trainer), None
        if folder is not None and trainer.is_global_zero:
            try:
                self._take(folder)
                if [*folder.iterdir()] == [folder / LOCK]:  # ModelCheckpoint would take the lock for a checkpoint
                    message = f"Checkpoint directory {re.escape(str(folder))} exists and is not empty"
                    warnings.filterwarnings("ignore", message=message)
            except ConfigurationError as error:
                refusal = str(error)
        if refusal := trainer.strategy.broadcast(refusal):
            raise ConfigurationError(refusal)

    def resume(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Takes the run's name from a checkpoint that the fit goes on from; every process must call it."""
        folder = logged_into(trainer)
        if folder is not None and goes_on(trainer, folder, trainer.ckpt_path):
            self.run = checkpoint.get(METADATA, {}).get("run")

    def begin(self, trainer: Trainer) -> None:
        """Moves aside what an earlier run has left, as the training starts; every process must call it."""
        folder = logged_into(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        self._lock.check()
        # Where this callback has trained before, the run goes on in memory.
        fresh = not self._claimed and folder != self._used and not goes_on(trainer, folder, trainer.ckpt_path)
        if fresh and (found := _ours(folder)):
            self._move(folder, found, None)
        if self._moved is not None:
            print(f"Earlier run moved aside: {self._moved.aside}", flush=True)
        self._moved, self._used = None, folder

    def leave(self) -> None:
        """Gives the folder free at the end of a fit, unless the command line does."""
        if not self._claimed:
            self._lock.release()

    def _take(self, folder: Path) -> None:
        self._lock.take(folder)
        adapter = folder / _ADAPTER
        if adapter.exists() and not adapter.is_dir():
            self._lock.release()
            raise ConfigurationError(f"{adapter} is a file, and a fit writes a folder of that name: move it")

    def _move(self, folder: Path, entries: list[str], stays: frozenset[str] | None) -> None:
        # Named after the earlier run's time: its config is written when it starts.
        dated = [_CONFIG] if _CONFIG in entries else entries
        when = max((folder / name).lstat().st_mtime for name in dated)
        within = stays is None
        aside = dated_path(*(folder, "earlier") if within else (folder.parent, f"{folder.name}.earlier"), when)
        self._moved = _Move(folder, aside, [], stays)
        try:
            aside.mkdir()
            for entry in entries:
                (folder / entry).rename(aside / entry)
                self._moved.entries.append(entry)
        except OSError as error:
            self._move_back()
            self._lock.release()
            raise ConfigurationError(
                f"{folder} has an earlier run, which cannot be moved to {aside} ({error.strerror}): give this one a "
                "folder of its own"
            ) from None

    def _move_back(self) -> None:
        move, self._moved = self._moved, None
        assert move is not None
        try:
            for entry in move.entries:
                (move.aside / entry).rename(move.folder / entry)
            move.aside.rmdir()
        except OSError as error:
            print(f"The earlier run of {move.folder} is in {move.aside} now ({error.strerror})", flush=True)


def logged_into(trainer: Trainer) -> Path | None:
    """The folder of this machine's file systems that a fit writes into, if any; every process must call it."""
    folder = trainer.log_dir  # asked on every rank
    return None if folder is None or trainer.fast_dev_run or local_file(folder) is None else Path(folder)


def goes_on(trainer: Trainer, folder: Path, checkpoint: Any) -> bool:
    """Whether a fit from a checkpoint (a path, or None) goes on with the run that the trainer's folder holds."""
    file = None if checkpoint is None else local_file(checkpoint)
    if file is None or not file.is_file():  # Lightning's finders remove theirs
        return False
    keepers = [Path(k.dirpath) for k in trainer.checkpoint_callbacks if getattr(k, "dirpath", None)]
    places = (folder, folder / "checkpoints", Path(trainer.default_root_dir), *keepers)
    return file.resolve().parent in [place.resolve() for place in places]


def rebase_checkpoints(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Corrects, in place, where a checkpoint's `ModelCheckpoint` files lie, if they lie beside it by another path.

    Those of a run that was moved since could name another run's files by now, and the path of one that is reached from
    another working directory differs from the folder's, where `ModelCheckpoint` would forget the best score.
    """
    here = Path(str(trainer.ckpt_path)).parent
    keepers = [k.dirpath for k in trainer.checkpoint_callbacks if isinstance(k, ModelCheckpoint) and k.dirpath]
    place = next((str(path) for path in keepers if Path(path).resolve() == here.resolve()), str(here))
    for key, state in (checkpoint.get("callbacks") or {}).items():
        if not isinstance(state, Mapping) or not state.get("best_model_path") or not state.get("dirpath"):
            continue
        best = here / Path(state["best_model_path"]).name
        if state["dirpath"] == place or not best.is_file():
            continue

        def moved(path: str) -> str:
            return path and str(Path(place) / Path(path).name)

        names = ("best_model_path", "kth_best_model_path", "last_model_path")
        paths = {name: moved(state.get(name) or "") for name in names}
        kept = {moved(path): score for path, score in (state.get("best_k_models") or {}).items()}
        checkpoint["callbacks"][key] = {**state, **paths, "best_k_models": kept, "dirpath": place}


def _ours(folder: Path) -> list[str]:
    """What tests and fits of this package have left in a folder that may be a whole project; nothing is guessed."""
    found = [_ADAPTER] if (folder / _ADAPTER / CONFIG_FILE).is_file() else []
    for path in _matching(folder, _RESULTS):
        with suppress(OSError, ValueError, LookupError, TypeError):
            if json.loads(path.read_text(encoding="utf-8"))["versions"]["pera_lightning"]:
                found.append(path.name)
    return [*found, *(path.name for path in _matching(folder, _PREDICTIONS))] if found else []


def _is_a_run_alone(folder: Path) -> bool:
    """Whether a folder holds one run and nothing else, by what there is in it."""
    if Path.cwd().is_relative_to(folder.resolve()):
        return False
    return not _matching(folder, (".git", "*/checkpoints", f"*/{_CONFIG}", "*/*/checkpoints"))


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _remove(path: Path) -> None:
    with suppress(OSError):  # a network disk keeps open files under another name for a while
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
