"""GLUE, and files of one's own with one or two texts and a label: batches for sequence classification.

What a task is stands in `tasks.py`, reading and checking examples in `sources.py` and `examples.py`, tokenising in
`cache.py`, and which examples select and which are scored on in `splits.py`. Here is the Lightning side of it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from pera_lightning.data import batching, length_grouping, splits
from pera_lightning.data.base import TaskDataModule
from pera_lightning.data.cached_tables import cache_folder
from pera_lightning.data.distributed_sampler import padded_shard
from pera_lightning.data.tokenization import pad_token_id
from pera_lightning.errors import ConfigurationError, DataError, listed
from pera_lightning.tasks.sequence_classification.cache import TokenDataset, tokenised, without_label
from pera_lightning.tasks.sequence_classification.examples import Examples, digest
from pera_lightning.tasks.sequence_classification.sources import GLUESource
from pera_lightning.tasks.sequence_classification.splits import LOADED, Plan, Subset
from pera_lightning.tasks.sequence_classification.tasks import CUSTOM, REPOSITORY, GLUETask
from pera_lightning.validation import check_choice, check_in_range

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

BATCHING = ("grouped", "random")


class GLUEDataModule(TaskDataModule):
    """Batches of texts or pairs with a label: a task of GLUE, or files of one's own.

    Batches are dicts: ``input_ids``, ``attention_mask`` and, if the tokenizer makes them, ``token_type_ids``, each
    (B, T) int64 and padded on the right; ``labels`` (B,), int64 or float32 for regression, -100 for unknown labels; at
    predict ``ids``, a list of B names. Over several processes each example that is scored on or predicted is in one
    batch of one of them; shards that do not come out even are filled up with the last example, labelled -100. Training
    examples are repeated to come out even.

    The test sets of GLUE have no labels, so the validation set serves twice: `split_protocol` says which of its
    examples choose the epoch and which are scored on at test. Which went where is written to ``splits/`` in the run's
    log folder. Predictions are made for the unlabelled test set.

    Args:
        task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli; "custom" (or null) for files of one's own.
        folder: folder with GLUE's splits as files (``train.jsonl``, ``validation.jsonl``, ``test.jsonl``; MNLI has
            ``validation_matched.jsonl`` and so on), .jsonl, .json, .csv or .tsv, of the hub's columns. By default
            ``nyu-mll/glue`` of the hub.
        train_file: training examples of a custom task: .csv, .tsv, .jsonl or .json.
        validation_file: validation examples of a custom task.
        test_file: test examples of a custom task; their labels are used by the split protocol "own_test" only.
        text_columns: text column of a custom task, or the two of a pair.
        label_column: label column of a custom task. Its classes are those of the training examples, numbers in their
            order, names in theirs.
        regression: labels of a custom task are numbers to predict.
        split_protocol: one of `splits.SPLIT_PROTOCOLS`. "full_validation": all validation examples select and are
            scored on (AuroRA); "red": some select, others are scored on (PERA, RED, ReFT); "own_test": a test set with
            labels is scored on; `setup` for fit reads it too, so that what it lacks shows before the training.
        split_seed: seed of the draws of "red" and `train_limit`, and of nothing else, so that runs of different seeds
            compare on the same examples.
        tokenizer: hub id or folder; by default the tokenizer that the trainer's module requires.
        max_length: most tokens of an example, special ones included. The longer text of a pair is cut first.
        batch_size: examples in a training batch, per process.
        eval_batch_size: examples in every other batch; by default `batch_size`.
        batching: order of the training examples: "grouped": examples of similar length together; "random".
        train_limit: most training examples to use, drawn by `split_seed`; those of a smaller number are among those of
            a larger one.
        num_workers: processes that make batches; 0 makes them in the main one.
        cache_dir: folder of tokenised examples; by default in the cache of the library datasets.
        protocol: former name of `split_protocol`.

    Raises:
        ConfigurationError, UnknownNameError: for values out of range, unknown or without effect on this task.
        DataError: from `prepare_data` and `setup`, for examples that are missing or cannot be used, naming the first.
    """

    def __init__(
        self,
        task: str | None,
        *,
        folder: str | None = None,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        text_columns: list[str] | None = None,
        label_column: str = "label",
        regression: bool = False,
        split_protocol: str | None = None,
        split_seed: int = 42,
        tokenizer: str | None = None,
        max_length: int = 512,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        batching: str = "grouped",
        train_limit: int | None = None,
        num_workers: int = 0,
        cache_dir: str | None = None,
        protocol: str | None = None,
    ) -> None:
        super().__init__()
        if protocol is not None:
            # Which of two was meant cannot be told: one may be a config's, and either the newer.
            if split_protocol not in (None, protocol):
                raise ConfigurationError(
                    f"split_protocol={split_protocol} and protocol={protocol}, its former name: give split_protocol "
                    "alone, with protocol=null over a config that has it"
                )
            rank_zero_warn(f"protocol={protocol} acts as split_protocol, as it is called now: give that in its place")
        split_protocol = split_protocol or protocol or "full_validation"
        files = {"train": train_file, "validation": validation_file, "test": test_file}
        self.source = GLUESource(
            name=CUSTOM if task is None else task,
            folder=None if folder is None else Path(folder).expanduser(),
            files={split: Path(file).expanduser() for split, file in files.items() if file is not None},
            text_columns=None if text_columns is None else tuple(text_columns),
            label_column=label_column,
            regression=regression,
        )
        self.split_protocol, self.split_seed = split_protocol, split_seed
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.batching = batching
        self.train_limit = train_limit
        self._plan = Plan(splits.split_protocol(split_protocol), split_seed, train_limit)
        self.num_workers = num_workers
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self._check()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        # By the source's splits: the tokenised table, its examples without their texts, and their digest.
        self._tables: dict[str, tuple[datasets.Dataset, Examples]] = {}
        self._digests: dict[str, str] = {}
        # By the run's splits: what they are made of, and for the stages that were set up the datasets.
        self._subsets: dict[str, Subset] = {}
        self._datasets: dict[str, TokenDataset] = {}
        self._recorded = False

    def _check(self) -> None:
        least = {"max_length": 1, "batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "split_seed": 0}
        for name, lowest in least.items():
            check_in_range(getattr(self, name), name, ge=lowest, integer=True)
        if self.train_limit is not None:
            check_in_range(self.train_limit, "train_limit", ge=1, integer=True)
        check_choice(self.batching, "batching", BATCHING)
        if self.split_protocol == "own_test":  # before hours of training, not after
            needed = "split_protocol=own_test scores on a test set with labels"
            if self.source.on_hub:
                raise ConfigurationError(f"{needed}, and GLUE's are hidden; use red")
            if self.source.name == CUSTOM and "test" not in self.source.files:
                raise ConfigurationError(f"{needed}; give it as test_file")

    # ---- what there is ----------------------------------------------------------------------------------------------

    @property
    def task(self) -> GLUETask:
        """Columns, labels and metrics; of a custom task they are found in its training examples."""
        return self.source.task

    @property
    def num_labels(self) -> int:
        """Outputs of the head: one a class, or the one of a regression."""
        return self.task.num_labels

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by label; none for regression."""
        return list(self.task.class_names)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the task's metrics, in the order of the leaderboard."""
        return self.task.metrics

    @property
    def selection(self) -> str:
        """Name of the metric that chooses the best epoch."""
        return self.task.selection

    @property
    def test_sets(self) -> list[str]:
        """Names of the sets by dataloader, the same at validation, test and predict: [""], or MNLI's two."""
        return list(self.task.sets)

    def description(self) -> dict[str, Any]:
        """What a module must know of these data; of GLUE's tasks without reading any."""
        names = ("task", "num_labels", "class_names", "metrics", "selection", "test_sets")
        return {name: getattr(self, name) for name in names}

    def expected_classes(self) -> int:
        """`num_labels`, for counting parameters; GLUE's need no data."""
        return self.num_labels

    def class_weights(self) -> Tensor:
        """Weights (C,) that give every class an equal part in the training loss; their mean over examples is 1.

        Raises:
            ConfigurationError: for a regression.
            DataError: where a class has no training example.
        """
        if self.task.regression:
            raise ConfigurationError(f"{self.source.name} is a regression: there are no classes to weigh")
        labels = self._examples("train").labels
        # Of the examples that are trained on, which are fewer with a train_limit.
        counts = np.bincount(labels[self._plan.limited(len(labels))], minlength=self.num_labels)
        if not counts.all():
            none = listed(name for name, count in zip(self.class_names, counts, strict=True) if not count)
            raise DataError(f"no training example of {none}, so the classes cannot be weighed; raise train_limit")
        return torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Downloads what this run needs, once on each machine, and tokenises it where several processes would."""
        # One process tokenises into the cache, the others find it there; a single one does so in `setup`.
        several = getattr(self.trainer, "world_size", 1) > 1
        command = None if self.trainer is None else self.trainer.state.fn
        stages = ("fit", "test") if command is None else (getattr(command, "value", command),)
        for split in dict.fromkeys(split for stage in stages for split in self._plan.needed(self.task, stage)):
            if several:
                self._tokenised(split)
            elif self.source.on_hub:
                self.source.table(split)
        self._tables.clear()  # all processes go on from `setup`

    def setup(self, stage: str | None = None) -> None:
        """Reads, cuts and tokenises, once.

        Args:
            stage: "fit", "validate", "test" or "predict" prepare what these need; None those of fit and test.
        """
        stage = getattr(stage, "value", stage)  # Lightning's enum has another name in an f-string, by Python's version
        for one in ("fit", "test") if stage is None else (stage,):
            subsets = self._plan.subsets(self.task, one, self._examples)
            self._subsets.update(subsets)
            for name in subsets:
                if name not in self._datasets and name.partition("_")[0] in LOADED[one]:
                    self._datasets[name] = self._build(name)
        if stage in ("fit", "validate", "test") and not self._recorded:
            # The file of a fit says more, so none of the others is written over it.
            name = self.source.name if stage == "fit" else f"{self.source.name}-{stage}"
            splits.record_run(self.trainer, name, self.split_record)
            self._recorded = stage == "fit"

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        examples = self._dataset("train")
        options: dict[str, Any] = {"shuffle": True}
        if self.batching == "grouped":
            options = {"sampler": length_grouping.grouped_sampler(examples.lengths, self.batch_size, self.trainer)}
        return self._loader(dataset=examples, batch_size=self.batch_size, **options)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The examples that select, longest first; a loader for each set of a task with several."""
        return self._evaluated("validation")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """The examples that are scored on, longest first; a loader for each set of a task with several."""
        return self._evaluated("test")

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """The test sets with ``ids``, in the order of their files; a loader for each set of a task with several."""
        return self._evaluated("predict")

    def _dataset(self, name: str) -> TokenDataset:
        if name not in self._datasets:
            raise ConfigurationError(f"the {name} examples are there after setup(); call it first")
        return self._datasets[name]

    def _evaluated(self, kind: str) -> DataLoader | list[DataLoader]:
        loaders = []
        for set_name in self.task.sets:
            examples = self._dataset(self.task.named(kind, set_name))
            if kind != "predict":  # whose order is that of the file
                examples = examples.longest_first()
            shard = padded_shard(examples, self.trainer, without_label)
            loaders.append(self._loader(**shard, batch_size=self.eval_batch_size))
        return loaders[0] if len(loaders) == 1 else loaders

    def _loader(self, **options: Any) -> DataLoader:
        pad_type_id = getattr(self.tokenizer, "pad_token_type_id", 0)
        collate = partial(batching.collate_classified, pad_id=pad_token_id(self.tokenizer), pad_type_id=pad_type_id)
        return self.make_loader(collate_fn=collate, **options)

    # ---- building ---------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer given, else the one that the trainer's module requires; loaded once."""
        if self._tokenizer is None:
            self._tokenizer = self.find_tokenizer("SequenceClassificationModule")
        return self._tokenizer

    def _build(self, name: str) -> TokenDataset:
        subset = self._subsets[name]
        dataset = TokenDataset(*self._tokenised(subset.split), subset.numbers, with_ids=name.startswith("predict"))
        if dataset.cut:
            rank_zero_warn(
                f"{dataset.cut} of {len(dataset)} {name} examples are longer than {self.max_length} tokens and were cut"
            )
        return dataset

    def _examples(self, split: str) -> Examples:
        """The checked examples of a source's split, without their texts."""
        return self._tokenised(split)[1]

    def _tokenised(self, split: str) -> tuple[datasets.Dataset, Examples]:
        if split not in self._tables:
            examples, name = self.source.examples(split), self.source.name
            if examples.empty:
                rank_zero_warn(
                    f"{examples.empty} of {len(examples)} {split} examples of {name} lack a text of the pair"
                )
            folder = self.cache_dir or cache_folder()
            table = tokenised(examples.texts, self.tokenizer, self.max_length, folder, name=f"{name}-{split}")
            self._digests[split] = digest(examples)
            self._tables[split] = table, replace(examples, texts=())  # which the table holds as tokens
        return self._tables[split]

    # ---- what is said of it -----------------------------------------------------------------------------------------

    def extremes(self) -> tuple[int, int]:
        """Tokens of the longest example there is, and the highest token id, padding included."""
        longest = max(int(dataset.lengths.max()) for dataset in self._datasets.values())
        highest = max(dataset.highest for dataset in self._datasets.values())
        return longest, max(highest, pad_token_id(self.tokenizer))

    def padding(self) -> dict[str, float]:
        """The share of padding in the first epoch's training batches of one process, in random order and grouped."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        shares = length_grouping.padding_shares(self._dataset("train").lengths, self.batch_size, seed=seed)
        return {name: round(share, 4) for name, share in shares.items()}

    def protocol(self) -> dict[str, Any]:
        """What was trained on and scored on, and how, as primitives."""
        facts = {
            "task": self.source.name,
            "source": REPOSITORY if self.source.on_hub else "files",
            "split_protocol": self.split_protocol,
            "selected_on_test": splits.selected_on_test(self._plan.cut),
            "split_seed": self.split_seed,
            "selection": self.selection,
            "max_length": self.max_length,
            "batching": self.batching,
            "train_limit": self.train_limit,
            "sizes": self._sizes(),
            "cut": {name: dataset.cut for name, dataset in self._datasets.items()},
            "sha256": dict(self._digests),
        }
        return {**facts, "padding": self.padding()} if "train" in self._datasets else facts

    def split_record(self) -> dict[str, Any]:
        """What ``splits/<task>.json`` says: protocol, seed, sizes, and the examples of every split.

        Returns:
            Primitives. Under "parts", for each split of the run: the source's split that it is "of", its "rows" there,
            numbers or "all", and if it is not all of them their "ids".
        """
        return {
            "task": self.source.name,
            "protocol": self.split_protocol,
            "selected_on_test": splits.selected_on_test(self._plan.cut),
            "seed": self.split_seed,
            "classes": self.class_names or None,
            "sizes": self._sizes(),
            "parts": {name: subset.record(self._examples(subset.split).ids) for name, subset in self._subsets.items()},
        }

    def _sizes(self) -> dict[str, int]:
        return {name: len(subset.numbers) for name, subset in self._subsets.items()}
