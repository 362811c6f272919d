"""What `export` and `merge` share: a trained run from its files, and batches of its data.

The base, its precision and the data are the config's, with what the command line changes; method, targets and heads are
those of the checkpoint.
"""

from __future__ import annotations

import json
import logging
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from pera_lightning.cli.lightning_cli import ConfiguredCLI
from pera_lightning.errors import CheckpointError, ConfigurationError, DataError, PeraError, listed
from pera_lightning.injection.inject import injection_of
from pera_lightning.injection.state import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_injection,
    check_plain,
    check_state,
    inject_spec,
    read_adapter,
)
from pera_lightning.tasks.image_classification.data import ImageDataModule
from pera_lightning.training.checkpoint_io import checkpoint_adapters
from pera_lightning.training.module import AdapterModule

BATCHES = 8
_CONFIGS = ("--config", "-c")
_SEED = 0  # of the batches that are drawn


class TrainedCLI(ConfiguredCLI):
    """The config of a run, and which of its checkpoints is meant.

    Args:
        words: after the command; without ``--config`` they get that of the run's folder.
    """

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(configured(words))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str, help="a checkpoint of a run, or an adapter folder")
        parser.add_argument("--weights_only", help=SUPPRESS)  # in every config that fit writes

    def read(self) -> list[str]:
        """What the command reads, and must not write over: the checkpoint, and the base where it is a folder."""
        hparams = getattr(self.model, "hparams", {})
        return [name for name in (self.config["ckpt_path"], hparams.get("model_name")) if name]


class Trained:
    """A module with its trained network on the CPU, in eval mode, and the data of its run.

    Args:
        cli: the parsed command line.

    Attributes:
        module: with its network.
        run: the run's folder; None where the checkpoint lies elsewhere.
        notes: one line for each thing that a reader should know.

    Raises:
        CheckpointError: where the checkpoint is missing, damaged, without adapters, or of another base.
        ConfigurationError: where the config does not fit it.
    """

    def __init__(self, cli: TrainedCLI) -> None:
        path, self.module, self._data = cli.config["ckpt_path"], cli.model, cli.datamodule
        if not isinstance(self.module, AdapterModule):
            raise ConfigurationError(
                f"{type(self.module).__name__} is no module of this package: reload it with load_adapted and call "
                "pera_lightning.merge or export_peft"
            )
        self.run = run_folder(path)
        state, spec = read_trained(path)
        load_network(self.module, state, spec, path)
        self.notes = other_adapter(cli.config_init["adapter"], self.module.model)  # type: ignore[arg-type]
        self._ready = False

    @property
    def data(self) -> LightningDataModule | None:
        """The data module, attached to the module and not set up; None where the config has none."""
        if self._data is not None and self._data.trainer is None:
            attach(self.module, self._data)
        return self._data

    def class_names(self) -> list[str] | None:
        """Names of the classes as the fit wrote them down, or as data tell them that are read anyway; else None."""
        if self._ready and hasattr(self.data, "class_names"):
            return [str(name) for name in self.data.class_names]
        for file in sorted((self.run / "splits").glob("*.json")) if self.run else ():
            names = json.loads(file.read_text(encoding="utf-8")).get("classes")
            if names is not None and len(names) == _classes(self.module.hparams.get):
                return [str(name) for name in names]
        return None

    def training_batches(self, count: int) -> list[Any]:
        """Training rows as evaluation sees them, drawn by a fixed seed."""
        data = self._set_up()
        if hasattr(data, "measuring_dataloader"):
            return drawn(data.measuring_dataloader(), count)
        if isinstance(data, ImageDataModule):
            return drawn(data._loader(data._part("train")), count, data.batch_size)
        return drawn(data.train_dataloader(), count)

    def validation_batches(self, count: int) -> list[Any]:
        """Validation rows, drawn by a fixed seed; of several sets those of the first.

        A data module whose validation is no set of rows has a `measuring_dataloader` of training rows instead.
        """
        data = self._set_up()
        if hasattr(data, "measuring_dataloader"):
            self.notes.append("measured on training images: there are no others")
            return drawn(data.measuring_dataloader(), count)
        loaders = data.val_dataloader()
        return drawn(loaders[0] if isinstance(loaders, (list, tuple)) else loaders, count)

    def _set_up(self) -> LightningDataModule:
        data = self.data
        if data is None:
            raise ConfigurationError("the config has no data to measure on, or to calibrate with: give --data …")
        if not self._ready:
            try:
                data.prepare_data()
                data.setup("fit")
            except (PeraError, OSError) as error:
                raise DataError(
                    f"the data cannot be had ({error}), and they are needed to measure a merge, or to calibrate one: "
                    "say where they are by --data.…, or export without --method and --batches"
                ) from None
            self._ready = True
            there, head = _classes(lambda name: getattr(data, name, None)), _classes(self.module.hparams.get)
            if None not in (there, head) and there != head:
                raise ConfigurationError(
                    f"the data have {there} classes, and the trained head {head}: give its own data"
                )
        return data


def _classes(value: Callable[[str], Any]) -> int | None:
    """How many classes a head or a data set has, of which images and texts have names of their own."""
    return next((count for name in ("num_classes", "num_labels") if (count := value(name)) is not None), None)


def configured(words: Sequence[str]) -> list[str]:
    """The words of a command, configs first; without any, that of the run which the checkpoint belongs to.

    Configs first, since the `ckpt_path` of the fit that a config was written by would win over one given before it.

    Raises:
        ConfigurationError: where no checkpoint is given, or no config is found; for options that would not act.
    """
    words = list(words)
    if "--help" in words or "-h" in words:
        return ["--help"]
    adapter = next((word for word in words if word.partition("=")[0].partition(".")[0] == "--adapter"), None)
    if adapter is not None:
        raise ConfigurationError(f"{adapter} would not act: the adapters are those of the checkpoint; leave it out")
    path = _value(words, ("--ckpt_path",))
    if not path:
        raise ConfigurationError("no --ckpt_path: give a checkpoint of a run, or an adapter folder")
    if _value(words, _CONFIGS) is None:
        return ["--config", str(_config_of(path)), *words]
    configs: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        chosen = configs if word.partition("=")[0] in _CONFIGS else others
        chosen.append(word)
        if word in _CONFIGS:
            chosen += islice(rest, 1)
    return [*configs, *others]


def _value(words: Sequence[str], flags: Sequence[str]) -> str | None:
    """The last value given to an option, None where there is none."""
    values = []
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name in flags:
            values.append(value if equals else following)
    return values[-1] if values else None


def run_folder(path: str | Path) -> Path | None:
    """The folder of the run that a checkpoint (RUN/checkpoints/…) or adapter folder (RUN/adapter) lies in, or None."""
    path = Path(path).absolute()
    if path.is_dir():
        return path.parent if path.name == "adapter" else None
    return path.parent.parent if path.parent.name == "checkpoints" else None


def _config_of(path: str) -> Path:
    read_trained(path)  # a file that is no checkpoint has no run either
    run = run_folder(path)
    if run is not None and (run / "config.yaml").is_file():
        return run / "config.yaml"
    where = f"{run} has no config.yaml" if run else "it is in no folder of a run (RUN/checkpoints/ or RUN/adapter)"
    raise ConfigurationError(f"the config of {path} is not known, {where}: give --config")


def read_trained(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Adapters, heads and buffers by their names in the network, and the description of the injection.

    Args:
        path: a Lightning checkpoint with adapters, or an adapter folder.

    Raises:
        CheckpointError: where it is neither, or damaged.
    """
    folder = Path(path)
    if folder.is_dir() and any((folder / name).exists() for name in (WEIGHTS_FILE, CONFIG_FILE)):
        return read_adapter(folder)
    if folder.is_dir():
        within = [p for p in (folder / "adapter", *sorted((folder / "checkpoints").glob("*.ckpt"))) if p.exists()]
        hint = f"; it has {listed(map(str, within), 3)}" if within else ""
        raise CheckpointError(f"{path} is neither a checkpoint nor an adapter folder{hint}")
    return checkpoint_adapters(path)


def load_network(module: AdapterModule, state: dict[str, Tensor], spec: dict[str, Any], source: str) -> None:
    """Builds a module's network with the base's weights and loads what was trained into it.

    Args:
        module: without a network.
        state: adapters, heads and buffers.
        spec: the description of the injection.
        source: where they come from, for messages.
    """
    module.settle(state)
    network = module.build_network()
    check_plain(network, state, spec, source, check_base=True)
    module.adapter_injection = lambda plain: inject_spec(plain, spec)
    module.model = module._injected(network)
    check_injection(spec, injection_of(network), source)  # type: ignore[arg-type]
    check_state(network, state, source)
    network.load_state_dict(state, strict=False)
    module.eval()


def other_adapter(given: Any, network: nn.Module) -> list[str]:
    """A note where the adapter group of the config is not what the checkpoint has."""
    mark = injection_of(network)
    config = (given.method, tuple(given.targets), tuple(given.trainable))
    if mark is None or config == (mark.method, mark.targets, mark.trainable):
        return []
    return [
        f"the config says {given.method} on {given.targets} with trainable={given.trainable}; what counts is the "
        f"checkpoint: {mark.method} on {list(mark.targets)} with trainable={list(mark.trainable)}"
    ]


def attach(module: AdapterModule, data: LightningDataModule) -> None:
    """Gives a data module a trainer that runs nothing and writes nothing, from which it asks for the module."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)  # what the trainer says of devices and of fast_dev_run is of no use here
    try:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", devices=1, fast_dev_run=True, **quiet)
    finally:
        log.setLevel(level)
    trainer.strategy.connect(module)
    trainer.state.fn = TrainerFn.FITTING
    trainer.datamodule = data
    data.trainer = trainer


def drawn(loader: Any, count: int, size: int | None = None) -> list[Any]:
    """The first batches of a seeded shuffle of a loader's rows; of a loader that makes its own batches, its first.

    Args:
        loader: a DataLoader.
        count: how many batches; fewer where there are fewer.
        size: rows in a batch, where not the loader's.

    Raises:
        DataError: where there is none.
    """
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(f"batches are drawn from one DataLoader; the data gave a {type(loader).__name__}")
    rows, size = loader.dataset, size or loader.batch_size
    if size is not None and not isinstance(rows, IterableDataset):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_SEED))  # type: ignore[arg-type]
        chosen = Subset(rows, order[: count * size].tolist())
        loader = DataLoader(chosen, size, num_workers=loader.num_workers, collate_fn=loader.collate_fn)
    batches = list(islice(loader, count))
    if not batches:
        raise DataError("the data have no batch to measure on, or to calibrate with")
    return batches
