"""GLUE, and files of one's own with one or two texts and a label: batches for sequence classification.

What a task is stands in `glue_tasks.py`, reading and checking rows in `sequence_rows.py`, tokenising in
`sequence_cache.py`, and which rows select and which are scored on in `splits.py`. Here is the Lightning side of it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from pera_lightning.data import batching, splits
from pera_lightning.data.cached_tables import cache_folder
from pera_lightning.data.distributed_sampler import padded_shard
from pera_lightning.data.tokenization import pad_token_id
from pera_lightning.errors import ConfigurationError, DataError, closest, listed
from pera_lightning.pretrained import load_tokenizer
from pera_lightning.tasks.sequence_classification.cache import SequenceTokens, tokenised, without_label
from pera_lightning.tasks.sequence_classification.examples import SequenceRows, digest
from pera_lightning.tasks.sequence_classification.sources import GLUESource
from pera_lightning.tasks.sequence_classification.splits import LOADED, Part, Plan
from pera_lightning.tasks.sequence_classification.tasks import CUSTOM, REPOSITORY, GLUETask

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

BATCHING = ("grouped", "random")


class GLUEDataModule(L.LightningDataModule):
    """Batches of texts or pairs with a label: a task of GLUE, or files of one's own.

    Batches are dicts: ``input_ids``, ``attention_mask`` and, where the tokenizer makes them, ``token_type_ids``, each
    (B, T) int64 and padded on the right; ``labels`` (B,), int64 or float32 for regression, -100 in rows of unknown
    label; at predict ``ids``, a list of B row names. Over several processes each row that is scored on or predicted is
    in one batch of one of them; where they do not come out even, the last row fills up, with the label -100. Training
    rows are repeated to come out even.

    The test sets of GLUE have no labels, so the validation set serves twice: `protocol` says which rows of it choose
    the epoch and which are scored on at test. Which went where is written to ``splits/`` in the run's log folder.
    Predictions are made for the unlabelled test set.

    Args:
        task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli; "custom" (or null) for files of one's own.
        folder: with GLUE's splits as files (``train.jsonl``, ``validation.jsonl``, ``test.jsonl``; MNLI has
            ``validation_matched.jsonl`` and so on), .jsonl, .json, .csv or .tsv, of the hub's columns. By default
            ``nyu-mll/glue`` of the hub.
        train_file: of a custom task: .csv, .tsv, .jsonl or .json.
        validation_file: of a custom task.
        test_file: of a custom task; labels in it are used by the protocol "own_test" only.
        text_columns: of a custom task: one column, or the two of a pair.
        label_column: of a custom task. Classes are those of the training rows, numbers in their order, names in theirs.
        regression: labels of a custom task are numbers to predict.
        protocol: one of `splits.SPLIT_PROTOCOLS`. "full_validation": all validation rows select and are scored on
            (AuroRA); "red": some select, others are scored on (PERA, RED, ReFT); "own_test": a test set with labels is
            scored on; `setup` for fit reads it too, so that what it lacks shows before the training.
        split_seed: of the draws of "red" and `train_limit`, and of nothing else, so that runs of different seeds
            compare on the same rows.
        tokenizer: hub id or folder; by default the tokenizer of the trainer's module.
        max_length: tokens of a row at most, special ones included. The longer text of a pair is cut first.
        batch_size: rows in a training batch, per process.
        eval_batch_size: rows in every other batch; as `batch_size` where not given.
        batching: of training rows: "grouped": rows of like length together; "random".
        train_limit: this many training rows at most, drawn by `split_seed`; a smaller number's rows are among those of
            a larger.
        num_workers: processes that make batches; 0 makes them in the main one.
        cache_dir: of tokenised rows; by default in the cache of the library datasets.

    Raises:
        ConfigurationError, UnknownNameError: for values out of range, unknown or without effect on this task.
        DataError: from `prepare_data` and `setup`, for rows that are missing or cannot be used, naming the first.
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
        protocol: str = "full_validation",
        split_seed: int = 42,
        tokenizer: str | None = None,
        max_length: int = 512,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        batching: str = "grouped",
        train_limit: int | None = None,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        files = {"train": train_file, "validation": validation_file, "test": test_file}
        self.source = GLUESource(
            name=CUSTOM if task is None else task,
            folder=None if folder is None else Path(folder).expanduser(),
            files={split: Path(file).expanduser() for split, file in files.items() if file is not None},
            text_columns=None if text_columns is None else tuple(text_columns),
            label_column=label_column,
            regression=regression,
        )
        self.split_protocol, self.split_seed = protocol, split_seed
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.batching = batching
        self.train_limit = train_limit
        self._plan = Plan(splits.split_protocol(protocol), split_seed, train_limit)
        self.num_workers = num_workers
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self._check()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tables: dict[str, tuple[datasets.Dataset, SequenceRows]] = {}
        self._digests: dict[str, str] = {}
        self._chosen: dict[str, Part] = {}
        self._parts: dict[str, SequenceTokens] = {}
        self._recorded = False

    def _check(self) -> None:
        least = {"max_length": 1, "batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "split_seed": 0}
        for name, lowest in {**least, "train_limit": 1}.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigurationError(f"{name} must be at least {lowest}; given {value}")
        if self.batching not in BATCHING:
            known = ", ".join(BATCHING)
            raise ConfigurationError(f"batching={self.batching!r}: one of {known}{closest(self.batching, BATCHING)}")
        if self.split_protocol == "own_test":  # before hours of training, not after
            if self.source.on_hub:
                raise ConfigurationError(
                    "protocol=own_test scores on a test set with labels, and GLUE's are hidden; use red"
                )
            if self.source.name == CUSTOM and "test" not in self.source.files:
                raise ConfigurationError("protocol=own_test scores on a test set with labels; give it as test_file")

    # ---- what there is ----------------------------------------------------------------------------------------------

    @property
    def task(self) -> GLUETask:
        """Columns, labels and metrics; of a custom task they are found in its training rows."""
        return self.source.task

    @property
    def num_labels(self) -> int:
        """Outputs of the head: one a class, or the one of a regression."""
        return self.task.num_labels

    @property
    def class_names(self) -> list[str]:
        """By label; none for regression."""
        return list(self.task.class_names)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the task's metrics, in the order of the leaderboard."""
        return self.task.metrics

    @property
    def selection(self) -> str:
        """The metric that chooses the best epoch."""
        return self.task.selection

    @property
    def test_sets(self) -> list[str]:
        """Names of the sets by dataloader, of validation, test and predict alike: [""], or MNLI's two."""
        return list(self.task.sets)

    def expected_classes(self) -> int:
        """`num_labels`, for counting parameters; GLUE's need no data."""
        return self.num_labels

    def class_weights(self) -> Tensor:
        """Weights (C,) under which every class has an equal part in the training loss, and their mean over rows is 1.

        Raises:
            ConfigurationError: for a regression.
            DataError: where a class has no training row.
        """
        if self.task.regression:
            raise ConfigurationError(f"{self.source.name} is a regression: there are no classes to weigh")
        labels = self._rows("train").labels
        counts = np.bincount(labels[self._plan.limited(len(labels))], minlength=self.num_labels)
        if not counts.all():
            none = listed(name for name, count in zip(self.class_names, counts, strict=True) if not count)
            raise DataError(f"no training row of {none}, so the classes cannot be weighed; raise train_limit")
        return torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Downloads what this run needs, once on each machine, and tokenises it where several processes would."""
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
            chosen = self._plan.parts(self.task, one, self._rows)
            self._chosen.update(chosen)
            for part in chosen:
                if part not in self._parts and part.partition("_")[0] in LOADED[one]:
                    self._parts[part] = self._build(part)
        if stage in ("fit", "validate", "test") and not self._recorded:
            # The file of a fit says more, so none of the others is written over it.
            name = self.source.name if stage == "fit" else f"{self.source.name}-{stage}"
            splits.record_run(self.trainer, name, self.split_record)
            self._recorded = stage == "fit"

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        rows = self._part("train")
        if self.batching == "random":
            return self._loader(dataset=rows, batch_size=self.batch_size, shuffle=True)
        sampler = batching.grouped_sampler(rows.lengths, self.batch_size, self.trainer)
        return self._loader(dataset=rows, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The rows that select, longest first; a loader a set where there are several."""
        return self._evaluated("validation")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """The rows that are scored on, longest first; a loader a set where there are several."""
        return self._evaluated("test")

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """The test sets with ``ids``, in the order of their files; a loader a set where there are several."""
        return self._evaluated("predict")

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
                raise ConfigurationError(
                    "no tokenizer: give the data module tokenizer=, or train a SequenceClassificationModule"
                )
        return self._tokenizer

    def _build(self, part: str) -> SequenceTokens:
        rows = self._chosen[part]
        made = SequenceTokens(*self._tokenised(rows.split), rows.numbers, with_ids=part.startswith("predict"))
        if made.cut:
            rank_zero_warn(
                f"{made.cut} of {len(made)} {part} rows are longer than {self.max_length} tokens and were cut"
            )
        return made

    def _rows(self, split: str) -> SequenceRows:
        """The checked rows of a split, without their texts where those are tokenised already."""
        return self._tokenised(split)[1]

    def _tokenised(self, split: str) -> tuple[datasets.Dataset, SequenceRows]:
        if split not in self._tables:
            rows = self.source.rows(split)
            if rows.empty:
                rank_zero_warn(
                    f"{rows.empty} of {len(rows)} {split} rows of {self.source.name} lack a text of the pair"
                )
            folder = self.cache_dir or cache_folder()
            name = f"{self.source.name}-{split}"
            table = tokenised(rows.texts, self.tokenizer, self.max_length, folder, name=name)
            self._digests[split] = digest(rows)
            self._tables[split] = table, replace(rows, texts=())
        return self._tables[split]

    # ---- what is said of it -----------------------------------------------------------------------------------------

    def extremes(self) -> tuple[int, int]:
        """Tokens of the longest row there is, and the highest token id, padding included."""
        parts = self._parts.values()
        longest, highest = max(int(part.lengths.max()) for part in parts), max(part.highest for part in parts)
        return longest, max(highest, pad_token_id(self.tokenizer))

    def padding(self) -> dict[str, float]:
        """The share of padding in the first epoch's training batches of one process, in random order and grouped."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        shares = batching.padding_shares(self._part("train").lengths, self.batch_size, seed=seed)
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
            "cut": {part: rows.cut for part, rows in self._parts.items()},
            "sha256": dict(self._digests),
        }
        return {**facts, "padding": self.padding()} if "train" in self._parts else facts

    def split_record(self) -> dict[str, Any]:
        """What ``splits/<task>.json`` says: protocol, seed, sizes, and the rows of every part.

        Returns:
            Primitives. Under "parts", for each part: the split that it is "of", its "rows" there, numbers or "all", and
            where it is not all of them their "ids".
        """
        return {
            "task": self.source.name,
            "protocol": self.split_protocol,
            "selected_on_test": splits.selected_on_test(self._plan.cut),
            "seed": self.split_seed,
            "classes": self.class_names or None,
            "sizes": self._sizes(),
            "parts": {part: rows.record(self._rows(rows.split).ids) for part, rows in self._chosen.items()},
        }

    def _sizes(self) -> dict[str, int]:
        return {part: len(rows.numbers) for part, rows in self._chosen.items()}

    # ---- loaders ----------------------------------------------------------------------------------------------------

    def _part(self, name: str) -> SequenceTokens:
        if name not in self._parts:
            raise ConfigurationError(f"the {name} rows are there after setup(); call it first")
        return self._parts[name]

    def _evaluated(self, kind: str) -> DataLoader | list[DataLoader]:
        loaders = []
        for name in self.task.sets:
            part = self._part(self.task.named(kind, name))
            rows = part if kind == "predict" else part.longest_first()
            loaders.append(
                self._loader(**padded_shard(rows, self.trainer, without_label), batch_size=self.eval_batch_size)
            )
        return loaders[0] if len(loaders) == 1 else loaders

    def _loader(self, **options: Any) -> DataLoader:
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", None)
        pin = device is not None and device.type not in ("cpu", "mps")
        collate = partial(
            batching.collate_classified,
            pad_id=pad_token_id(self.tokenizer),
            pad_type_id=getattr(self.tokenizer, "pad_token_type_id", 0),
        )
        return DataLoader(num_workers=self.num_workers, pin_memory=pin, collate_fn=collate, **options)
