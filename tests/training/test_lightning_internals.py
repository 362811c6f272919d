"""Canaries: each fails with a sentence once Lightning has changed what `_lightning_internals` relies on."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, RandomSampler

from pera_lightning.training import _lightning_internals as internals
from tests.training.foreign import Plain, train_loader, val_loader
from tests.training.short_fits import trainer


@contextmanager
def canary(function: Callable[..., Any]) -> Iterator[None]:
    """Says which function is to be read again, whatever fails within."""
    try:
        yield
    except BaseException as error:
        name = function.__name__
        pytest.fail(
            f"Lightning changed what `{name}` relies on; look at pera_lightning/training/_lightning_internals.py and "
            f"at the class that its docstring names ({type(error).__name__}: {error})"
        )


class During(Callback):
    """Notes what a function of the trainer gives after every training batch."""

    def __init__(self, function: Callable[[Trainer], Any]) -> None:
        self.function, self.seen = function, []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(self.function(trainer))


def fit(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    run = trainer(folder, *callbacks, **{"enable_checkpointing": False, **options})
    run.fit(Plain(), train_loader(), val_loader())
    return run


def test_restoring_can_be_wrapped(tmp_path: Path) -> None:
    with canary(internals.wrap_restoring):
        seen: list[Any] = []

        class Wraps(Callback):
            def setup(self, trainer: Trainer, *_: Any, stage: str) -> None:
                internals.wrap_restoring(trainer, lambda restore: (seen.append("wrapped"), restore()), seen.append)

        run = fit(tmp_path)
        run.save_checkpoint(tmp_path / "x.ckpt")
        again = trainer(tmp_path, Wraps(), enable_checkpointing=False)
        again.fit(Plain(), train_loader(), val_loader(), ckpt_path=tmp_path / "x.ckpt")
        assert seen[:2] == ["wrapped", "wrapped"]
        assert "optimizer_states" in seen[2]


def test_a_method_of_classes() -> None:
    with canary(internals.called_on_classes):

        class Own:
            @internals.called_on_classes
            def make(cls) -> type:
                return cls

        assert Own.make() is Own
        with pytest.raises(TypeError, match="cannot be called on an instance"):
            Own().make()


def test_the_canary_names_the_function() -> None:
    with (
        pytest.raises(pytest.fail.Exception, match=r"Lightning changed what `hpc_save_path` relies on; look at"),
        canary(internals.hpc_save_path),
    ):
        raise AttributeError("gone")


# --- modules and loops ---


def test_attached_trainer(tmp_path: Path) -> None:
    with canary(internals.attached_trainer):
        module, run = Plain(), trainer(tmp_path, enable_checkpointing=False)
        assert internals.attached_trainer(module) is None
        run.fit(module, train_loader())
        assert internals.attached_trainer(module) is run


def test_should_accumulate(tmp_path: Path) -> None:
    """Steps after the second batch and, the epoch's last, after the third."""
    with canary(internals.should_accumulate):
        during = During(internals.should_accumulate)
        fit(tmp_path, during, accumulate_grad_batches=2)
        assert during.seen == [True, False, False]


def test_is_training_done(tmp_path: Path) -> None:
    with canary(internals.is_training_done):
        during = During(internals.is_training_done)
        fit(tmp_path, during, max_epochs=2, max_steps=5)
        assert during.seen == [False, False, True, False, True]


def test_restart_by_epochs(tmp_path: Path) -> None:
    """Of all that the loop asks, only what tells a run by steps changes."""
    with canary(internals.restart_by_epochs):
        run = fit(tmp_path, max_steps=3, limit_val_batches=0)
        state = run.fit_loop.state_dict()
        run.fit_loop.load_state_dict(state)
        assert run.fit_loop.restarting
        internals.restart_by_epochs(run)
        run.fit_loop.load_state_dict(state)
        assert not run.fit_loop.restarting


class Counts:
    """A loader with a state: how often it was asked to begin."""

    def __init__(self, given: list[Any]) -> None:
        self.given = given

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(4, 8), torch.zeros(4, dtype=torch.long))] * 4)

    def state_dict(self) -> dict[str, Any]:
        return {"at": 7}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given.append(state)


def test_the_states_of_train_loaders(tmp_path: Path) -> None:
    """Lightning leaves those of an epoch's end alone, and where they are."""
    given: list[Any] = []
    taken: list[Any] = []

    class Loads(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            taken.extend(internals.take_loader_states(trainer))
            assert internals.take_loader_states(trainer) == []
            assert given == []
            internals.load_loader_states(trainer, taken)

    with canary(internals.take_loader_states), canary(internals.load_loader_states):
        run = trainer(tmp_path, enable_checkpointing=False)
        run.fit(Plain(), Counts(given))
        run.save_checkpoint(tmp_path / "x.ckpt")
        trainer(tmp_path, Loads(), max_epochs=2).fit(Plain(), Counts(given), ckpt_path=str(tmp_path / "x.ckpt"))
        assert taken == [{"at": 7}]
        assert given == [{"at": 7}]


def test_intercepted_loaders(tmp_path: Path) -> None:
    """Each loader comes by once, after the strategy's own processing."""
    with canary(internals.intercept_loaders):
        seen: list[Any] = []
        run = trainer(tmp_path, enable_checkpointing=False, num_sanity_val_steps=0)
        internals.intercept_loaders(run, lambda loader: seen.append(type(loader)) or loader)
        run.fit(Plain(), train_loader(), val_loader())
        assert seen == [DataLoader, DataLoader]
        internals.stop_intercepting_loaders(run)
        run.validate(Plain(), val_loader(), verbose=False)
        assert len(seen) == 2


class Doubled:
    """A template for `extend_object`."""

    def __len__(self) -> int:
        return 2 * self.plain_class.__len__(self)


def test_an_extended_object_is_of_its_class_still() -> None:
    loader = train_loader()
    before = len(loader)
    for _ in range(2):
        internals.extend_object(loader, Doubled)
        assert len(loader) == 2 * before
    assert isinstance(loader, DataLoader)
    assert type(loader).__name__ == "DataLoader"
    with pytest.raises(TypeError):
        internals.extend_object([], Doubled)


# --- signals and SLURM ---


def test_signal_handlers(tmp_path: Path) -> None:
    """Ours are registered for a fit, and Lightning's afterwards."""
    taken: list[str] = []

    def during(trainer: Trainer) -> None:
        signal.raise_signal(signal.SIGTERM)

    with canary(internals.replace_signal_handlers):
        run = trainer(tmp_path, During(during), enable_checkpointing=False, limit_train_batches=1)
        internals.replace_signal_handlers(run, lambda *_: taken.append("term"), lambda *_: taken.append("requeue"))
        run.fit(Plain(), train_loader())
        assert taken == ["term"]
        internals.restore_signal_handlers(run)
        assert {"_sigterm_notifier_fn", "_slurm_sigusr_handler_fn"}.isdisjoint(vars(run._signal_connector))
        assert callable(run._signal_connector._sigterm_notifier_fn)
        assert callable(run._signal_connector._slurm_sigusr_handler_fn)


def test_put_back_handler(tmp_path: Path) -> None:
    """What a handler is after a fit can be said while it runs."""

    def during(trainer: Trainer) -> None:
        signal.signal(signal.SIGUSR2, lambda *_: None)
        internals.put_back_handler(trainer, signal.SIGUSR2, signal.SIG_IGN)

    before = signal.getsignal(signal.SIGUSR2)
    with canary(internals.put_back_handler):
        fit(tmp_path, During(during))
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    signal.signal(signal.SIGUSR2, before)


def test_stop_after_batch(tmp_path: Path) -> None:
    """All callbacks have the batch, and the fit ends by a signal's exception."""
    ended: list[BaseException] = []

    class Ends(Callback):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            ended.append(exception)

    with canary(internals.stop_after_batch):
        later = During(lambda trainer: trainer.global_step)
        with pytest.raises(SystemExit):
            fit(tmp_path, During(internals.stop_after_batch), later, Ends())
        assert later.seen == [1]
        assert isinstance(ended[0], SIGTERMException)


def test_slurms_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is requeued with the next free number, which is the one that Lightning resumes from."""
    commands: list[Any] = []
    monkeypatch.setattr(
        "lightning.pytorch.trainer.connectors.signal_connector.call", lambda words: commands.append(words) or 0
    )
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with canary(internals.requeue_job), canary(internals.hpc_save_path), canary(internals.hpc_resume_path):
        run = fit(tmp_path)
        assert internals.hpc_resume_path(run) is None
        assert internals.hpc_save_path(run) == str(tmp_path / "hpc_ckpt_1.ckpt")
        internals.requeue_job(run)
        assert commands == [["scontrol", "requeue", "7"]]
        assert internals.hpc_resume_path(run) == str(tmp_path / "hpc_ckpt_1.ckpt")
        assert internals.hpc_save_path(run) == str(tmp_path / "hpc_ckpt_2.ckpt")


@pytest.mark.parametrize("requeues", [True, False])
def test_is_requeued(tmp_path: Path, requeues: bool) -> None:
    with canary(internals.is_requeued):
        assert not internals.is_requeued(trainer(tmp_path))
        run = trainer(tmp_path, plugins=[SLURMEnvironment(auto_requeue=requeues)])
        assert internals.is_requeued(run) is requeues


# --- checkpoints, strategies and samplers ---


def test_replace_wrapped_io() -> None:
    class Own(TorchCheckpointIO):
        pass

    with canary(internals.replace_wrapped_io):
        plain, new = TorchCheckpointIO(), Own()
        wrapper = AsyncCheckpointIO(plain)
        internals.replace_wrapped_io(wrapper, Own, new)
        assert wrapper.checkpoint_io is plain
        internals.replace_wrapped_io(wrapper, TorchCheckpointIO, new)
        assert wrapper.checkpoint_io is new
        internals.replace_wrapped_io(plain, TorchCheckpointIO, new)  # which wraps nothing


def test_write_one_file() -> None:
    with canary(internals.write_one_file):
        strategy = ModelParallelStrategy()
        assert strategy._save_distributed_checkpoint
        assert internals.write_one_file(strategy)
        assert not internals.write_one_file(strategy)
        source = inspect.getsource(ModelParallelStrategy.save_checkpoint)
        assert "_save_distributed_checkpoint" in source


def test_shard_over_all_processes() -> None:
    with canary(internals.shard_over_all_processes):
        strategy = ModelParallelStrategy(tensor_parallel_size=1)
        assert strategy._data_parallel_size == "auto"
        strategy.num_nodes, strategy.parallel_devices = 2, [torch.device("cpu")] * 3
        internals.shard_over_all_processes(strategy)
        assert strategy._data_parallel_size == 6
        assert "self._data_parallel_size" in inspect.getsource(ModelParallelStrategy.setup_environment)


def test_wrap_draws() -> None:
    """Every epoch draws once, through ours."""
    drawn: list[int] = []

    def wrap(draw: Callable[[], None]) -> None:
        torch.manual_seed(5)
        draw()
        drawn.append(1)

    with canary(internals.wrap_draws):
        sampler = DistributedSamplerWrapper(RandomSampler(range(6)), num_replicas=2, rank=1, shuffle=False)
        internals.wrap_draws(sampler, wrap)
        torch.manual_seed(5)
        expected = list(RandomSampler(range(6)))[1::2]
        assert [list(sampler), list(sampler)] == [expected, expected]
        assert drawn == [1, 1]


def test_what_the_command_line_overrides() -> None:
    """Methods of `LightningCLI` that `PeraCLI` has too: under other names they would not be called."""
    for name, arguments in {
        "_prepare_subcommand_kwargs": ["self", "subcommand"],
        "_instantiate_trainer": ["self", "config", "callbacks"],
        "_parse_ckpt_path": ["self"],
        "_get": ["self", "config", "key", "default"],
    }.items():
        method = getattr(LightningCLI, name, None)
        assert method is not None, f"Lightning changed LightningCLI.{name}; look at cli/lightning_cli.py"
        assert list(inspect.signature(method).parameters) == arguments, f"Lightning changed LightningCLI.{name}"
        assert f"self.{name}(" in inspect.getsource(LightningCLI), f"Lightning does not call LightningCLI.{name}"
