"""Processes forked from the test's, as `torchrun` would start them: what they need is imported already."""

import multiprocessing
import os
import sys
import time
import traceback

from lightning.pytorch.utilities import rank_zero_only

from tests.training.distributed.node_helpers import environment, free_port


def run_forked(function, world, folder, timeout):
    """Runs a function in each of `world` processes; fails where one of them does. Returns what all of them printed."""
    output, port = folder / "output", free_port()
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_as_rank, args=(function, rank, world, port, output)) for rank in range(world)]
    end = time.monotonic() + timeout
    try:
        for process in started:
            process.start()
        while any(process.exitcode is None for process in started) and not any(process.exitcode for process in started):
            assert time.monotonic() < end, f"not ended after {timeout} s: {output.read_text()[-3000:]}"
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()  # where one has failed, the others wait for it
            process.join()
    text = output.read_text()
    assert [process.exitcode for process in started] == [0] * world, text[-3000:]
    return text


def _as_rank(function, rank, world, port, output):
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))  # pytest's are others
    variables = {}
    if world > 1:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
        rank_zero_only.rank = rank  # Lightning has read the variables when it was imported
    os.environ |= environment(**variables)
    code = 0
    try:
        function()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)  # without what the test's process does at its end
