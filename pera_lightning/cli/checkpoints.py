"""What ``--ckpt_path`` means: a run's checkpoints by their names, files, and the run that a file is of."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_warn

from pera_lightning.cli.words import CONFIG_FLAGS, taken_out
from pera_lightning.errors import ConfigurationError, PeraError, listed
from pera_lightning.training._lightning_internals import hpc_resume_path

EVALUATIONS = ("validate", "test", "predict")
NONE = "none"  # no checkpoint, asked for by name


def resuming_command(words: Sequence[str]) -> str:
    """The shell command of a fit (its words, without the program), without the checkpoint that it goes on from."""
    _, kept = taken_out(words, ("--ckpt_path",))
    # As it was called: by a script, or by the installed command.
    program = ["python", sys.argv[0]] if sys.argv[0].endswith(".py") else [Path(sys.argv[0]).name]
    return shlex.join([*program, *kept])


# ---- the checkpoints of a run, by its trainer ------------------------------------------------------------------------


def to_evaluate(command: str, given: str | None, trainer: Trainer) -> str | None:
    """The checkpoint that an evaluation is of, None for the untrained network.

    Raises:
        PeraError: where a run's folder has checkpoints and it is not said which is meant, or where it has none of that
            name.
    """
    if given == NONE:
        if SLURMEnvironment.detect() and (found := hpc_resume_path(trainer)):
            raise PeraError(f"--ckpt_path {NONE}: Lightning would load {found} all the same; delete it")
        return None
    if given in ("best", "last"):
        if path := find_checkpoint(given, trainer):
            return str(path)
        where = Path(checkpoint_folders(trainer)[0], f"{given}.ckpt")
        raise PeraError(f"--ckpt_path {given}: {where} does not exist{_there(trainer) or '; give a FILE'}")
    if given is None:
        if files := _files(trainer):
            names = [name for name in ("best", "last") if find_checkpoint(name, trainer)]
            raise PeraError(
                f"{command} of which checkpoint? {files[0].parent} has {listed([file.name for file in files])}: give "
                f"--ckpt_path {', '.join([*names, 'FILE'])}, or {NONE} for the untrained network"
            )
        rank_zero_warn(f"{command} without --ckpt_path: adapters and head are as initialised, not trained")
    return given


def to_go_on_from(given: str | None, trainer: Trainer) -> str | None:
    """The checkpoint that a fit goes on from, None where it starts from the beginning."""
    if given is not None and (found := _written_before_requeue(trainer)):
        rank_zero_warn(f"requeued by SLURM: going on from {found}, not from --ckpt_path {given}")
        return "hpc"
    if given not in ("best", "last"):
        return None if given == NONE else given
    if path := find_checkpoint(given, trainer):
        return str(path)
    folder = checkpoint_folders(trainer)[0]
    rank_zero_warn(f"--ckpt_path {given}: {folder} has no {given}.ckpt; the fit starts from the beginning")
    return None


def loaded_first(given: str | None, trainer: Trainer) -> str | None:
    """The file that Lightning loads for a `ckpt_path` of fit, which it may find by itself."""
    if given == "hpc" or (given is None and SLURMEnvironment.detect()):
        return hpc_resume_path(trainer)
    if given is None:
        kept = (c.ckpt_path for c in trainer.callbacks if isinstance(c, OnExceptionCheckpoint))  # type: ignore[attr-defined]
        return next((path for path in kept if os.path.exists(path)), None)
    return given


def find_checkpoint(name: str, trainer: Trainer) -> Path | None:
    """The newest file that "best" or "last" means in the folder of a run."""
    # Lightning counts them, best-v1.ckpt, where a file of that name is there: also an earlier run's, in one `dirpath`.
    patterns = ["last*.ckpt"] if name == "last" else [f"{name}.ckpt", f"{name}-v[0-9]*.ckpt"]
    found = [file for folder in checkpoint_folders(trainer) for one in patterns for file in folder.glob(one)]
    return max(found, key=lambda file: file.stat().st_mtime_ns, default=None)


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Where the checkpoints of a trainer's run lie, as far as that is known before it runs; at least one folder."""
    folders = [Path(path) for k in trainer.checkpoint_callbacks if (path := getattr(k, "dirpath", None))]
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or isinstance(logger, (TensorBoardLogger, CSVLogger)):
        folders.append(Path(trainer.log_dir or ".") / "checkpoints")
    else:  # loggers of services make a folder for each run
        folders += Path(logger.save_dir or trainer.default_root_dir, str(logger.name)).glob("*/checkpoints")
    return list(dict.fromkeys(folders)) or [Path(trainer.default_root_dir) / "checkpoints"]


def check_checkpoint_exists(given: str | None, trainer: Trainer) -> None:
    """Raises `PeraError` for a local file that does not exist, naming the checkpoints of the run's folder."""
    # Names that Lightning resolves itself, and URLs, are not files.
    if given is None or given in ("hpc", "registry") or ":" in given or Path(given).exists():
        return
    raise PeraError(f"checkpoint {given} does not exist{_there(trainer)}")


def _files(trainer: Trainer) -> list[Path]:
    return [file for folder in checkpoint_folders(trainer) for file in sorted(folder.glob("*.ckpt"))]


def _there(trainer: Trainer) -> str:
    files = listed(map(str, _files(trainer)))
    return f"; this run has {files}" if files else ""


def _written_before_requeue(trainer: Trainer) -> str | None:
    # The job repeats its own command, and Lightning looks for this file only where no checkpoint is given.
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
    return hpc_resume_path(trainer) if requeued else None


# ---- the run that a checkpoint is of ---------------------------------------------------------------------------------


def run_folder(given: str) -> Path | None:
    """The folder of the run that a checkpoint (RUN/checkpoints/…) or adapter folder (RUN/adapter) lies in, or None."""
    path = Path(given).absolute()
    if path.is_dir():
        return path.parent if path.name == "adapter" else None  # RUN/adapter
    return path.parent.parent if path.parent.name == "checkpoints" else None  # RUN/checkpoints/FILE


def configured(words: Sequence[str], path: str) -> list[str]:
    """Puts configs first; without any, that of the run which the checkpoint at `path` belongs to.

    The `ckpt_path` in a config that a fit wrote would win over one given before the config.
    """
    configs, others = taken_out(words, CONFIG_FLAGS)
    run = run_folder(path)
    if not configs:
        if run is None or not (run / "config.yaml").is_file():
            where = f"{run} has no config.yaml" if run else "it is in no run's folder (RUN/checkpoints/ or RUN/adapter)"
            raise ConfigurationError(f"the config of {path} is not known, {where}: give --config")
        configs = [str(run / "config.yaml")]
    return [*(word for file in configs for word in ("--config", file)), *others]


def of_its_run(words: Sequence[str]) -> list[str]:
    """The words of an evaluation; with a checkpoint's file and no config, those of its run, wherever that lies now."""
    configs, _ = taken_out(words, CONFIG_FLAGS)
    given, _ = taken_out(words, ("--ckpt_path",))
    if configs or not given:
        return [*words]
    if not Path(given[-1]).is_file():
        if any(word.startswith("--model") for word in words):  # all is given on the command line
            return [*words]
        named = given[-1] in ("best", "last", NONE) or "://" in given[-1]
        what = "of which run?" if named else "a folder." if Path(given[-1]).is_dir() else "no such file."
        raise ConfigurationError(
            f"--ckpt_path {given[-1]}: {what} Give --config, or the FILE of a checkpoint in its run's folder"
        )
    found = configured(words, given[-1])
    run = run_folder(given[-1])
    assert run is not None
    if run.is_relative_to(Path.cwd()):
        run = run.relative_to(Path.cwd())  # as the fit wrote it, and shorter to read
    return [*found[:2], *_logged_into(run), *found[2:]]


def _logged_into(run: Path) -> list[str]:
    """The words that have a run logged into its folder, which may have been moved since its config was written."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
    trainer = config.get("trainer") or {}
    options: dict[str, Any] = {"default_root_dir": run} if trainer.get("default_root_dir") else {}
    logger = trainer.get("logger")
    names = (logger.get("init_args") or {}) if isinstance(logger, dict) else {}
    if names.get("save_dir") and names.get("name"):
        place = {"save_dir": run.parent, "name": run.name, "version": ""}
        if names.get("version") != "":  # one folder more
            place = {"save_dir": run.parent.parent, "name": run.parent.name, "version": run.name}
        options |= {f"logger.init_args.{key}": value for key, value in place.items()}
    return [f"--trainer.{key}={value}" for key, value in options.items()]
