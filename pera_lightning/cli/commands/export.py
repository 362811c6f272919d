"""`export`: writes what was trained for others: this package's adapter folder, PEFT, diffusers, or merged weights."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.cli import LightningArgumentParser

from pera_lightning.cli.trained_run import BATCHES, Trained, TrainedCLI
from pera_lightning.errors import ConfigurationError, megabytes
from pera_lightning.export.folder import check_output_folder, output_folder
from pera_lightning.injection.adapter_folder import save_adapter
from pera_lightning.injection.state import adapter_state_dict
from pera_lightning.validation import check_positive_int

# Options that act with each format.
_ACTING = {
    "adapter": (),
    "peft": ("mode", "batches", "rank", "max_error", "target"),
    "diffusers": ("mode", "batches", "rank", "max_error"),
    "merged": ("mode", "batches"),
}
_CONFIG_ROOM = 1 << 20  # bytes


class ExportCLI(TrainedCLI):
    """The options of `export`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        formats = Literal["adapter", "peft", "diffusers", "merged"]
        parser.add_argument("--format", type=formats, help="what to write; diffusers: a LoRA file of SDXL")
        parser.add_argument("--output", type=str, help="the folder to write; it must not exist")
        parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
        add_merging(parser, "calibrate with, and to measure on")
        cut = "cut updates to this rank by SVD, with the error reported"
        parser.add_argument("--rank", type=int, help=f"peft, diffusers: {cut}")
        parser.add_argument("--max_error", type=float, help="with --rank: largest relative error of a layer")
        parser.add_argument("--target", type=Literal["peft", "vllm"], help="peft: vllm refuses what vLLM does not take")


def add_merging(parser: LightningArgumentParser, purpose: str) -> None:
    """Adds the options that `export` and `merge` share."""
    choices = Literal["static", "calibrated"]
    becomes = "how an AuroRA with dynamic inference becomes linear (--method, its old name, is the same)"
    parser.add_argument("--mode", "--method", type=choices, help=becomes)
    parser.add_argument("--batches", type=int, help=f"batches to {purpose} (default: {BATCHES})")


def run(args: Sequence[str]) -> None:
    """Writes a trained run for others, by the options of `ExportCLI`; after a `PeraError` nothing is written."""
    cli = ExportCLI(args)
    given = chosen_options(cli.config)
    kind, output, overwrite = cli.config["format"], cli.config["output"], cli.config["overwrite"]
    check_output_folder(output, overwrite=overwrite, apart=cli.read())  # before the base is loaded
    trained = Trained(cli)
    if kind == "adapter":
        _export_adapter(trained, output, overwrite)
        return
    options = merge_options(trained, given.get("mode"), given.get("batches"))
    if kind == "merged":
        write_merged(trained, output, overwrite=overwrite, **options)
        return
    # How updates are cut to a rank, and for whom.
    options |= {name: given[name] for name in ("rank", "max_error", "target") if name in given}
    options |= {"overwrite": overwrite, "forward": trained.module.outputs_and_loss}
    (_export_peft if kind == "peft" else _export_diffusers)(trained, output, options)


def chosen_options(config: Any) -> dict[str, Any]:
    """The options given besides format and output; raises `ConfigurationError` for those that would not act."""
    for name in ("format", "output"):
        if not config[name]:
            raise ConfigurationError(f"no --{name}: give " + (", ".join(_ACTING) if name == "format" else "a folder"))
    # An option without effect is refused rather than ignored.
    names = dict.fromkeys(name for acting in _ACTING.values() for name in acting)
    given = {name: config[name] for name in names if config[name] is not None}
    idle = [name for name in given if name not in _ACTING[config["format"]]]
    if idle:
        raise ConfigurationError(f"--{idle[0]} does not act with --format {config['format']}: leave it out")
    if "max_error" in given and "rank" not in given:
        raise ConfigurationError("--max_error acts with --rank only: leave it out, or give the rank to cut to")
    if "batches" in given and "mode" not in given:
        raise ConfigurationError("--batches acts with --mode only; `merge` measures any merge on batches")
    if "batches" in given:
        check_positive_int(given["batches"], "batches")
    return given


def merge_options(trained: Trained, mode: str | None, count: int | None) -> dict[str, Any]:
    """The options of a merge or export: its mode, batches to calibrate with, and to measure the merge error on.

    A calibration needs its data anyway. The static mode needs none, and is measured where batches are asked for.
    """
    # Training batches fit the linear map; validation batches, which it has not seen, measure it.
    options: dict[str, Any] = {} if mode is None else {"mode": mode}
    if mode == "calibrated":
        options["batches"] = trained.calibration_batches(count or BATCHES)
    if mode == "calibrated" or count is not None:
        options["measure_on"] = trained.measuring_batches(count or BATCHES)
    return options


def write_merged(trained: Trained, output: str, *, overwrite: bool, **options: Any) -> None:
    """Merges, writes the folder of the network's own library, and prints what was done."""
    module = trained.module
    report = module.export_merged(
        output, data=trained.data, class_names=trained.class_names(), overwrite=overwrite, **options
    )
    _told(trained, report, module.how_to_load(Path(output)))


def _export_adapter(trained: Trained, output: str, overwrite: bool) -> None:
    network = trained.module.model
    size = sum(tensor.nbytes for tensor in adapter_state_dict(network).values())  # type: ignore[arg-type]
    with output_folder(output, overwrite=overwrite, needed=size + _CONFIG_ROOM) as made:
        save_adapter(network, made)  # type: ignore[arg-type]
    _told(trained, f"Wrote {output} ({megabytes(size)})", f"pera_lightning.load_adapter(base, {output!r})")


def _export_peft(trained: Trained, output: str, options: dict[str, Any]) -> None:
    # Imported here since peft takes seconds, and need not be installed for the other formats.
    from pera_lightning.export.peft import export_peft

    module = trained.module
    base, revision = module.hparams["model_name"], module.hparams.get("revision")
    report = export_peft(module.model, output, base_name=base, base_revision=revision, **options)  # type: ignore[arg-type]
    load = f"peft.PeftModel.from_pretrained(base, {output!r})"
    if report.max_lora_rank is not None:
        # vLLM takes adapters up to rank 16 unless told otherwise.
        words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(report.max_lora_rank)]
        load = shlex.join([*words, "--lora-modules", f"{Path(output).name}={output}"])
    _told(trained, report, load)


def _export_diffusers(trained: Trained, output: str, options: dict[str, Any]) -> None:
    from pera_lightning.export.diffusers import export_diffusers

    trained.notes += trained.module.export_notes()
    report = export_diffusers(trained.module.model, output, **options)  # type: ignore[arg-type]
    _told(trained, report, f"pipe.load_lora_weights({output!r})")


def _told(trained: Trained, report: Any, load: str) -> None:
    print("\n".join([str(report), *(f"  note: {note}" for note in trained.notes), f"Load it: {load}"]), flush=True)
