"""LightningCLI with adapters: the `adapter` group, what all runs share, and one-line errors."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import pera_lightning
from pera_lightning.adapters.registry import registered_methods
from pera_lightning.cli.checkpoints import (
    EVALUATIONS,
    check_checkpoint_exists,
    checkpoint_of_run,
    resuming_command,
    warn_without_last,
)
from pera_lightning.cli.lost_process import lost_process
from pera_lightning.cli.messages import explain
from pera_lightning.cli.run_defaults import complete, default_folder, default_logger
from pera_lightning.errors import PeraError, UnknownNameError, closest
from pera_lightning.training._lightning_internals import hpc_resume_path
from pera_lightning.training.callback import AdapterInjection
from pera_lightning.training.module import AdapterModule

# Short class names (AuroRA, ImageDataModule) are found where the classes are loaded.
_PUBLIC = [name for name in pera_lightning.__all__ if name.endswith("Module")]
_CLASSES = {
    "model": [getattr(pera_lightning, name) for name in _PUBLIC if not name.endswith("DataModule")],
    "data": [getattr(pera_lightning, name) for name in _PUBLIC if name.endswith("DataModule")],
}


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, without the usage; it takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a nested parser, whose error the outer one may recover from
            super().error(message, ex)
        # The options of the command that was given, for suggestions, not those of the outer parser.
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [option for action in parser._actions for option in action.option_strings]
        classes = {group: [each.__name__ for each in classes] for group, classes in _CLASSES.items()}
        raise InputError(explain(message, options, {"adapter.method": [*registered_methods()], **classes}))


class InputError(PeraError, SystemExit):
    """Wrong input on the command line; a `SystemExit`, since the parser takes other errors for a failed alternative."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2  # as of argparse


class PeraCLI(LightningCLI):
    """LightningCLI with an `adapter` group, whose callback comes first, and without optimizer groups.

    Models and data modules are given by class path; those of other packages work too.
    """

    def __init__(self, **kwargs: Any) -> None:
        # Words are handed over so that config paths can be resolved first; Lightning warns about that.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        self._words: Sequence[str] = kwargs.get("args") or sys.argv[1:]
        self._folder = default_folder(self._words)
        defaults: dict[str, Any] = {
            "trainer_defaults": {"logger": default_logger(self._folder)},
            "save_config_callback": SaveConfigAtStart,
            "save_config_kwargs": {"overwrite": True},  # the next run of a name uses its folder again
            "parser_class": OneLineParser,
            # Lightning would build the optimizer before the adapters exist.
            "auto_configure_optimizers": False,
            "seed_everything_default": 0,  # a run without a seed could not be repeated
        }
        super().__init__(**{**defaults, **kwargs})

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that is given alone: a parser of each takes a second to build, and one is used."""
        every = LightningCLI.subcommands()
        given = self._words[0] if self._words else None
        return {given: every[given]} if given in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(AdapterInjection, "adapter")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        complete(self.config.get(str(self.config.get("subcommand")), self.config), self._folder)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would let the checkpoint's hyperparameters override what the command line says."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise PeraError(explain(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the trainer with the adapter callback before all others, which may copy the model at their setup."""
        config = {**self._get(self.config_init, "trainer", default=Namespace()), **kwargs}
        others = config.get("callbacks") or []
        others = others if isinstance(others, list) else [others]
        config["callbacks"] = [self._get(self.config_init, "adapter"), *others]
        check_strategy(config.get("strategy"))
        return self._instantiate_trainer(config, [])  # no callbacks besides: Lightning would put the adapter's last

    def before_fit(self) -> None:
        """Tells the callback the command that goes on with the fit where a signal stops it."""
        self._get(self.config_init, "adapter").preemption.command = resuming_command(self._words)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        given = arguments.get("ckpt_path")
        if subcommand in EVALUATIONS and given is None:
            rank_zero_warn(f"{subcommand} without --ckpt_path: adapters and head are as initialised, not trained")
        elif subcommand in EVALUATIONS and given in ("best", "last"):
            # Lightning knows these names only in the process that trained.
            arguments["ckpt_path"] = checkpoint_of_run(given, self.trainer.log_dir)
        elif subcommand == "fit" and given is not None and (found := self._written_before_requeue()):
            rank_zero_warn(f"requeued by SLURM: going on from {found}, not from --ckpt_path {given}")
            arguments["ckpt_path"] = "hpc"
        elif subcommand == "fit" and given == "last":
            warn_without_last(self.trainer)
        check_checkpoint_exists(arguments.get("ckpt_path"), self.trainer.log_dir)
        if subcommand in EVALUATIONS and isinstance(self.model, AdapterModule):
            self.model.evaluated_checkpoint = arguments.get("ckpt_path")
        return arguments

    def _written_before_requeue(self) -> str | None:
        # The job repeats its own command, and Lightning looks for this file only where no checkpoint is given.
        requeued = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
        return hpc_resume_path(self.trainer) if requeued else None


class SaveConfigAtStart(SaveConfigCallback):
    """Writes a fit's config when its training starts, so that a fit that is refused leaves an earlier run's."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            super().setup(trainer, pl_module, stage)  # evaluations have no start of their own

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class ConfiguredCLI(PeraCLI):
    """Parses and builds model, data and adapter but no trainer, for commands that train nothing."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args=list(args), run=False, save_config_callback=None)

    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        return None


def check_strategy(name: Any) -> None:
    """Raises `UnknownNameError` for an unknown name of a strategy."""
    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(name, str) and name not in known:
        raise UnknownNameError(f"strategy={name!r} does not exist; give auto, ddp or fsdp2{closest(name, known)}")


def run(args: Sequence[str]) -> None:
    """Runs fit, validate, test or predict; raises `PeraError` for wrong input."""
    # A test in the run's folder must not replace the config that it was trained by.
    name = "config.yaml" if args[0] == "fit" else f"config_{args[0]}.yaml"
    try:
        PeraCLI(args=list(args), save_config_kwargs={"overwrite": True, "config_filename": name})
    except (MisconfigurationException, OSError) as error:
        raise PeraError(str(error)) from error
    except (ValueError, TypeError, ArithmeticError) as error:
        # Lightning's checks of the trainer's values are wrong input; elsewhere these are bugs, with a traceback.
        source = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, PeraError) or not source.is_relative_to(Path(lightning.__file__).parent):
            raise
        raise PeraError(f"{type(error).__name__}: {error}") from error
    except RuntimeError as error:
        # The process that ended first has the error that matters; the others point at it.
        if line := lost_process(error):
            raise PeraError(line) from error
        raise
