"""The line for errors of gloo, as gloo raises them in a process whose partner ends, or does not answer."""

import multiprocessing
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pera_lightning.cli.lost_process import lost_process


def _partner(store, rank, how, answer):
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=4), 2, rank)
    dist.barrier()
    if rank == 1:
        time.sleep(0 if how == "ends" else 30)
        os._exit(0)
    try:
        dist.all_reduce(torch.ones(1))
    except Exception as error:
        answer.send(lost_process(error))
    os._exit(0)


@pytest.mark.parametrize(("how", "words"), [("ends", "has ended"), ("hangs", "did not answer in time")])
def test_errors_of_gloo(tmp_path, how, words):
    fork = multiprocessing.get_context("fork")
    asked, answer = fork.Pipe(duplex=False)
    partners = [fork.Process(target=_partner, args=(tmp_path / "store", rank, how, answer)) for rank in (0, 1)]
    try:
        for partner in partners:
            partner.start()
        assert asked.poll(60)
        line = asked.recv()
    finally:
        for partner in partners:
            partner.kill()
            partner.join()
    assert words in line
    assert "\n" not in line
    assert "127.0.0.1" in line or "waiting" in line  # what gloo says is there too


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), "has ended"),
        (dist.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed."), "has ended"),
        (dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0"), "did not answer in time"),
    ],
)
def test_errors_of_torch(error, words):
    assert words in lost_process(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer"),  # somebody else's
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ConnectionResetError("Connection reset by peer"),
        dist.DistBackendError("NCCL error: unhandled cuda error"),
        ValueError("timed out"),
    ],
)
def test_other_errors_are_left_alone(error):
    assert lost_process(error) is None
