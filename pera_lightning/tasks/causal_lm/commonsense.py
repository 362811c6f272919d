"""The eight commonsense sets of LLM-Adapters (arXiv 2304.01933): their files, from a folder or its repository.

Prompts, decoding and the reading of answers are in `protocols/commonsense.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pera_lightning.data import downloads
from pera_lightning.data.folder_files import warn_of_size
from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.tasks.causal_lm.data import TextDataModule
from pera_lightning.tasks.causal_lm.examples import Example, read_examples
from pera_lightning.tasks.causal_lm.protocols.commonsense import SETS, TASK, options
from pera_lightning.validation import check_choice

# The branch and no commit: of none could we establish that it has all these files. So the checksums of the first
# download are recorded, and the numbers of examples are held to those of the papers.
REPOSITORY = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main"
TRAINING_SETS: dict[str, int | None] = {"commonsense_170k": 170_420, "commonsense_15k": None}


class CommonsenseDataModule(TextDataModule):
    """Commonsense170K, or the training examples of single sets, and the eight test sets.

    Args:
        folder: folder of LLM-Adapters' files, laid out as in its repository (``ft-training_set/commonsense_170k.json``,
            ``dataset/ARC-Easy/test.json``) or without those two folders. By default the files that are needed are
            downloaded from the repository into `cache_dir`, once, and held to their checksums ever after.
        train: "commonsense_170k", "commonsense_15k", or a list of sets, whose training examples are joined.
        test: sets to test on; by default all eight, in the order of the papers' tables.
        protocol: "llm_adapters", "hira", "strict" or "score", see `protocols/commonsense.py`.
        download_from: base URL of a mirror of the repository; its files end as those of the repository do.
        options: those of `TextDataModule`.
    """

    task = TASK

    def __init__(
        self,
        folder: str | None = None,
        *,
        train: str | list[str] = "commonsense_170k",
        test: list[str] | None = None,
        protocol: str = "hira",
        download_from: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(protocol=protocol, **options)
        if folder is not None and download_from is not None:
            raise ConfigurationError("folder and download_from exclude each other; leave one out")
        self.folder = None if folder is None else Path(folder).expanduser()
        self.download_from = (download_from or REPOSITORY).rstrip("/")
        self.train = [train] if isinstance(train, str) else list(train)
        self.test = list(SETS) if test is None else list(test)
        _check_names("train", self.train, [*TRAINING_SETS, *SETS])
        _check_names("test", self.test, [*SETS])

    def prepare_data(self) -> None:
        """Downloads what this run needs and lacks, in one process of each machine, and tokenises."""
        training, testing = self.needed()
        places = [_place(name, "train") for name in self.train if training]
        places += [_place(name, "test") for name in self.test if testing]
        for place in places if self.folder is None else ():
            downloads.fetch(f"{self.download_from}/{place}", self._downloaded(place))
        super().prepare_data()

    def training_examples(self) -> list[Example]:
        found = [one for name in self.train for one in self._read(name, "train", TRAINING_SETS.get(name))]
        _warn_of_answers(found)
        return found

    def test_examples(self) -> dict[str, list[Example]]:
        return {name: self._read(name, "test", SETS[name].count) for name in self.test}

    def _read(self, name: str, split: str, expected: int | None) -> list[Example]:
        path, needed = self._find(_place(name, split)), ("instruction", "output" if split == "train" else "answer")
        examples = read_examples(path, set_name=name, split=split, needed=needed)
        if self.folder is None and expected not in (None, len(examples)):
            record = downloads.record_path(path).name
            raise DataError(
                f"{path}, downloaded, has {len(examples)} examples and the papers' file has {expected}; delete it and "
                f"{record} to download it again, or give folder"
            )
        warn_of_size(name, len(examples), expected, path)
        return examples

    def _downloaded(self, place: str) -> Path:
        return self.cache_folder / "llm_adapters" / place

    def _find(self, place: str) -> Path:
        """The path of a file of the repository: a download, or in the folder given."""
        if self.folder is None:
            path = self._downloaded(place)
            if not path.is_file():
                raise ConfigurationError(f"{path} is there after prepare_data(); call it first, or give folder")
            return downloads.verified(path)
        short = place.partition("/")[2]
        for path in (self.folder / short, self.folder / place):
            if path.is_file():
                return path
        what = f"has neither {short} nor {place}" if self.folder.is_dir() else "is not a folder"
        raise DataError(f"{self.folder} {what}; give the folder of LLM-Adapters' files, or none to download them")


def _warn_of_answers(examples: list[Example]) -> None:
    """Warns of training examples whose answer is not one of their options; they are trained on as they are."""
    wrong = []
    for one in examples:
        with suppress(DataError):  # a training example need not say its options
            if one.answer and one.answer not in (words := options(one)):
                wrong.append(f"{one.id} has {one.answer!r}, of {'/'.join(words)}")
    if wrong:
        rank_zero_warn(
            f"{len(wrong)} of {len(examples)} training examples have an answer that is not one of their options, and "
            f"are trained on as they are: {wrong[0]}"
        )


def _place(name: str, split: str) -> str:
    """Where a file lies in the repository."""
    return f"dataset/{name}/{split}.json" if name in SETS else f"ft-training_set/{name}.json"


def _check_names(argument: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        check_choice(name, argument, known)
    if not names or len({*names}) < len(names):
        raise ConfigurationError(f"{argument}={list(names)}: one set or more is needed, each once")
