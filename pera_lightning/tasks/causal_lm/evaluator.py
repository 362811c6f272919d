"""The evaluator of language models: what `CausalLMModule` does at test and predict.

`start` opens what an interrupted evaluation has left, `step` answers what of a batch is not answered yet and writes
the predictions, `finish` gathers those of all processes, scores them and writes the results. The results of a set are
accuracy (or what the protocol measures), seconds and tokens per second; the average over sets is the plain mean. An
AuroRA whose inference is dynamic is tested twice, `test` and `test_static`, as in its paper.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pera_lightning.adapters.aurora import static_inference
from pera_lightning.data.tokenization import tokenizer_key
from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.causal_lm.answers import answer, is_sharded
from pera_lightning.tasks.causal_lm.evaluation_key import evaluation_key
from pera_lightning.tasks.causal_lm.predictions import (
    PartialPredictions,
    Prediction,
    by_set,
    unique,
    write_predictions,
)
from pera_lightning.tasks.causal_lm.questions import Question, Questions
from pera_lightning.tasks.causal_lm.statistics import average_of, evaluation_seconds, table
from pera_lightning.training import results
from pera_lightning.training.distributed import all_gather_object
from pera_lightning.training.module import AdapterModule


class Evaluator:
    """One test, or one prediction, of a language model; every process calls each of its methods.

    Args:
        module: the language model, attached to its trainer.
        data: `TextDataModule.description`.
        kind: "test" or "predict".
    """

    def __init__(self, module: AdapterModule, data: Mapping[str, Any], kind: str) -> None:
        if "evaluation_protocol" not in data:
            raise ConfigurationError(
                "testing a language model needs a data module with a protocol, e.g. CommonsenseDataModule"
            )
        self.module, self.trainer, self.data, self.kind = module, module.trainer, data, kind
        self.protocol, self.tokenizer = data["evaluation_protocol"], data["tokenizer"]
        self.inference = results.inference_stages(module)  # the stages, and what each stands for
        self.name = self.protocol.name if kind == "test" else f"{self.protocol.name}_predict"
        self.folder: Path | None = None
        self.partial: PartialPredictions | None = None
        self.answered: frozenset[str] = frozenset()
        self.predictions: list[dict[str, Any]] = []

    # --- before the first batch ---

    def start(self) -> None:
        """Looks for what an interrupted evaluation has left, and says how many questions are answered."""
        log_dir = self.trainer.log_dir
        if log_dir is not None and not self.trainer.fast_dev_run:
            self.folder = Path(log_dir) / results.output_name(self.trainer, Path(log_dir), "predictions")
        # An evaluation of some batches is complete as it is: it takes no earlier answers, and leaves none.
        limit = getattr(self.trainer, f"limit_{self.kind}_batches")
        if self.folder is None or isinstance(limit, int) or limit != 1.0:  # the integer 1 is one batch
            return
        self.partial = PartialPredictions(self.folder, self.name, self._key(), self.trainer.global_rank)
        # Of all processes, each of which may see the files of its machine only; a question counts as answered if it
        # has a prediction for every stage.
        found = set().union(*all_gather_object({(one["stage"], one["id"]) for one in self.partial.read()}))
        stages = [frozenset(name for stage, name in found if stage == wanted) for wanted in self.inference]
        self.answered = frozenset.intersection(*stages)
        if self.answered and self.trainer.is_global_zero:
            count = len(self.answered)
            print(f"{count} questions were answered by an interrupted run: {self.partial.folder}", flush=True)

    def _key(self) -> str:
        return evaluation_key(self.module.model, self.data, [*self.inference], self._network())  # type: ignore[arg-type]

    def _network(self) -> dict[str, Any]:
        """The base, as it computes."""
        module = self.module
        return {
            **{name: module.hparams[name] for name in ("model_name", "revision", "base_dtype")},
            "attn_implementation": module.model.config._attn_implementation,  # type: ignore[union-attr]
            "precision": str(module.trainer.precision),
        }

    # --- batch after batch ---

    def step(self, batch: Questions) -> list[dict[str, Any]]:
        """Answers the questions of a batch that are not answered yet, and writes their predictions."""
        left = [q for q in batch if q.example.id not in self.answered]
        questions = left
        # Sharded processes gather the weights together, and so have to do as many forwards: one that has nothing left
        # of its batch answers a question again while others answer theirs.
        sharded = self.answered and is_sharded(self.module.model)  # type: ignore[arg-type]
        if sharded and any(all_gather_object(bool(left))):
            questions = left or batch.questions[:1]
        if not questions:
            return []
        predictions = self._answer(questions, "test")
        with static_inference(self.module) as dynamic:
            if dynamic:
                predictions += self._answer(questions, "test_static")
        if not left:
            return []
        if self.partial is not None:
            self.partial.append(predictions)
        self.predictions += predictions  # for a test that keeps no files
        return predictions

    def _answer(self, questions: Sequence[Question], stage: str) -> list[dict[str, Any]]:
        begin = time.perf_counter()  # generation ends with ids on the host, so that nothing is left running
        answers = answer(self.module.model, self.tokenizer, self.protocol, questions)  # type: ignore[arg-type]
        seconds = (time.perf_counter() - begin) / len(questions)
        return [
            {
                "id": q.example.id,
                "set": q.example.set,
                "stage": stage,
                **one,
                "answer": q.example.answer,
                "correct": self.protocol.is_correct(one["prediction"], q.example),
                "seconds": seconds,
                "rank": self.trainer.global_rank,
            }
            for q, one in zip(questions, answers, strict=True)
        ]

    # --- after the last batch ---

    def finish(self) -> None:
        """Scores the predictions of all processes; the first prints the table and writes predictions and results."""
        # 1. Gather; all that follows is the same on every process.
        own = self.predictions if self.partial is None else self.partial.read()
        everything = [one for rank in all_gather_object(own) for one in rank]
        # A question is answered twice where shards were filled up, or where several processes read the same files.
        stages = {
            stage: unique([one for one in everything if one["stage"] == stage], self.data["test_ids"])
            for stage in self.inference
        }
        # 2. Score: by stage the results of each set, and their average.
        sets: dict[str, list[dict[str, Any]]] = {}
        for stage, found in stages.items():
            if found:
                sets[stage] = [self._of_set(name, answered) for name, answered in by_set(found).items()]
        metric = self.protocol.main_metric
        averages = {stage: average_of(own, metric) for stage, own in sets.items()}
        facts = {
            "n": {stage: sum(one["n"] for one in own) for stage, own in sets.items()},
            "inference": {stage: self.inference[stage] for stage in sets},
            "seconds": evaluation_seconds(one for found in stages.values() for one in found),
            "sets": sets,
            "average": averages,
            "shortened": sum(one["left_out"] > 0 for one in stages["test"]),
            "complete": all(len(found) == len(self.data["test_ids"]) for found in stages.values()),
        }
        # 3. Tell.
        if self.trainer.is_global_zero:
            for stage, own in sets.items():
                print(f"\n{stage}, protocol {self.protocol.name}\n{table(own, metric)}", flush=True)
            if shortened := facts["shortened"]:
                print(f"{shortened} prompts were longer than the model's context; their ends were kept", flush=True)
        # 4. Write.
        result = None
        if self.kind == "test":
            scores = {f"{stage}/{metric}": one[metric] for stage, one in averages.items()}
            scores |= {f"{stage}_{metric}/{one['set']}": one[metric] for stage, own in sets.items() for one in own}
            self.module.log_dict(scores, sync_dist=True)  # every rank has them; without it Lightning warns
            # Its table would have a column a data loader, all of them alike; the next test sets this anew.
            self.trainer.test_loop.verbose = False
            result = results.record(self.module, scores, protocol=self._about(), **facts)
        if self.folder is not None and self.trainer.is_global_zero:
            self._write(self.folder, stages, result)
            if self.partial is not None and facts["complete"]:
                self.partial.remove()  # only now that all is written
                if left := ", ".join(map(str, self.partial.others())):
                    print(f"Interrupted with other weights or settings, to go on with or to delete: {left}", flush=True)

    def _of_set(self, name: str, predictions: Sequence[Prediction]) -> dict[str, Any]:
        """The results of a set."""
        seconds = evaluation_seconds(predictions)
        speed = sum(one["tokens"] for one in predictions) / max(seconds, 1e-9)
        measured = {**self.protocol.summarise(predictions), "n": len(predictions)}
        return {"set": name, **measured, "seconds": seconds, "tokens_per_second": speed}

    def _about(self) -> dict[str, Any]:
        """What was tested, with what, and what it was trained with."""
        return {
            **results.about(self.module, "causal_lm"),
            **self._network(),
            "tokenizer": {"name_or_path": self.tokenizer.name_or_path, "key": tokenizer_key(self.tokenizer)},
            "evaluation": self.data["protocol"],
            "training": self.module.trained_with,  # type: ignore[attr-defined]
        }

    def _write(self, folder: Path, stages: dict[str, list[Prediction]], result: dict[str, Any] | None) -> None:
        """Writes predictions, beside those of a test its results too: each protocol keeps its own."""
        static = folder / f"{self.name}_static"
        if "test_static" in stages:
            write_predictions(static, stages["test_static"])
        else:
            shutil.rmtree(static, ignore_errors=True)  # of another evaluation
        others = {} if result is None else {results.FILE: results.as_text(result)}
        write_predictions(folder / self.name, stages["test"], others)
        if result is None:
            print(f"Predictions: {folder / self.name}", flush=True)
