"""`sweep`: one config over seeds and config values; runs what is missing, and sums up."""

from __future__ import annotations

import os
import re
import shlex
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from pera_lightning.cli.lightning_cli import ConfiguredCLI, check_strategy
from pera_lightning.cli.run_defaults import FOLDER, class_of, default_logger
from pera_lightning.cli.sweeps.folder import check_same, fit_finished, is_complete, locked, read_sweep
from pera_lightning.cli.sweeps.plan import (
    Plan,
    Request,
    flattened,
    read_request,
    runs,
    setting_name,
    settings,
    value_words,
    with_seed,
)
from pera_lightning.cli.sweeps.processes import Processes, program
from pera_lightning.cli.sweeps.running import Sweep, going_on, run_words
from pera_lightning.cli.sweeps.summary import COMPLETE
from pera_lightning.cli.words import config_file
from pera_lightning.errors import ConfigurationError, PeraError

_ANY_SEED = 271828  # where a config is read for no run in particular
# Set by a run's folder, and so not compared between sweeps of one folder.
_PLACE = re.compile(
    r"seed_everything|trainer\.default_root_dir|trainer\.logger(\.0)?\.init_args\.(save_dir|name|version)"
)
# Numbers of processes of a launch. Not SLURM_NTASKS, which salloc and sbatch set to what the allocation has room for;
# SLURM_PROCID is 0 in a batch script and in srun's first task alike. srun alone sets SLURM_STEP_NUM_TASKS (srun(1)).
_TASKS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# SLURM_STEP_ID of the shell that salloc starts as a step: one process (SLURM_INTERACTIVE_STEP, 0xfffffffa, in slurm.h).
_SHELL_STEP = "4294967290"


class SweepCLI(ConfiguredCLI):
    """Parses the config of a run; builds modules of this package only, to have their values checked."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        # The sweep's own are read before; they are here for --help, and for the names that are close to a wrong one.
        parser.add_argument("--seeds", type=str, help="e.g. 42,43,44: a run for each (default: the config's)")
        parser.add_argument("--grid", type=str, metavar="KEY=V1,V2", help="values of a config key; again for more keys")
        parser.add_argument("--output", type=str, help="the sweep's folder (default: runs/CONFIG_sweep)")
        parser.add_argument("--dry_run", action="store_true", help="print the runs and their commands, start nothing")
        for name in ("--ckpt_path", "--weights_only"):  # in every config that fit writes
            parser.add_argument(name, help=SUPPRESS)

    def _set_seed(self) -> None:
        """Does nothing: the seed would be handed on in the environment."""

    def instantiate_classes(self) -> None:
        check_strategy(self.config["trainer"]["strategy"])
        paths = [(self.config.get(group) or {}).get("class_path", "") for group in ("model", "data")]
        if all(path.startswith("pera_lightning.") for path in paths):
            full, self.config = self.config, self.config.clone()
            # A logger or a callback may write files when it is built.
            self.config["trainer"]["logger"] = self.config["trainer"]["callbacks"] = None
            try:
                super().instantiate_classes()
            finally:
                self.config = full

    def as_dict(self) -> dict[str, Any]:
        """The config as primitives."""
        return yaml.safe_load(self.parser.dump(self.config))


def run(args: Sequence[str]) -> None:
    """Runs a sweep, or what is missing of it.

    Args:
        args: ``--config FILE``, ``--seeds``, ``--grid``, ``--output``, ``--dry_run``, and overrides as for fit.

    Raises:
        PeraError: for wrong input; no run has begun then.
        SystemExit: 1 where a run failed, 130, 143 or 129 after a signal.
    """
    if "--help" in args or "-h" in args:
        SweepCLI(["--help"])
    # Nothing is written before all is read: a wrong config is refused before the first run.
    check_alone(os.environ)
    request = read_request(args)
    folder = output_folder(request)
    # 1. What was swept here before: the same keys and settings go on, others are refused.
    before = read_sweep(folder, request.grid)
    if before is not None:
        request.grid = {key: request.grid[key] for key in before["grid"]}  # names are made in the first sweep's order
    # 2. What is asked for now, every setting parsed.
    plan = read_plan(request, before)
    if before is not None:
        check_same(folder, before, plan.config)
    if request.dry_run:
        _print_plan(folder, plan, before)
        return
    # 3. Run it; another sweep may have come first between reading the folder and locking it.
    with locked(folder) as lock, Processes(lock) as processes:
        if read_sweep(folder, request.grid) != before:
            raise ConfigurationError(f"{folder} was written by another sweep meanwhile: give the command again")
        sweep = description(request, plan, before, shlex.join(["sweep", *args]))
        code = Sweep(folder, sweep, plan, processes).run()
    sys.exit(code)


def check_alone(environment: Mapping[str, str]) -> None:
    """Raises `ConfigurationError` where a launcher has started several processes, each of which would sweep."""
    shell = environment.get("SLURM_STEP_ID") == _SHELL_STEP
    for name in _TASKS:
        count = environment.get(name, "1").strip()
        if count not in ("", "0", "1") and not (shell and name == "SLURM_STEP_NUM_TASKS"):
            raise ConfigurationError(
                f"sweep was started with {name}={count}: start it as one process, without torchrun or srun, and give "
                "the devices in the config (--trainer.devices, --trainer.strategy)"
            )


def output_folder(request: Request) -> Path:
    """The sweep's folder: the one that was given, else one under runs/ with the name of the first config."""
    if request.output:
        return Path(request.output).expanduser().resolve()
    file = config_file(request.words)
    if file is None or request.output is not None:
        raise ConfigurationError("no --output, and no --config FILE to name one by: give a folder")
    return FOLDER / f"{file.stem}_sweep"


# --- what is to be run ---


def read_plan(request: Request, before: Mapping[str, Any] | None) -> Plan:
    """Makes the plan of a sweep, and reads every setting's config, so that a wrong one is refused now.

    `before` is the content of the folder's `sweep.json`, or None.
    """
    # Every setting is parsed once, with any seed; runs of a setting differ in the seed alone.
    combinations = settings(request.grid)
    parsed = {setting_name(values): parse(request, values) for values in combinations}
    for one in parsed.values():
        check_config(one.config)
    seeds = request.seeds or (config_seed(next(iter(parsed.values())).config),)  # the config's own
    # A later sweep of the folder is compared in the setting that the first one noted, swept or not.
    reference = combinations[0] if before is None else before["reference"]
    compared = parsed.get(setting_name(reference)) or parse(request, reference)
    return Plan(
        runs=runs(request.grid, seeds),
        seeds=seeds,
        words=request.words,
        reference=reference,
        config={
            key: str(value) if isinstance(value, float) and not isfinite(value) else value  # JSON has no infinity
            for key, value in flattened(compared.as_dict()).items()
            if not _PLACE.fullmatch(key)
        },
        loggers={name: loggers_of(one.config) for name, one in parsed.items()},
    )


def description(request: Request, plan: Plan, before: Mapping[str, Any] | None, command: str) -> dict[str, Any]:
    """What `sweep.json` says of a sweep, with the seeds, values and runs of earlier ones of the same folder."""
    old = before or {"seeds": [], "grid": {}, "runs": []}
    grid = {key: list(dict.fromkeys([*old["grid"].get(key, ()), *values])) for key, values in request.grid.items()}
    return {
        "command": command,
        "words": request.words,
        "seeds": list(dict.fromkeys([*old["seeds"], *plan.seeds])),
        "grid": grid,
        "reference": dict(plan.reference),
        "config": dict(plan.config),
        "runs": list(old["runs"]),
    }


def parse(request: Request, values: Mapping[str, str]) -> SweepCLI:
    """Parses the config of a setting; an error says which setting of the grid it is of."""
    try:
        return SweepCLI([*with_seed(request.words, _ANY_SEED), *value_words(values)])
    except PeraError as error:
        if not values:
            raise
        raise ConfigurationError(f"with {setting_name(values)}: {error}") from None


def check_config(config: Any) -> None:
    """Raises `ConfigurationError` for a config whose runs would share files, or leave nothing to sum up."""
    trainer, callbacks = config["trainer"], config["trainer"]["callbacks"] or []
    wrong = []
    if config.get("ckpt_path"):
        wrong.append(f"ckpt_path={config['ckpt_path']}, and a sweep chooses the checkpoints")
    if trainer["fast_dev_run"]:
        wrong.append("trainer.fast_dev_run, which writes no checkpoint and no results")
    if trainer["enable_checkpointing"] is False:
        wrong.append("trainer.enable_checkpointing=false, and a sweep tests checkpoints")
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if path := (callback.get("init_args") or {}).get("dirpath"):
            name = callback["class_path"].rpartition(".")[2]
            wrong.append(f"{name} with dirpath={path}, where the runs would write over each other's checkpoints")
    if wrong:
        raise ConfigurationError(f"the config has {wrong[0]}: leave it out")


def config_seed(config: Any) -> int:
    """The seed of a config; raises `ConfigurationError` where it leaves the seed open."""
    seed = config["seed_everything"]
    if isinstance(seed, bool) or seed is None:
        raise ConfigurationError(f"the config has seed_everything: {seed}: give --seeds")
    return seed


def loggers_of(config: Any) -> list[dict[str, Any]]:
    """The loggers of a config as primitives, the first of which gives each run its folder; none is fine.

    Raises:
        ConfigurationError: for a first logger that does not write into save_dir/name/version.
    """
    logger = config["trainer"]["logger"]
    if logger is None or isinstance(logger, bool):
        return [] if logger is False else [default_logger(FOLDER)]
    loggers = [one.as_dict() for one in (logger if isinstance(logger, list) else [logger])]
    # Checkpoints lie beside a sub_dir, not in it.
    first = loggers[0] if loggers else default_logger(FOLDER)
    if not issubclass(class_of(first), (TensorBoardLogger, CSVLogger)) or (first.get("init_args") or {}).get("sub_dir"):
        name = first["class_path"].rpartition(".")[2]
        raise ConfigurationError(
            f"trainer.logger: {name} has a folder of its own making: give TensorBoardLogger or CSVLogger without "
            "sub_dir, in a list the first"
        )
    return loggers


def _print_plan(folder: Path, plan: Plan, before: Mapping[str, Any] | None) -> None:
    records = {record["name"]: record for record in (before or {"runs": []})["runs"]}
    for k, run in enumerate(plan.runs, 1):
        place = folder / run.name
        # As a sweep would find it now.
        complete, fitted = is_complete(place, records.get(run.name)), fit_finished(place)
        status = COMPLETE if complete else "to be tested" if fitted else "to be run"
        print(f"[{k}/{len(plan.runs)}] {run.name}: {status}")
        own = run_words(plan, run, place)  # of fit and test alike
        if not complete and not fitted:
            print(f"  {shlex.join([*program(), 'fit', *own, *going_on(place)])}")
        if not complete:
            print(f"  {shlex.join([*program(), 'test', *own, '--ckpt_path', 'best'])}")
    print(f"Runs in {folder}: {len(plan.runs)}; nothing was started", flush=True)
