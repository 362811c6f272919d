"""What ``--ckpt_path`` means: the checkpoints of a run's folder, by their names or as files."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from pera_lightning.cli.words import taken_out
from pera_lightning.errors import PeraError, listed

EVALUATIONS = ("validate", "test", "predict")


def resuming_command(words: Sequence[str]) -> str:
    """The shell command of a fit (its words, without the program), without the checkpoint that it goes on from."""
    _, kept = taken_out(words, ("--ckpt_path",))
    # As it was called: by a script, or by the installed command.
    program = ["python", sys.argv[0]] if sys.argv[0].endswith(".py") else [Path(sys.argv[0]).name]
    return shlex.join([*program, *kept])


def checkpoint_of_run(name: str, log_dir: str | None) -> str:
    """The file that ``--ckpt_path best`` or ``last`` means in a process that did not train; it must exist."""
    path = Path(log_dir or ".") / "checkpoints" / f"{name}.ckpt"
    if not path.is_file():
        raise PeraError(f"--ckpt_path {name}: {path} does not exist; give the checkpoint's file")
    return str(path)


def check_checkpoint_exists(given: str | None, log_dir: str | None) -> None:
    """Raises `PeraError` for a local file that does not exist, naming the checkpoints of the run's folder."""
    # Names that Lightning resolves itself, and URLs, are not files.
    if given is None or given in ("best", "last", "hpc", "registry") or ":" in given or Path(given).exists():
        return
    there = [str(path) for path in sorted((Path(log_dir or ".") / "checkpoints").glob("*.ckpt"))]
    raise PeraError(f"checkpoint {given} does not exist{f'; this run has {listed(there)}' if there else ''}")


def warn_without_last(trainer: Trainer) -> None:
    """Warns of a fit with ``--ckpt_path last`` that finds nothing to go on from, and so begins anew."""
    # A checkpoint callback without a folder of its own writes beside the logs.
    keeper = trainer.checkpoint_callback
    folder = Path(getattr(keeper, "dirpath", None) or Path(trainer.log_dir or ".") / "checkpoints")
    if keeper is not None and not any(folder.glob("last*.ckpt")):
        rank_zero_warn(f"--ckpt_path last: {folder} has no last.ckpt; the fit starts from the beginning")
        # Lightning would say the same without the folder.
        warnings.filterwarnings("ignore", message=r".*ckpt_path=.last.. is set, but there is no last checkpoint")
