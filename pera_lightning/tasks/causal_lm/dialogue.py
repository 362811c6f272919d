"""ConvAI2 with the persona of the one who answers: every reply of a dialogue is an example. arXiv 1902.00098.

Decoding, the wording of a dialogue and its metrics are in `protocols/dialogue.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pera_lightning.data.json_files import read_json
from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.files import read_text
from pera_lightning.tasks.causal_lm.data import TextDataModule
from pera_lightning.tasks.causal_lm.examples import Example
from pera_lightning.tasks.causal_lm.protocols.dialogue import render, summary

# By their usual names. The test set of ConvAI2 was never given out; its validation file is what papers test on.
TRAINING_FILES = ("train_self_original.txt", "train_self_original_no_cands.txt", "train.jsonl")
TEST_FILES = ("valid_self_original.txt", "valid_self_original_no_cands.txt", "valid.jsonl")
_ORIGIN = (
    "ConvAI2 comes with ParlAI (`parlai display_data -t convai2` downloads it): give its train_self_original.txt and "
    'valid_self_original.txt, or JSON lines of {"persona": [...], "turns": [{"partner": ..., "self": ...}]}'
)
_LINE = re.compile(r"(\d+) (.*)")
_PERSONA, _OTHER = "your persona:", "partner's persona:"


class DialogueDataModule(TextDataModule):
    """ConvAI2, self persona, from ParlAI's text files or JSON lines.

    ParlAI's lines are numbered from 1 in each dialogue: "1 your persona: i like tea.", later "5 what the partner
    says", a tab, "the reply", and candidates after more tabs, which are passed over; "__SILENCE__", a partner who has
    said nothing yet, stays. A file that ends in .json or .jsonl has a dialogue a line (or a list of them): "persona",
    a list of sentences, and "turns", a list of objects with "partner" and "self".

    Args:
        folder: with both files by their usual names: train_self_original.txt or train.jsonl, and
            valid_self_original.txt or valid.jsonl.
        train: the training file; by default that of the folder.
        test: the test file; by default the folder's validation file, since ConvAI2's test set is not public.
        protocol: "self_persona", see `protocols/dialogue.py`.
        meteor: measures METEOR too; needs the WordNet files of nltk.
        bertscore_model: measures BERTScore too, by this encoder (folder or hub id).
        options: those of `TextDataModule`.
    """

    task = "dialogue"

    def __init__(
        self,
        folder: str | None = None,
        *,
        train: str | None = None,
        test: str | None = None,
        protocol: str = "self_persona",
        meteor: bool = False,
        bertscore_model: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(protocol=protocol, **options)
        more = partial(summary, with_meteor=meteor, bertscore_model=bertscore_model)
        self.evaluation = replace(self.evaluation, summarise=more)
        if folder is None and train is None and test is None:
            raise ConfigurationError(f"give folder, or train and test. {_ORIGIN}")
        self.folder = None if folder is None else Path(folder).expanduser()
        self.train = None if train is None else Path(train).expanduser()
        self.test = None if test is None else Path(test).expanduser()

    def training_examples(self) -> list[Example]:
        return read_replies(self._find("train", self.train, TRAINING_FILES))

    def test_examples(self) -> dict[str, list[Example]]:
        return {"convai2": read_replies(self._find("test", self.test, TEST_FILES))}

    def _find(self, argument: str, given: Path | None, usual: tuple[str, ...]) -> Path:
        places = [given] if given is not None else [self.folder / name for name in usual] if self.folder else []
        for path in places:
            if path.is_file():
                return path
        if given is not None:
            raise DataError(f"{argument}: there is no file {given}. {_ORIGIN}")
        if self.folder is None:
            raise DataError(f"{argument} is needed here and not given; nor is folder. {_ORIGIN}")
        raise DataError(f"{self.folder} has none of {', '.join(usual)}; or give {argument}. {_ORIGIN}")


@dataclass
class Dialogue:
    """One dialogue.

    Attributes:
        where: names it in messages.
        persona: sentences about the one who answers.
        turns: what the partner said and what was answered, in order.
    """

    where: str
    persona: list[str] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)


def read_replies(path: Path) -> list[Example]:
    """Reads every reply of a file as an example, with its persona and all that was said before it in the instruction.

    Args:
        path: JSON or JSON lines by its ending, else ParlAI's text; ids are ``<stem>/<dialogue>/<turn>``, from 0.

    Raises:
        DataError: for a file or dialogue that cannot be used, naming it.
    """
    dialogues = _of_json(path) if path.suffix in (".json", ".jsonl") else _of_text(path)
    examples = []
    for number, dialogue in enumerate(dialogues):
        for turn, (partner, reply) in enumerate(dialogue.turns):
            try:
                instruction = render(dialogue.persona, dialogue.turns[:turn], partner)
            except DataError as error:
                raise DataError(f"{dialogue.where}, turn {turn}: {error}") from None
            if not reply.strip():
                raise DataError(f"{dialogue.where}, turn {turn}: the reply is empty; leave the turn out")
            name = f"{path.stem}/{number}/{turn}"
            examples.append(
                Example(id=name, set="convai2", instruction=instruction, input="", output=reply, answer=reply)
            )
    if not examples:
        raise DataError(f"{path} has no dialogue with a reply. {_ORIGIN}")
    return examples


def _of_json(path: Path) -> list[Dialogue]:
    return [_of_entry(entry, f"dialogue {k} of {path}") for k, entry in enumerate(read_json(path))]


def _of_entry(entry: Any, where: str) -> Dialogue:
    persona, turns = (entry.get(name) if isinstance(entry, Mapping) else None for name in ("persona", "turns"))
    if not isinstance(persona, list) or not all(isinstance(sentence, str) for sentence in persona):
        raise DataError(f"{where}: 'persona' has to be a list of sentences")
    if not isinstance(turns, list):
        raise DataError(f"{where}: 'turns' has to be a list of objects with 'partner' and 'self'")
    pairs = []
    for number, turn in enumerate(turns):
        pair = [turn.get(name) if isinstance(turn, Mapping) else None for name in ("partner", "self")]
        if not all(isinstance(text, str) for text in pair):
            raise DataError(f"{where}, turn {number}: 'partner' and 'self' have to be there, both text")
        pairs.append((pair[0], pair[1]))
    return Dialogue(where, persona, pairs)


def _of_text(path: Path) -> list[Dialogue]:
    dialogues: list[Dialogue] = []
    last = 0
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        found = _LINE.fullmatch(line)
        if found is None:
            raise DataError(f"{where} is not in ParlAI's form, a number, a space and text. {_ORIGIN}")
        own, text = int(found[1]), found[2]
        if own == 1:
            dialogues.append(Dialogue(f"the dialogue from line {number} of {path}"))
        elif not dialogues or own != last + 1:
            raise DataError(f"{where} has number {own} after {last}; a dialogue counts its lines from 1")
        last = own
        _add(dialogues[-1], text, where)
    return dialogues


def _add(dialogue: Dialogue, text: str, where: str) -> None:
    if text.startswith(_PERSONA):
        dialogue.persona.append(text.removeprefix(_PERSONA).strip())
    elif text.startswith(_OTHER):
        raise DataError(f"{where} has the partner's persona; give a file of the self persona, such as {TEST_FILES[0]}")
    elif "\t" in text:
        partner, reply = text.split("\t")[:2]
        dialogue.turns.append((partner.strip(), reply.strip()))
    else:
        raise DataError(f"{where} has no reply after a tab; complete the line or leave the dialogue out")
