"""The plan of a sweep: its own options apart from those of each run, grid values and seeds, a name for every run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from pera_lightning.errors import ConfigurationError

SEED = "{seed}"
LARGEST_SEED = 2**32 - 1  # of NumPy, and so of `seed_everything`
_NAME_LENGTH = 180  # file systems take 255 bytes, and temporary files add to a name
_VALUE_LENGTH = 40

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
_BRACKETS = {"[": "]", "{": "}", "(": ")"}


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


def read_request(words: Sequence[str]) -> Request:
    """Sorts the words after `sweep`.

    Raises:
        ConfigurationError: for wrong values of sweep's own options, and for options that sweep sets itself.
    """
    # Sweep's own options are taken out; all other words go to every run, unread.
    request, rest = Request(), list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if option == "--dry_run" and not equals:
            request.dry_run = True
        elif option in ("--seeds", "--output", "--grid"):
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise ConfigurationError(f"{option}: expected one argument")
                value = rest.pop(0)
            if option == "--seeds":
                _once(option, request.seeds)
                request.seeds = read_seeds(value)
            elif option == "--output":
                _once(option, request.output)
                request.output = value
            else:
                # One --grid may be followed by several keys.
                entries = [value]
                while rest and not rest[0].startswith("-"):
                    entries.append(rest.pop(0))
                for entry in entries:
                    key, values = read_grid(entry)
                    if key in request.grid:
                        raise ConfigurationError(f"--grid {key} is given twice: give all its values at once")
                    request.grid[key] = values
        else:
            request.words.append(word)
    _check_words(request)
    return request


def _once(option: str, before: object) -> None:
    if before is not None:
        raise ConfigurationError(f"{option} is given twice")


def _check_words(request: Request) -> None:
    for word in request.words:
        key = plain_key(word.partition("=")[0][2:]) if word.startswith("--") else ""
        if key in _SET_HERE:
            raise ConfigurationError(f"--{key} is set by sweep: {_SET_HERE[key]}")
        if key in request.grid:
            raise ConfigurationError(f"--{key} is given, and swept over by --grid: leave one of them out")
    for key in request.grid:
        if key in _SET_HERE:
            raise ConfigurationError(f"--grid {key}: set by sweep, {_SET_HERE[key]}")
        if key in ("config", "trainer.logger"):
            raise ConfigurationError(f"--grid {key}: not one value of the config; give each an --output of its own")


def read_seeds(text: str) -> tuple[int, ...]:
    """The seeds in ``"42,43,44"``.

    Raises:
        ConfigurationError: for anything but whole numbers from 0 to `LARGEST_SEED`, each once.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[0-9]+", word) and int(word) <= LARGEST_SEED for word in words):
        raise ConfigurationError(f"--seeds {text}: whole numbers from 0 to {LARGEST_SEED} are needed, such as 42,43,44")
    seeds = tuple(int(word) for word in words)
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise ConfigurationError(f"--seeds {text}: {seed} is given twice")
    return seeds


def read_grid(text: str) -> tuple[str, tuple[str, ...]]:
    """The key and the values in ``"model.lr=0.001,0.01"``; commas within brackets and quotes do not divide.

    Raises:
        ConfigurationError: without a key, or for a value that is empty or given twice.
    """
    key, _, values = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", key) or not values.strip():
        raise ConfigurationError(f"--grid {text}: a key and its values are needed, such as model.lr=0.001,0.01")
    parts = split_values(values)
    if parts is None or not all(parts):
        problem = "brackets or quotes that do not close" if parts is None else "one of its values is empty"
        raise ConfigurationError(f"--grid {text}: {problem}")
    # 1e-3 and 0.001 are one value.
    written = [canonical(part) for part in parts]
    for part in written:
        if written.count(part) > 1:
            raise ConfigurationError(f"--grid {text}: {part} is given twice")
    return plain_key(key), tuple(parts)


def split_values(text: str) -> list[str] | None:
    """Divides a text at the commas outside brackets and quotes; None where these do not close."""
    parts, open_, quote = [""], [], ""
    for letter in text:
        # A quote opens at the start of a value or inside of brackets: "it's" has none.
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and (open_ or not parts[-1].strip()):
            quote = letter
        elif letter in _BRACKETS:
            open_.append(_BRACKETS[letter])
        elif open_ and letter == open_[-1]:
            open_.pop()
        elif letter == "," and not open_:
            parts.append("")
            continue
        parts[-1] += letter
    if open_ or quote:
        return None
    return [re.sub(r"""^(["'])(.*)\1$""", r"\2", part.strip()) for part in parts]


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


def runs(grid: Mapping[str, Sequence[str]], seeds: Iterable[int]) -> list[Run]:
    """A run for each setting and seed, the seeds of a setting one after the other.

    Raises:
        ConfigurationError: for two names that are one on a file system that ignores case.
    """
    seeds = list(seeds)
    planned = [Run(run_name(values, seed), values, seed) for values in settings(grid) for seed in seeds]
    # On some file systems a.txt and A.txt are one file.
    folded: dict[str, str] = {}
    for run in planned:
        other = folded.setdefault(run.name.casefold(), run.name)
        if other != run.name:
            raise ConfigurationError(f"runs {other} and {run.name} cannot have a folder each: sweep them apart")
    return planned


def run_name(values: Mapping[str, str], seed: int) -> str:
    """A folder's name that says values and seed: ``lr=0.001_seed=42``; ``seed42`` where nothing else is swept."""
    if not values:
        return f"seed{seed}"
    short = short_keys(values)
    end = f"_seed={seed}"
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
    keys = list(keys)
    short = {}
    for key in keys:
        parts = key.split(".")
        # From the last part on, until no other key ends in the same parts.
        for k in range(1, len(parts) + 1):
            short[key] = ".".join(parts[-k:])
            if not any(other != key and f".{other}".endswith(f".{short[key]}") for other in keys):
                break
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
