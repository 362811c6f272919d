"""`sweep` from the command line: what it runs, keeps, refuses and says; fit and test are played by a small script."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from pera_lightning.cli.commands.sweep import check_alone
from pera_lightning.cli.sweeps import processes, running
from pera_lightning.errors import ConfigurationError
from tests.run_helpers import QUICKSTART

# Plays fit and test: writes what they write, and does what ACTS says for "fit 1" (command and seed).
PLAYER = """
import json, os, shutil, signal, sys, time
from pathlib import Path

command, *words = sys.argv[1:]
given = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
run, seed = Path(given["trainer.default_root_dir"]), given["seed_everything"]
lr = float(given.get("model.lr", "0.01"))
folder = Path(__file__).parent
act = json.loads((folder / "acts.json").read_text()).get(f"{command} {seed}", "")
with open(folder / "calls", "a") as file:
    file.write(f"{command} {run.name}{' on' if words[-1] == 'last' else ''}\\n")

def stop(*_):
    print("stopped by a signal after optimizer step 3: saved last.ckpt", flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
print("begun", flush=True)
if command == "fit" and act != "nothing":
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("")
    for name in ("best", "last"):
        shutil.copy(folder / f"{lr}.ckpt", run / "checkpoints" / f"{name}.ckpt")
if act == "fail":
    print("Traceback ...\\nerror: the data are gone\\nsome notice", file=sys.stderr)
    sys.exit(2)
if act == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "stop":
    os.kill(os.getpid(), signal.SIGTERM)
if act == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(2):
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.5)
    time.sleep(60)
if act in ("INT", "TERM"):
    os.kill(os.getppid(), getattr(signal, f"SIG{act}"))
    time.sleep(60)
if command == "fit" and act != "nothing":
    (run / "adapter").mkdir(exist_ok=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
if command == "test" and act != "nothing":
    metrics = {"test/accuracy": float(act) if act in ("nan", "inf") else lr + int(seed) / 100}
    facts = {"checkpoint": "x", "data": {"split": "p", "selected_on_test": act == "selected", "prompt": "x" * 200}}
    result = {"method": {}, "metrics": metrics, "trainable_parameters": 5, "protocol": facts}
    (run / "results.json").write_text(json.dumps(result))
"""


@pytest.fixture
def play(pera, tmp_path, monkeypatch, interruptible):
    """Sweeps with the player: ``play(*words, acts={})`` has `code`, `out`, `err`, `calls` and `sweep`."""
    script = tmp_path / "player.py"
    script.write_text(PLAYER)
    for lr, score in (("0.01", 0.5), ("0.1", 0.75), ("1.0", float("-inf"))):
        keeper = {"monitor": "val/accuracy", "best_model_score": torch.tensor(score), "best_model_path": "x/best.ckpt"}
        key = "ModelCheckpoint{'monitor': 'val/accuracy', 'mode': 'max', 'every_n_epochs': 1}"
        checkpoint = {"pytorch-lightning_version": "2.6.0", "state_dict": {}, "callbacks": {key: keeper}}
        torch.save(checkpoint, tmp_path / f"{lr}.ckpt")
    for module in (processes, running):
        monkeypatch.setattr(module, "program", lambda: [sys.executable, str(script)])
    monkeypatch.setattr("pera_lightning.cli.commands.sweep.program", lambda: [sys.executable, str(script)])
    out = tmp_path / "out"

    def run(*words, acts=None, config=QUICKSTART):
        (tmp_path / "acts.json").write_text(json.dumps(acts or {}))
        (tmp_path / "calls").write_text("")
        result = pera("sweep", "--config", config, "--output", out, *words)
        result.calls = (tmp_path / "calls").read_text().splitlines()
        result.folder = out
        text = (out / "sweep.json").read_text() if (out / "sweep.json").is_file() else "null"
        result.sweep = json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
        return result

    return run


def test_every_run_is_fitted_and_tested_and_summed_up(play):
    done = play("--seeds", "1,2", "--grid", "model.init_args.lr=0.01,1e-1", acts={"test 2": "selected"})
    names = [f"lr={lr}_seed={seed}" for lr in ("0.01", "0.1") for seed in (1, 2)]
    assert done.code == 0, done.err
    assert done.calls == [f"{command} {name}" for name in names for command in ("fit", "test")]
    assert [record["name"] for record in done.sweep["runs"]] == names
    first = done.sweep["runs"][0]
    assert first["selection"] == {"name": "val/accuracy", "mode": "max", "score": 0.5}
    assert (first["status"], first["metrics"], first["trainable_parameters"]) == (
        "complete",
        {"test/accuracy": 0.02},
        5,
    )
    assert first["protocol"] == {"data.split": "p", "data.selected_on_test": False}
    assert done.sweep["summary"][1]["metrics"]["test/accuracy"]["mean"] == pytest.approx(0.115)
    assert done.sweep["best"] == [{"of": None, "values": {"model.lr": "1e-1"}, "mean": 0.75}]
    assert "[4/4] lr=0.1_seed=2: val/accuracy 0.7500, test/accuracy 0.1200; " in done.out
    assert "Best by the mean of val/accuracy (max): lr=0.1, 0.7500; val/accuracy is measured on the test" in done.out
    assert len(list(csv.DictReader((done.folder / "sweep.csv").open()))) == 4
    assert (done.folder / names[0] / "sweep.log").read_text().count("begun") == 2


def test_a_second_sweep_runs_what_is_new_only(play):
    assert play("--seeds", "1").code == 0
    again = play("--seeds", "1,2")
    assert again.calls == ["fit seed2", "test seed2"]
    assert "[1/2] seed1: val/accuracy 0.5000, test/accuracy 0.0200; complete before, kept" in again.out
    assert again.sweep["seeds"] == [1, 2]
    assert again.sweep["summary"][0]["metrics"]["test/accuracy"]["n"] == 2
    assert play("--seeds", "2").sweep["summary"][0]["seeds"] == [1, 2]


@pytest.mark.parametrize("odd", ["inf"])
def test_runs_whose_scores_are_no_numbers_are_told_and_summed_up(play, odd):
    words = ["--seeds", "1,2", "--grid", "model.lr=1.0,0.1"]
    done = play(*words, acts={"test 1": odd, "test 2": odd})
    assert done.code == 0, done.err
    first = done.sweep["runs"][0]
    assert (first["status"], first["selection"]["score"], first["metrics"]) == (
        "complete",
        None,
        {"test/accuracy": None},
    )
    row = done.sweep["summary"][0]
    for of in (row["selection"], row["metrics"]["test/accuracy"]):
        assert (of["n"], of["not_finite"], of["mean"], of["sd"], of["max"]) == (0, 2, None, None, None)
    assert "[1/4] lr=1.0_seed=1: val/accuracy is not a number, test/accuracy is not a number; " in done.out
    assert "statistics: val/accuracy of lr=1.0_seed=1, lr=1.0_seed=2; test/accuracy of lr=1.0_seed=1, " in done.out
    assert "Best by the mean of val/accuracy (max): lr=0.1, 0.7500; not chosen from" in done.out
    rows = list(csv.DictReader((done.folder / "sweep.csv").open()))
    assert (rows[0]["selection_score"], rows[0]["test/accuracy"]) == ("", "")
    again = play(*words)
    assert (again.code, again.calls, again.sweep["summary"]) == (0, [], done.sweep["summary"])
    more = play("--seeds", "1,2,3", "--grid", "model.lr=1.0,0.1").sweep["summary"][1]["metrics"]["test/accuracy"]
    assert (more["n"], more["not_finite"], more["mean"]) == (1, 2, pytest.approx(0.13))


def test_a_sweep_with_nan_in_its_file_goes_on(play):
    done = play("--seeds", "1,2")
    file = done.folder / "sweep.json"
    file.write_text(
        file.read_text().replace('"score": 0.5', '"score": -Infinity').replace('accuracy": 0.02', 'accuracy": NaN')
    )
    again = play("--seeds", "1,2")
    assert (again.code, again.calls) == (0, [])
    assert again.sweep["runs"][0]["selection"]["score"] is None


def test_an_infinite_option_is_written_and_found_the_same(play):
    words = ["--trainer.gradient_clip_val", ".inf"]
    assert play(*words).sweep["config"]["trainer.gradient_clip_val"] == "inf"
    assert (play(*words).code, play(*words).calls) == (0, [])


def test_without_seeds_the_config_s_own_is_run(play):
    assert play().calls == ["fit seed0", "test seed0"]


def test_a_run_that_fails_is_told_and_tried_again(play):
    done = play("--seeds", "1,2,3", acts={"fit 1": "fail", "test 2": "die"})
    assert done.code == 1
    assert "[1/3] seed1: FAILED, fit: exit code 2 (see " in done.out
    assert "[2/3] seed2: FAILED, test: killed by SIGKILL, out of memory? (see " in done.out
    assert "2 of 3 runs are not complete; the same command tries them again" in done.out
    again = play("--seeds", "1,2,3")
    assert again.code == 0
    assert again.calls == ["fit seed1 on", "test seed1", "test seed2"]


@pytest.mark.parametrize(
    ("act", "word"), [("stop", "INTERRUPTED, its fit was stopped, with"), ("nothing", "FAILED, fit: no s")]
)
def test_a_fit_that_exits_with_0_and_is_not_finished_is_not_tested(play, act, word):
    done = play("--seeds", "1", acts={"fit 1": act})
    assert (done.code, done.calls) == (1, ["fit seed1"])
    assert word in done.out
    again = play("--seeds", "1").calls
    assert again == [f"fit seed1{' on' if act == 'stop' else ''}", "test seed1"]


@pytest.mark.parametrize(("act", "code"), [("INT", 130), ("TERM", 143)])
def test_a_signal_is_handed_on_and_ends_the_sweep(play, act, code):
    done = play("--seeds", "1,2", acts={"fit 1": act})
    assert (done.code, done.calls) == (code, ["fit seed1"])
    assert f"stopped by SIG{act} with 0 of 2 runs complete; seed1: its fit was stopped, with a checkpoint" in done.out
    assert done.sweep["runs"][0]["status"] == "interrupted"
    done = play("--seeds", "1,2", acts={"test 1": act})
    assert (done.code, done.calls) == (code, ["fit seed1 on", "test seed1"])
    assert play("--seeds", "1,2").calls == ["test seed1", "fit seed2", "test seed2"]


def test_a_second_signal_kills_a_run_that_does_not_end(play):
    done = play("--seeds", "1,2", acts={"fit 1": "deaf"})
    assert (done.code, done.calls) == (130, ["fit seed1"])
    assert "seed1: its fit was ended, what it did since its last checkpoint is lost\n" in done.out


def test_a_dry_run_prints_the_commands_and_writes_nothing(play):
    done = play("--seeds", "1,2", "--data.split_seed", "{seed}", "--dry_run")
    assert (done.code, done.calls, done.folder.exists()) == (0, [], False)
    assert done.out.count(" fit --config ") == 2
    assert "--data.split_seed 2 --seed_everything=2 " in done.out
    play("--seeds", "1", "--data.split_seed", "{seed}")
    again = play("--seeds", "1,2", "--data.split_seed", "{seed}", "--dry_run")
    assert "[1/2] seed1: complete\n[2/2] seed2: to be run\n" in again.out


def test_other_settings_in_a_folder_are_refused(play, tmp_path):
    assert play("--seeds", "1").code == 0
    (tmp_path / "moved.yaml").write_text(Path(QUICKSTART).read_text() + "# a comment\n")
    assert play("--seeds", "1", config=tmp_path / "moved.yaml").calls == []
    other = play("--seeds", "1", "--model.head_lr", "0.5")
    assert (other.code, other.calls) == (2, [])
    assert "holds a sweep with other settings: model.init_args.head_lr is 0.5, and was 0.01; give another" in other.err
    assert "over seeds only, and this one is over model.lr: give" in play("--grid", "model.lr=1").err


def test_one_sweep_at_a_time(play, tmp_path):
    from pera_lightning.cli.sweeps.folder import locked

    with locked(tmp_path / "out"):
        done = play("--seeds", "1")
    assert (done.code, done.calls) == (2, [])
    assert "is in use by another sweep, or by a run that one left behind: wait" in done.err
    assert play("--seeds", "1").code == 0


def test_folders_that_are_no_sweep_s_are_refused(play, tmp_path):
    out = tmp_path / "out"
    out.write_text("")
    assert "out is a file: give a folder" in play().err
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").write_text("")
    assert "out holds no sweep but thesis.tex: give another" in play().err
    (out / "sweep.json").write_text("{}")
    assert "sweep.json is damaged, or of something else" in play().err


REFUSED = {
    "an unknown key": (
        ["--grid", "model.lrr=1,2"],
        "with lrr=1: model: ImageClassificationModule has no option 'lrr",
    ),
    "a wrong type": (
        ["--grid", "trainer.max_epochs=1,two"],
        "with max_epochs=two: trainer.max_epochs: int is needed",
    ),
    "a wrong value": (["--grid", "adapter.method.rank=4,0"], "with rank=0: rank=0: a positive integer is needed"),
    "an option that is none": (["--sedes", "1"], "unknown option --sedes; closest: --seeds"),
    "a trial run": (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run, which writes no checkpoint"),
    "no checkpoints": (["--trainer.enable_checkpointing", "false"], "trainer.enable_checkpointing=false, and"),
    "no seed": (["--config", '{"seed_everything": true}'], "the config has seed_everything: True: give --seeds"),
    "another logger": (
        ["--trainer.logger", '{"class_path": "lightning.pytorch.loggers.MLFlowLogger"}'],
        "trainer.logger: MLFlowLogger has a folder of its own making",
    ),
    "one folder for all checkpoints": (
        ['--trainer.callbacks=[{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "x"}}]'],
        "ModelCheckpoint with dirpath=x, where the runs would write over each other's checkpoints",
    ),
    "an unknown strategy": (["--trainer.strategy", "fspd2"], "strategy='fspd2' does not exist"),
}


@pytest.mark.parametrize(("words", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_no_run_could_take_is_one_line_before_the_first(play, words, expected):
    done = play(*words)
    assert (done.code, done.calls, done.folder.exists()) == (2, [], False)
    assert expected in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_several_processes_are_refused(play, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        with pytest.raises(ConfigurationError, match=f"sweep was started with {name}=2: start it as one process"):
            check_alone({name: "2"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = play("--seeds", "1")
    assert (done.code, done.calls) == (2, [])
    assert "sweep was started with WORLD_SIZE=2: start it as one process" in done.err


SLURM = {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}
ONE_PROCESS = {
    "salloc -n4": SLURM,
    "a batch script": {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "a shell that is a step": {
        **SLURM,
        "SLURM_PROCID": "0",
        "SLURM_STEP_ID": "4294967290",
        "SLURM_STEP_NUM_TASKS": "4",
    },
    "srun -n1": {**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
}


@pytest.mark.parametrize("environment", ONE_PROCESS.values(), ids=ONE_PROCESS)
def test_one_process_in_an_allocation_for_more_is_fine(environment):
    check_alone(environment)


def test_srun_of_several_tasks_is_refused():
    with pytest.raises(ConfigurationError, match="sweep was started with SLURM_STEP_NUM_TASKS=4: start it as one"):
        check_alone({**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"})


def test_a_full_disk_is_one_line(play, monkeypatch):
    import errno

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pera_lightning.cli.sweeps.folder.atomic_write", full)
    done = play("--seeds", "1")
    assert (done.code, done.calls) == (2, [])
    assert "sweep.json cannot be written (No space left on device): make room" in done.err


def test_the_best_file_is_found_by_any_name(tmp_path):
    from pera_lightning.cli.sweeps.outcome import tested_checkpoint

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    keeper = {"monitor": "val/loss", "best_model_score": torch.tensor(0.25), "best_model_path": "y/epoch=1.ckpt"}
    state = {"callbacks": {"ModelCheckpoint{'monitor': 'val/loss', 'mode': 'min'}": keeper}}
    for name in ("epoch=1", "last"):
        torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": {}, **state}, folder / f"{name}.ckpt")
    found = {"name": "val/loss", "mode": "min", "score": 0.25}
    assert tested_checkpoint(tmp_path) == (str(folder / "epoch=1.ckpt"), found)
    (folder / "epoch=1.ckpt").unlink()
    assert tested_checkpoint(tmp_path) == ("last", None)


def test_help_names_the_options(pera):
    done = pera("sweep", "--help")
    assert done.code == 0
    for option in ("--seeds", "--grid", "--output", "--dry_run", "--adapter.targets"):
        assert option in done.out
