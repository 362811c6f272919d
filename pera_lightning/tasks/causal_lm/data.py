"""What the text data modules share: tokenising once, splits, batches, and questions for the test."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from pera_lightning.data import batching, splits
from pera_lightning.data.cached_tables import cache_folder
from pera_lightning.data.distributed_sampler import padded_shard
from pera_lightning.data.tokenization import pad_token_id
from pera_lightning.errors import ConfigurationError, DataError, closest
from pera_lightning.pretrained import load_tokenizer
from pera_lightning.tasks.causal_lm.examples import Row, digest
from pera_lightning.tasks.causal_lm.protocols import Protocol
from pera_lightning.tasks.causal_lm.protocols import protocol as find_protocol  # `protocol` is an argument here
from pera_lightning.tasks.causal_lm.questions import Question, Questions, make_questions
from pera_lightning.tasks.causal_lm.token_cache import PackedRows, TokenRows, tokenised

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

BATCHING = ("grouped", "packed", "random")


class TextDataModule(L.LightningDataModule):
    """Base of the data modules for causal language models; a subclass reads the rows.

    Training and validation batches are dicts of int64 tensors: ``input_ids``, ``labels`` (-100: no label),
    ``position_ids`` and, where rows are padded, ``attention_mask``, each (B, T); packed ones are (1, T). Test and
    prediction batches are `Questions`.

    Args:
        protocol: name of the protocol: prompts, loss mask, decoding and the reading of answers.
        tokenizer: hub id or folder; by default the tokenizer of the trainer's module.
        max_length: tokens of a training row at most; by default the protocol's. What is longer is cut at the end and
            counted; a row whose labels are all cut is left out.
        batch_size: rows in a training batch, per process; of packed batches on average.
        eval_batch_size: rows in every other batch; as `batch_size` where not given.
        batching: "grouped": rows of like length together; "packed": rows one after the other in one sequence;
            "random".
        validation_size: rows held out of the training rows, drawn by `split_seed`.
        train_fraction: share of the remaining training rows to use, for studies with few data.
        split_seed: of the two draws, and of nothing else.
        test_limit: rows of every test set, the first ones of its file; by default all.
        num_workers: processes that make batches; 0 makes them in the main one.
        cache_dir: of tokenised rows and downloads; by default in the cache of the library datasets.
    """

    task: str

    def __init__(
        self,
        *,
        protocol: str,
        tokenizer: str | None = None,
        max_length: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        batching: str = "grouped",
        validation_size: int = 120,
        train_fraction: float = 1.0,
        split_seed: int = 0,
        test_limit: int | None = None,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.evaluation: Protocol = find_protocol(self.task, protocol)
        self.tokenizer_name = tokenizer
        self.max_length = self.evaluation.max_length if max_length is None else max_length
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.batching = batching
        self.validation_size = validation_size
        self.train_fraction = train_fraction
        self.split_seed = split_seed
        self.test_limit = test_limit
        self.num_workers = num_workers
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self._check()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._parts: dict[str, TokenRows] = {}
        self._questions: dict[str, list[Question]] = {}
        self._record: dict[str, Any] = {}
        self._digests: dict[str, str] = {}
        self._order: list[str] = []

    def _check(self) -> None:
        least = {"max_length": 2, "batch_size": 1, "eval_batch_size": 1, "validation_size": 1, "num_workers": 0}
        for name, lowest in {**least, "split_seed": 0, "test_limit": 1}.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigurationError(f"{name} must be at least {lowest}; given {value}")
        if not 0 < self.train_fraction <= 1:
            raise ConfigurationError(f"train_fraction must lie in (0, 1]; given {self.train_fraction}")
        if self.batching not in BATCHING:
            known = ", ".join(BATCHING)
            raise ConfigurationError(f"batching={self.batching!r}: one of {known}{closest(self.batching, BATCHING)}")

    # ---- what a subclass reads --------------------------------------------------------------------------------------

    @abstractmethod
    def training_rows(self) -> list[Row]:
        """All rows that may be trained on."""

    @abstractmethod
    def test_rows(self) -> Mapping[str, list[Row]]:
        """The rows of each test set."""

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenises the training rows once on each machine, where several processes would; keeps nothing."""
        if self.needed()[0] and getattr(self.trainer, "world_size", 1) > 1:
            rows = self.training_rows()
            self._tokenised(rows, digest(rows))

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises, once.

        Args:
            stage: "fit" and "validate" read the training rows, "test" and "predict" the test rows, None all.
        """
        if stage in ("fit", "validate", None) and not self._parts:
            self._build_training()
        if stage in ("test", "predict", None) and not self._questions:
            self._build_questions()
        if stage in ("fit", "validate"):
            splits.record_run(self.trainer, self.task, lambda: self._record)

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        rows = self._part("train")
        if self.batching == "packed":
            capacity = batching.capacity_for(rows.lengths, self.batch_size)
            packed = PackedRows(rows, batching.pack(rows.lengths, capacity, seed=self.split_seed))
            return self._loader(packed, batch_size=1, shuffle=True, collate_fn=_packed_batch)
        if self.batching == "random":
            return self._loader(rows, batch_size=self.batch_size, shuffle=True, collate_fn=self._padded())
        sampler = batching.grouped_sampler(rows.lengths, self.batch_size, self.trainer)
        return self._loader(rows, batch_size=self.batch_size, sampler=sampler, collate_fn=self._padded())

    def val_dataloader(self) -> DataLoader:
        """The validation rows, in a fixed order; over several processes each counts once."""
        rows = padded_shard(self._part("validation"), self.trainer, _without_label)
        return self._loader(**rows, batch_size=self.eval_batch_size, collate_fn=self._padded())

    def test_dataloader(self) -> list[DataLoader]:
        """The questions of each test set, a loader each, longest first; those that are answered already are left out.

        An interrupted evaluation goes on: the trainer's module tells by `answered()` which ids it has.
        """
        if not self._questions:
            raise ConfigurationError("the test rows are there after setup(); call it first")
        answered = getattr(getattr(self.trainer, "lightning_module", None), "answered", None)
        done = answered() if callable(answered) else frozenset()
        left = {name: [q for q in rows if q.row.id not in done] for name, rows in self._questions.items()}
        if not any(left.values()):  # the last batch again: without one Lightning would not come to the end of the test
            name, rows = next(reversed(self._questions.items()))
            left = {name: rows[-1:]}
        return [
            self._loader(rows, batch_size=self.eval_batch_size, collate_fn=Questions) for rows in left.values() if rows
        ]

    def predict_dataloader(self) -> list[DataLoader]:
        """The questions of each test set."""
        return self.test_dataloader()

    # ---- building ---------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer: the one given, else that of the trainer's module."""
        if self._tokenizer is None:
            if self.tokenizer_name is not None:
                self._tokenizer = load_tokenizer(self.tokenizer_name)
            else:
                module = getattr(self.trainer, "lightning_module", None)
                self._tokenizer = getattr(module, "tokenizer", None)
            if self._tokenizer is None:
                raise ConfigurationError("no tokenizer: give the data module tokenizer=, or train a CausalLMModule")
            if self._tokenizer.pad_token_id is None:
                rank_zero_info(
                    f"the tokenizer has no padding token: {pad_token_id(self._tokenizer)} fills up, masked throughout"
                )
        return self._tokenizer

    def _build_training(self) -> None:
        rows = self.training_rows()
        self._digests["train"] = digest(rows)
        order = splits.random_order(np.random.Generator(np.random.PCG64(self.split_seed)), len(rows))
        if len(rows) <= self.validation_size:
            raise DataError(
                f"{len(rows)} training rows cannot give {self.validation_size} to validation; lower validation_size"
            )
        held, rest = order[: self.validation_size], order[self.validation_size :]
        rest = rest[: splits.held_out_size(len(rest), self.train_fraction)]
        chosen = {"train": np.sort(rest), "validation": np.sort(held)}
        table = self._tokenised(rows, self._digests["train"])
        for name, indices in chosen.items():
            part = TokenRows(table, indices, self.max_length)
            if not len(part):
                raise DataError(
                    f"max_length={self.max_length} leaves no {name} row with a label: all {len(indices)} lose their "
                    "answer; raise it"
                )
            if part.cut:
                rank_zero_warn(
                    f"{part.cut} of {len(indices)} {name} rows are longer than {self.max_length} tokens and were cut; "
                    f"{part.dropped} of them lost their answer and are left out"
                )
            self._parts[name] = part
        everything = len(rest) + len(held) == len(rows)
        self._record = {
            "seed": self.split_seed,
            "sizes": {name: len(indices) for name, indices in chosen.items()},
            "validation": [rows[k].id for k in chosen["validation"]],
            "train": "all others" if everything else [rows[k].id for k in chosen["train"]],
        }

    def _tokenised(self, rows: list[Row], sha256: str) -> datasets.Dataset:
        return tokenised(rows, self.evaluation, self.tokenizer, self.cache_folder, sha256=sha256)

    def _build_questions(self) -> None:
        self._order = []
        for name, rows in self.test_rows().items():
            rows = rows[: self.test_limit]
            self._digests[f"test {name}"] = digest(rows)
            self._order += [row.id for row in rows]
            questions = make_questions(self.evaluation, self.tokenizer, rows)
            self._questions[name] = sorted(questions, key=lambda q: -len(q.prompt))

    def extremes(self) -> tuple[int, int]:
        """Tokens of the longest training or validation row, and the highest token id among them, padding included."""
        parts = self._parts.values()
        longest, highest = (max(int(p.lengths.max()) for p in parts), max(p.highest for p in parts))
        return longest, max(highest, pad_token_id(self.tokenizer))

    def protocol(self) -> dict[str, Any]:
        """What was trained on and tested on, and how, as primitives."""
        return {
            **self.evaluation.describe(),
            "max_length": self.max_length,
            "batching": self.batching,
            "train_fraction": self.train_fraction,
            "split_seed": self.split_seed,
            "test_limit": self.test_limit,
            "sizes": {name: len(part) for name, part in self._parts.items()},
            "cut": {name: part.cut for name, part in self._parts.items()},
            "left_out": {name: part.dropped for name, part in self._parts.items()},
            "sha256": dict(self._digests),
        }

    @property
    def test_order(self) -> list[str]:
        """Ids of the test rows, set after set, in the order of their files."""
        return list(self._order)

    @property
    def cache_folder(self) -> Path:
        """Of tokenised rows and downloads."""
        return self.cache_dir or cache_folder()

    def needed(self) -> tuple[bool, bool]:
        """Whether this run needs training rows, and whether it needs test rows; both where there is no trainer."""
        command = None if self.trainer is None else self.trainer.state.fn
        return command not in ("test", "predict"), command not in ("fit", "validate")

    def _part(self, name: str) -> TokenRows:
        if name not in self._parts:
            raise ConfigurationError(f"the {name} rows are there after setup(); call it first")
        return self._parts[name]

    def _padded(self) -> partial:
        return partial(batching.collate_padded, pad_id=pad_token_id(self.tokenizer))

    def _loader(self, dataset: Sequence[Any] | Any, **options: Any) -> DataLoader:
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", None)
        pin = device is not None and device.type not in ("cpu", "mps") and options.get("collate_fn") is not Questions
        return DataLoader(dataset, num_workers=self.num_workers, pin_memory=pin, **options)


def _without_label(example: Mapping[str, Any]) -> dict[str, Any]:
    return {**example, "start": len(example["input_ids"])}


def _packed_batch(items: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    return batching.collate_packed([example for item in items for example in item])
