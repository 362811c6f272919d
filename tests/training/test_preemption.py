"""A run that a signal stopped at any point equals, once resumed, the run that never was stopped."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from torch.utils.data import DataLoader, Dataset

from pera_lightning.cli.checkpoints import resuming_command
from pera_lightning.errors import CheckpointError
from tests.training.foreign import Plain, train_loader, val_loader
from tests.training.interrupted_fits import BATCHES, Sends, fit
from tests.training.short_fits import callback, trainer


def assert_resumes_exactly(folder: Path, *more: Callback, twin: tuple[Callback, ...] = (), **options) -> None:
    """Runs once undisturbed, and once with `more` and then resumed; `twin` are the callbacks of the other runs."""
    whole, adapters, optimizer, stopped = fit(folder / "a", *twin, **options)
    assert not stopped
    first, _, _, stopped = fit(folder / "b", *twin, *more, **options)
    assert stopped
    assert len(first.losses) < len(whole.losses) or len(first.validations) < len(whole.validations)
    later, resumed, moments, stopped = fit(folder / "b", *twin, ckpt="last", seed=99, **options)
    assert not stopped
    assert first.losses | later.losses == whole.losses
    assert not first.losses.keys() & later.losses.keys()  # no batch was trained twice
    assert first.validations | later.validations == whole.validations
    assert resumed.keys() == adapters.keys()
    for name, value in adapters.items():
        assert torch.equal(value, resumed[name]), name
    for number, state in optimizer.items():
        for name, value in state.items():
            assert torch.equal(value, moments[number][name]), (number, name)


# Ten batches and three of validation an epoch, three epochs.
@pytest.mark.parametrize(
    ("where", "epoch", "batch"),
    [
        ("training", 0, 0),
        ("training", 1, 4),
        ("training", 1, 9),  # validation follows
        ("training", 2, 9),  # and nothing after it
        ("validation", 0, 0),
        ("validation", 1, 1),
        ("validation", 1, 2),  # its last batch
        ("validation", 2, 1),
    ],
)
def test_sigterm(tmp_path: Path, where: str, epoch: int, batch: int) -> None:
    assert_resumes_exactly(tmp_path, Sends(where, epoch, batch))


@pytest.mark.parametrize(("where", "batch"), [("training", 3), ("training", 5), ("validation", 1)])
def test_sigterm_in_the_middle_of_an_accumulation(tmp_path: Path, where: str, batch: int) -> None:
    """Validation after batches 3, 6 and 9, an optimizer step after 4, 8 and 10."""
    assert_resumes_exactly(tmp_path, Sends(where, 1, batch), accumulate_grad_batches=4, val_check_interval=3)


@pytest.mark.parametrize("batch", [3, 9])
def test_sigterm_without_validation(tmp_path: Path, batch: int) -> None:
    assert_resumes_exactly(tmp_path, Sends("training", 1, batch), limit_val_batches=0)


class Dies(Callback):
    """Ends a fit before a validation in the second epoch, or before a batch of the first."""

    def __init__(self, batch: int | None = None) -> None:
        self.batch = batch

    def on_validation_start(self, trainer: Trainer, pl_module: Plain) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("killed")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Plain, batch: list, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise RuntimeError("killed")


def test_after_a_validation_that_was_begun_three_times(tmp_path: Path) -> None:
    """Its checkpoint is one like others: the validation is not begun once more."""
    options = {"val_check_interval": 3, "max_epochs": 1}
    whole, _, _, _ = fit(tmp_path / "a", **options)
    assert fit(tmp_path / "b", Sends("validation", 0, 1), **options)[3]
    assert fit(tmp_path / "b", Sends("validation", 0, 0), ckpt="last", seed=97, **options)[3]
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "b", Dies(batch=4), ckpt="last", seed=99, **options)
    later, _, _, _ = fit(tmp_path / "b", ckpt="last", seed=98, **options)
    assert later.validations == {step: seen for step, seen in whole.validations.items() if step > 3}
    assert later.losses == {key: loss for key, loss in whole.losses.items() if key[1] > 2}


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": None}], ids=["of an epoch", "of the run"])
def test_a_checkpoint_of_a_batch_before_a_validation(tmp_path: Path, options: dict) -> None:
    """The same within an epoch: every third batch of the epoch, or of the run, is validated after."""

    def often(folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(folder, filename="step", every_n_train_steps=1, enable_version_counter=False)

    options = {"val_check_interval": 3, **options}
    whole, adapters, _, _ = fit(tmp_path / "a", often(tmp_path / "a"), **options)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "b", often(tmp_path / "b"), Dies(), **options)
    step = tmp_path / "b" / "step.ckpt"
    stopped = torch.load(step, weights_only=True)["global_step"]
    assert stopped in whole.validations
    later, resumed, _, _ = fit(tmp_path / "b", often(tmp_path / "b"), ckpt=str(step), seed=99, **options)
    assert later.validations == {s: v for s, v in whole.validations.items() if s >= stopped}
    for name, value in adapters.items():
        assert torch.equal(value, resumed[name]), name


def test_a_checkpoint_of_an_epochs_last_batch(tmp_path: Path) -> None:
    """Written before the validation: the resumed run begins with it, and once only."""

    def often(folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(folder, filename="step", every_n_train_steps=BATCHES, enable_version_counter=False)

    whole, adapters, _, _ = fit(tmp_path / "a", often(tmp_path / "a"))
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "b", often(tmp_path / "b"), Dies())
    step = str(tmp_path / "b" / "step.ckpt")
    again, _, _, stopped = fit(tmp_path / "b", often(tmp_path / "b"), Sends("training", 2, 4), ckpt=step, seed=99)
    assert stopped
    later, resumed, _, _ = fit(tmp_path / "b", often(tmp_path / "b"), ckpt="last", seed=98)
    assert list(again.validations) == [2 * BATCHES]
    assert again.validations | later.validations == {s: v for s, v in whole.validations.items() if s > BATCHES}
    assert again.losses | later.losses == {key: loss for key, loss in whole.losses.items() if key[0] == 2}
    for name, value in adapters.items():
        assert torch.equal(value, resumed[name]), name


def test_sigterm_lets_other_callbacks_finish_the_batch(tmp_path: Path) -> None:
    """The average of the weights has the last batch too."""
    averages: list[dict[str, torch.Tensor]] = []

    class Averages(WeightAveraging):
        def on_train_end(self, trainer: Trainer, pl_module: Plain) -> None:
            averages.append({n: p.detach().clone() for n, p in self._average_model.module.named_parameters()})
            super().on_train_end(trainer, pl_module)

    fit(tmp_path / "a", Averages())
    assert fit(tmp_path / "b", Averages(), Sends("training", 1, 4))[3]
    fit(tmp_path / "b", Averages(), ckpt="last", seed=99)
    whole, resumed = averages
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_sigterm_in_the_last_batch_of_all_ends_the_run(tmp_path: Path) -> None:
    """Without a validation nothing is left to do: the run ends as it would have, with its adapter folder."""
    _, _, _, stopped = fit(tmp_path, Sends("training", 2, 9), limit_val_batches=0)
    assert not stopped
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()


def test_sigterm_in_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    sync, sent = os.fsync, []

    def interrupted(handle: int) -> None:
        if not sent:
            sent.append(os.fstat(handle).st_size)
            os.kill(os.getpid(), signal.SIGTERM)
        sync(handle)

    monkeypatch.setattr(os, "fsync", interrupted)
    _, _, _, stopped = fit(tmp_path)
    assert stopped
    assert sent
    assert "after optimizer step 11" in capsys.readouterr().out  # the write was that of the first epoch's end
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == BATCHES + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "last.ckpt"]


def test_sigterm_in_the_sanity_check_saves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class Early(Callback):
        def on_sanity_check_start(self, trainer: Trainer, pl_module: Plain) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    assert fit(tmp_path, Early(), num_sanity_val_steps=2)[3]
    assert "nothing to save" in capsys.readouterr().out
    assert not list(tmp_path.glob("**/*.ckpt"))


class Interrupts(Callback):
    """Sends Ctrl-C's signal before the second batch, so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def on_train_batch_start(self, trainer: Trainer, pl_module: Plain, batch: list, batch_idx: int) -> None:
        if batch_idx == 1:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


class InterruptedWhileLoading(Dataset):
    """A terminal sends Ctrl-C to the workers too, here while the first batch is waited for."""

    def __init__(self, examples: Dataset) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, k: int) -> list[torch.Tensor]:
        if k == 0:
            time.sleep(1)  # until the training has started
            os.kill(os.getppid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return self.examples[k]


class AsksForTheSteps(Plain):
    """Lightning then starts the workers before the training."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def interrupted(folder: Path, *more: Callback, data: DataLoader | None = None) -> tuple[int, bool]:
    """The exit code of a fit, and whether it has saved its adapters; its folder is free and its handler gone."""
    seed_everything(3, verbose=False)
    run = trainer(folder, callback(), *more, ModelCheckpoint(folder, filename="last"))
    with pytest.raises(SystemExit) as end:
        run.fit(AsksForTheSteps(), data or train_loader(), val_loader())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (folder / ".fit.lock").exists()
    files = [(folder / name).is_file() for name in ("last.ckpt", "adapter/adapter.safetensors")]
    assert files[0] == files[1]
    return end.value.code, files[0]


def test_ctrl_c_ends_as_sigterm_does(tmp_path: Path, interruptible: None, capfd: pytest.CaptureFixture) -> None:
    data = DataLoader(InterruptedWhileLoading(train_loader().dataset), batch_size=4, num_workers=1)
    assert interrupted(tmp_path, data=data) == (130, True)  # no shell goes on with its next command
    out, err = capfd.readouterr()
    assert "stopping after this batch; Ctrl-C again ends at once" in err
    assert out.splitlines()[-1].startswith("stopped by a signal after optimizer step 1: saved ")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, interruptible: None) -> None:
    assert interrupted(tmp_path, Interrupts(2)) == (1, False)


def test_in_a_notebook_ctrl_c_is_lightnings(tmp_path: Path, interruptible: None, monkeypatch) -> None:
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    assert interrupted(tmp_path, Interrupts(1)) == (1, False)


def test_the_handlers_are_given_back(tmp_path: Path) -> None:
    """An evaluation with the same callback stops as Lightning lets it."""
    before = signal.getsignal(signal.SIGTERM)
    seed_everything(3, verbose=False)
    model, adapt = Plain(), callback()
    run = trainer(tmp_path, adapt, Sends("validation", 1, 1))
    run.fit(model, train_loader(), val_loader())
    assert signal.getsignal(signal.SIGTERM) == before
    assert not [name for name in vars(run._signal_connector) if name.endswith("_fn")]
    with pytest.raises(SystemExit):
        run.validate(model, val_loader(), verbose=False)


def test_the_message(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fit(tmp_path, Sends("training", 1, 4))
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"stopped by a signal after optimizer step 15: saved {tmp_path}/last.ckpt; go on with: "
        f"trainer.fit(…, ckpt_path='{tmp_path}/last.ckpt')"
    )
    seed_everything(3, verbose=False)
    run = trainer(tmp_path, callback(), Sends("training", 0, 1), enable_checkpointing=False)
    with pytest.raises(SystemExit):
        run.fit(Plain(), train_loader(), val_loader())
    assert "after optimizer step 2: nothing saved, the trainer has no ModelCheckpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([{"filename": "best", "monitor": "val/loss"}, {"filename": "last"}], "last.ckpt"),
        ([{"filename": "x"}], "last.ckpt"),
        ([{"filename": "x", "monitor": "val/loss"}, {"save_last": True}], "last-v1.ckpt"),
    ],
)
def test_the_file(tmp_path: Path, options: list[dict], expected: str) -> None:
    """The one that the run keeps as its last, if it keeps one; an older run's is left alone."""
    (tmp_path / "last.ckpt").write_text("of an older run")
    seed_everything(3, verbose=False)
    keepers = [ModelCheckpoint(tmp_path, **o) for o in options]
    run = trainer(tmp_path, callback(), Sends("training", 1, 1), *keepers, max_epochs=2)
    with pytest.raises(SystemExit):
        run.fit(Plain(), train_loader(), val_loader())
    assert torch.load(tmp_path / expected, weights_only=True)["global_step"] == 5
    assert run._checkpoint_connector._parse_ckpt_path(run.state.fn, "last", True, True) == str(tmp_path / expected)


def test_no_room_for_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not end as if it had been saved."""

    class Fills(Sends):
        def _send(self, where: str, trainer: Trainer, batch_idx: int) -> None:
            super()._send(where, trainer, batch_idx)
            if trainer.current_epoch == 1:
                (tmp_path / "last.ckpt").chmod(0o600)
                monkeypatch.setattr(os, "fsync", full)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"last.ckpt of .* MB could not be written \(No space left on device"):
        fit(tmp_path, Fills("training", 1, 4))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == BATCHES


def test_the_command_to_go_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["cli.py", "fit"])
    words = ["fit", "--config", "a b.yaml", "--ckpt_path", "x.ckpt", "--trainer.max_epochs=3"]
    expected = "python cli.py fit --config 'a b.yaml' --trainer.max_epochs=3"
    assert resuming_command(words) == expected
    assert resuming_command([*words[:3], "--ckpt_path=y.ckpt", words[-1]]) == expected
    monkeypatch.setattr("sys.argv", ["/usr/bin/pera", "fit"])
    assert resuming_command(["fit"]) == "pera fit"
