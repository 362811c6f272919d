"""`params`: the injection report of a config, on the meta device, without weights or memory; and what it would need."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from pera_lightning.cli.lightning_cli import ConfiguredCLI
from pera_lightning.errors import ConfigurationError
from pera_lightning.training.module import AdapterModule
from pera_lightning.validation import check_positive_int


class ParamsCLI(ConfiguredCLI):
    """The config, and whether the memory is asked for."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--memory", action="store_true", help="compute the memory per device of a training step")
        parser.add_argument("--devices", type=str, help="with --memory: numbers of devices for FSDP2 (default: 8,32)")
        parser.add_argument(
            "--answer_length",
            type=int,
            help="with --memory: labelled tokens of an example, where only answers have labels (default: as many as "
            "the protocol generates)",
        )


def run(args: Sequence[str]) -> None:
    """Prints which layers a config adapts and how many parameters it trains, with ``--memory`` also what it needs."""
    cli = ParamsCLI(args)
    module = cli.model
    if not isinstance(module, AdapterModule):
        raise ConfigurationError(f"{type(module).__name__}: params works on this package's modules only")
    # The head's size is counted too; a fit would ask the data for it.
    if module.classes_argument and module.classes is None:
        if not hasattr(cli.datamodule, "expected_classes"):
            raise ConfigurationError(
                f"the data do not tell how many classes there are: give --model.{module.classes_argument}"
            )
        module.classes = cli.datamodule.expected_classes()  # without reading the data, where they tell
    given = {name: cli.config[name] for name in ("devices", "answer_length") if cli.config[name] is not None}
    if given and not cli.config["memory"]:
        raise ConfigurationError(f"--{next(iter(given))} acts with --memory only")
    print(module.dry_run(cli.config_init["adapter"].injector()))
    if not cli.config["memory"]:
        return
    # Imported here since the plain report needs none of it.
    from pera_lightning.cli.commands.memory import memory_report

    devices = device_counts(given.get("devices", "8,32"))  # a node, and four
    options = {name: value for name, value in given.items() if name == "answer_length"}
    if options:
        check_positive_int(options["answer_length"], "answer_length")
    if options and "answer_length" not in inspect.signature(module.example_batch).parameters:
        raise ConfigurationError(f"answer_length={options['answer_length']} acts on language models only")
    batch, assumed = module.example_batch(cli.datamodule, **options)
    trainer = cli.config["trainer"]
    how = {"precision": trainer["precision"], "devices": devices, "cuda": trainer["accelerator"] != "cpu"}
    print(memory_report(module, batch, assumed, **how))


def device_counts(text: str) -> tuple[int, ...]:
    """The numbers of devices in ``"8,32"``; raises `ConfigurationError` for anything else."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 1 for word in words):
        raise ConfigurationError(f"devices={text!r}: whole numbers from 2 on are needed, such as 8,32")
    return tuple(dict.fromkeys(map(int, words)))  # each once
