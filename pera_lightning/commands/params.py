"""`params`: the injection report of a config, on the meta device, without weights or memory."""

from __future__ import annotations

from collections.abc import Sequence

from pera_lightning.commands.lightning_cli import ConfiguredCLI
from pera_lightning.errors import ConfigurationError


def run(args: Sequence[str]) -> None:
    """Prints which layers a config adapts and how many parameters it trains.

    Args:
        args: ``--config FILE`` and overrides, as for fit.

    Raises:
        ConfigurationError: for a module that cannot be built without weights.
    """
    cli = ConfiguredCLI(args)
    if not hasattr(cli.model, "dry_run"):
        raise ConfigurationError(f"{type(cli.model).__name__} has no dry_run: params works on this package's modules")
    if cli.model.settings.get("num_classes", 0) is None:
        if not hasattr(cli.datamodule, "expected_classes"):
            raise ConfigurationError("the data do not tell how many classes there are: give --model.num_classes")
        cli.model.settings["num_classes"] = cli.datamodule.expected_classes()
    print(cli.model.dry_run(cli.config_init["adapter"].injector()))
