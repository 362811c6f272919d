"""Runs what is missing of a sweep, one run after the other: fit, test, and what came of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pera_lightning.cli.sweeps.folder import (
    FILE,
    LOG,
    TABLE,
    digest,
    find_results,
    fit_finished,
    is_complete,
    new_record,
    write_sweep,
    written,
)
from pera_lightning.cli.sweeps.outcome import read_results, tested_checkpoint
from pera_lightning.cli.sweeps.plan import Plan, Run, setting_name, value_words, with_seed
from pera_lightning.cli.sweeps.processes import Processes, ended_by, program
from pera_lightning.cli.sweeps.summary import COMPLETE, scores, table, without_number
from pera_lightning.errors import CheckpointError


def run_words(plan: Plan, run: Run, folder: Path) -> list[str]:
    """The words of a run that its fit and its test share; its first logger writes into its folder."""
    words = [*with_seed(plan.words, run.seed), f"--seed_everything={run.seed}", *value_words(run.values)]
    words.append(f"--trainer.default_root_dir={folder}")
    if loggers := plan.loggers[setting_name(run.values)]:
        names = {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}
        first = {**loggers[0], "init_args": {**(loggers[0].get("init_args") or {}), **names}}
        words.append(f"--trainer.logger={json.dumps([first, *loggers[1:]])}")
    return words


def going_on(run: Path) -> list[str]:
    """The words by which a fit goes on from a run's last checkpoint, where it has one."""
    return ["--ckpt_path", "last"] if any(run.glob("checkpoints/last*.ckpt")) else []


class Sweep:
    """Runs what is missing, one run after the other.

    Args:
        folder: folder of the sweep.
        sweep: content of `sweep.json`; the runs that are wanted are added.
        plan: what is asked for now.
        processes: runs the commands, in its context.
    """

    def __init__(self, folder: Path, sweep: dict[str, Any], plan: Plan, processes: Processes) -> None:
        self.folder, self.sweep, self.plan, self.processes = folder, sweep, plan, processes
        # Runs of earlier sweeps stay in the file, whether they are wanted now or not.
        there = {record["name"]: record for record in sweep["runs"]}
        self.records = {run.name: there.get(run.name) or new_record(run) for run in plan.runs}
        sweep["runs"] = list({**there, **self.records}.values())

    def run(self) -> int:
        """Runs, prints, writes; returns the exit code."""
        write_sweep(self.folder, self.sweep)
        print(f"Runs in {self.folder}: {len(self.plan.runs)}; the output of each is in its {LOG}", flush=True)
        for k, run in enumerate(self.plan.runs, 1):
            record, place = self.records[run.name], self.folder / run.name
            # What is complete is kept, whichever sweep ran it.
            kept = is_complete(place, record)
            if not kept:
                record.update({**new_record(run), "fit_seconds": record["fit_seconds"]})  # of every attempt
                self._run(run, record, place)
                write_sweep(self.folder, self.sweep)
            if self.processes.signal is None or record["status"] == COMPLETE:
                print(f"[{k}/{len(self.plan.runs)}] {run.name}: {self._line(record, kept)}", flush=True)
            if self.processes.signal is not None:
                return self._stopped()
        self._print_summary()
        bad = [name for name, record in self.records.items() if record["status"] != COMPLETE]
        if bad:
            print(f"{len(bad)} of {len(self.records)} runs are not complete; the same command tries them again")
        return 1 if bad else 0

    def _run(self, run: Run, record: dict[str, Any], place: Path) -> None:
        words = run_words(self.plan, run, place)
        # 1. Fit; a run that was stopped goes on from its own last checkpoint.
        if not fit_finished(place):
            code, seconds = self._process("fit", [*words, *going_on(place)], place)
            record["fit_seconds"] += seconds  # a fit that was stopped is paid for too
            if code != 0 or not fit_finished(place):
                self._not_done(record, "fit", code, place)
                return
        # Written before the test, so that a sweep that is killed now does not train again.
        record["status"] = "fitted"
        write_sweep(self.folder, self.sweep)
        if self.processes.signal is not None:
            return
        # 2. Test the checkpoint that the fit selected.
        try:
            checkpoint, record["selection"] = tested_checkpoint(place)
        except CheckpointError as error:
            record.update(status="failed", error=str(error))
            return
        before = written(find_results(place))  # results must be new: an earlier test may have left some
        code, record["test_seconds"] = self._process("test", [*words, "--ckpt_path", checkpoint], place)
        results = find_results(place)
        # 3. Note what came of it.
        if code != 0 or results is None or written(results) == before:
            self._not_done(record, "test", code, place)
            return
        record.update(read_results(results), results=str(results.relative_to(place)), results_sha256=digest(results))
        record["status"] = COMPLETE

    def _process(self, command: str, words: list[str], place: Path) -> tuple[int, float]:
        start = time.monotonic()
        code = self.processes.run([*program(), command, *words], place / LOG)
        return code, time.monotonic() - start

    def _not_done(self, record: dict[str, Any], command: str, code: int, place: Path) -> None:
        # A fit that a signal stops saves a checkpoint and exits with 0, as one that is finished does.
        stopped = command == "fit" and code == 0 and any(place.glob("checkpoints/*.ckpt"))
        if stopped:
            record.update(status="interrupted", error="its fit was stopped, with a checkpoint to go on from")
        elif self.processes.signal is not None:
            lost = "what it did since its last checkpoint is lost" if command == "fit" else "it is run again"
            record.update(status="interrupted", error=f"its {command} was ended, {lost}")
        else:
            missing = "no step was trained" if command == "fit" else "its module writes no results.json"
            record.update(status="failed", error=f"{command}: {missing if code == 0 else ended_by(code)}")

    def _line(self, record: Mapping[str, Any], kept: bool) -> str:
        if record["status"] != COMPLETE:
            return f"{record['status'].upper()}, {record['error']} (see {self.folder / record['name'] / LOG})"
        seconds = f"{record['fit_seconds']:.0f} s of fit, {record['test_seconds']:.0f} s of test"
        return f"{scores(record)}; {'complete before, kept' if kept else seconds}"

    def _stopped(self) -> int:
        number = self.processes.signal
        assert number is not None
        done = sum(record["status"] == COMPLETE for record in self.records.values())
        begun = [name for name, record in self.records.items() if record["status"] == "interrupted"]
        saved = f"; {begun[-1]}: {self.records[begun[-1]]['error']}" if begun else ""
        print(
            f"stopped by {number.name} with {done} of {len(self.records)} runs complete{saved}\n"
            "The same sweep command goes on from here.",
            flush=True,
        )
        return 128 + number  # as a shell says of a program that a signal ended

    def _print_summary(self) -> None:
        if self.sweep["summary"]:
            print(f"\n{table(self.sweep['summary'])}")
            for line in filter(None, (without_number(self.sweep["runs"]), self.sweep["best_text"])):
                print(line)
        print(f"Sweep: {self.folder / FILE}, {self.folder / TABLE}", flush=True)
