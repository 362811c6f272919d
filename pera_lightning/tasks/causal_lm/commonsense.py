"""The commonsense sets of LLM-Adapters: one training file, eight test sets; from a folder or its repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from pera_lightning.data import downloads
from pera_lightning.errors import ConfigurationError, DataError, UnknownNameError, closest
from pera_lightning.tasks.causal_lm.commonsense import SETS, TASK, options
from pera_lightning.tasks.causal_lm.data import TextDataModule
from pera_lightning.tasks.causal_lm.examples import Row, read_rows

# The branch and no commit: of none could we establish that it has all these files. So the checksums of the first
# download are recorded, and the numbers of rows are held to those of the papers.
REPOSITORY = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main"
TRAINING_ROWS: dict[str, int | None] = {"commonsense_170k": 170_420, "commonsense_15k": None}


class CommonsenseDataModule(TextDataModule):
    """Commonsense170K, or the training rows of single sets, and the eight test sets.

    Args:
        folder: with LLM-Adapters' files, laid out as in its repository (``ft-training_set/commonsense_170k.json``,
            ``dataset/ARC-Easy/test.json``) or without those two folders. By default the files that are needed are
            downloaded from the repository into `cache_dir`, once, and held to their checksums ever after.
        train: "commonsense_170k", "commonsense_15k", or a list of sets, whose training rows are joined.
        test: sets to test on; by default all eight, in the order of the papers' tables.
        protocol: "llm_adapters", "hira", "strict" or "score", see `pera_lightning.tasks.causal_lm.commonsense`.
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
        for argument, names, known in (
            ("train", self.train, [*TRAINING_ROWS, *SETS]),
            ("test", self.test, list(SETS)),
        ):
            _check_names(argument, names, known)

    def prepare_data(self) -> None:
        """Downloads what this run needs and lacks, in one process of each machine, and tokenises."""
        training, testing = self.needed()
        places = [_training_place(name) for name in self.train if training]
        places += [_test_place(name) for name in self.test if testing]
        for place in places if self.folder is None else ():
            downloads.fetch(f"{self.download_from}/{place}", self._downloaded(place))
        super().prepare_data()

    def training_rows(self) -> list[Row]:
        rows: list[Row] = []
        for name in self.train:
            path = self._find(_training_place(name))
            own = read_rows(path, set_name=name, split="train")
            rows += self._counted(path, own, TRAINING_ROWS.get(name))
        _warn_of_answers(rows)
        return rows

    def test_rows(self) -> dict[str, list[Row]]:
        tests = {}
        for name in self.test:
            path = self._find(_test_place(name))
            rows = read_rows(path, set_name=name, split="test", needed=("instruction", "answer"))
            tests[name] = self._counted(path, rows, SETS[name].test_rows)
        return tests

    def _downloaded(self, place: str) -> Path:
        return self.cache_folder / "llm_adapters" / place

    def _find(self, place: str) -> Path:
        """A file of the repository: where the download has put it, or in the folder given."""
        if self.folder is None:
            path = self._downloaded(place)
            if not path.is_file():
                raise ConfigurationError(f"{path} is there after prepare_data(); call it first, or give folder")
            return downloads.verified(path)
        for path in (self.folder / place.partition("/")[2], self.folder / place):
            if path.is_file():
                return path
        if not self.folder.is_dir():
            raise DataError(f"{self.folder} is no folder; give that of LLM-Adapters' files, or none to download them")
        raise DataError(
            f"{self.folder} has neither {place.partition('/')[2]} nor {place}; give the folder of LLM-Adapters' files, "
            "or none to download them"
        )

    def _counted(self, path: Path, rows: list[Row], expected: int | None) -> list[Row]:
        if self.folder is None and expected not in (None, len(rows)):
            record = downloads.record_path(path).name
            raise DataError(
                f"{path}, downloaded, has {len(rows)} rows and the papers' file has {expected}; delete it and {record} "
                "to download it again, or give folder"
            )
        return rows


def _warn_of_answers(rows: list[Row]) -> None:
    """Warns of training rows whose answer is none of their options; they are trained on as they are written."""
    wrong = []
    for row in rows:
        try:
            words = options(row)
        except DataError:  # a training row need not say them
            continue
        if row.answer and row.answer not in words:
            wrong.append(f"{row.id} has {row.answer!r}, of {'/'.join(words)}")
    if wrong:
        rank_zero_warn(
            f"{len(wrong)} of {len(rows)} training rows have an answer that is none of their options, and are trained "
            f"on as they are: {wrong[0]}"
        )


def _training_place(name: str) -> str:
    return f"dataset/{name}/train.json" if name in SETS else f"ft-training_set/{name}.json"


def _test_place(name: str) -> str:
    return f"dataset/{name}/test.json"


def _check_names(argument: str, names: list[str], known: list[str]) -> None:
    if not names:
        raise ConfigurationError(f"{argument} names no set; give one or more of {', '.join(known)}")
    for name in names:
        if name not in known:
            there = ", ".join(known)
            raise UnknownNameError(f"{argument}: unknown set {name!r}; there are {there}{closest(name, known)}")
        if names.count(name) > 1:
            raise ConfigurationError(f"{argument} names {name} twice; leave one out")
