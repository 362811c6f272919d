"""Two nodes on this machine, started in each of the three ways: they train and test as one process does."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from pera_lightning.cli.main import main
from tests.run_helpers import ROOT
from tests.training.distributed.forked import run_forked
from tests.training.distributed.node_helpers import (
    environment,
    free_port,
    pera_words,
    run_together,
    torchrun_words,
    watched,
    writers,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LIMIT = 200
COMMANDS = [sys.executable, ROOT / "tests" / "training" / "distributed" / "command_runs.py"]
NODES = ("--trainer.strategy", "ddp", "--trainer.num_nodes", "2", "--trainer.devices", "1")


def checked(ends):
    for end in ends:
        assert end.code == 0, end.text[-3000:]
    return ends


def left(folder):
    run = folder / "quickstart"
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    results = run / "results.json"
    return SimpleNamespace(run=run, state=state, results=json.loads(results.read_text()) if results.exists() else None)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One process with the doubled batch. Its strategy is DDP too, so that the same sampler gives the order."""
    folder = tmp_path_factory.mktemp("single")
    for command in ("fit", "test"):
        words = pera_words(folder, command, "--trainer.strategy", "ddp", "--data.batch_size", "64")
        run_forked(lambda words=words[2:]: main(words), 1, folder, LIMIT)
    return left(folder)


def torchrun(folder, variables):
    port = free_port()
    runs = [pera_words(folder, command, *NODES)[2:] for command in ("fit", "test")]
    variables = environment(**variables, RUNS=json.dumps(runs))
    return [(torchrun_words(COMMANDS, nodes=2, node=node, port=port), variables) for node in (0, 1)]


def own_variables(folder, variables):
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **variables}
    return [(pera_words(folder, "fit", *NODES), environment(NODE_RANK=node, **where)) for node in (0, 1)]


def slurm(folder, variables):
    """docs/slurm.sbatch as it is, with an srun of our own; the port is the job's last four digits and 15000."""
    bin_folder = folder.parent / "bin"
    bin_folder.mkdir(exist_ok=True)
    for name, run in (
        ("srun", f'"{sys.executable}" "{ROOT}/tests/training/distributed/loopback_srun.py"'),
        ("python", ""),
    ):
        path = bin_folder / name
        path.write_text(f'#!/bin/sh\nexec {run or chr(34) + sys.executable + chr(34)} "$@"\n')
        path.chmod(0o755)
    number = 70000 + free_port(range(15000, 25000)) - 15000
    job = {"SLURM_JOB_NAME": "pera_lightning", "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_ID": number}
    job |= {"SLURM_NNODES": 2, "SLURM_NTASKS_PER_NODE": 1}
    variables = environment(**variables, **job)
    variables["PATH"] = f"{bin_folder}:{variables['PATH']}"
    return [(["bash", ROOT / "docs" / "slurm.sbatch", *pera_words(folder)[2:]], variables)]


@pytest.mark.parametrize("start", [torchrun, own_variables, slurm])
def test_two_nodes_are_one_process_with_the_double_batch(single, tmp_path, start):
    """A fit; with `torchrun` also the test of what it trained."""
    folder = tmp_path / "runs"
    folder.mkdir()
    checked(run_together(start(folder, watched(folder)), tmp_path, LIMIT))
    two = left(folder)
    assert two.state.keys() == single.state.keys()
    for name, value in single.state.items():
        # A hundredth of what one of the three steps moves a weight: Adam makes rounding of small gradients larger.
        torch.testing.assert_close(two.state[name], value, rtol=1e-4, atol=1e-4)
    commands = 1
    if start is torchrun:
        commands = 2
        assert two.results["n"] == single.results["n"] == 179
        assert two.results["metrics"] == pytest.approx(single.results["metrics"], rel=1e-4)
        assert two.results["accuracy_per_class"] == single.results["accuracy_per_class"]
    assert_each_file_by_one_process(single, writers(folder), commands)


def assert_each_file_by_one_process(single, found, commands):
    assert {name: pids for name, pids in found.items() if len(pids) > 1} == {}
    assert sum("events.out" in name for name in found) == commands
    names = {path.relative_to(single.run).as_posix() for path in single.run.rglob("*") if path.is_file()}
    of_a_test = {
        name for name in names if name in ("results.json", "config_test.yaml") or name.startswith("predictions")
    } | {"splits/digits-test.json"}
    assert {"results.json", "checkpoints/last.ckpt", "config.yaml"} < names
    names = {name for name in names if "events.out" not in name} - (of_a_test if commands == 1 else set())
    assert {f"quickstart/{name}" for name in names} <= found.keys()
