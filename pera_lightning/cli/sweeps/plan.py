"""The plan of a sweep: its own options apart from those of each run, grid values and seeds, a name for every run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from pera_lightning.errors import ConfigurationError

SEED = "{seed}"
LARGEST_SEED = 2**32 - 1  # of NumPy, and so of `seed_everything`
_NAME_LENGTH = 180  # file systems take 255 bytes, and temporary files add to a name
_VALUE_LENGTH = 40
_BRACKETS = {"[": "]", "{": "}", "(": ")"}

# What each run gets from the sweep, and what to do instead of giving it.
_SET_HERE = {
    "seed_everything": "give --seeds",
    "ckpt_path": "leave it out; every run goes on from its own last checkpoint, and its best one is tested",
    "trainer.default_root_dir": "give --output; every run has a folder in it",
    "trainer.logger.save_dir": "give --output; every run has a folder in it",
    "trainer.logger.name": "leave it out; a run's folder says its values and seed",
    "trainer.logger.version": "leave it out; a run's folder says its values and seed",
    "print_config": "use it with fit, or give --dry_run",
}


@dataclass
class Request:
    """The words after `sweep`, sorted."""

    words: list[str] = field(default_factory=list)  # of every run's fit and test
    seeds: tuple[int, ...] | None = None
    grid: dict[str, tuple[str, ...]] = field(default_factory=dict)  # key without init_args to its values
    output: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Run:
    """One run: grid values (key to text) and a seed."""

    name: str
    values: Mapping[str, str]
    seed: int


@dataclass(frozen=True)
class Plan:
    """What a sweep is asked to run."""

    runs: list[Run]
    seeds: tuple[int, ...]  # of each setting
    words: Sequence[str]  # of every run
    reference: Mapping[str, str]  # setting by which two sweeps of a folder are compared
    config: Mapping[str, Any]  # of the reference, flat, without what a run's folder sets
    loggers: Mapping[str, list[dict[str, Any]]]  # of each setting, by its name, as primitives


def read_request(words: Sequence[str]) -> Request:
    """Sorts the words after `sweep`; as everywhere on a command line, the last of several values of an option counts.

    Raises:
        ConfigurationError: for wrong values of sweep's own options, and for options that sweep sets itself.
    """
    # Sweep's own options are taken out; all other words go to every run, unread.
    request, rest = Request(), list(words)
    while rest:
        option, equals, value = (word := rest.pop(0)).partition("=")
        if word == "--dry_run":
            request.dry_run = True
        elif option in ("--seeds", "--output", "--grid"):
            values = [value] if equals else []
            # One --grid may be followed by several keys.
            stop = "-" if option == "--grid" else "--"  # a value may be negative
            while rest and not rest[0].startswith(stop) and (option == "--grid" or not values):
                values.append(rest.pop(0))
            if not values:
                raise ConfigurationError(f"{option}: expected one argument")
            if option == "--seeds":
                request.seeds = read_seeds(values[0])
            elif option == "--output":
                request.output = values[0]
            else:
                for key, texts in map(read_grid, values):
                    if key in request.grid:
                        raise ConfigurationError(f"--grid {key} is given twice: give all its values at once")
                    request.grid[key] = texts
        else:
            request.words.append(word)  # of the runs
    _check_words(request)
    return request


def _check_words(request: Request) -> None:
    given = [plain_key(word.partition("=")[0][2:]) for word in request.words if word.startswith("--")]
    for key in [*given, *request.grid]:
        if key in _SET_HERE:
            raise ConfigurationError(f"--{key} is set by sweep: {_SET_HERE[key]}")
    for key in request.grid:
        if key in given:
            raise ConfigurationError(f"--{key} is given, and swept over by --grid: leave one of them out")
        if key in ("config", "trainer.logger"):
            raise ConfigurationError(f"--grid {key}: not one value of the config; give each an --output of its own")


def read_seeds(text: str) -> tuple[int, ...]:
    """The seeds in ``"42,43,44"``."""
    words = [word.strip() for word in text.split(",")]
    seeds = tuple(int(word) for word in words if re.fullmatch("[0-9]+", word) and int(word) <= LARGEST_SEED)
    if len(set(seeds)) < len(words):
        raise ConfigurationError(
            f"--seeds {text}: different whole numbers from 0 to {LARGEST_SEED} are needed, such as 42,43,44"
        )
    return seeds


def read_grid(text: str) -> tuple[str, tuple[str, ...]]:
    """The key and the values in ``"model.lr=0.001,0.01"``; commas within brackets and quotes do not divide."""
    key, _, values = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", key) or not values.strip():
        raise ConfigurationError(f"--grid {text}: a key and its values are needed, such as model.lr=0.001,0.01")
    parts = split_values(values)  # as they are written
    if parts is None or not all(parts):
        raise ConfigurationError(
            f"--grid {text}: one of its values is empty, or has brackets or quotes that do not close"
        )
    # 1e-3 and 0.001 are one value.
    if len({*map(canonical, parts)}) < len(parts):
        raise ConfigurationError(f"--grid {text}: a value is given twice")
    return plain_key(key), tuple(parts)


def split_values(text: str) -> list[str] | None:
    """Divides a text at the commas outside brackets and quotes; None where these do not close."""
    values, open_, quote = [""], [], ""
    for letter in text:
        # A quote opens at the start of a value or inside of brackets: "it's" has none.
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and (open_ or not values[-1].strip()):
            quote = letter
        elif letter in _BRACKETS:
            open_.append(_BRACKETS[letter])
        elif open_ and letter == open_[-1]:
            open_.pop()
        elif letter == "," and not open_:
            values.append("")
            continue
        values[-1] += letter
    if open_ or quote:
        return None
    return [re.sub(r"""^(["'])(.*)\1$""", r"\2", value.strip()) for value in values]


def plain_key(key: str) -> str:
    """A key without what may be left out of it: ``model.init_args.lr`` is ``model.lr``."""
    return ".".join(part for part in key.split(".") if part not in ("init_args", "class_path"))


def canonical(text: str) -> str:
    """One form of the ways to write a number (1e-3, 0.001), so that a run is found again; else the text."""
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return str(int(text))
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        return repr(float(text))
    return text


def settings(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """All combinations of a grid's values, the last key changing first; of no grid one without values."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def runs(grid: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> list[Run]:
    """A run for each setting and seed, the seeds of a setting one after the other."""
    planned = [Run(run_name(values, seed), values, seed) for values in settings(grid) for seed in seeds]
    # On some file systems a.txt and A.txt are one file.
    if len({run.name.casefold() for run in planned}) < len(planned):
        raise ConfigurationError("values that differ in capitals alone cannot have a folder each: sweep them apart")
    return planned


def run_name(values: Mapping[str, str], seed: int) -> str:
    """A folder's name that says values and seed: ``lr=0.001_seed=42``; ``seed42`` where nothing else is swept."""
    if not values:
        return f"seed{seed}"
    short, end = short_keys(values), f"_seed={seed}"
    name = "_".join(f"{short[key]}={_safe(canonical(text))}" for key, text in values.items())
    # A name that is too long ends with a digest of all of it.
    if len(name) + len(end) > _NAME_LENGTH:
        name = f"{name[: _NAME_LENGTH - len(end) - 9]}-{_digest(name)}"
    return name + end


def setting_name(values: Mapping[str, str]) -> str:
    """A setting in words: ``lr=0.001, rank=8``; ``config`` where only seeds are swept."""
    short = short_keys(values)
    return ", ".join(f"{short[key]}={canonical(text)}" for key, text in values.items()) or "config"


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """The last parts of each key, as many as tell it from the others."""
    keys, short = list(keys), {}
    for key in keys:
        parts = key.split(".")
        # From the last part on, until no other key ends in the same parts.
        ends = (".".join(parts[-k:]) for k in range(1, len(parts)))
        short[key] = next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)
    return short


def _safe(text: str) -> str:
    """A value for a file's name; where letters had to go, with a digest that tells it from others."""
    safe = re.sub(r"[^A-Za-z0-9.+-]+", "-", text)[:_VALUE_LENGTH]
    return safe if safe == text else f"{safe}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def with_seed(words: Iterable[str], seed: int) -> list[str]:
    """Words with `SEED` in them replaced."""
    return [word.replace(SEED, str(seed)) for word in words]


def value_words(values: Mapping[str, str]) -> list[str]:
    """A setting on the command line."""
    return [f"--{key}={text}" for key, text in values.items()]


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What differs between two configs, nested dictionaries and lists, in words; a missing key is null."""
    one, other = flattened(before), flattened(now)
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [f"{key} is {other.get(key)!r}, and was {one.get(key)!r}" for key in keys]


def flattened(value: object, key: str = "") -> dict[str, object]:
    """The leaves of nested dictionaries and lists by their dotted keys, without nulls."""
    if isinstance(value, Mapping):
        inner = [(str(name), part) for name, part in value.items()]
    elif isinstance(value, list):
        inner = [(str(k), part) for k, part in enumerate(value)]
    else:
        return {} if value is None else {key: value}
    return {k: v for name, part in inner for k, v in flattened(part, f"{key}.{name}" if key else name).items()}
