"""Processes that stand for nodes: started with a clean environment, ended by pid, and what each of them wrote."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

from tests.run_helpers import QUICKSTART, ROOT, quick_words

# What a launcher around the tests may have left, and the launchers here set themselves.
LEFTOVERS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK")
LEFTOVERS += ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "COVERAGE_PROCESS_START")

# Put before a process's own code: notes which process opens what for writing, and what it renames to what.
_WATCH = """
import json, os, sys

def _note(event, args):
    if event == "open" and not isinstance(args[0], int) and set(args[1] or "") & set("wax+"):
        path = args[0]
    elif event == "os.rename":
        path = args[1]
    else:
        return
    path = os.path.abspath(os.fsdecode(path))
    if path.startswith(os.environ["WATCHED"] + os.sep):
        line = json.dumps([os.getpid(), path]) + chr(10)
        os.write(_file, line.encode())

_file = os.open(os.environ["WATCHED"] + ".writers", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.addaudithook(_note)
"""


def environment(**more):
    """This process's, without what launchers leave, on one thread a process; `more` of None is taken out."""
    kept = {k: v for k, v in os.environ.items() if k not in LEFTOVERS and not k.startswith(("SLURM_", "TORCHELASTIC_"))}
    kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    kept |= {k: str(v) for k, v in more.items()}
    paths = [kept.get("PYTHONPATH", ""), str(ROOT)]
    return {**kept, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def watched(folder):
    """The part of an environment that notes who writes what under a folder, from here on."""
    Path(f"{folder}.writers").unlink(missing_ok=True)
    site = folder.parent / f"{folder.name}.site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_WATCH)
    return {"PYTHONPATH": site, "WATCHED": folder}


def writers(folder):
    """Of each file that is there now, relative to the folder, the processes that wrote it."""
    found = defaultdict(set)
    for line in Path(f"{folder}.writers").read_text().splitlines():
        pid, path = json.loads(line)
        if Path(path).is_file():
            found[Path(path).relative_to(folder).as_posix()].add(pid)
    return found


def free_port(among=(0,)):
    """The first of some ports that is free; by default whichever is."""
    for port in among:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise OSError(f"no free port among {among}")


def run_together(commands, folder, timeout):
    """Runs commands side by side; each a pair of words and environment.

    Returns, of each, `code` (None: it had to be ended), `text`, when all had ended (`at`, in seconds since 1970), and
    whether processes that it had started `outlived` the limit. None outlives this.
    """
    started, began = [], time.monotonic()
    marks = [f"PERA_TEST_RUN={os.getpid()}-{time.monotonic_ns()}-{number}" for number in range(len(commands))]
    try:
        for mark, (words, variables) in zip(marks, commands, strict=True):
            path = folder / f"output{len(started)}"
            with path.open("w") as file:
                process = subprocess.Popen(
                    [str(word) for word in words],
                    env={**variables, **dict([mark.split("=")])},
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            started.append((process, path))
        while any(process.poll() is None for process, _ in started) or any(map(marked, marks)):
            if time.monotonic() - began > timeout:
                break
            time.sleep(0.2)
        at = time.time()
        return [
            SimpleNamespace(code=process.poll(), text=path.read_text(), at=at, outlived=bool(marked(mark)))
            for mark, (process, path) in zip(marks, started, strict=True)
        ]
    finally:
        for pid in [pid for mark in marks for pid in marked(mark)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process, _ in started:
            process.kill()
            process.wait()


def marked(mark):
    """The processes that have a variable in their environment: what a command of ours has started, and itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def pera_words(folder, command="fit", *options, config=QUICKSTART):
    """The quickstart cut down to two steps, as a script of its own."""
    more = ("--ckpt_path", "best") if command == "test" else ()
    return [sys.executable, ROOT / "cli.py", *quick_words(folder, command, config=config), *more, *options]


def torchrun_words(words, *, nodes, node, port, processes=1):
    """The same under torchrun, as one of several nodes on this machine."""
    where = [f"--nnodes={nodes}", f"--nproc_per_node={processes}", f"--node_rank={node}"]
    where += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    return [sys.executable, "-m", "torch.distributed.run", *where, *words[1:]]
