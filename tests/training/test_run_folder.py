"""A fit is alone in its folder, leaves an earlier run's files whole, and writes its own adapter only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from pera_lightning import load_adapter
from pera_lightning.adapters import LoRA
from pera_lightning.errors import CheckpointError, ConfigurationError
from pera_lightning.injection.adapter_folder import read_adapter
from pera_lightning.training.folder_lock import FILE
from pera_lightning.training.run_folder import RunFolder
from tests.training.foreign import Plain, train_loader, val_loader
from tests.training.short_fits import callback, trainer


def fit(folder: Path, *more: Callback, rank: int = 2, ckpt: str | None = None, **options):
    """A fit whose best checkpoint is `folder`/best.ckpt, whoever wrote it."""
    keep = ModelCheckpoint(folder, filename="best", monitor="val/loss", enable_version_counter=False)
    run = trainer(folder, callback(LoRA(rank=rank)), keep, *more, **options)
    run.fit(Plain(), train_loader(), val_loader(), ckpt_path=ckpt)
    return run


def rank_of(folder: Path) -> int:
    state, spec = read_adapter(folder)
    ranks = {value.shape[0] for name, value in state.items() if name.endswith(".A")}
    assert ranks == {spec["method"]["init_args"]["rank"]}
    return ranks.pop()


class Does(Callback):
    """Does something at the end of the training, before the adapter folder is written."""

    def __init__(self, what) -> None:
        self.what = what

    def on_train_end(self, *_: object) -> None:
        self.what()


def test_a_second_fit_is_refused_while_the_first_trains(tmp_path: Path) -> None:
    refused = []

    def second() -> None:
        with pytest.raises(ConfigurationError, match="in use by another fit") as error:
            fit(tmp_path, rank=4)
        refused.append(error)

    fit(tmp_path, Does(second))
    assert refused
    assert rank_of(tmp_path / "adapter") == 2
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_lock_goes_with_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    def fails() -> None:
        raise error

    with pytest.raises((error, SystemExit)):
        fit(tmp_path, Does(fails))
    fit(tmp_path)


def test_another_runs_checkpoint_is_not_taken_for_the_best(tmp_path: Path) -> None:
    """It has the same method, targets and name, and lies where this run's best one was."""
    fit(tmp_path / "other")
    with pytest.warns(UserWarning, match="best.ckpt is of another run"):
        run = fit(
            tmp_path / "run",
            Does(lambda: shutil.copy(tmp_path / "other" / "best.ckpt", tmp_path / "run" / "best.ckpt")),
        )
    model = Plain()
    load_adapter(model, tmp_path / "run" / "adapter")
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.lightning_module.state_dict()[name]), name


def test_what_lies_around_other_peoples_trainers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Only what this package wrote is moved; a project's own files of the same names stay."""
    theirs = {"results.json": "{}", "predictions.csv": "", "images/a.png": "", "checkpoints/x.ckpt": ""}
    for name, text in theirs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    fit(tmp_path, rank=2)
    ours = json.dumps({"versions": {"pera_lightning": "0"}, "metrics": {}})
    (tmp_path / "results-last.json").write_text(ours)
    (tmp_path / "predictions").mkdir()
    assert "moved" not in capsys.readouterr().out
    fit(tmp_path, rank=4)
    (earlier,) = tmp_path.glob("earlier-*")
    assert f"Earlier run moved aside: {earlier}\n" in capsys.readouterr().out
    assert sorted(path.name for path in earlier.iterdir()) == ["adapter", "predictions", "results-last.json"]
    assert (rank_of(earlier / "adapter"), rank_of(tmp_path / "adapter")) == (2, 4)
    assert all((tmp_path / name).read_text() == text for name, text in theirs.items())


def test_a_fit_that_goes_on_stays_in_place(tmp_path: Path) -> None:
    fit(tmp_path)
    fit(tmp_path, ckpt=str(tmp_path / "best.ckpt"), max_epochs=2)
    assert not [*tmp_path.glob("earlier-*")]
    assert rank_of(tmp_path / "adapter") == 2


def test_a_trainer_that_fits_again_goes_on(tmp_path: Path) -> None:
    run = fit(tmp_path)
    run.fit_loop.max_epochs = 2
    run.fit(run.lightning_module, train_loader(), val_loader())
    assert not [*tmp_path.glob("earlier-*")]


def test_a_run_that_was_moved_goes_on_with_its_own_best(tmp_path: Path) -> None:
    """Its checkpoints name the place of before, where another run's files lie by now."""
    fit(tmp_path / "run", rank=2)
    moved = tmp_path / "run.earlier"
    (tmp_path / "run").rename(moved)
    score = torch.load(moved / "best.ckpt", weights_only=True)["callbacks"]
    fit(tmp_path / "run", rank=2)
    # Nothing is validated: the best one stays that of before.
    keep = ModelCheckpoint(moved, filename="best", monitor="val/loss", enable_version_counter=False)
    run = trainer(moved, callback(LoRA(rank=2)), keep, max_epochs=2, limit_val_batches=0)
    run.fit(Plain(), train_loader(), val_loader(), ckpt_path=str(moved / "best.ckpt"))
    assert keep.best_model_path == str(moved / "best.ckpt")
    assert keep.best_model_score == next(s["best_model_score"] for s in score.values() if "best_model_score" in s)
    best = torch.load(moved / "best.ckpt", weights_only=True)["state_dict"]
    written, _ = read_adapter(moved / "adapter")
    assert all(torch.equal(value, best[name]) for name, value in written.items())


def test_an_adapter_that_cannot_be_written_is_found_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "adapter").touch()
    with pytest.raises(ConfigurationError, match="adapter is a file"):
        fit(tmp_path)
    assert not (tmp_path / "best.ckpt").exists()


def test_an_adapter_that_cannot_be_written_afterwards_names_its_checkpoint(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pera_lightning.training.final_adapter.write_adapter", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*best.ckpt has the same"):
        fit(tmp_path)


# --- the command line's part ---


def a_run(folder: Path) -> Path:
    for name in ("checkpoints/best.ckpt", "adapter/adapter_config.json", "config.yaml", "notes.txt", "sweep.log"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("first")
    return folder


class Quiet:
    loggers = ()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_run_is_moved_whole_and_comes_back_where_the_next_is_refused(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    before = files(folder)
    claim = RunFolder()
    claim.claim(folder, fresh=True, keep=("sweep.log",))
    assert files(folder) == [FILE, "sweep.log"]
    (earlier,) = tmp_path.glob("run.earlier-*")
    assert sorted([*files(earlier), "sweep.log"]) == before
    (folder / "events").write_text("of the fit that is refused")
    claim.close(Quiet())
    assert (files(folder), [*tmp_path.iterdir()]) == (before, [folder])
    # It goes on in place, and a second name is free.
    claim.claim(folder, fresh=False)
    claim.close(Quiet())
    assert files(folder) == before


def test_a_folder_with_other_runs_is_not_moved_whole(tmp_path: Path, monkeypatch) -> None:
    for place in ("project", "runs"):
        folder = a_run(tmp_path / place)
        if place == "runs":
            a_run(folder / "another")
        else:
            monkeypatch.chdir(folder)
        claim = RunFolder()
        claim.claim(folder, fresh=True)
        (earlier,) = folder.glob("earlier-*")
        assert files(earlier) == ["adapter/adapter_config.json", "checkpoints/best.ckpt", "config.yaml"]
        (folder / "checkpoints").mkdir()
        claim.close(Quiet())
        assert "earlier" not in "".join(files(folder))
        assert (folder / "checkpoints" / "best.ckpt").read_text() == "first"
