"""What the text data modules share: tokenising once, splits, batches, and questions for the test."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from pera_lightning.data import batching, splits
from pera_lightning.data.distributed_sampler import padded_shard
from pera_lightning.data.example_hashes import as_array, hash_texts
from pera_lightning.data.token_data import TokenDataModule
from pera_lightning.data.tokenization import pad_token_id
from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.tasks.causal_lm.examples import Example, digest
from pera_lightning.tasks.causal_lm.protocols import Protocol
from pera_lightning.tasks.causal_lm.protocols import protocol as find_protocol  # `protocol` is an argument here
from pera_lightning.tasks.causal_lm.questions import Question, Questions, make_questions
from pera_lightning.tasks.causal_lm.token_cache import PackedDataset, TokenDataset, tokenised
from pera_lightning.validation import check_in_range

if TYPE_CHECKING:
    import datasets


class TextDataModule(TokenDataModule):
    """Base of the data modules for causal language models; a subclass reads the examples.

    Training and validation batches are dicts of int64 tensors: ``input_ids``, ``labels`` (-100: no label),
    ``position_ids`` and, if examples are padded, ``attention_mask``, each (B, T); packed ones are (1, T). Test and
    prediction batches are `Questions`.

    Args:
        protocol: name of the protocol: prompts, loss mask, decoding and the reading of answers.
        max_length: most tokens of a training example; by default the protocol's. What is longer is cut at the end and
            counted; an example whose labels are all cut is left out.
        batch_size: examples in a training batch, per process; of packed batches on average.
        validation_size: number of training examples held out for validation, drawn by `split_seed`.
        train_fraction: share of the remaining training examples to use, for studies with few data.
        split_seed: seed of the two draws, and of nothing else.
        test_limit: examples of every test set, the first ones of its file; by default all.
        shared: arguments of `TokenDataModule`; here `batching` can be "packed" too: examples one after the other in one
            sequence.
    """

    task: str
    asks_module = "CausalLMModule"
    orders = ("grouped", "packed", "random")
    shortest = 2  # a token, and one that it predicts

    def __init__(
        self,
        *,
        protocol: str,
        max_length: int | None = None,
        batch_size: int = 16,
        validation_size: int = 120,
        train_fraction: float = 1.0,
        split_seed: int = 0,
        test_limit: int | None = None,
        **shared: Any,
    ) -> None:
        self.evaluation: Protocol = find_protocol(self.task, protocol)
        length = self.evaluation.max_length if max_length is None else max_length
        super().__init__(max_length=length, split_seed=split_seed, batch_size=batch_size, **shared)
        self.validation_size, self.train_fraction, self.test_limit = validation_size, train_fraction, test_limit
        check_in_range(validation_size, "validation_size", ge=1, integer=True)
        check_in_range(train_fraction, "train_fraction", gt=0, le=1)
        if test_limit is not None:
            check_in_range(test_limit, "test_limit", ge=1, integer=True)
        self._questions: dict[str, list[Question]] = {}
        self._record: dict[str, Any] = {}
        self._digests: dict[str, str] = {}
        self._hashes: dict[str, list[int]] = {}  # of "train" and "test": each example's question
        self._test_ids: list[str] = []

    # ---- what a subclass reads --------------------------------------------------------------------------------------

    @abstractmethod
    def training_examples(self) -> list[Example]:
        """All examples that may be trained on."""

    @abstractmethod
    def test_examples(self) -> Mapping[str, list[Example]]:
        """The examples of each test set."""

    # ---- the handshake with the module: see `pera_lightning.data.base` ----------------------------------------------

    def description(self) -> dict[str, Any]:
        """What a module must know of these data, after `setup`.

        Returns:
            ``evaluation_protocol`` (a `Protocol`), ``tokenizer``, ``tokenizer_name`` (None for the module's own),
            ``protocol`` (what is trained and tested on, and how, as primitives), ``packed`` (whether training batches
            are), ``test_ids`` (set after set, in the order of their files) and `extremes`.
        """
        return {
            "evaluation_protocol": self.evaluation,
            "tokenizer": self.tokenizer,
            "tokenizer_name": self.tokenizer_name,
            "protocol": self.protocol(),
            "packed": self.batching == "packed",
            "test_ids": list(self._test_ids),
            "extremes": self.extremes(),
        }

    def protocol(self) -> dict[str, Any]:
        """What was trained on and tested on, and how, as primitives."""
        return {
            **self.evaluation.describe(),
            "max_length": self.max_length,
            "batching": self.batching,
            "train_fraction": self.train_fraction,
            "split_seed": self.split_seed,
            "test_limit": self.test_limit,
            "sizes": {name: len(split) for name, split in self._datasets.items()},
            "cut": {name: split.cut for name, split in self._datasets.items()},
            "left_out": {name: split.dropped for name, split in self._datasets.items()},
            "sha256": dict(self._digests),
        }

    def example_hashes(self, split: str) -> np.ndarray | None:
        """A hash of each question of "train" or "test", of all test sets, (n,) int64."""
        return as_array(self._hashes[split]) if split in self._hashes else None

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenises the training examples once on each machine, if several processes would; keeps nothing."""
        if self.needed()[0] and getattr(self.trainer, "world_size", 1) > 1:
            self._tokenised(self.training_examples())

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises, once.

        Args:
            stage: "fit" and "validate" read the training examples, "test" and "predict" those of the tests, None all.
        """
        if stage in ("fit", "validate", None) and not self._datasets:
            self._build_training()
        if stage in ("test", "predict", None) and not self._questions:
            self._build_questions()
        if stage in ("fit", "validate"):
            splits.record_run(self.trainer, self.task, lambda: self._record, stage)

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        if self.batching != "packed":
            return super().train_dataloader()
        # An item is a packed sequence already, so that a batch is one of them.
        examples = self.dataset("train")
        capacity = batching.capacity_for(examples.lengths, self.batch_size)
        packed = PackedDataset(examples, batching.pack(examples.lengths, capacity, seed=self.split_seed))
        return self.make_loader(packed, batch_size=1, shuffle=True, collate_fn=_collate_sequence)

    def val_dataloader(self) -> DataLoader:
        """The validation examples, in a fixed order; over several processes each counts once."""
        shard = padded_shard(self.dataset("validation"), self.trainer, _without_label)
        return self.make_loader(**shard, batch_size=self.eval_batch_size, collate_fn=self.collate_function())

    def test_dataloader(self) -> list[DataLoader]:
        """The questions of each test set, a loader each, longest first; over several processes each counts once."""
        if not self._questions:
            raise ConfigurationError("the test examples are there after setup(); call it first")
        return [
            self.make_loader(
                **padded_shard(questions, self.trainer),  # what fills up is told apart by its id
                batch_size=self.eval_batch_size,
                collate_fn=Questions,
                pin_memory=False,  # no tensors
            )
            for questions in self._questions.values()
            if questions
        ]

    def predict_dataloader(self) -> list[DataLoader]:
        """The questions of each test set."""
        return self.test_dataloader()

    # ---- building ---------------------------------------------------------------------------------------------------

    def _build_training(self) -> None:
        examples = self.training_examples()
        if len(examples) <= self.validation_size:
            raise DataError(
                f"validation_size={self.validation_size} leaves nothing to train on, of {len(examples)} training "
                "examples; lower it"
            )
        # The validation examples are drawn first: they are the same at every fraction, and a smaller fraction of the
        # others is contained in a larger one.
        order = splits.random_order(np.random.Generator(np.random.PCG64(self.split_seed)), len(examples))
        held, rest = order[: self.validation_size], order[self.validation_size :]
        rest = rest[: splits.held_out_size(len(rest), self.train_fraction)]
        chosen = {"train": np.sort(rest), "validation": np.sort(held)}  # numbers in the order of the file
        self._hashes["train"] = [_question_hash(examples[k]) for k in chosen["train"]]
        table = self._tokenised(examples)
        for name, indices in chosen.items():
            split = TokenDataset(table, indices, self.max_length)
            if not len(split):
                raise DataError(
                    f"max_length={self.max_length} leaves no {name} example with a label: all {len(indices)} lose "
                    "their answer; raise it"
                )
            if split.cut:
                rank_zero_warn(
                    f"{split.cut} of {len(indices)} {name} examples are longer than {self.max_length} tokens and were "
                    f"cut; {split.dropped} of them lost their answer and are left out"
                )
            self._datasets[name] = split
        # What is written to splits/: ids, but for the usual case that nothing is left out.
        everything = len(rest) + len(held) == len(examples)
        self._record = {
            "seed": self.split_seed,
            "sizes": {name: len(indices) for name, indices in chosen.items()},
            "validation": [examples[k].id for k in chosen["validation"]],
            "train": "all others" if everything else [examples[k].id for k in chosen["train"]],
        }

    def _tokenised(self, examples: list[Example]) -> datasets.Dataset:
        self._digests["train"] = digest(examples)
        return tokenised(examples, self.evaluation, self.tokenizer, self.cache_folder, sha256=self._digests["train"])

    def _build_questions(self) -> None:
        for name, examples in self.test_examples().items():
            examples = examples[: self.test_limit]
            self._digests[f"test {name}"] = digest(examples)
            self._test_ids += [one.id for one in examples]
            self._hashes.setdefault("test", []).extend(map(_question_hash, examples))
            questions = make_questions(self.evaluation, self.tokenizer, examples)
            # Longest first: similar lengths share a batch, and running out of memory shows in the first one.
            self._questions[name] = sorted(questions, key=lambda q: -len(q.prompt))

    def needed(self) -> tuple[bool, bool]:
        """Whether this run needs training examples, and whether it needs test examples; both without a trainer."""
        command = None if self.trainer is None else self.trainer.state.fn
        return command not in ("test", "predict"), command not in ("fit", "validate")

    def collate_function(self) -> partial:
        return partial(batching.collate_padded, pad_id=pad_token_id(self.tokenizer))


def _question_hash(example: Example) -> int:
    return hash_texts(example.instruction, example.input)


def _without_label(example: Mapping[str, Any]) -> dict[str, Any]:
    return {**example, "start": len(example["input_ids"])}


def _collate_sequence(items: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    return batching.collate_packed([example for item in items for example in item])
