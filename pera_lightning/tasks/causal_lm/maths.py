"""Word problems: MetaMathQA (arXiv 2309.12284) to train on, GSM8K (arXiv 2110.14168) to test on.

Decoding and the reading of numbers are in `protocols/maths.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pera_lightning.data import hub
from pera_lightning.data.folder_files import warn_of_size
from pera_lightning.data.json_files import read_json
from pera_lightning.errors import ConfigurationError, DataError, listed
from pera_lightning.tasks.causal_lm.data import TextDataModule
from pera_lightning.tasks.causal_lm.examples import Example, to_example
from pera_lightning.tasks.causal_lm.protocols.maths import read_otherwise

# Test examples of GSM8K and of LLM-Adapters' sets of numbers (arXiv 2304.01933, table 1).
SET_SIZES = {"gsm8k": 1319, "AddSub": 395, "MultiArith": 600, "SingleEq": 508, "SVAMP": 1000}
_ENDINGS = (".json", ".jsonl")
# Columns that tell a form, the first that fits: LLM-Adapters', MetaMathQA's, GSM8K's.
_FORMS = (("instruction",), ("query", "response"), ("question", "answer"))
_COLUMNS = {"instruction", "input", "output", "answer", "query", "response", "question"}
_IN_WORDS = (
    "instruction and output or answer (LLM-Adapters), query and response (MetaMathQA), question and answer (GSM8K)"
)


class MathsDataModule(TextDataModule):
    """MetaMathQA and GSM8K, or word problems of your own in one of three forms.

    The columns tell the form. LLM-Adapters': "instruction", "input", "output", "answer". MetaMathQA's: "query" and
    "response", whose answer follows "The answer is:". GSM8K's: "question" and "answer", which is the entire solution
    and ends in "#### 72"; it is trained on as it is. The answer of a test example has to be a number.

    Args:
        train: hub id, of which the split "train" is read, or a file of JSON or JSON lines. A configuration is given
            after a colon, as in "openai/gsm8k:main".
        test: the same, with the split "test".
        protocol: "last_number" or "last_written_number", see `protocols/maths.py`.
        options: those of `TextDataModule`.
    """

    task = "maths"

    def __init__(
        self,
        *,
        train: str = "meta-math/MetaMathQA",
        test: str = "openai/gsm8k:main",
        protocol: str = "last_number",
        **options: Any,
    ) -> None:
        super().__init__(protocol=protocol, **options)
        self.train, self.test = train, test
        for argument, source in (("train", train), ("test", test)):
            if not _is_file(source) and source.count("/") != 1:
                raise ConfigurationError(
                    f"{argument}={source!r}: a hub id like org/name or a .json or .jsonl is needed"
                )

    def prepare_data(self) -> None:
        """Downloads what this run needs from the hub, in one process of each machine."""
        for source, split, needed in zip((self.train, self.test), ("train", "test"), self.needed(), strict=True):
            if needed and not _is_file(source):
                _load(source, split)
        super().prepare_data()

    def training_examples(self) -> list[Example]:
        return read_problems(self.train, "train")

    def test_examples(self) -> dict[str, list[Example]]:
        name, examples = _name(self.test), read_problems(self.test, "test")
        warn_of_size(name, len(examples), SET_SIZES.get(name), self.test)
        for one in examples:  # first, so that an answer that is no number is named with its example
            self.evaluation.check(one)
        if unread := read_otherwise(self.evaluation, examples):
            shown = listed([repr(one.answer[-20:]) for one in unread], 3)
            rank_zero_warn(
                f"{len(unread)} of {len(examples)} answers of {name} are written in a form that "
                f"protocol={self.evaluation.name} does not read in what a model writes ({shown}): such answers count "
                "as wrong; last_written_number reads them"
            )
        return {name: examples}


def read_problems(source: str, split: str) -> list[Example]:
    """Reads word problems.

    Args:
        source: hub id with or without a configuration, or file.
        split: "train" or "test".

    Raises:
        DataError: if there are none, or an example cannot be used.
    """
    if _is_file(source):
        where, entries = source, read_json(Path(source).expanduser())
    else:
        where, table = f"data set {source}, split {split!r}", _load(source, split)
        # Other columns, such as MetaMathQA's of originals, would be long lists for nothing.
        entries = table.select_columns([name for name in table.column_names if name in _COLUMNS]).to_list()
    names = list(entries[0]) if entries and isinstance(entries[0], Mapping) else []
    form = next((form for form in _FORMS if set(form) <= set(names)), None)
    if form is None:
        raise DataError(f"{where} has the columns {listed(names) or 'of no object'}; known are {_IN_WORDS}")
    needed = ("instruction", "output" if split == "train" else "answer")
    about = {"set_name": _name(source), "split": split, "source": where, "needed": needed}
    return [
        to_example(_unified(entry, form, f"example {k} of {where}"), number=k, **about)
        for k, entry in enumerate(entries)
    ]


def _is_file(source: str) -> bool:
    return source.endswith(_ENDINGS) or Path(source).expanduser().is_file()


def _name(source: str) -> str:
    """What a source is called in results: ``openai/gsm8k:main`` is gsm8k, ``anywhere/problems.json`` is problems.

    A file that is called train or test says nothing: it is "maths", or the set of LLM-Adapters that its folder is
    called like (``dataset/AddSub/test.json``), and never another folder.
    """
    if not _is_file(source):
        return source.partition(":")[0].rpartition("/")[2]
    path = Path(source).expanduser().absolute()
    if path.stem not in ("train", "test"):
        return path.stem
    return path.parent.name if path.parent.name in SET_SIZES else MathsDataModule.task


def _load(source: str, split: str) -> Any:
    repository, _, config = source.partition(":")
    try:
        return hub.load_table(repository, config or None, split, instead="a file of JSON or JSON lines")
    except DataError as error:  # that of datasets names the configurations, and not how to give one
        raise DataError(f"{error} (its configuration, if it has several, as ORG/NAME:CONFIGURATION)") from error


def _unified(entry: Any, form: tuple[str, ...], where: str) -> Any:
    """An entry in LLM-Adapters' form."""
    if form == ("instruction",) or not isinstance(entry, Mapping):
        return entry
    question, solution = (entry.get(name) for name in form)
    if not isinstance(question, str) or not isinstance(solution, str):
        raise DataError(f"{where}: text is needed as {form[0]!r} and as {form[1]!r}; correct it or leave it out")
    mark = "The answer is:" if form[0] == "query" else "####"  # MetaMathQA's, or GSM8K's
    return {"instruction": question, "output": solution, "answer": solution.rpartition(mark)[2].strip()}
