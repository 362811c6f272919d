"""Tests of a tiny language model on tiny files, what they leave, and what the model was asked."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from pera_lightning import AdapterInjection
from pera_lightning.adapters import PERA
from pera_lightning.tasks.causal_lm import answers
from pera_lightning.tasks.causal_lm.commonsense import CommonsenseDataModule
from pera_lightning.tasks.causal_lm.protocols.commonsense import SCORE
from tests.tasks.causal_lm.language_helpers import QV, make_trainer, module, randomise

COUNTS = {"ARC-Easy": 7, "boolq": 4}
TOTAL = sum(COUNTS.values())


def data(sets, protocol="score", **options):
    usual = {"train": "ARC-Easy", "test": list(COUNTS), "validation_size": 2, "eval_batch_size": 3, "batch_size": 4}
    return CommonsenseDataModule(str(sets), protocol=protocol, **{**usual, "cache_dir": sets / "cache", **options})


def ready(folder, method=None, seed=3, **options):
    """A module with random adapters."""
    network = module(folder, **options)
    network.adapter_injection = AdapterInjection(method or PERA(rank=2), QV).injector()
    network.configure_model()
    randomise(network, seed=seed)
    return network


def evaluate(folder, network, datamodule, method=None, callbacks=(), command="test", **options):
    """Tests; the scores that the trainer returns, results.json, and the predictions of each file of predictions."""
    trainer = make_trainer(folder, method, callbacks=callbacks, **options)
    scores = getattr(trainer, command)(network, datamodule=datamodule)
    return SimpleNamespace(scores=scores and scores[0], **left(folder))


def left(folder):
    path, files = folder / "results.json", sorted((folder / "predictions").rglob("*.jsonl"))
    records = {
        file.relative_to(folder / "predictions").as_posix(): [json.loads(line) for line in file.open()]
        for file in files
    }
    return {"results": json.loads(path.read_text()) if path.exists() else None, "records": records}


class Asked:
    """The questions, in order, that the module is asked: prompts for `generate`, candidates for `score_options`."""

    def __init__(self, monkeypatch):
        self.seen, self.calls = [], 0
        for name in ("generate", "score_options"):
            monkeypatch.setattr(answers, name, self.counting(getattr(answers, name)))

    def counting(self, function):
        def call(model, *args, **options):
            assert not model.training
            questions = args[1] if function.__name__ == "generate" else args[0]
            self.calls += 1
            self.seen += questions
            return function(model, *args, **options)

        return call

    def taken(self):
        seen, self.seen = self.seen, []
        return seen


class Interrupt(Callback):
    """Stops a test after so many batches."""

    def __init__(self, batches):
        self.left = batches

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not self.left:
            raise InterruptedError
        self.left -= 1

    on_predict_batch_start = on_test_batch_start


@torch.no_grad()
def by_hand(network, sets):
    """Prediction of every example: the option with the largest log-probability, one text after the other."""
    network.eval()
    predictions = {}
    for name in COUNTS:
        for k, row in enumerate(json.loads((sets / name / "test.json").read_text())):
            prompt = SCORE.evaluation_prompt(SimpleNamespace(**row))
            scores = {}
            for option in ["true", "false"] if name == "boolq" else ["answer1", "answer2", "answer3"]:
                ids = [0, *network.tokenizer(f"{prompt}the correct answer is {option}")["input_ids"]]
                logs = network.model(torch.tensor([ids])).logits[0].log_softmax(-1)
                scores[option] = sum(logs[t - 1, ids[t]].item() for t in range(len(ids) - 5, len(ids)))
            predictions[f"{name}/test/{k}"] = max(scores, key=scores.get), row["answer"]
    return predictions


def partials(folder):
    return sorted(path.name.partition("-")[0] for path in folder.glob("predictions/*.partial-*"))


def without_time(records):
    return {name: [{k: v for k, v in r.items() if k != "seconds"} for r in rows] for name, rows in records.items()}


def close(one, other):
    """Equal predictions but for the rounding of sums in batches of another size, and for who answered."""
    strip = {"scores", "beam_score", "seconds", "rank"}
    for name, rows in one.items():
        assert [{k: v for k, v in r.items() if k not in strip} for r in rows] == [
            {k: v for k, v in r.items() if k not in strip} for r in other[name]
        ]
    assert one.keys() == other.keys()


def interrupted(folder, network, datamodule, method=None, batches=2, **options):
    with pytest.raises(InterruptedError):
        evaluate(folder, network, datamodule, method, [Interrupt(batches)], **options)
