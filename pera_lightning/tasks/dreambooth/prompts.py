"""Prompts of a subject: what it is called, lists with ``{}`` for it, and the rows that images are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.dreambooth.subject_prompts import SUBJECT, has_other_braces

FILLER = -1  # the seed of a row that fills up
_PICTURE = "photo|photograph|picture|image|painting|drawing|rendering|portrait|close-?up|selfie|depiction"
_OPENING = re.compile(rf"^(?:(?:\S+\s+){{0,3}}(?:{_PICTURE})\s+of\s+)?(?:(?:an?|the|my|one)\s+)?", re.IGNORECASE)
_ENDING = re.compile(r"(?:[,.;:]|\s(?:in|on|at|with|under|by|near|against|standing|sitting)\b).*$", re.IGNORECASE)
_LONGEST = 2**63 - 1


@dataclass(frozen=True)
class Subject:
    """What prompts call a subject.

    Attributes:
        identifier: the rare word that is learnt, such as "sks".
        class_words: what it is one of, such as "dog"; may be empty.
    """

    identifier: str
    class_words: str

    def __str__(self) -> str:
        return f"{self.identifier} {self.class_words}".strip()


def names(prompt: str, identifier: str) -> bool:
    """Whether a prompt has the identifier as words of their own, in whatever case (CLIP lowers it)."""
    return re.search(_words_of_their_own(identifier), prompt, re.IGNORECASE) is not None


def _words_of_their_own(words: str) -> str:
    return rf"(?<!\w){re.escape(words)}(?!\w)"


def subject_of(prompt: str, identifier: str | None = None, class_prompt: str | None = None) -> Subject:
    """The subject of a prompt: "sks dog" of "a photo of sks dog in the park".

    Args:
        prompt: the instance prompt.
        identifier: of the subject; otherwise what the prompt has before the words that it shares with `class_prompt`
            ("a photo of dog"), else the first word after "a photo of a".
        class_prompt: the same prompt without the identifier.
    """
    noun = _noun(prompt)
    if identifier is None:
        identifier = _beyond(noun.split(), _noun(class_prompt or "").split()) or noun.partition(" ")[0] or prompt
    if not names(prompt, identifier):
        return Subject(identifier, noun)
    after = re.split(_words_of_their_own(identifier), prompt, maxsplit=1, flags=re.IGNORECASE)[1]
    return Subject(identifier, _ENDING.sub("", after).strip())


def _noun(prompt: str) -> str:
    return _ENDING.sub("", _OPENING.sub("", prompt.strip())).strip()


def _beyond(words: Sequence[str], of_class: Sequence[str]) -> str:
    """The words before the end that two prompts share; none where they share none."""
    shared = 0
    while shared < min(len(words), len(of_class)) and words[-1 - shared].lower() == of_class[-1 - shared].lower():
        shared += 1
    return " ".join(words[: len(words) - shared]) if shared else ""


def without(prompts: Iterable[str], identifier: str) -> list[str]:
    """The prompts that do not have the identifier."""
    return [prompt for prompt in prompts if not names(prompt, identifier)]


def fill(prompts: Iterable[str], subject: Subject) -> list[str]:
    """Prompts with the subject in place of ``{}``."""
    return [prompt.replace("{}", str(subject)) for prompt in prompts]


def check_prompts(prompts: Sequence[str], argument: str) -> None:
    """Refuses prompts that are empty or have braces other than ``{}``, and a text in place of a list.

    Raises:
        ConfigurationError: naming the argument.
    """
    if isinstance(prompts, str):
        raise ConfigurationError(f"{argument} takes a list of prompts; given {prompts!r}")
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ConfigurationError(f"{argument} has {'an empty prompt' if prompts else 'no prompts'}; give at least one")
    for prompt in prompts:
        if has_other_braces(prompt):
            raise ConfigurationError(f"{argument}: {prompt!r} has braces that are not {SUBJECT}; write {SUBJECT} alone")


def check_seeds(seeds: Sequence[int], argument: str) -> None:
    """Refuses seeds that are out of range or come twice.

    Raises:
        ConfigurationError: naming the argument.
    """
    if not seeds or not all(0 <= seed <= _LONGEST for seed in seeds):
        raise ConfigurationError(f"{argument} takes at least one number of 0 to 2^63 - 1; given {list(seeds)}")
    if len(set(seeds)) < len(seeds):
        raise ConfigurationError(f"{argument} has a seed twice, which would make the same image: {list(seeds)}")


def generation_rows(prompts: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One image each: ``prompt``, ``seed``, and ``name``, a file stem that no other has; all seeds of a prompt first.

    Args:
        prompts: without ``{}``.
        seeds: for each prompt.
    """
    digits = max(2, len(str(len(prompts) - 1)))
    return [
        {"prompt": prompt, "seed": seed, "name": f"{number:0{digits}d}-{_stem(prompt)}-seed{seed}"}
        for number, prompt in enumerate(prompts)
        for seed in seeds
    ]


def blank(row: dict[str, Any]) -> dict[str, Any]:
    """The same row as one that fills up."""
    return {**row, "seed": FILLER}


def _stem(prompt: str) -> str:
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    return words[:40].rstrip("-") or "prompt"  # of four bytes each at most, and file systems take 255
