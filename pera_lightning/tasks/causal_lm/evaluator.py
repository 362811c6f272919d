"""Testing a language model: questions answered by a protocol, records written as they come, results at the end.

The results of a set are accuracy (or what the protocol measures), seconds and tokens per second; the average over sets
is the plain mean. An AuroRA whose inference is dynamic is tested twice, `test` and `test_static`, as in its paper.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor
from torch.distributed.tensor import DTensor

from pera_lightning.adapters.aurora import static_inference
from pera_lightning.data.tokenization import pad_token_id, tokenizer_key
from pera_lightning.errors import ConfigurationError
from pera_lightning.injection.state import adapter_state_dict, find_injected
from pera_lightning.tasks.causal_lm.decoding import end_ids, generate, score_options
from pera_lightning.tasks.causal_lm.predictions import PartialRecords, Record, unique, write_records
from pera_lightning.tasks.causal_lm.questions import Question, Questions
from pera_lightning.tasks.causal_lm.statistics import answering_seconds, average_row, table
from pera_lightning.training import results
from pera_lightning.training.distributed import all_gather_object

if TYPE_CHECKING:
    from pera_lightning.tasks.causal_lm.module import CausalLMModule

_SAMPLE = 1024  # about so many elements of each frozen tensor go into the key
# How a warning of Lightning's begins.
_ADVICE = r"Using `DistributedSampler` with the dataloaders\. During `trainer\.test\(\)`"
# What of a data module's protocol says how it trains: a test after a fit is the same test as one without.
_OF_TRAINING = ("max_length", "batching", "train_fraction", "split_seed", "sizes", "cut", "left_out")


class Answering:
    """The test of one `CausalLMModule`.

    Args:
        module: what is tested; its trainer's data module gives the protocol as `evaluation`.
    """

    def __init__(self, module: CausalLMModule) -> None:
        self.module = module
        self._opened: PartialRecords | None = None  # by `answered`, for `start` of the same test
        self._partial: PartialRecords | None = None
        self._folder: Path | None = None
        self._records: list[dict[str, Any]] = []
        self._kind = "test"

    # --- what there is already ---

    def answered(self) -> frozenset[str]:
        """Ids whose records an interrupted test left behind, for every stage; every process must call it."""
        # Lightning advises a single process, so that no question counts twice; here each counts once.
        warnings.filterwarnings("ignore", _ADVICE, PossibleUserWarning)
        # The first that a test does: made anew whatever became of the last test.
        self._opened = partial = self._open("predict" if self.module.trainer.predicting else "test")
        own = {(record["stage"], record["id"]) for record in (partial.read() if partial else [])}
        pairs = set().union(*all_gather_object(own))
        stages = self._stages()
        done = frozenset.intersection(*(frozenset(i for stage, i in pairs if stage == wanted) for wanted in stages))
        if done and self.module.trainer.is_global_zero:
            print(f"{len(done)} questions were answered by an interrupted run: {partial.folder}", flush=True)
        return done

    def _open(self, kind: str) -> PartialRecords | None:
        """Where records are kept as they come; none for a run that leaves out batches, since it is whole as it is."""
        folder = self._predictions()
        limit = getattr(self.module.trainer, f"limit_{kind}_batches")
        if folder is None or isinstance(limit, int) or limit != 1.0:  # the integer 1 is one batch
            return None
        return PartialRecords(folder, self._name(kind), self._key(), self.module.trainer.global_rank)

    def _predictions(self) -> Path | None:
        """The folder of predictions, where the run has one; every process must call it."""
        folder = self.module.trainer.log_dir
        return None if folder is None or self.module.trainer.fast_dev_run else Path(folder) / "predictions"

    def _name(self, kind: str) -> str:
        name = self._data().evaluation.name
        return name if kind == "test" else f"{name}_predict"

    def _key(self) -> str:
        """A hash of all that decides the answers: weights, what they are computed with, tokenizer, protocol, rows."""
        data, installed = self._data(), results.versions()
        protocol = {k: v for k, v in data.protocol().items() if k not in _OF_TRAINING}
        if "sha256" in protocol:
            protocol["sha256"] = {k: v for k, v in protocol["sha256"].items() if k != "train"}
        ends = None if data.evaluation.decoding is None else end_ids(self.module.model, data.tokenizer)  # type: ignore
        facts = [self._stages(), self._network(), tokenizer_key(data.tokenizer), ends, protocol]
        return hashed(self._deciding_tensors(), [*facts, *(installed[name] for name in ("transformers", "torch"))])

    def _deciding_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that was trained, and some elements of every other tensor."""
        model = self.module.model
        whole = set(adapter_state_dict(model)) if find_injected(model) else set()  # type: ignore[arg-type]
        for name, value in sorted(model.state_dict().items()):  # type: ignore[union-attr]
            tensor = (value.full_tensor() if isinstance(value, DTensor) else value).detach().flatten()
            yield name, tensor if name in whole else tensor[:: max(len(tensor) // _SAMPLE, 1)]

    def _network(self) -> dict[str, Any]:
        """The base, as it computes."""
        module = self.module
        return {
            **{name: module.hparams[name] for name in ("model_name", "revision", "base_dtype")},
            "attn_implementation": module.model.config._attn_implementation,  # type: ignore[union-attr]
            "precision": str(module.trainer.precision),
        }

    def _data(self) -> Any:
        data = getattr(self.module.trainer, "datamodule", None)
        if not hasattr(data, "evaluation"):
            raise ConfigurationError(
                "testing a language model needs a data module with a protocol, e.g. CommonsenseDataModule"
            )
        return data

    def _stages(self) -> tuple[str, ...]:
        return tuple(results.inference_rows(self.module))

    # --- batch after batch ---

    def start(self, kind: str) -> None:
        """Before the first batch; `kind` is "test" or "predict"."""
        self._kind, self._records, self._folder = kind, [], self._predictions()
        opened, self._opened = self._opened, None
        self._partial = opened or self._open(kind)

    def step(self, batch: Questions) -> list[dict[str, Any]]:
        """Answers a batch and writes its records."""
        records = self._answer(batch.questions, "test")
        with static_inference(self.module) as dynamic:
            if dynamic:
                records += self._answer(batch.questions, "test_static")
        if self._partial is not None:
            self._partial.append(records)
        self._records += records
        return records

    def _answer(self, questions: Sequence[Question], stage: str) -> list[dict[str, Any]]:
        protocol = self._data().evaluation
        begin = time.perf_counter()
        answers = self._scored(questions) if protocol.decoding is None else self._generated(questions)
        seconds = (time.perf_counter() - begin) / len(questions)
        return [
            {
                "id": q.row.id,
                "set": q.row.set,
                "stage": stage,
                **answer,
                "answer": q.row.answer,
                "correct": protocol.is_correct(answer["prediction"], q.row),
                "seconds": seconds,
                "rank": self.module.trainer.global_rank,
            }
            for q, answer in zip(questions, answers, strict=True)
        ]

    def _scored(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """The likeliest option of each question; its tokens are those of the prompt and of all options."""
        data = self._data()
        fitting = [self._fit_candidates(q) for q in questions]
        pad_id = pad_token_id(data.tokenizer)
        scores = score_options(self.module.model, [c for c, _ in fitting], pad_id=pad_id)  # type: ignore[arg-type]
        answers = []
        for q, own, (candidates, left_out) in zip(questions, scores, fitting, strict=True):
            prediction = q.options[max(range(len(own)), key=own.__getitem__)]
            answers.append(
                {
                    "scores": dict(zip(q.options, own, strict=True)),
                    "output": data.evaluation.option_response(prediction),
                    "prediction": prediction,
                    "tokens": len(q.prompt) - left_out + sum(len(ids) - start for ids, start in candidates),
                    "left_out": left_out,
                }
            )
        return answers

    def _generated(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """What is generated after each prompt; its tokens are the new ones."""
        data, model = self._data(), self.module.model
        protocol = data.evaluation
        new = protocol.decoding.max_new_tokens
        left_out = [self._excess(len(q.prompt) + new, len(q.prompt)) for q in questions]
        prompts = [_without(q.prompt, left) for q, left in zip(questions, left_out, strict=True)]
        # Sharded ranks gather weights together: none may be done with a batch before the others.
        sharded = any(isinstance(p, DTensor) for p in model.parameters())  # type: ignore[union-attr]
        answers = generate(model, data.tokenizer, prompts, protocol.decoding, synced=sharded)  # type: ignore[arg-type]
        return [
            {
                "beam_score": answer.score,
                "output": answer.text,
                "prediction": protocol.extract(answer.text, q.row),
                "tokens": len(answer.ids),
                "left_out": left,
            }
            for q, answer, left in zip(questions, answers, left_out, strict=True)
        ]

    def _excess(self, needed: int, prompt: int) -> int:
        """How many tokens of a prompt must go so that `needed` positions fit the model's context."""
        context = getattr(self.module.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore
        excess = 0 if context is None else max(needed - context, 0)
        if excess > prompt - 2:  # the first token stays, and one more
            raise ConfigurationError(
                f"the model's context of {context} tokens has no room for a prompt and {needed - prompt} tokens after "
                "it; use another protocol or model"
            )
        return excess

    def _fit_candidates(self, question: Question) -> tuple[list[tuple[list[int], int]], int]:
        """The options of a question after the end of its prompt, the same for all; how many tokens were left out."""
        longest = max(len(ids) - 1 for ids, _ in question.candidates)  # the last token is not read
        left = self._excess(longest, min(start for _, start in question.candidates))
        return [(_without(ids, left), start - left) for ids, start in question.candidates], left

    # --- the end ---

    def finish(self) -> None:
        """Gathers the records of all processes, writes them and the results, and prints the table."""
        trainer, data = self.module.trainer, self._data()
        own = self._records if self._partial is None else self._partial.read()
        records = [record for found in all_gather_object(own) for record in found]
        by_stage = {
            stage: unique([r for r in records if r["stage"] == stage], data.test_order) for stage in self._stages()
        }
        tables = {stage: self._table(rows) for stage, rows in by_stage.items() if rows}
        metric = data.evaluation.main_metric
        averages = {stage: average_row(rows, metric) for stage, rows in tables.items()}
        scores = {f"{stage}/{metric}": row[metric] for stage, row in averages.items()}
        for stage, rows in tables.items():
            scores |= {f"{stage}_{metric}/{row['set']}": row[metric] for row in rows}
        if self._kind == "test":
            self.module.log_dict(scores, sync_dist=True)  # every rank has them; without it Lightning warns
            # Its table would have a column a data loader, all of them alike; the next test sets this anew.
            trainer.test_loop.verbose = False
        if trainer.is_global_zero:
            for stage, rows in tables.items():
                print(f"\n{stage}, protocol {data.evaluation.name}\n{table(rows, metric)}", flush=True)
            facts = {
                "seconds": answering_seconds(record for rows in by_stage.values() for record in rows),
                "sets": tables,
                "average": averages,
                "shortened": sum(record["left_out"] > 0 for record in by_stage["test"]),
                "complete": all(len(rows) == len(data.test_order) for rows in by_stage.values()),
            }
            if facts["shortened"]:
                text = f"{facts['shortened']} prompts were longer than the model's context; their ends were kept"
                print(text, flush=True)
            if self._folder is not None:
                self._write(self._folder, by_stage, scores, facts)
        self._partial, self._records = None, []

    def _table(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """A row of results for each set."""
        by_set: dict[str, list[Record]] = {}
        for record in records:
            by_set.setdefault(record["set"], []).append(record)
        rows = []
        for name, found in by_set.items():
            seconds = answering_seconds(found)
            speed = sum(record["tokens"] for record in found) / max(seconds, 1e-9)
            measured = {**self._data().evaluation.summarise(found), "n": len(found)}
            rows.append({"set": name, **measured, "seconds": seconds, "tokens_per_second": speed})
        return rows

    def _write(
        self, folder: Path, by_stage: dict[str, list[Record]], scores: dict[str, float], facts: dict[str, Any]
    ) -> None:
        """Writes predictions and, of a test, results; only then do the partial records go."""
        name, static = self._name(self._kind), folder / f"{self._name(self._kind)}_static"
        if "test_static" in by_stage:
            write_records(static, by_stage["test_static"])
        else:
            shutil.rmtree(static, ignore_errors=True)  # of another evaluation
        result = self._result(scores, facts) if self._kind == "test" else None
        others = {} if result is None else {results.FILE: results.as_text(result)}  # each protocol keeps its own
        write_records(folder / name, by_stage["test"], others)
        if result is None:
            print(f"Predictions: {folder / name}", flush=True)
        else:  # not trainer.log_dir: a collective call, and the other processes are gone
            print(f"Results: {results.write(folder.parent, result)}", flush=True)
        if self._partial is None or not facts["complete"]:
            return
        self._partial.remove()
        if left := self._partial.others():
            names = ", ".join(map(str, left))
            print(f"Interrupted with other weights or settings, to go on with or to delete: {names}", flush=True)

    def _result(self, scores: dict[str, float], facts: dict[str, Any]) -> dict[str, Any]:
        module, inference, tokenizer = self.module, results.inference_rows(self.module), self._data().tokenizer
        about = {
            **results.about(module, "causal_lm"),
            **self._network(),
            "tokenizer": {"name_or_path": tokenizer.name_or_path, "key": tokenizer_key(tokenizer)},
            "evaluation": self._data().protocol(),
            "training": module.trained_with,
        }
        facts = {
            "n": {stage: sum(row["n"] for row in rows) for stage, rows in facts["sets"].items()},
            "inference": {stage: inference[stage] for stage in facts["sets"]},
            **facts,
        }
        return results.collect(module, scores, protocol=about, **facts)


def hashed(tensors: Iterable[tuple[str, Tensor]], facts: Any) -> str:
    """Sha256 (hex) of named tensors, without a copy of what lies in host memory, and of facts as JSON."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.cpu().contiguous().view(torch.uint8).numpy()))
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _without(ids: list[int], left: int) -> list[int]:
    """Ids less the `left` ones after the first, which may be BOS."""
    return [*ids[:1], *ids[1 + left :]]
