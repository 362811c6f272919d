"""`sweep`: one config over seeds and config values; runs what is missing, and sums up."""

from __future__ import annotations

import os
import re
import shlex
import sys
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from pera_lightning.cli.lightning_cli import ConfiguredCLI, check_strategy
from pera_lightning.cli.run_defaults import FOLDER, class_of
from pera_lightning.cli.sweeps.folder import (
    check_keys,
    check_same,
    fit_finished,
    is_complete,
    locked,
    read_sweep,
)
from pera_lightning.cli.sweeps.plan import (
    SEED,
    Request,
    Run,
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
# SLURM_STEP_ID in the shell that salloc starts as a step (LaunchParameters=use_interactive_step): one process,
# whatever the count (SLURM_INTERACTIVE_STEP, 0xfffffffa, in slurm.h).
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
            whole, self.config = self.config, self.config.clone()
            self.config["trainer"]["logger"] = self.config["trainer"]["callbacks"] = None
            try:
                super().instantiate_classes()
            finally:
                self.config = whole

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
    before = read_sweep(folder)
    if before is not None:
        check_keys(folder, before, request.grid)
        request.grid = {key: request.grid[key] for key in before["grid"]}  # names are made in the first sweep's order
    plan = read_plan(folder, request, before)
    if before is not None:
        check_same(folder, before, plan.config)
    if request.dry_run:
        _print_plan(folder, plan, before, request.words)
        return
    # Another sweep may have come first between reading the folder and locking it.
    with locked(folder) as lock, Processes(lock) as processes:
        if read_sweep(folder) != before:
            raise ConfigurationError(f"{folder} was written by another sweep meanwhile: give the command again")
        sweep = description(request, plan, before, shlex.join(["sweep", *args]))
        code = Sweep(folder, sweep, plan.runs, request.words, plan.placements, processes).run()
    sys.exit(code)


def check_alone(environment: Mapping[str, str]) -> None:
    """Raises `ConfigurationError` where a launcher has started several processes, each of which would sweep."""
    for name in _TASKS:
        if name == "SLURM_STEP_NUM_TASKS" and environment.get("SLURM_STEP_ID") == _SHELL_STEP:
            continue
        if environment.get(name, "1").strip() not in ("", "0", "1"):
            raise ConfigurationError(
                f"sweep was started with {name}={environment[name]}: start it as one process, without torchrun "
                "or srun, and give the devices in the config (--trainer.devices, --trainer.strategy)"
            )


def output_folder(request: Request) -> Path:
    """The sweep's folder: what was given, else one under runs/ with the name of the first config.

    Raises:
        ConfigurationError: where neither is given.
    """
    if request.output is not None:
        if not request.output.strip():
            raise ConfigurationError("--output is empty: give a folder")
        folder = Path(request.output).expanduser()
        return folder if folder.name not in ("", "..") else folder.resolve()
    if (file := config_file(request.words)) is not None:
        return FOLDER / f"{file.stem}_sweep"
    raise ConfigurationError("no --output, and no --config FILE to name one by: give a folder")


# --- what is to be run ---


@dataclass(frozen=True)
class Plan:
    """What a sweep is asked to run."""

    runs: list[Run]
    seeds: tuple[int, ...]  # of each setting
    reference: Mapping[str, str]  # setting by which two sweeps of a folder are compared
    config: Mapping[str, Any]  # of the reference, flat, without what a run's folder sets
    placements: Mapping[str, Any]  # `placement_of` each setting, by its name


def read_plan(folder: Path, request: Request, before: Mapping[str, Any] | None) -> Plan:
    """Makes the plan of a sweep, and reads every setting's config, so that a wrong one is refused now.

    Args:
        folder: folder of the sweep.
        request: words of the sweep.
        before: content of the folder's `sweep.json`, or None.

    Raises:
        PeraError: for a config that fit would not take, or that a sweep cannot place.
    """
    # Every setting is parsed once, with any seed; runs of a setting differ in the seed alone.
    combinations = settings(request.grid)
    parsed = [parse(request, values, told=bool(request.grid)) for values in combinations]
    for one in parsed:
        check_config(one.config)
    seeds = request.seeds or (config_seed(parsed[0].config),)
    planned = runs(request.grid, seeds)
    by_name = {setting_name(values): one for values, one in zip(combinations, parsed, strict=True)}
    check_starts(folder, request, planned, by_name)
    # A later sweep of the folder is compared in the setting that the first one noted, swept or not.
    reference = combinations[0] if before is None else before["reference"]
    shared = parsed[combinations.index(reference)] if reference in combinations else parse(request, reference)
    return Plan(
        runs=planned,
        seeds=seeds,
        reference=reference,
        config={
            key: str(value) if isinstance(value, float) and not isfinite(value) else value  # JSON has no infinity
            for key, value in flattened(shared.as_dict()).items()
            if not _PLACE.fullmatch(key)
        },
        placements={name: placement_of(one.config) for name, one in by_name.items()},
    )


def description(request: Request, plan: Plan, before: Mapping[str, Any] | None, command: str) -> dict[str, Any]:
    """What `sweep.json` says of a sweep, with the seeds, values and runs of earlier ones of the same folder."""
    old = before or {"seeds": [], "grid": {}, "runs": []}
    return {
        "command": command,
        "words": request.words,
        "seeds": list(dict.fromkeys([*old["seeds"], *plan.seeds])),
        "grid": {
            key: list(dict.fromkeys([*old["grid"].get(key, ()), *values])) for key, values in request.grid.items()
        },
        "reference": dict(plan.reference),
        "config": dict(plan.config),
        "runs": list(old["runs"]),
    }


def check_starts(folder: Path, request: Request, planned: Sequence[Run], parsed: Mapping[str, SweepCLI]) -> None:
    """Has modules with a `check_start` check what their fits will read, such as the paths in their options.

    Only for the runs that are still to begin: others go on from checkpoints of their own.

    Args:
        folder: folder of the sweep.
        request: words of the sweep.
        planned: runs of the sweep.
        parsed: config of each setting, by its name, with `_ANY_SEED`; parsed anew for each run where a word, such as a
            path, has the seed in it.

    Raises:
        PeraError: for a module that a run could not train.
    """
    # Where no word has the seed in it, the setting's config serves all its runs.
    own = any(SEED in word for word in request.words)
    for run in planned:
        one, place = parsed[setting_name(run.values)], folder / run.name
        if not hasattr(getattr(one, "model", None), "check_start") or fit_finished(place) or going_on(place):
            continue
        with _setting_told(run.values, bool(request.grid)):
            words = [*with_seed(request.words, run.seed), *value_words(run.values)]
            (SweepCLI(words) if own else one).model.check_start()


@contextmanager
def _setting_told(values: Mapping[str, str], told: bool) -> Iterator[None]:
    """Where told, has an error say which setting it is of."""
    try:
        yield
    except PeraError as error:
        if not told:
            raise
        raise ConfigurationError(f"with {setting_name(values)}: {error}") from None


def parse(request: Request, values: Mapping[str, str], *, told: bool = False) -> SweepCLI:
    """Parses the config of a setting; where `told`, an error says which setting it is of."""
    with _setting_told(values, told):
        return SweepCLI([*with_seed(request.words, _ANY_SEED), *value_words(values)])


def check_config(config: Any) -> None:
    """Raises `ConfigurationError` for a config whose runs would share files, or leave nothing to sum up."""
    trainer = config["trainer"]
    if config.get("ckpt_path"):
        raise ConfigurationError(f"the config has ckpt_path: {config['ckpt_path']}: sweep chooses the checkpoints")
    if trainer["fast_dev_run"]:
        raise ConfigurationError("trainer.fast_dev_run writes no checkpoint and no results: leave it out")
    if trainer["enable_checkpointing"] is False:
        raise ConfigurationError("trainer.enable_checkpointing is false: a sweep tests each run's best checkpoint")
    callbacks = trainer["callbacks"] or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        folder = (callback.get("init_args") or {}).get("dirpath")
        if folder:
            raise ConfigurationError(
                f"{callback['class_path'].rpartition('.')[2]} has dirpath={folder}, where the runs would write over "
                "each other's checkpoints: leave it out"
            )


def config_seed(config: Any) -> int:
    """The seed of a config; raises `ConfigurationError` where it leaves the seed open."""
    seed = config["seed_everything"]
    if isinstance(seed, bool) or seed is None:
        raise ConfigurationError(f"the config has seed_everything: {seed}: give --seeds")
    return seed


def placement_of(config: Any) -> Any:
    """The placement of a config, for `placed`: its logger as primitives, or whether it has one.

    Raises:
        ConfigurationError: for a logger that does not write into save_dir/name/version.
    """
    logger = config["trainer"]["logger"]
    if logger is None or isinstance(logger, bool):
        return logger is not False
    loggers = [one.as_dict() for one in (logger if isinstance(logger, list) else [logger])]
    if not loggers:
        return False
    name = loggers[0]["class_path"].rpartition(".")[2]
    if not issubclass(class_of(loggers[0]), (TensorBoardLogger, CSVLogger)):
        raise ConfigurationError(
            f"trainer.logger: {name} has a folder of its own making: give TensorBoardLogger or CSVLogger, in a list "
            "the first"
        )
    if (loggers[0].get("init_args") or {}).get("sub_dir"):
        raise ConfigurationError(f"trainer.logger: {name} has a sub_dir, and checkpoints lie beside it: leave it out")
    return loggers if isinstance(logger, list) else loggers[0]


def _print_plan(folder: Path, plan: Plan, before: Mapping[str, Any] | None, words: Sequence[str]) -> None:
    records = {record["name"]: record for record in (before or {"runs": []})["runs"]}
    for k, run in enumerate(plan.runs, 1):
        place = folder / run.name
        complete = is_complete(place, records.get(run.name))
        fitted = fit_finished(place)
        # As a sweep would find it now.
        status = COMPLETE if complete else "to be tested" if fitted else "to be run"
        print(f"[{k}/{len(plan.runs)}] {run.name}: {status}")
        own = run_words(run, place, words, plan.placements[setting_name(run.values)])
        if not complete and not fitted:
            print(f"  {shlex.join([*program(), 'fit', *own, *going_on(place)])}")
        if not complete:
            print(f"  {shlex.join([*program(), 'test', *own, '--ckpt_path', 'best'])}")
    print(f"Runs in {folder}: {len(plan.runs)}; nothing was started", flush=True)
