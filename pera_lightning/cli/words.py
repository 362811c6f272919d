"""The words of a command line: the values of its options, and the configs that it names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from pera_lightning.errors import PeraError, closest

CONFIG_FLAGS = ("--config", "-c")


def taken_out(words: Sequence[str], flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values given to an option, as ``--flag VALUE`` or ``--flag=VALUE``, and the other words."""
    values, others = [], []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in flags:
            values += [value] if equals else islice(rest, 1)  # the value is the next word, if there is one
        else:
            others.append(word)
    return values, others


def config_file(words: Sequence[str]) -> Path | None:
    """The first config of a command that is a file, not YAML on the command line."""
    given, _ = taken_out(words, CONFIG_FLAGS)
    return next((Path(value) for value in given if value and not value.lstrip().startswith("{")), None)


def find_configs(words: list[str]) -> list[str]:
    """Words with each config path resolved: as given, else among the configs that come with the package."""
    # In their places: what stands after a config overrides it, what stands before does not.
    found = list(words)
    for k, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in CONFIG_FLAGS and equals:
            found[k] = f"{flag}={_config(value)}"
        elif word in CONFIG_FLAGS and k + 1 < len(words):
            found[k + 1] = _config(words[k + 1])
    return found


def _config(value: str) -> str:
    if Path(value).is_file() or value.lstrip().startswith("{"):
        return value
    # Installed, the configs lie in the package; in a checkout beside it.
    package = Path(__file__).resolve().parents[1]
    shipped = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package / "configs")
    inside = shipped / value.removeprefix("configs/")
    if inside.is_file():
        return str(inside)
    # The closest names are suggested; without any, the folder.
    names = [f"configs/{path.relative_to(shipped)}" for path in sorted(shipped.rglob("*.yaml"))]
    hint = closest(value, names) or f"; there are {len(names)} in configs/"
    raise PeraError(f"config {value!r} does not exist{hint}")
