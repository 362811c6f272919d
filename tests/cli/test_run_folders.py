"""What commands do to the folder of a run: no files are lost or mixed, and it is said which checkpoint is meant."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from pera_lightning import ImageClassificationModule
from pera_lightning.cli.checkpoints import find_checkpoint
from pera_lightning.cli.lightning_cli import SaveConfigAtStart
from pera_lightning.cli.sweeps.folder import fit_finished
from pera_lightning.training.folder_lock import FILE, FolderLock


@pytest.fixture
def run(fitted, tmp_path):
    """A copy of the trained run, in the folder that the commands use."""
    return shutil.copytree(fitted.run, tmp_path / "quickstart")


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def method_of(run):
    return json.loads((run / "adapter" / "adapter_config.json").read_text())["method"]["class_path"].rpartition(".")[2]


def step_of(file):
    return torch.load(file, weights_only=True)["global_step"]


def error_line(result):
    assert result.code == 2, result.out + result.err
    return result.err.strip().splitlines()[-1]


def test_consecutive_fits_both_survive(quick, run, tmp_path, monkeypatch):
    """The second by the first's own config: it is named on the command line, and read again by further processes."""
    before, configs = files(run), []
    setup = SaveConfigAtStart.setup

    def spy(*args, stage):
        configs.append((run / "config.yaml").read_bytes())
        setup(*args, stage=stage)

    monkeypatch.setattr(SaveConfigAtStart, "setup", spy)
    result = quick("--adapter.method", "PERA", config=run / "config.yaml")
    assert result.code == 0, result.err
    (earlier,) = tmp_path.glob("quickstart.earlier-*")
    assert f"Earlier run moved aside: {earlier}\n" in result.out
    assert files(earlier) == before
    assert configs == [before["config.yaml"]]  # before the new one was written
    assert (method_of(earlier), method_of(run)) == ("AuroRA", "PERA")
    # Nothing of the first is left in the plain folder, and the second is complete.
    now = files(run)
    assert {name.partition("tfevents")[0] for name in now} == {name.partition("tfevents")[0] for name in before}
    assert len([name for name in now if "tfevents" in name]) == 1
    assert "PERA" in now["config.yaml"].decode()


@pytest.mark.parametrize(
    "words",
    [["--adapter.targets", "[nope]"], ["--data.dataset", "/nowhere"], ["--trainer.fast_dev_run", "1"]],
    ids=["a wrong target", "missing data", "fast_dev_run"],
)
def test_a_fit_that_does_not_train_leaves_the_earlier_run(quick, run, tmp_path, words):
    before = files(run)
    quick(*words)
    assert files(run) == before
    assert [*tmp_path.iterdir()] == [run]


def test_a_fit_does_not_move_what_it_reads(quick, run):
    shutil.copytree(run / "adapter", run / "data")
    before = files(run)
    assert "--data.dataset is" in error_line(quick("--data.dataset", run / "data"))
    assert files(run) == before


def test_a_second_fit_is_refused_before_it_opens_a_file(quick, run):
    lock = FolderLock()
    lock.take(run)
    before = files(run)
    assert f"in use by another fit (host {os.uname().nodename}, process {os.getpid()}" in error_line(quick())
    assert files(run) == before
    lock.release()


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_fit_goes_on_in_place(quick, run, tmp_path, name):
    assert quick("--ckpt_path", name, "--trainer.max_epochs", 2).code == 0
    assert step_of(run / "checkpoints" / "last.ckpt") == 4
    assert [*tmp_path.iterdir()] == [run]
    assert not (run / FILE).exists()


def test_results_that_a_fit_in_place_leaves_behind_are_said(quick, run, monkeypatch):
    """They stand beside checkpoints of their names, and are of others."""
    for name in ("best", "last"):
        assert quick("--ckpt_path", name, command="test").code == 0
    best = (run / "checkpoints" / "best.ckpt").read_bytes()
    result = quick("--ckpt_path", "last", "--trainer.max_epochs", 8, "--model.lr", 0.03)
    assert (run / "checkpoints" / "best.ckpt").read_bytes() != best
    line = f"{run} has results.json, results-last.json from before this fit, which has replaced the checkpoints"
    assert f"{line}: measure again" in result.out.splitlines()
    for name in ("best", "last"):
        assert quick("--ckpt_path", name, command="test").code == 0
    assert "from before" not in quick("--ckpt_path", "last", "--trainer.max_epochs", 8).out


# --- which checkpoint is measured ---


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_it_must_be_said_which_checkpoint_is_meant(quick, run, command):
    before = files(run)
    line = error_line(quick(command=command))
    assert f"{run / 'checkpoints'} has best.ckpt, last.ckpt: give --ckpt_path best, last, FILE, or none" in line
    assert files(run) == before


def test_results_of_one_checkpoint_do_not_replace_another_s(quick, run, fitted):
    tested = {"best": "", "last": "-last", "none": "-none", fitted.checkpoint: None}  # the last is another run's
    for given in tested:
        assert quick("--ckpt_path", given, command="test").code == 0
    assert quick("--ckpt_path", "best", command="predict").code == 0
    assert quick("--ckpt_path", "last", command="predict").code == 0
    assert sorted(path.name for path in (run / "splits").iterdir()) == ["digits-test.json", "digits.json"]
    results = {path.stem: json.loads(path.read_text()) for path in run.glob("results*.json")}
    assert len(results) == 4
    assert sorted(path.name for path in run.glob("predictions*")) == ["predictions", "predictions-last"]
    for given, name in tested.items():
        if name is not None:
            checkpoint = results[f"results{name}"]["protocol"]["checkpoint"]
            assert checkpoint == (None if given == "none" else str(run / "checkpoints" / f"{given}.ckpt"))
    # What was not trained is the base, with a new head.
    assert results["results-none"]["metrics"]["test/accuracy"] < results["results"]["metrics"]["test/accuracy"]


def test_a_checkpoint_alone_is_tested_where_its_run_lies(pera, run, tmp_path, monkeypatch):
    """By the run's config, which says where the run was before it was moved."""
    moved = tmp_path / "elsewhere" / "quickstart.earlier"
    moved.parent.mkdir()
    run.rename(moved)
    assert yaml.safe_load((moved / "config.yaml").read_text())["trainer"]["logger"]
    monkeypatch.chdir(tmp_path)
    own = ["--trainer.enable_progress_bar", "false", "--model.label_smoothing", 0.1]  # over the run's config
    result = pera("test", "--ckpt_path", moved / "checkpoints" / "best.ckpt", *own)
    assert result.code == 0, result.err
    assert "Results: elsewhere/quickstart.earlier/results.json" in result.out
    assert [*tmp_path.iterdir()] == [moved.parent]
    (tmp_path / "copy.ckpt").touch()
    assert "copy.ckpt is not known" in error_line(pera("test", "--ckpt_path", tmp_path / "copy.ckpt"))
    assert "gone.ckpt: no such file. Give --config" in error_line(pera("test", "--ckpt_path", tmp_path / "gone.ckpt"))
    assert f"{moved}: a folder. Give --config" in error_line(pera("test", "--ckpt_path", moved))
    for unclear in ("best", "http://127.0.0.1/x.ckpt"):
        assert f"{unclear}: of which run? Give --config" in error_line(pera("predict", "--ckpt_path", unclear))


def test_a_logger_that_counts_its_versions(quick, tmp_path):
    """New runs have a folder each; a checkpoint's run goes on, and is tested, in its own, and keeps its metrics."""
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.init_args.version", "null"]

    def command(*words, command="fit"):
        result = quick(*logger, *words, command=command)
        assert result.code == 0, result.err

    command()
    command()
    first, second = (tmp_path / "quickstart" / f"version_{k}" for k in (0, 1))
    metrics = (second / "metrics.csv").read_text()
    command("--ckpt_path", "last", "--trainer.max_epochs", 2)
    assert (step_of(first / "checkpoints" / "last.ckpt"), step_of(second / "checkpoints" / "last.ckpt")) == (2, 4)
    command("--ckpt_path", "best", command="test")
    command("--ckpt_path", first / "checkpoints" / "best.ckpt", command="test")
    assert all((run / "results.json").is_file() for run in (first, second))
    assert metrics in [file.read_text() for file in second.glob("metrics.earlier-*.csv")]
    assert sorted(path.name for path in (tmp_path / "quickstart").iterdir()) == ["version_0", "version_1"]


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_training_is_one_line(quick, run, monkeypatch, interruptible, number):
    """It comes while the network is built; nothing is changed."""
    before, handler = files(run), signal.getsignal(number)
    monkeypatch.setattr(ImageClassificationModule, "configure_model", lambda self: os.kill(os.getpid(), number))
    result = quick()
    assert result.code == 128 + number
    assert result.err.splitlines()[-1] == f"stopped by {number.name}; before the training began: nothing was changed"
    assert "Traceback" not in result.err
    assert files(run) == before
    assert signal.getsignal(number) == handler


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_stops_a_fit_with_the_command_that_goes_on(quick, tmp_path, monkeypatch, interruptible, number, code):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(LearningRateMonitor, "on_train_batch_start", on_train_batch_start)
        result = quick("--trainer.max_epochs", 3)
    run = tmp_path / "quickstart"
    assert result.code == code, result.err
    assert f"Adapter of the best checkpoint: {run / 'adapter'}" in result.out
    assert result.out.splitlines()[-1].endswith(f"--ckpt_path {run}/checkpoints/last.ckpt")
    assert not fit_finished(run)  # as a sweep sees it
    assert quick("--trainer.max_epochs", 3, "--ckpt_path", "last").code == 0
    assert (step_of(run / "checkpoints" / "last.ckpt"), fit_finished(run)) == (6, True)


def test_a_second_ctrl_c_ends_with_the_code_of_one(quick, monkeypatch, interruptible):
    """Else a shell would go on with its next command; Lightning exits with 1, and says nothing of what is lost."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LearningRateMonitor, "on_train_batch_start", on_train_batch_start)
    result = quick("--trainer.max_epochs", 3)
    assert result.code == 130
    assert result.err.splitlines()[-1].startswith("stopped by SIGINT at once: what was done since the last checkpoint")
    assert "Traceback" not in result.err


def test_a_signal_to_a_test_is_one_line(quick, run, monkeypatch, interruptible):
    monkeypatch.setattr(ImageClassificationModule, "test_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    result = quick("--ckpt_path", "best", command="test")
    assert (result.code, result.err.splitlines()[-1]) == (130, "stopped by SIGINT")


@pytest.mark.parametrize("name", ["best", "last"])
def test_of_files_that_lightning_counted_the_newest_is_meant(tmp_path, name):
    """In a `dirpath` of one's own that two runs shared, the file without a number is the earlier run's."""
    for age, file in enumerate(("adapter.ckpt", f"{name}-v1.ckpt", f"{name}.ckpt")):
        (tmp_path / file).touch()
        os.utime(tmp_path / file, (10 - age, 10 - age))
    trainer = Trainer(logger=False, callbacks=[ModelCheckpoint(tmp_path)], default_root_dir=tmp_path / "other")
    assert find_checkpoint(name, trainer) == tmp_path / f"{name}-v1.ckpt"
