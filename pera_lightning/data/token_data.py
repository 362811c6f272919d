"""The base of the data modules whose examples are token ids: the tokenizer, its cache, and the order of training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from pera_lightning.data import length_grouping
from pera_lightning.data.base import TaskDataModule
from pera_lightning.data.cached_tables import cache_folder
from pera_lightning.data.tokenization import pad_token_id
from pera_lightning.errors import ConfigurationError
from pera_lightning.validation import check_choice, check_in_range

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenDataModule(TaskDataModule):
    """Base of the data modules of tokenised examples; what is not given here, the subclasses describe.

    Args:
        tokenizer: hub id or folder; by default the tokenizer that the trainer's module requires.
        batch_size: examples in a training batch, per process.
        eval_batch_size: examples in every other batch; by default `batch_size`.
        batching: order of the training examples: "grouped": examples of similar length together; "random".
        num_workers: processes that make batches; 0 makes them in the main one.
        cache_dir: folder of tokenised examples and downloads; by default in the cache of the library datasets.
    """

    asks_module: str  # class of a module that has a tokenizer, for the message
    orders: tuple[str, ...] = ("grouped", "random")  # values of `batching`
    shortest = 1  # least `max_length`

    def __init__(
        self,
        *,
        max_length: int,
        split_seed: int,
        batch_size: int,
        tokenizer: str | None = None,
        eval_batch_size: int | None = None,
        batching: str = "grouped",
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer_name = tokenizer
        self.max_length, self.batch_size, self.batching = max_length, batch_size, batching
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.split_seed, self.num_workers = split_seed, num_workers
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        least = {"max_length": self.shortest, "batch_size": 1, "eval_batch_size": 1, "split_seed": 0, "num_workers": 0}
        for name, lowest in least.items():
            check_in_range(getattr(self, name), name, ge=lowest, integer=True)
        check_choice(batching, "batching", self.orders)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._datasets: dict[str, Any] = {}  # by name of the split, for the stages that were set up

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer given, else the one that the trainer's module requires; loaded once."""
        if self._tokenizer is None:
            self._tokenizer = self.find_tokenizer(self.asks_module)
            if self._tokenizer.pad_token_id is None:
                rank_zero_info(
                    f"the tokenizer has no padding token: {pad_token_id(self._tokenizer)} fills up, masked throughout"
                )
        return self._tokenizer

    @property
    def cache_folder(self) -> Path:
        """The folder of tokenised examples and downloads."""
        return self.cache_dir or cache_folder()

    def extremes(self) -> tuple[int, int] | None:
        """Tokens of the longest example there is, and the highest token id, padding included; None before `setup`."""
        if not self._datasets:
            return None
        longest = max(int(dataset.lengths.max()) for dataset in self._datasets.values())
        highest = max(dataset.highest for dataset in self._datasets.values())
        return longest, max(highest, pad_token_id(self.tokenizer))

    def dataset(self, name: str) -> Any:
        """The examples of a split; raises `ConfigurationError` before `setup`."""
        if name not in self._datasets:
            raise ConfigurationError(f"the {name} examples are there after setup(); call it first")
        return self._datasets[name]

    @abstractmethod
    def collate_function(self) -> Callable[..., Any]:
        """What makes a batch of examples."""

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches, of examples of similar length if `batching` is "grouped"."""
        examples = self.dataset("train")
        order: dict[str, Any] = {"shuffle": True}  # "random"; Lightning puts a distributed sampler in its place
        if self.batching == "grouped":
            order = {"sampler": length_grouping.grouped_sampler(examples.lengths, self.batch_size, self.trainer)}
        return self.make_loader(examples, batch_size=self.batch_size, collate_fn=self.collate_function(), **order)
