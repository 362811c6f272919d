"""Kills a fit at random moments, resumes it until it ends, and compares it with one that was never disturbed.

    python scripts/kill_and_resume.py --kills 20
    python scripts/kill_and_resume.py --task dreambooth --kills 20
    python scripts/kill_and_resume.py --config configs/vit_dtd_aurora.yaml --kills 5 --trainer.max_epochs 2

A task is run offline, on a very small model and data that `tiny_tasks.py` makes: images (the quickstart), causal_lm,
glue, dreambooth.

The fit runs once to its end, and once with SIGKILL at random moments, after each of which it is started again with
``--ckpt_path last``. Every third kill waits for a checkpoint's temporary file and strikes while it is written: that it
did is known from the file left behind. At the end all tensors of the last and the best checkpoint (weights, optimizer
states) and the adapter folder must be equal to the bit, and so must the loss of every batch, however often it was
trained. Options that this script does not know are the command line's (``--adapter.method PERA``). Exit code 1 where
anything differs. Every kill costs a start, most of which is imports: some ten seconds on a CPU.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny_tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent


class Journal(Callback):
    """Writes what the fit does to a file, a line each, unbuffered: what was written outlives a SIGKILL.

    Args:
        path: appended to.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def _line(self, *words: Any) -> None:
        with open(self.path, "ab", buffering=0) as file:
            file.write((" ".join(map(str, words)) + "\n").encode())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._line("begins", trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self._line("batch", trainer.current_epoch, batch_idx, trainer.global_step, float(loss).hex())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._line("validation", trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._line("validated", trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._line("ends", trainer.global_step)


class Run:
    """A fit with a folder of its own under `output`, which can be started again and again."""

    def __init__(self, name: str, args: argparse.Namespace, fit: list[str]) -> None:
        self.folder = args.output / name
        self.checkpoints, self.journal = self.folder / "checkpoints", args.output / f"{name}.journal"
        self.printed = args.output / f"{name}.out"
        if self.folder.exists() or self.journal.exists():
            raise SystemExit(f"{self.folder} exists: give another --output, or remove it")
        keeps = "{{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {{filename: last, {}: {}, \
enable_version_counter: false}}}}"
        journal = f"{{class_path: kill_and_resume.Journal, init_args: {{path: {self.journal}}}}}"
        options = {
            "default_root_dir": self.folder,
            "logger.init_args.save_dir": args.output,
            "logger.init_args.name": name,
            "enable_progress_bar": "false",
            "enable_model_summary": "false",
        }
        self.words = [sys.executable, str(ROOT / "cli.py"), "fit", *fit, "--ckpt_path=last"]
        self.words += [f"--trainer.{key}={value}" for key, value in options.items()]
        for when in (("every_n_train_steps", args.every), ("save_on_train_epoch_end", "true")):
            self.words.append(f"--trainer.callbacks+={keeps.format(*when)}")
        self.words.append(f"--trainer.callbacks+={journal}")

    def start(self) -> subprocess.Popen:
        """Starts the fit, from its last checkpoint where there is one."""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths}
        with self.printed.open("ab") as printed:
            return subprocess.Popen(self.words, env=environment, stdout=printed, stderr=subprocess.STDOUT)

    def lines(self) -> list[list[str]]:
        """The journal; a line that a kill has cut is left out."""
        text = self.journal.read_text() if self.journal.exists() else ""
        return [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def temporaries(self) -> set[str]:
        """Names of the files that checkpoints are written to before they get their own."""
        return {file.name for file in self.checkpoints.glob(".*")}

    def losses(self) -> Iterator[tuple[tuple[str, str], str]]:
        """Epoch and batch, and the loss as a hexadecimal number; as often as it was trained."""
        for kind, *words in self.lines():
            if kind == "batch":
                yield (words[0], words[1]), words[3]

    def step_to_resume_from(self) -> int | None:
        """The optimizer step of the last checkpoint; it must be whole."""
        file = self.checkpoints / "last.ckpt"
        return torch.load(file, weights_only=True)["global_step"] if file.exists() else None


def wait(process: subprocess.Popen, reached: Callable[[], Any], poll: float = 0.02) -> bool:
    """Looks every `poll` seconds whether something is so; False where the process ended before."""
    while not reached():
        if process.poll() is not None:
            return False
        time.sleep(poll)
    return True


def undisturbed(run: Run) -> None:
    """Runs to the end."""
    process = run.start()
    try:
        if process.wait() != 0:
            raise SystemExit(f"the undisturbed run ended with {process.returncode}: see {run.printed}")
    finally:
        process.kill()


def killed(run: Run, kills: int, batches: int, moments: random.Random) -> int:
    """Starts the run again and again, killing it; returns the number of kills before it ended by itself.

    Args:
        run: where.
        kills: at most so many.
        batches: how many the undisturbed run trained.
        moments: draws them.
    """
    for number in range(1, kills + 2):
        before, known, source = len(run.lines()), run.temporaries(), run.step_to_resume_from()
        process, started = run.start(), time.monotonic()
        try:
            if number <= kills and wait(process, lambda before=before: len(run.lines()) > before):
                begun = time.monotonic()
                # Three quarters of an even share on average, in batches, since others may slow the machine down; then
                # a moment within the time that one batch takes, its checkpoint and validation included.
                share = int(moments.uniform(0, 1.5 * batches / (kills + 1)))
                wait(process, lambda enough=before + share: len(run.lines()) > enough, 0.005)
                until = time.monotonic() + moments.uniform(0, 2) * (time.monotonic() - begun) / max(1, share)
                wait(process, lambda until=until: time.monotonic() >= until, 0.001)
                if number % 3 == 0:
                    wait(process, lambda known=known: run.temporaries() - known, 0.0002)
                process.kill()
            code = process.wait()
        finally:
            process.kill()
        resumed = "nothing" if source is None else f"step {source}"
        if code >= 0:
            print(f"start {number}: resumed from {resumed}, ended by itself with {code}", flush=True)
            if code != 0:
                raise SystemExit(f"a resumed run failed: see {run.printed}")
            return number - 1
        left, last = run.temporaries() - known, run.lines()[-1]
        phase = f"while writing {min(left)[1:].rpartition('.')[0]}" if left else PHASES[last[0]]
        step = last[3] if last[0] == "batch" else last[1]
        took = time.monotonic() - started
        print(f"kill {number}: {took:.2f} s after its start, step {step}, {phase}; resumed from {resumed}", flush=True)
    raise AssertionError("the last start is never killed")


PHASES = {
    "begins": "in the first batch",
    "batch": "between two batches or in the next",
    "validation": "in a validation",
    "validated": "after a validation",
    "ends": "at the end of the fit",
}


def differences(one: Any, other: Any, name: str) -> Iterator[str]:
    """Names of what is not equal to the bit in two checkpoints."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{name}.{number}")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if not (one.dtype == other.dtype and torch.equal(one, other)):
            yield name
    elif one != other:
        yield name


def compare(whole: Run, cut: Run) -> list[str]:
    """What differs between two finished runs, in words."""
    found, count = [], 0
    for name in ("last.ckpt", "best.ckpt"):
        if not (whole.checkpoints / name).exists():
            continue
        pair = [torch.load(run.checkpoints / name, weights_only=True) for run in (whole, cut)]
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
            found += differences(pair[0][part], pair[1][part], f"{name} {part}")
            count += 1
    adapters = [(run.folder / "adapter" / "adapter.safetensors").read_bytes() for run in (whole, cut)]
    if adapters[0] != adapters[1]:
        found.append("adapter/adapter.safetensors")
    expected, again = dict(whole.losses()), list(cut.losses())
    found += [f"loss of epoch {k[0]}, batch {k[1]}" for k, loss in again if loss != expected.get(k)]
    found += [f"epoch {e}, batch {b} was never trained" for e, b in expected.keys() - dict(again).keys()]
    print(f"compared {count} parts of checkpoints, the adapter folder, {len(expected)} losses ({len(again)} trained)")
    return found


def main() -> None:
    """Runs both, compares them and says what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--task", choices=[*TASKS], default="images")
    what.add_argument("--config", help="in place of a task")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=int, default=3, help="optimizer steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, not of the runs")
    parser.add_argument("--output", type=Path, help="folder of the runs, by default runs/kill_and_resume/TASK")
    args, overrides = parser.parse_known_args()
    args.output = (args.output or Path("runs/kill_and_resume", "" if args.config else args.task)).resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    fit = ["--config", args.config] if args.config else TASKS[args.task](args.output / "made")
    whole, cut = (Run(name, args, [*fit, *overrides]) for name in ("undisturbed", "killed"))
    undisturbed(whole)
    batches = len(dict(whole.losses()))
    print(f"undisturbed: {batches} batches", flush=True)
    done = killed(cut, args.kills, batches, random.Random(args.seed))
    found = compare(whole, cut)
    for difference in found[:20]:
        print(f"  differs: {difference}")
    print(f"{'DIFFERENT' if found else 'EQUAL'} to the bit after {done} kills of {args.kills}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
