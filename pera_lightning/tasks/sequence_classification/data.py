"""GLUE, and files of one's own with one or two texts and a label: batches for sequence classification.

What a task is stands in `tasks.py`, reading and checking examples in `sources.py` and `examples.py`, tokenising in
`cache.py`, and which examples select and which are scored on in `splits.py`. Here is the Lightning side of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from pera_lightning.data import batching, length_grouping, splits
from pera_lightning.data.distributed_sampler import padded_shard
from pera_lightning.data.example_hashes import as_array, hash_texts
from pera_lightning.data.token_data import TokenDataModule
from pera_lightning.data.tokenization import pad_token_id
from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.sequence_classification.cache import TokenDataset, tokenised, without_label
from pera_lightning.tasks.sequence_classification.examples import Examples, digest
from pera_lightning.tasks.sequence_classification.sources import GLUESource
from pera_lightning.tasks.sequence_classification.splits import LOADED, Plan, Subset
from pera_lightning.tasks.sequence_classification.tasks import CUSTOM, REPOSITORY, GLUETask
from pera_lightning.validation import check_in_range

if TYPE_CHECKING:
    import datasets


class GLUEDataModule(TokenDataModule):
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
        max_length: most tokens of an example, special ones included. The longer text of a pair is cut first.
        train_limit: most training examples to use, drawn by `split_seed`; those of a smaller number are among those of
            a larger one.
        protocol: former name of `split_protocol`.
        shared: arguments of `TokenDataModule`.

    Raises:
        ConfigurationError, UnknownNameError: for values out of range, unknown or without effect on this task.
        DataError: from `prepare_data` and `setup`, for examples that are missing or cannot be used, naming the first.
    """

    asks_module = "SequenceClassificationModule"

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
        max_length: int = 512,
        batch_size: int = 32,
        train_limit: int | None = None,
        protocol: str | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(max_length=max_length, split_seed=split_seed, batch_size=batch_size, **shared)
        if train_limit is not None:
            check_in_range(train_limit, "train_limit", ge=1, integer=True)
        if protocol is not None:
            # Which of two was meant cannot be told: one may be a config's, and either the newer.
            if split_protocol not in (None, protocol):
                raise ConfigurationError(
                    f"split_protocol={split_protocol} and protocol={protocol}, its former name: give split_protocol "
                    "alone, with protocol=null over a config that has it"
                )
            rank_zero_warn(f"protocol={protocol} acts as split_protocol, as it is called now: give that in its place")
        self.split_protocol = split_protocol or protocol or "full_validation"
        self.train_limit = train_limit
        self._plan = Plan(splits.split_protocol(self.split_protocol), split_seed, train_limit)
        files = {"train": train_file, "validation": validation_file, "test": test_file}
        self.source = GLUESource(
            name=CUSTOM if task is None else task,
            folder=None if folder is None else Path(folder).expanduser(),
            files={split: Path(file).expanduser() for split, file in files.items() if file is not None},
            text_columns=None if text_columns is None else tuple(text_columns),
            label_column=label_column,
            regression=regression,
        )
        unlabelled = self.source.on_hub or (self.source.name == CUSTOM and test_file is None)
        if self.split_protocol == "own_test" and unlabelled:  # before hours of training, not after
            raise ConfigurationError(
                "split_protocol=own_test scores on a test set with labels, and GLUE's are hidden: give one of your own "
                "as test_file, or split_protocol=red"
            )
        # By the source's splits: the tokenised table, its examples without their texts, and their digest.
        self._tables: dict[str, tuple[datasets.Dataset, Examples]] = {}
        self._digests: dict[str, str] = {}
        self._hashes: dict[str, np.ndarray] = {}  # of the texts of each example
        self._subsets: dict[str, Subset] = {}  # by the run's splits: what they are made of
        self._recorded = False

    # ---- what there is ----------------------------------------------------------------------------------------------

    @property
    def task(self) -> GLUETask:
        """Columns, labels and metrics; of a custom task they are found in its training examples."""
        return self.source.task

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by label; none for regression."""
        return list(self.task.class_names)

    def number_classes(self, names: list[str]) -> None:
        """Numbers the classes of a custom task in another order, a checkpoint's; `names` are those of `class_names`."""
        place = np.array([names.index(name) for name in self.class_names])  # by the label that they had

        def moved(labels: np.ndarray) -> np.ndarray:
            return np.where(labels == batching.IGNORE, labels, place[np.maximum(labels, 0)])

        self.source = replace(self.source, class_names=tuple(names))
        for split, (table, examples) in self._tables.items():
            self._tables[split] = table, replace(examples, labels=moved(examples.labels))
        for dataset in self._datasets.values():
            dataset.labels = moved(dataset.labels)

    def example_hashes(self, split: str) -> np.ndarray | None:
        """A hash of the texts of each example of "train" or "test", of all its sets, (n,) int64."""
        subsets = [s for name, s in self._subsets.items() if name.partition("_")[0] == split]
        return np.concatenate([self._hashes[s.split][s.numbers] for s in subsets]) if subsets else None

    def expected_classes(self) -> int:
        """Outputs of the head, for counting parameters; GLUE's need no data."""
        return self.task.num_labels

    def description(self) -> dict[str, Any]:
        """What a module must know of these data; of a custom task only after `setup`, since its files tell.

        Returns:
            ``tokenizer_name``, ``task``, ``num_labels``, ``class_names``, ``metrics``, ``selection``, ``test_sets``
            (names of the sets by dataloader, [""] or MNLI's two), ``class_counts`` (training examples of each class),
            ``extremes`` and ``protocol``; the last three None where nothing was set up that tells.
        """
        said: dict[str, Any] = {"tokenizer_name": self.tokenizer_name}
        if self.source.name == CUSTOM and not self._datasets:
            return said
        task, train = self.task, self._datasets.get("train")
        counts = None if train is None or task.regression else np.bincount(train.labels, minlength=task.num_labels)
        return {
            **said,
            "task": task,
            "num_labels": task.num_labels,
            "class_names": self.class_names,
            "metrics": task.metrics,
            "selection": task.selection,
            "test_sets": list(task.sets),
            "class_counts": None if counts is None else counts.tolist(),
            "extremes": self.extremes(),
            "protocol": self.protocol() if self._datasets else None,
        }

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
            subsets = self._plan.subsets(self.task, one, self._examples)  # by the run's splits
            self._subsets.update(subsets)
            if one == "test" and "test" in self.source.files and subsets["test"].split != "test":
                rank_zero_warn(
                    f"split_protocol={self.split_protocol} scores on the {subsets['test'].split} file; test_file is "
                    "for predict: with labels, split_protocol=own_test scores on it"
                )
            for name in subsets:
                if name not in self._datasets and name.partition("_")[0] in LOADED[one]:
                    self._datasets[name] = self._build(name)
        if stage in ("fit", "validate", "test") and not self._recorded:
            splits.record_run(self.trainer, self.source.name, self.split_record, stage)
            self._recorded = stage == "fit"  # a test after this fit writes nothing

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The examples that select, longest first; a loader for each set of a task with several."""
        return self._evaluated("validation")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """The examples that are scored on, longest first; a loader for each set of a task with several."""
        return self._evaluated("test")

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """The test sets with ``ids``, in the order of their files; a loader for each set of a task with several."""
        return self._evaluated("predict")

    def _evaluated(self, kind: str) -> DataLoader | list[DataLoader]:
        loaders = []  # MNLI has two
        for set_name in self.task.sets:
            examples = self.dataset(self.task.named(kind, set_name))
            if kind != "predict":  # whose order is that of the file
                examples = examples.longest_first()
            shard = padded_shard(examples, self.trainer, without_label)
            loaders.append(
                self.make_loader(**shard, batch_size=self.eval_batch_size, collate_fn=self.collate_function())
            )
        return loaders[0] if len(loaders) == 1 else loaders

    def collate_function(self) -> Callable[..., Any]:
        ids = {"pad_id": pad_token_id(self.tokenizer), "pad_type_id": getattr(self.tokenizer, "pad_token_type_id", 0)}
        return partial(batching.collate_classified, **ids)

    # ---- building ---------------------------------------------------------------------------------------------------

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
            path = self.cache_folder / f"{name}-{split}"
            table = tokenised(examples.texts, self.tokenizer, self.max_length, path)
            self._digests[split] = digest(examples)
            self._hashes[split] = as_array(hash_texts(*texts) for texts in zip(*examples.texts, strict=True))
            self._tables[split] = table, replace(examples, texts=())  # which the table holds as tokens
        return self._tables[split]

    # ---- what is said of it -----------------------------------------------------------------------------------------

    def protocol(self) -> dict[str, Any]:
        """What was trained on and scored on, and how, as primitives."""
        facts = {
            "task": self.source.name,
            "source": REPOSITORY if self.source.on_hub else "files",
            "split_protocol": self.split_protocol,
            "selected_on_test": splits.selected_on_test(self._plan.cut),
            "split_seed": self.split_seed,
            "selection": self.task.selection,
            "max_length": self.max_length,
            "batching": self.batching,
            "train_limit": self.train_limit,
            "sizes": self._sizes(),
            "cut": {name: dataset.cut for name, dataset in self._datasets.items()},
            "sha256": dict(self._digests),
        }
        if "train" in self._datasets:
            # The share of padding in the first epoch's batches of one process, in random order and grouped.
            lengths, seed = self.dataset("train").lengths, int(os.environ.get("PL_GLOBAL_SEED", 0))
            shares = length_grouping.padding_shares(lengths, self.batch_size, seed=seed)
            facts["padding"] = {name: round(share, 4) for name, share in shares.items()}
        return facts

    def split_record(self) -> dict[str, Any]:
        """What ``splits/<task>.json`` says: protocol, seed, sizes, and the examples of every split.

        Returns:
            Primitives. Under "parts", for each split of the run, `Subset.record`.
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
