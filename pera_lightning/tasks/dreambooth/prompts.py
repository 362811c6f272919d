"""Prompts of a subject: what it is called, lists with ``{}`` for it, and the examples that images are generated of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.dreambooth.subject_prompts import SUBJECT, has_other_braces

FILLER = -1  # the seed of an example that fills up
_PICTURE = "photo|photograph|picture|image|painting|drawing|rendering|portrait|close-?up|selfie|depiction"
_OPENING = re.compile(rf"^(?:(?:\S+\s+){{0,3}}(?:{_PICTURE})\s+of\s+)?(?:(?:an?|the|my|one)\s+)?", re.IGNORECASE)
_ENDING = re.compile(r"(?:[,.;:]|\s(?:in|on|at|with|under|by|near|against|standing|sitting)\b).*$", re.IGNORECASE)


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
    """Tells whether a prompt has the identifier as words of their own, in any case (CLIP lowers it)."""
    return re.search(_as_words(identifier), prompt, re.IGNORECASE) is not None


def _as_words(words: str) -> str:
    return rf"(?<!\w){re.escape(words)}(?!\w)"  # "sks" is not in "sksy"


def subject_of(prompt: str, identifier: str | None = None, class_prompt: str | None = None) -> Subject:
    """Finds the subject of a prompt: "sks dog" in "a photo of sks dog in the park".

    Without `identifier` that is what the prompt has before the words shared with `class_prompt` ("a photo of dog"),
    else the first word after "a photo of a".
    """
    # 1. What the prompt has after "a photo of a" and before a comma, "in", "on" and the like.
    noun = _noun(prompt)  # "sks dog"
    # 2. The identifier: what the class prompt lacks, else the first word.
    if identifier is None:
        identifier = _beyond(noun.split(), _noun(class_prompt or "").split()) or noun.partition(" ")[0] or prompt
    if not names(prompt, identifier):
        return Subject(identifier, noun)  # the noun alone says what it is
    # 3. The class: what comes after it.
    after = re.split(_as_words(identifier), prompt, maxsplit=1, flags=re.IGNORECASE)[1]  # " dog in the park"
    return Subject(identifier, _ENDING.sub("", after).strip())


def _noun(prompt: str) -> str:
    return _ENDING.sub("", _OPENING.sub("", prompt.strip())).strip()


def _beyond(words: Sequence[str], of_class: Sequence[str]) -> str:
    """Gives the words before the end that two prompts share; none if they share none."""
    shared = 0  # words at the end that both have
    while shared < min(len(words), len(of_class)) and words[-1 - shared].lower() == of_class[-1 - shared].lower():
        shared += 1
    return " ".join(words[: len(words) - shared]) if shared else ""


def check_prompts(prompts: Sequence[str], argument: str) -> None:
    """Refuses prompts that are empty or have braces other than ``{}``, and a text in place of a list."""
    if isinstance(prompts, str) or not prompts or not all(prompt.strip() for prompt in prompts):
        raise ConfigurationError(f"{argument} takes a list of prompts, none of them empty; given {prompts!r}")
    for prompt in prompts:
        if has_other_braces(prompt):
            raise ConfigurationError(f"{argument}: {prompt!r} has braces that are not {SUBJECT}; write {SUBJECT} alone")


def check_seeds(seeds: Sequence[int], argument: str) -> None:
    """Refuses seeds that are out of range or come twice, which would make the same image."""
    if not seeds or not all(0 <= seed < 2**63 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigurationError(f"{argument} takes numbers of 0 to 2^63 - 1, each once; given {list(seeds)}")


def generation_examples(prompts: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Lists an image each: ``prompt``, ``seed``, ``name``, a file stem of its own; all seeds of a prompt first."""
    digits = max(2, len(str(len(prompts) - 1)))  # so that names sort as the prompts
    return [
        {"prompt": prompt, "seed": seed, "name": f"{number:0{digits}d}-{_stem(prompt)}-seed{seed}"}
        for number, prompt in enumerate(prompts)
        for seed in seeds
    ]


def blank(example: dict[str, Any]) -> dict[str, Any]:
    """Gives the same example as one that fills up."""
    return {**example, "seed": FILLER}


def _stem(prompt: str) -> str:
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    return words[:40].rstrip("-") or "prompt"  # of four bytes each at most, and file systems take 255
