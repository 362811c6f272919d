"""Testing a language model: questions answered by a protocol, records written as they come, results at the end.

The results of a set are accuracy (or what the protocol measures), seconds and tokens per second; the average over sets
is the plain mean. An AuroRA whose inference is dynamic is tested twice, `test` and `test_static`, as in its paper.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pera_lightning.adapters.aurora import static_inference
from pera_lightning.callbacks.data_order import on_every_rank
from pera_lightning.errors import ConfigurationError
from pera_lightning.evaluation.decoding import generate, score_options
from pera_lightning.evaluation.encoding import pad_token_id
from pera_lightning.evaluation.questions import Question, Questions
from pera_lightning.evaluation.records import PartialRecords, unique, write_records
from pera_lightning.evaluation.statistics import average, table
from pera_lightning.modules import results
from pera_lightning.state import adapter_state_dict, find_injected

if TYPE_CHECKING:
    from pera_lightning.modules.causal_lm import CausalLMModule

_SAMPLE = 1024  # about so many elements of each frozen tensor go into the key
# What of a data module's protocol says how it trains: a test after a fit is the same test as one without.
_OF_TRAINING = ("max_length", "batching", "train_fraction", "split_seed", "sizes", "cut", "left_out")


class Answering:
    """The test of one `CausalLMModule`.

    Args:
        module: what is tested; its trainer's data module gives the protocol as `evaluation`.
    """

    def __init__(self, module: CausalLMModule) -> None:
        self.module = module
        self._partial: PartialRecords | None = None
        self._records: list[dict[str, Any]] = []
        self._kind = "test"

    # --- what there is already ---

    def answered(self) -> frozenset[str]:
        """Ids whose records an interrupted test left behind, for every stage; every process must call it."""
        partial = self._open()
        own = {(record["stage"], record["id"]) for record in (partial.read() if partial else [])}
        pairs = set().union(*on_every_rank(own))
        stages = self._stages()
        done = frozenset.intersection(*(frozenset(i for stage, i in pairs if stage == wanted) for wanted in stages))
        if done and self.module.trainer.is_global_zero:
            print(f"{len(done)} questions were answered by an interrupted run: {partial.folder}", flush=True)
        return done

    def _open(self) -> PartialRecords | None:
        trainer, name = self.module.trainer, self._data().evaluation.name
        folder, key = trainer.log_dir, self._key()  # both asked on every rank
        if folder is None or trainer.fast_dev_run:
            return None
        return PartialRecords(Path(folder) / "predictions", name, key, trainer.global_rank)

    def _key(self) -> str:
        """A hash of all that decides the answers: weights, what they are computed with, protocol and rows."""
        digest = hashlib.sha256()
        for name, tensor in self._deciding_tensors():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        protocol = {k: v for k, v in self._data().protocol().items() if k not in _OF_TRAINING}
        if "sha256" in protocol:
            protocol["sha256"] = {k: v for k, v in protocol["sha256"].items() if k != "train"}
        facts = [self._stages(), self._network(), protocol]
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        return digest.hexdigest()

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
            **{name: module.settings[name] for name in ("model_name", "revision", "base_dtype")},
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
        self._kind, self._records = kind, []
        self._partial = self._open()

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
        partial = self._partial
        own = self._records if partial is None else partial.read()
        records = [record for found in on_every_rank(own) for record in found]
        by_stage = {
            stage: unique([r for r in records if r["stage"] == stage], data.test_order) for stage in self._stages()
        }
        tables = {stage: self._table(rows) for stage, rows in by_stage.items() if rows}
        metric = data.evaluation.main_metric
        scores = {f"{stage}/{metric}": average(rows, metric) for stage, rows in tables.items()}
        for stage, rows in tables.items():
            scores |= {f"{stage}_{metric}/{row['set']}": row[metric] for row in rows}
        if self._kind == "test":
            self.module.log_dict(scores, sync_dist=True)  # every rank has them; without it Lightning warns
        if not trainer.is_global_zero:
            return
        for stage, rows in tables.items():
            print(f"\n{stage}, protocol {data.evaluation.name}\n{table(rows, metric)}", flush=True)
        shortened = sum(record["left_out"] > 0 for record in by_stage["test"])
        if shortened:
            print(f"{shortened} prompts were longer than the model's context; their ends were kept", flush=True)
        if partial is None:
            return
        name = data.evaluation.name if self._kind == "test" else f"{data.evaluation.name}_predict"
        folder = partial.folder.parent / name
        for stage, rows in by_stage.items():
            write_records(folder if stage == "test" else folder.with_name(f"{name}_static"), rows)
        complete = all(len(rows) == len(data.test_order) for rows in by_stage.values())
        if complete:
            partial.remove()
        if self._kind == "test":
            # Not trainer.log_dir: a collective call, and the other processes are gone.
            self._write(partial.folder.parent.parent, scores, tables, shortened=shortened, complete=complete)
        else:
            print(f"Predictions: {folder}", flush=True)

    def _table(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A row of results for each set."""
        by_set: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            by_set.setdefault(record["set"], []).append(record)
        rows = []
        for name, found in by_set.items():
            seconds = sum(record["seconds"] for record in found)
            tokens = sum(record["tokens"] for record in found)
            measured = self._data().evaluation.summarise(found)
            rows.append({"set": name, **measured, "seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9)})
        return rows

    def _write(self, folder: Path, scores: dict[str, float], tables: dict[str, Any], **facts: Any) -> None:
        module, inference = self.module, results.inference_rows(self.module)
        about = {
            **results.about(module, "causal_lm"),
            **self._network(),
            "evaluation": self._data().protocol(),
            "training": module.trained_with,
        }
        facts |= {
            "n": {stage: sum(int(row["n"]) for row in rows) for stage, rows in tables.items()},
            "seconds": sum(row["seconds"] for rows in tables.values() for row in rows),
            "inference": {stage: inference[stage] for stage in tables},
            "sets": tables,
        }
        result = results.collect(module, scores, protocol=about, **facts)
        print(f"Results: {results.write(folder, result)}", flush=True)


def _without(ids: list[int], left: int) -> list[int]:
    """Ids less the `left` ones after the first, which may be BOS."""
    return [*ids[:1], *ids[1 + left :]]
