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

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pera_lightning.data.json_files import read_json
from pera_lightning.errors import ConfigurationError, DataError, listed
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
        if found := [path for path in places if path.is_file()]:
            if more := [path.name for path in found[1:]]:
                rank_zero_warn(f"{listed(more)} of {found[0].parent} is not read: {found[0].name} is; see {argument}=")
            return found[0]
        tried = ", ".join(map(str, places)) or "folder is not given either"
        raise DataError(f"{argument}: no such file ({tried}). {_ORIGIN}")


@dataclass
class Dialogue:
    """One dialogue."""

    where: str  # names it in messages
    persona: list[str] = field(default_factory=list)  # sentences about the one who answers
    turns: list[tuple[str, str]] = field(default_factory=list)  # what the partner said and what was answered, in order


def read_replies(path: Path) -> list[Example]:
    """Reads every reply of a file as an example, with its persona and all that was said before it in the instruction.

    Args:
        path: JSON or JSON lines by its ending, else ParlAI's text; ids are ``<stem>/<dialogue>/<turn>``, from 0.
    """
    if path.suffix in (".json", ".jsonl"):
        dialogues = [_of_entry(entry, f"dialogue {k} of {path}") for k, entry in enumerate(read_json(path))]
    else:
        dialogues = _of_text(path)
    examples = []
    for number, dialogue in enumerate(dialogues):
        for turn, (partner, reply) in enumerate(dialogue.turns):
            try:
                instruction = render(dialogue.persona, dialogue.turns[:turn], partner)
            except DataError as error:
                raise DataError(f"{dialogue.where}, turn {turn}: {error}") from None
            if not reply.strip():
                raise DataError(f"{dialogue.where}, turn {turn}: the reply is empty; leave the turn out")
            one = Example(f"{path.stem}/{number}/{turn}", "convai2", instruction, input="", output=reply, answer=reply)
            examples.append(one)
    if not examples:
        raise DataError(f"{path} has no dialogue with a reply. {_ORIGIN}")
    return examples


def _of_entry(entry: Any, where: str) -> Dialogue:
    entry = entry if isinstance(entry, Mapping) else {}
    persona, turns = (value if isinstance(value := entry.get(name), list) else [None] for name in ("persona", "turns"))
    pairs = [(turn.get("partner"), turn.get("self")) for turn in turns if isinstance(turn, Mapping)]
    texts = [*persona, *(text for pair in pairs for text in pair)]
    if len(pairs) < len(turns) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where}: 'persona', a list of sentences, and 'turns', a list of objects with the texts 'partner' and "
            "'self', are needed"
        )
    return Dialogue(where, persona, pairs)


def _of_text(path: Path) -> list[Dialogue]:
    dialogues: list[Dialogue] = []
    last = 0  # number of the line before
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        found = _LINE.fullmatch(line.rstrip("\r"))
        # Each dialogue counts its lines from 1.
        if found is None or int(found[1]) not in (1, last + 1) or not (dialogues or found[1] == "1"):
            raise DataError(f"{where} is not in ParlAI's form, the next number or 1, a space and text. {_ORIGIN}")
        last, text = int(found[1]), found[2]
        if last == 1:
            dialogues.append(Dialogue(f"the dialogue from line {number} of {path}"))
        if text.startswith(_PERSONA):
            dialogues[-1].persona.append(text.removeprefix(_PERSONA).strip())
        elif text.startswith(_OTHER):
            raise DataError(f"{where} has the partner's persona; give a file of the self persona, {TEST_FILES[0]}")
        elif "\t" in text:
            partner, reply = text.split("\t")[:2]  # candidates follow
            dialogues[-1].turns.append((partner.strip(), reply.strip()))
        else:
            raise DataError(f"{where} has no reply after a tab; complete the line or leave the dialogue out")
    return dialogues
