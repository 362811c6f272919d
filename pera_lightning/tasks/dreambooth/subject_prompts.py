"""Prompts to try a subject with, as templates in which `{}` stands for it: "a photo of {} on a park bench".

A short list of our own, and two kinds of files: one prompt a line, and the file of the DreamBooth data set
(github.com/google/dreambooth, prompts_and_classes.txt), which has a table of subjects and one list of prompts for
objects and one for live subjects.
"""

from __future__ import annotations

import re
from pathlib import Path

from pera_lightning.errors import ConfigurationError, DataError, closest, listed
from pera_lightning.files import read_text

SUBJECT = "{}"

PROMPTS = (  # places, light and materials that suit things and animals; ours, in no paper
    "a photo of {} on a park bench in autumn",
    "a photo of {} between the shelves of an old library",
    "a photo of {} in front of a lighthouse at sunset",
    "a photo of {} on a snowy mountain path",
    "a photo of {} on a raft on a calm lake",
    "a close-up photo of {} on wet moss",
    "a photo of {} at night under neon lights",
    "an oil painting of {}",
    "a pencil drawing of {}",
    "{} made of blue glass",
)

# The data set's table does not say who is alive; its paper counts 9 pets among 30 subjects (arXiv 2208.12242, section
# 4), and these are its dogs and cats.
LIVE_CLASSES = ("cat", "dog")

_CALL = ".format("
_PROMPT = re.compile(r"""(["'])(?P<text>.*)\1\.format\(\s*unique_token\s*,\s*class_token\s*\)\s*,?""")
_TABLE = "subject_name,class"
_SECTIONS = {"object prompts": "object", "live subject prompts": "live"}


def read_prompts(path: str | Path, subject: str | None = None) -> list[str]:
    """Reads the prompts of a file, as templates with `{}`.

    Args:
        path: a file with one prompt a line, where lines that begin with `#` count for nothing; or the data set's
            prompts_and_classes.txt.
        subject: what the prompts are for, which decides between the lists of the data set's file: the name of a
            subject ("dog6") or words that end with a class ("sks dog"). Other files have one list for all.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"{path} is not a file: give prompts as a list, or a file with one prompt a line")
    lines = [line.strip() for line in read_text(path).splitlines()]  # of either kind of file
    # Python code of the data set's repository, or plain text.
    if any(_CALL in line or line.casefold() == _TABLE for line in lines):
        return _of_data_set(path, lines, subject)
    found = [_checked(path, n, line) for n, line in enumerate(lines, start=1) if line and not line.startswith("#")]
    if not found:
        raise DataError(f"{path} has no prompts; write one a line, with {SUBJECT} where the subject stands")
    return found


def has_other_braces(template: str) -> bool:
    """Tells whether a template has braces other than ``{}``, which would stand in the prompt as they are."""
    return re.search(r"[{}]", template.replace(SUBJECT, "")) is not None


def _checked(path: Path, number: int, template: str) -> str:
    """Returns the template of a line, once it is checked."""
    if has_other_braces(template):
        raise DataError(f"{path}, line {number}: {template!r} has braces that are not {SUBJECT}; write {SUBJECT} alone")
    return template


def _of_data_set(path: Path, lines: list[str], subject: str | None) -> list[str]:
    """Reads the list of the data set's file that fits a subject."""
    classes: dict[str, str] = {}  # subject -> class
    prompts: dict[str, list[str]] = {kind: [] for kind in _SECTIONS.values()}
    section = None  # the table of subjects, or one of the lists
    for number, line in enumerate(lines, start=1):
        if line.casefold() == _TABLE:
            section = "table"  # what follows are subjects and their classes
        elif line.casefold() in _SECTIONS:
            section = _SECTIONS[line.casefold()]  # what follows are prompts
        elif section == "table" and line.count(",") == 1:
            name, kind = (_words(cell) for cell in line.split(","))
            classes[name] = kind  # "dog6" is a dog
        elif _CALL in line:
            found = _PROMPT.fullmatch(line)  # of Python code, which is not run
            if found is None or "{0} {1}" not in found["text"] or section not in prompts:
                raise DataError(f"{path}, line {number}: {line!r} is not as in the data set; take its file as it is")
            # "{0} {1}" are the identifier and the class, which {} stands for together.
            prompts[section].append(_checked(path, number, found["text"].replace("{0} {1}", SUBJECT)))
    kind = "live" if _class_of(path, subject, classes) in LIVE_CLASSES else "object"
    if not prompts[kind]:
        raise DataError(f"{path} has no prompts for {kind} subjects; take the data set's file as it is")
    return prompts[kind]


def _class_of(path: Path, subject: str | None, classes: dict[str, str]) -> str:
    """Finds the class of a subject by the longest name that its words end with ("sks backpack dog" is not a dog)."""
    known = {**{kind: kind for kind in classes.values()}, **classes}
    words = _words(subject or "")
    ends = [name for name in known if f" {words}".endswith(f" {name}")]
    if not ends:
        has = f"it has {listed(dict.fromkeys(known))}{closest(words, known)}; end the subject with one of these"
        raise ConfigurationError(f"{path} does not say whether {subject!r} is an object or alive: {has}")
    return known[max(ends, key=len)]  # the longest: "tin robot cat" is a toy


def _words(name: str) -> str:
    """Writes a name in small letters with single spaces: "bear_plushie" is "bear plushie"."""
    return " ".join(name.casefold().replace("_", " ").split())
