"""The command line: Lightning's fit, validate, test and predict with adapters, and this package's own commands.

``--help`` and the own commands' names are answered before Lightning is imported, which takes seconds.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from pera_lightning.cli.signals import Stopped, stopping
from pera_lightning.cli.words import find_configs
from pera_lightning.errors import PeraError, closest, shorten

TRAINER_COMMANDS = {
    "fit": "train adapters",
    "validate": "measure a checkpoint on the validation data",
    "test": "measure a checkpoint on the test data",
    "predict": "write predictions",
}
OWN_COMMANDS = {
    "params": ("pera_lightning.cli.commands.params:run", "print what a config adapts; with --memory what it needs"),
    "merge": ("pera_lightning.cli.commands.merge:run", "merge a checkpoint and measure what that changes"),
    "export": (
        "pera_lightning.cli.commands.export:run",
        "write a checkpoint for PEFT, vLLM, transformers, timm or diffusers",
    ),
    "methods": ("pera_lightning.cli.commands.methods:run", "print what each method can do: merge, export as LoRA"),
    "sweep": ("pera_lightning.cli.commands.sweep:run", "fit and test over seeds and config values, with a table"),
    "grid": ("pera_lightning.cli.commands.grid:run", "draw the images of several runs side by side"),
}


def usage() -> str:
    """The text of a bare ``--help``."""
    commands = TRAINER_COMMANDS | {name: text for name, (_, text) in OWN_COMMANDS.items()}
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in commands.items())
    return f"""\
usage: python cli.py COMMAND --config FILE [--KEY VALUE ...]   (or: pera COMMAND ...)

{lines}

examples:
  python cli.py fit --config configs/quickstart.yaml
  python cli.py fit --config configs/quickstart.yaml --adapter.method PERA --adapter.method.rank 8
  python cli.py export --ckpt_path runs/quickstart/adapter --format peft --mode calibrated --output DIR
  python cli.py COMMAND --help   every key of a command"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line, by default on this process's words.

    Exits with 2 and one line for wrong input, and with one line where a signal stops it.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("--help", "-h", "help"):
        print(usage())
        sys.exit(0 if words else 2)  # no command is wrong input, though the answer is the same
    if words[0] == "--version":
        from pera_lightning import __version__

        print(__version__)
        return
    try:
        with stopping():
            _run(words)
    except PeraError as error:
        fail(str(error))
    except KeyboardInterrupt:  # the second one, while a fit was stopping at the first
        _end_at_once()
    except Stopped as stop:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # Ctrl-C reaches all processes of a terminal
            print("; ".join([f"stopped by {stop.name}", *getattr(stop, "__notes__", ())]), file=sys.stderr, flush=True)
        sys.exit(stop.code)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # the second one within the training: Lightning exits with 1
            _end_at_once()
        raise


def _end_at_once() -> NoReturn:
    print("stopped by SIGINT at once: what was done since the last checkpoint is lost", file=sys.stderr, flush=True)
    sys.exit(130)


def _run(words: list[str]) -> None:
    # Each command is imported when it is asked for: Lightning alone takes seconds.
    words = find_configs(words)
    if words[0] in OWN_COMMANDS:
        module, _, function = OWN_COMMANDS[words[0]][0].partition(":")
        getattr(importlib.import_module(module), function)(words[1:])
    elif words[0] in TRAINER_COMMANDS:
        from pera_lightning.cli.lightning_cli import run  # takes seconds

        run(words)
    else:
        known = [*TRAINER_COMMANDS, *OWN_COMMANDS]
        raise PeraError(f"unknown command {words[0]!r}; there are {', '.join(known)}{closest(words[0], known)}")


def fail(message: str) -> None:
    """Prints one line and exits with 2; of an error in a loader's worker, the line that says what was wrong."""
    if "Original Traceback" in message:
        # The last line of a worker's traceback is "ErrorClass: message".
        message = message.strip().splitlines()[-1].partition(": ")[2]
    print(f"error: {shorten(message)}", file=sys.stderr, flush=True)
    sys.exit(2)
