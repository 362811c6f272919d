"""`merge`: what merging a trained run changes, its outputs and loss on validation data."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from pera_lightning.cli.commands.export import add_merging, merge_options, write_merged
from pera_lightning.cli.trained_run import BATCHES, Trained, TrainedCLI
from pera_lightning.errors import ConfigurationError
from pera_lightning.export.folder import check_output_folder
from pera_lightning.merging.merge import merge
from pera_lightning.validation import check_positive_int


class MergeCLI(TrainedCLI):
    """The options of `merge`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        add_merging(parser, "measure on, and to calibrate with")
        parser.add_argument("--output", type=str, help="write the merged weights to this folder; it must not exist")
        parser.add_argument("--overwrite", action="store_true", help="with --output: replace an earlier export")


def run(args: Sequence[str]) -> None:
    """Merges a trained run in memory and prints what that changes; with ``--output`` it writes the merged weights.

    After a `PeraError` nothing is written.
    """
    cli = MergeCLI(args)
    output, overwrite, count = cli.config["output"], cli.config["overwrite"], cli.config["batches"]
    if overwrite and not output:
        raise ConfigurationError("--overwrite acts with --output only")
    if count is not None:
        check_positive_int(count, "batches")
    if output:
        check_output_folder(output, overwrite=overwrite, apart=cli.read())
    # Everything that can be refused is refused before the base is loaded.
    trained = Trained(cli)
    module = trained.module
    options = merge_options(trained, cli.config["mode"], count or BATCHES)
    if output:
        write_merged(trained, output, overwrite=overwrite, **options)
        return
    report = merge(module.model, keep_base=False, forward=module.outputs_and_loss, **options)  # type: ignore[arg-type]
    print("\n".join([str(report), *(f"  note: {note}" for note in trained.notes)]), flush=True)
