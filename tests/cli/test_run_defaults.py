"""What all runs share without their configs saying so, and that a config or the command line takes its place."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from pera_lightning.cli.lightning_cli import PeraCLI
from pera_lightning.cli.run_defaults import default_folder
from tests.run_helpers import QUICKSTART


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["--config", "configs/paper/pera/x_r2.yaml"], "runs/paper/pera/x_r2"),
        (["--config=/home/me/mine.v2.yaml", "--config", "other.yaml"], "runs/mine.v2"),
        (["--config", '{"a": 1}', "-c", "/a/configs/b/configs/c.yaml"], "runs/c"),
        (["--model", "X"], "runs/run"),
    ],
)
def test_the_folder_of_a_run_is_told_by_its_first_config(words, folder):
    assert default_folder(words) == Path(folder)


@pytest.fixture
def parsed(monkeypatch):
    """The command line of the quickstart with more words, built and not run."""
    monkeypatch.setattr(sys, "argv", ["pera"])  # Lightning warns where words are given twice

    def parse(*words, config=QUICKSTART):
        return PeraCLI(args=["--config", str(config), *map(str, words)], run=False, save_config_callback=None)

    return parse


def kept(trainer):
    return [(one.filename, one.monitor, one.mode) for one in trainer.checkpoint_callbacks]


BOTH = [("best", "val/accuracy", "max"), ("last", None, "min")]


def test_a_config_without_them_logs_keeps_the_best_and_the_last_and_notes_rates(parsed):
    trainer = parsed().trainer
    assert isinstance(trainer.logger, TensorBoardLogger)
    assert Path(trainer.log_dir) == Path("runs/quickstart")
    assert (Path(trainer.default_root_dir).parts[-2:], kept(trainer)) == (("runs", "quickstart"), BOTH)
    assert [c.logging_interval for c in trainer.callbacks if type(c).__name__ == "LearningRateMonitor"] == ["step"]
    # Runs of before resume by these.
    assert trainer.checkpoint_callback.state_key.startswith("ModelCheckpoint{'monitor': 'val/accuracy', 'mode': 'max',")


def test_the_folder_is_given_in_part_or_whole(parsed, tmp_path):
    trainer = parsed("--trainer.logger.init_args.save_dir", tmp_path, "--trainer.logger.init_args.name", "pera").trainer
    assert Path(trainer.log_dir) == Path(trainer.default_root_dir) == tmp_path / "pera"
    trainer = parsed("--trainer.default_root_dir", tmp_path).trainer
    assert Path(trainer.log_dir) == Path("runs/quickstart")
    assert Path(trainer.default_root_dir) == tmp_path


def test_another_logger_or_none(parsed):
    trainer = parsed("--trainer.logger", "CSVLogger").trainer
    assert isinstance(trainer.logger, CSVLogger)
    assert Path(trainer.log_dir) == Path("runs/quickstart")
    trainer = parsed("--trainer.logger", "false").trainer
    assert trainer.logger is None
    assert Path(trainer.log_dir).parts[-2:] == ("runs", "quickstart")
    assert "LearningRateMonitor" not in {type(callback).__name__ for callback in trainer.callbacks}  # it needs a logger


def test_callbacks_of_a_config_are_added_and_its_checkpoints_take_the_place_of_both(parsed, tmp_path):
    config = yaml.safe_load(Path(QUICKSTART).read_text())
    path = tmp_path / "mine.yaml"
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}
    config["trainer"]["callbacks"] = [stopping]
    path.write_text(yaml.safe_dump(config))
    trainer = parsed(config=path).trainer
    assert "EarlyStopping" in {type(callback).__name__ for callback in trainer.callbacks}
    assert kept(trainer) == BOTH
    assert Path(trainer.log_dir) == Path("runs/mine")
    own = {"class_path": "ModelCheckpoint", "init_args": {"filename": "own", "monitor": "val/loss"}}
    trainer = parsed("--trainer.callbacks", json.dumps([own, {"class_path": "LearningRateMonitor"}])).trainer
    assert kept(trainer) == [("own", "val/loss", "min")]
    assert [type(callback).__name__ for callback in trainer.callbacks].count("LearningRateMonitor") == 1
    assert kept(parsed("--trainer.enable_checkpointing", "false").trainer) == []


def test_a_module_of_somebody_else_keeps_the_last_only(parsed):
    boring = "lightning.pytorch.demos.boring_classes.Boring"
    adapter = ["--adapter.method", "LoRA", "--adapter.targets", "[layer]"]
    words = ["--model", f"{boring}Model", "--data", f"{boring}DataModule", *adapter]
    trainer = parsed(*words, config='{"trainer": {}}').trainer
    assert kept(trainer) == [("last", None, "min")]
    assert trainer.checkpoint_callback._save_on_train_epoch_end


def test_the_config_of_a_run_says_everything_and_runs_as_it_is(parsed, tmp_path):
    first = parsed("--trainer.logger.init_args.save_dir", tmp_path)
    saved = tmp_path / "config.yaml"
    first.parser.save(first.config, str(saved), skip_none=False)
    again = parsed(config=saved)
    assert again.config["trainer"] == first.config["trainer"]
    assert kept(again.trainer) == BOTH
