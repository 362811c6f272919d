"""Sentences on several processes: every example counts once, and a step is that of one process."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from pera_lightning.adapters import AuroRA, LoRA
from tests.tasks.sequence_classification.classifier_helpers import (
    Sentences,
    make_trainer,
    module,
    randomise,
    save_tiny,
    sentences,
    task_of,
)

pytestmark = pytest.mark.filterwarnings("error:.*it is recommended to use .Trainer.devices=1.*")


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """An encoder without dropout."""
    return save_tiny(tmp_path_factory.mktemp("still"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


class Start(Callback):
    def on_validation_start(self, trainer, pl_module):
        randomise(pl_module)

    on_test_start = on_predict_start = on_train_start = on_validation_start


def processes(world):
    return {"devices": world, "strategy": "ddp_fork" if world > 1 else "auto"}


def evaluated(folder, path, data, world):
    """What `validate` returns, results.json, and the rows of the submission."""
    folder.mkdir()
    seed_everything(0, verbose=False)
    trainer = make_trainer(folder, AuroRA(rank=2), [Start()], **processes(world))
    measured = trainer.validate(module(path), datamodule=data(), verbose=False)[0]
    trainer.test(module(path), datamodule=data(), verbose=False)
    trainer.predict(module(path), datamodule=data(), return_predictions=False)
    rows = []
    for file in sorted((folder / "predictions").iterdir()):
        with file.open(newline="") as text:
            rows += csv.reader(text, delimiter="\t")
    results = json.loads((folder / "results.json").read_text())
    return SimpleNamespace(measured=measured, results=results, rows=rows)


@pytest.mark.parametrize(("counts", "world", "classes"), [((11, 7), 2, 1), ((10, 1), 3, 2)])
def test_every_example_counts_once(still, tmp_path, counts, world, classes):
    """Eleven rows and seven on two processes; ten and a single one on three, two of which have padding only."""
    sets = [sentences(count, classes, seed=count) for count in counts]

    def data():
        metrics = None if classes == 1 else ("matthews", "f1", "accuracy")
        files = task_of("own", ("one", "other"), lambda value: f"{value:.3f}")
        options = {"classes": classes, "metrics": metrics, "names": ("", "other"), "task": files}
        return Sentences(sets, **options)

    one, several = (evaluated(tmp_path / str(n), still, data, n) for n in (1, world))
    assert one.results["n"] == several.results["n"]
    assert (one.results["n"]["test"], one.results["n"]["test_other"]) == counts
    assert set(one.results["n"]) == {"test", "test_other", "test_static", "test_static_other"}
    assert several.results["metrics"] == pytest.approx(one.results["metrics"], rel=1e-5, abs=1e-6, nan_ok=True)
    assert several.measured == pytest.approx(one.measured, rel=1e-5, abs=1e-6, nan_ok=True)
    assert several.rows == one.rows
    assert len(one.rows) == 2 + sum(counts)


class Gradients(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        randomise(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        own = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        torch.save(own, self.folder / f"{trainer.world_size}_{trainer.global_rank}.pt")


class Uneven(Sentences):
    """Batches of five rows on one process and of three and two on two of them, in windows of two."""

    def train_dataloader(self):
        from tests.tasks.sequence_classification.classifier_helpers import collate

        rank, world = self.trainer.global_rank, self.trainer.world_size
        parts = [self.train[:5], self.train[5:]]
        if world == 2:
            parts = [part[:3] if rank == 0 else part[3:] for part in parts]
        return DataLoader(parts, batch_size=None, collate_fn=collate)


@pytest.mark.parametrize("weights", [None, [0.3, 4.0]])
def test_a_step_is_that_of_one_process(still, tmp_path, weights):
    rows = sentences(9, 2)
    for world in (1, 2):
        seed_everything(0, verbose=False)
        options = {"accumulate_grad_batches": 2, "limit_val_batches": 0, "use_distributed_sampler": False}
        trainer = make_trainer(tmp_path, LoRA(rank=2), [Gradients(tmp_path)], **options, **processes(world))
        trainer.fit(module(still, class_weights=weights), datamodule=Uneven([rows]))
    one, *both = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for name, value in one.items():
        assert value.abs().max() > 1e-5, name
        for other in both:
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6, msg=name)
