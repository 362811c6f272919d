"""What `export` and `merge` share: a trained run from its files, and batches of its data.

The base, its precision and the data are the config's, with what the command line changes; method, targets and heads are
those of the checkpoint.
"""

from __future__ import annotations

import json
import logging
import re
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from pera_lightning.cli.checkpoints import configured, run_folder
from pera_lightning.cli.lightning_cli import ConfiguredCLI
from pera_lightning.cli.words import taken_out
from pera_lightning.data.base import draw_batches
from pera_lightning.errors import CheckpointError, ConfigurationError, DataError, PeraError, listed
from pera_lightning.injection.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from pera_lightning.injection.inject import injection_of
from pera_lightning.training.checkpoint_io import checkpoint_adapters
from pera_lightning.training.module import AdapterModule

BATCHES = 8
_NOT_THE_FITS = re.compile(r"-(validate|test)$|\.earlier-")  # ends of names in splits/


class TrainedCLI(ConfiguredCLI):
    """The config of a run, and which of its checkpoints is meant.

    Attributes:
        path: the checkpoint or adapter folder.
        trained: what it holds, see `read_trained`.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if not {"--help", "-h"}.isdisjoint(words):
            super().__init__(["--help"])  # prints and exits
        # Read before the config is looked for: without a checkpoint the search is in vain.
        self.path = checkpoint_path(words)
        self.trained = read_trained(self.path)
        super().__init__(configured(words, self.path))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str, help="a checkpoint of a run, or an adapter folder")
        parser.add_argument("--weights_only", help=SUPPRESS)  # in every config that fit writes

    def read(self) -> list[str]:
        """What the command reads, and must not write over: the checkpoint, and the base where it is a folder."""
        base = self.model.hparams.get("model_name")
        return [self.path, *([base] if base else [])]


class Trained:
    """A module with its trained network on the CPU, in eval mode, and the data of its run.

    Attributes:
        module: the module, with its network.
        data: the data module, attached to the module and not set up; None where the config has none.
        run: folder of the run; None where the checkpoint lies elsewhere.
        notes: what a reader should know, a line each.
    """

    def __init__(self, cli: TrainedCLI) -> None:
        self.module, self.data = cli.model, cli.datamodule
        if not isinstance(self.module, AdapterModule):
            raise ConfigurationError(
                f"{type(self.module).__name__} is not a module of this package: reload it with load_adapted and call "
                "pera_lightning.merge or export_peft"
            )
        self.run = run_folder(cli.path)  # None where it was moved or copied
        # The checkpoint says what was injected; the config only which base and data.
        self.module.load_trained(*cli.trained, source=cli.path)
        self.notes: list[str] = []
        given, mark = cli.config_init["adapter"], injection_of(self.module.model)  # type: ignore[arg-type]
        there = mark and (mark.method, mark.targets, mark.trainable)
        if mark and (given.method, tuple(given.targets), tuple(given.trainable)) != there:
            self.notes.append(
                f"the config says {given.method} on {given.targets} with trainable={given.trainable}; what counts is "
                f"the checkpoint: {mark.method} on {list(mark.targets)} with trainable={list(mark.trainable)}"
            )
        self._ready = False  # whether the data are set up
        if self.data is not None:
            attach(self.module, self.data)

    def class_names(self) -> list[str] | None:
        """Names of the classes, of data that are read anyway or as the fit wrote them down; None if unknown."""
        if (names := self.module.trained_class_names()) is not None:
            return names
        # A checkpoint of an earlier version has none. Nothing is read for names alone: the fit wrote them into splits/.
        if self._ready and hasattr(self.data, "class_names"):
            return [str(name) for name in self.data.class_names]
        files = sorted((self.run / "splits").glob("*.json")) if self.run else []
        for file in sorted(files, key=lambda file: bool(_NOT_THE_FITS.search(file.stem))):  # the fit's first
            names = json.loads(file.read_text(encoding="utf-8")).get("classes")
            if names is not None and len(names) == self.module.classes:
                return [str(name) for name in names]  # of several data sets the first that fits the head
        return None

    def calibration_batches(self, count: int) -> list[Any]:
        """Training batches as evaluation sees them, drawn by a fixed seed."""
        data = self._set_up()
        own = getattr(data, "calibration_batches", None)
        return own(count) if own else draw_batches(data.train_dataloader(), count)

    def measuring_batches(self, count: int) -> list[Any]:
        """Validation batches, drawn by a fixed seed; of several sets those of the first."""
        data = self._set_up()
        if not hasattr(data, "measuring_batches"):
            return draw_batches(data.val_dataloader(), count)
        if data.measuring_note:
            self.notes.append(data.measuring_note)
        return data.measuring_batches(count)

    def _set_up(self) -> LightningDataModule:
        data = self.data
        if data is None:
            raise ConfigurationError("the config has no data to measure on, or to calibrate with: give --data …")
        if not self._ready:
            try:
                data.prepare_data()  # what a trainer would call, in its order
                data.setup("fit")
            except (PeraError, OSError) as error:
                raise DataError(
                    f"the data cannot be had ({error}), and a merge is measured and calibrated on them: say where they "
                    "are by --data.…, or export without --mode and --batches"
                ) from None
            self._ready = True
        there, head = data.expected_classes() if hasattr(data, "expected_classes") else None, self.module.classes
        if None not in (there, head) and there != head:
            raise ConfigurationError(f"the data have {there} classes, and the trained head {head}: give its own data")
        return data


def checkpoint_path(words: Sequence[str]) -> str:
    """The last ``--ckpt_path``; raises `ConfigurationError` without one, and for an adapter, which would not act."""
    adapter = next((word for word in words if word.partition("=")[0].partition(".")[0] == "--adapter"), None)
    if adapter is not None:
        raise ConfigurationError(f"{adapter} would not act: the adapters are those of the checkpoint; leave it out")
    given, _ = taken_out(words, ("--ckpt_path",))
    if not given or not given[-1].strip():
        raise ConfigurationError("no --ckpt_path: give a checkpoint of a run, or an adapter folder")
    return given[-1]  # as the parser, which takes the last


def read_trained(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Adapters, heads and buffers of a checkpoint or adapter folder by their names, and the injection's description."""
    folder = Path(path)
    if not folder.is_dir():
        return checkpoint_adapters(path)
    if any((folder / name).exists() for name in (WEIGHTS_FILE, CONFIG_FILE)):
        return read_adapter(folder)
    within = [p for p in (folder / "adapter", *sorted((folder / "checkpoints").glob("*.ckpt"))) if p.exists()]
    hint = f"; it has {listed(map(str, within), 3)}" if within else ""
    raise CheckpointError(f"{path} is neither a checkpoint nor an adapter folder{hint}")


def attach(module: AdapterModule, data: LightningDataModule) -> None:
    """Gives a data module a trainer that runs nothing and writes nothing, from which it asks for the module."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    # What the trainer says of devices and of fast_dev_run is of no use here.
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before, logger.disabled = logger.disabled, True
    try:
        trainer = Trainer(accelerator="cpu", devices=1, fast_dev_run=True, **quiet)
    finally:
        logger.disabled = before
    # The handshake of module and data goes through the trainer, see `pera_lightning.data.base`.
    trainer.strategy.connect(module)
    trainer.state.fn = TrainerFn.FITTING  # data modules ask which stage they serve
    trainer.datamodule = data
    data.trainer = trainer
