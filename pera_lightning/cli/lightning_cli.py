"""LightningCLI with adapters: the `adapter` group, what all runs share, and one-line errors."""

from __future__ import annotations

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
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import pera_lightning
from pera_lightning.adapters.registry import registered_methods
from pera_lightning.cli.checkpoints import (
    EVALUATIONS,
    check_checkpoint_exists,
    loaded_first,
    of_its_run,
    resuming_command,
    to_evaluate,
    to_go_on_from,
)
from pera_lightning.cli.lost_process import lost_process
from pera_lightning.cli.messages import explain
from pera_lightning.cli.run_defaults import complete, default_folder, default_logger
from pera_lightning.cli.signals import Stopped, leave_to
from pera_lightning.cli.sweeps.folder import LOG as SWEEP_LOG
from pera_lightning.cli.words import CONFIG_FLAGS, taken_out
from pera_lightning.errors import PeraError, UnknownNameError, closest
from pera_lightning.files import dated_path
from pera_lightning.training.callback import AdapterInjection
from pera_lightning.training.module import AdapterModule
from pera_lightning.training.run_folder import goes_on, logged_into

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
        command = str(self.config.get("subcommand"))
        complete(self.config.get(command, self.config), self._folder, evaluates=command in EVALUATIONS)

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
        """Leaves signals to the callback once it trains, and tells it the command that goes on with the fit."""
        preemption = self._callback.preemption
        preemption.command = resuming_command(self._words)
        leave_to(lambda: preemption.watching)

    @property
    def _callback(self) -> AdapterInjection:
        return self._get(self.config_init, "adapter")

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Stopped as stop:
            if subcommand == "fit" and not self._callback.preemption.begun:
                stop.add_note("before the training began: nothing was changed")
            raise
        finally:
            self._callback.run_folder.close(self.trainer)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        given, trainer = arguments.get("ckpt_path"), self.trainer
        if subcommand in EVALUATIONS:
            given = to_evaluate(subcommand, given, trainer)
            self._callback.untrained = given is None
            if isinstance(self.model, AdapterModule):
                self.model.evaluated_checkpoint = given
        else:
            given = to_go_on_from(given, trainer)
        check_checkpoint_exists(given, trainer)
        if subcommand == "fit":
            self._claim_folder(loaded_first(given, trainer))
        keep_metrics(trainer)
        return {**arguments, "ckpt_path": given}

    def _claim_folder(self, checkpoint: str | None) -> None:
        """Locks the run's folder and moves an earlier run aside, before a logger opens its files there."""
        folder, trainer = logged_into(self.trainer), self.trainer
        if folder is None or not trainer.is_global_zero:
            return
        config = vars(self.config[str(self.subcommand)].as_flat())
        reads = {
            f"--{key.replace('.init_args', '')}": value
            for key, value in config.items()
            if key.startswith(("model.", "data.")) and value and isinstance(value, (str, Path))
        }
        reads |= {"--ckpt_path": checkpoint} if checkpoint else {}
        fresh = not goes_on(trainer, folder, checkpoint)
        self._callback.run_folder.claim(folder, fresh=fresh, keep=(SWEEP_LOG,), reads=reads)
        for config_file in taken_out(self._words, CONFIG_FLAGS)[0]:  # processes that are started now read it too
            if (path := Path(config_file)).parent.resolve() == folder.resolve():
                self._callback.run_folder.copy_back(path.name)


def keep_metrics(trainer: Trainer) -> None:
    """Renames the metrics of an earlier command in a folder that is used again: a `CSVLogger` would delete them."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, CSVLogger) and (path := Path(logger.log_dir) / "metrics.csv").is_file():
            path.rename(dated_path(path.parent, "metrics.earlier", path.stat().st_mtime, path.suffix))


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
    if args[0] in EVALUATIONS:
        args = [args[0], *of_its_run(args[1:])]
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
