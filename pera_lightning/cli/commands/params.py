"""`params`: the injection report of a config, on the meta device, without weights or memory; and what it would need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LightningArgumentParser

from pera_lightning.cli.lightning_cli import ConfiguredCLI
from pera_lightning.errors import ConfigurationError
from pera_lightning.injection.inject import injection_of


class ParamsCLI(ConfiguredCLI):
    """The config, and whether the memory is asked for."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--memory", action="store_true", help="compute the memory per device of a training step")
        parser.add_argument("--devices", type=str, help="with --memory: numbers of devices for FSDP2 (default: 8,32)")
        parser.add_argument(
            "--answer_length",
            type=int,
            help="with --memory: tokens with a label in a row, where only answers have them (default: as many as the "
            "protocol generates)",
        )


def run(args: Sequence[str]) -> None:
    """Prints which layers a config adapts and how many parameters it trains, and the memory where it is asked for.

    Args:
        args: ``--config FILE`` and overrides, as for fit; ``--memory``, ``--devices``, ``--answer_length``.

    Raises:
        ConfigurationError: for a module that cannot be built without weights, or values that do not fit.
    """
    cli = ParamsCLI(args)
    module, injector = cli.model, cli.config_init["adapter"].injector()
    if not hasattr(module, "dry_run"):
        raise ConfigurationError(f"{type(module).__name__} has no dry_run: params works on this package's modules")
    for name in ("num_classes", "num_labels"):
        if module.hparams.get(name, 0) is None:
            if not hasattr(cli.datamodule, "expected_classes"):
                raise ConfigurationError(f"the data do not tell how many classes there are: give --model.{name}")
            module.hparams[name] = cli.datamodule.expected_classes()
    given = {name: cli.config[name] for name in ("devices", "answer_length") if cli.config[name] is not None}
    if not cli.config["memory"]:
        if given:
            raise ConfigurationError(f"--{next(iter(given))} acts with --memory only")
        print(module.dry_run(injector))
        return
    # Imported here since the plain report needs none of it.
    from pera_lightning.cli.commands.memory import device_counts, memory_table

    if given.get("answer_length", 1) < 1:
        raise ConfigurationError(f"answer_length={given['answer_length']}: at least 1 token is needed")
    if "devices" in given:
        given["devices"] = device_counts(given["devices"])
    if "compile" in module.hparams:  # the network runs on fake tensors, once
        module.hparams["compile"] = False
    module.adapter_injection = injector
    with torch.device("meta"):
        module.model = module._injected(module.build_network(weights=False))
        module.finish_network()
    print(injection_of(module.model).report)
    trainer = cli.config["trainer"]
    cpu = trainer["accelerator"] == "cpu"
    print(memory_table(module, cli.datamodule, precision=trainer["precision"], as_on_cuda=not cpu, **given))
