"""`grid`: the images of several runs side by side, at the same prompts and seeds: the figures of papers.

Read with the standard library's parser, and without torch until the grid is drawn: wrong input is refused at once.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pera_lightning.errors import ConfigurationError, DataError, closest, listed, megabytes, shorten
from pera_lightning.tasks.dreambooth.image_folder import (
    FILE,
    FOLDER,
    GeneratedImages,
    read_image,
    read_images,
    save_image,
)
from pera_lightning.tasks.dreambooth.image_grid import check_shape, labelled_grid, useful_side

Pair = tuple[str, int]  # a prompt and a seed


@dataclass(frozen=True)
class Column:
    """A run and its images."""

    run: str  # its folder, as given
    folder: Path  # of its images
    generated: GeneratedImages  # what `images.json` says

    @property
    def pairs(self) -> dict[Pair, Path]:
        """The file of each prompt and seed, in the run's order."""
        return {(one.prompt, one.seed): self.folder / one.file for one in self.generated.images}


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see grid --help")


def run(args: Sequence[str]) -> None:
    """Writes a grid: a column for each run, a row for each prompt and seed that all of them have.

    Args:
        args: ``--runs``, ``--output`` and further options, see `read_options`.

    Raises:
        PeraError: for wrong input; nothing is written then.
    """
    # All that can be wrong is found before images are read, which takes long.
    options = read_options(args)
    check_output(options.output, overwrite=options.overwrite)
    columns = [read_column(name) for name in options.runs]
    folders = [column.folder.resolve() for column in columns]
    for name, folder in zip(options.runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigurationError(f"--runs {name}: given twice")
    if Path(options.output).resolve().parent in folders:
        raise ConfigurationError(f"--output {options.output} lies among a run's images: give another place")
    # Columns are runs, rows what all of them have.
    labels = options.labels or column_labels(columns)
    if len(labels) != len(columns):
        raise ConfigurationError(f"--labels has {len(labels)} and --runs {len(columns)}: give a label for each run")
    rows = chosen(common(columns), columns, options.prompts, options.seeds)
    check_shape(len(rows), len(columns))
    # Drawn at the size that a page shows.
    side = useful_side(len(rows) * len(columns))
    files = [column.pairs for column in columns]
    images = [[read_image(pairs[row], side) for pairs in files] for row in rows]
    grid = labelled_grid(images, [f"{shorten(prompt)}\nseed {seed}" for prompt, seed in rows], labels)
    try:
        size = save_image(grid, Path(options.output))
    except OSError as error:
        raise ConfigurationError(
            f"{options.output} cannot be written ({error.strerror}): give another --output"
        ) from None
    names = ", ".join(shorten(label) for label in labels)
    print(f"Wrote {options.output} ({megabytes(size)}): {len(rows)} prompts and seeds x {len(columns)} runs ({names})")
    print(*(f"  note: {note}\n" for note in notes(columns)), sep="", end="", flush=True)


def read_options(args: Sequence[str]) -> Namespace:
    """Reads the options of `grid`; `ConfigurationError` names an unknown one, or one without a value."""
    parser = _Parser(prog="python cli.py grid", description=(run.__doc__ or "").splitlines()[0], allow_abbrev=False)
    many = {"nargs": "+", "action": "extend"}
    parser.add_argument("--runs", **many, metavar="RUN", help="folders of runs, each with the images of predict")
    parser.add_argument("--output", metavar="FILE.png", help="the file to write; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace the file where it exists")
    parser.add_argument("--labels", **many, metavar="LABEL", help="of the columns (default: the runs' methods)")
    parser.add_argument("--prompts", **many, metavar="PROMPT", help="only these, in this order (default: all)")
    parser.add_argument("--seeds", **many, metavar="SEED", help="only these, in this order (default: all)")
    options, unknown = parser.parse_known_args(list(args))
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        if not unknown[0].startswith("-"):
            raise ConfigurationError(f"{unknown[0]!r} stands after no option that takes it; see grid --help")
        raise ConfigurationError(f"unknown option {unknown[0]}{closest(unknown[0], known)}")
    for name in ("runs", "output"):
        if not all(getattr(options, name) or [""]):  # an empty word names nothing either
            raise ConfigurationError(f"no --{name}: give " + ("folders of runs" if name == "runs" else "a file"))
    # As sweep takes them too, 0,1; compared as words, for any whole number may be a seed.
    options.seeds = [word for words in options.seeds or () for word in words.split(",") if word]
    return options


def check_output(path: str, *, overwrite: bool) -> None:
    """Raises `ConfigurationError` where the grid cannot be written to `path`; to be told before the work is done."""
    output = Path(path)
    if output.suffix.lower() != ".png":
        raise ConfigurationError(f"--output {path}: a grid is a PNG, give a name that ends in .png")
    if output.is_dir():
        raise ConfigurationError(f"--output {path} is a folder: give a file in it")
    if output.exists() and not overwrite:
        raise ConfigurationError(f"{path} exists: give another --output, or --overwrite")


def read_column(name: str) -> Column:
    """Reads what images a run has; `name` is the folder of the run, or of its images."""
    path = Path(name)
    folder = path if path.name == FOLDER and (path / FILE).is_file() else path / FOLDER
    if not path.is_dir():
        around = [str(one) for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
        raise DataError(f"run {name} does not exist{closest(name, around)}")
    if not folder.is_dir():
        config = path / "config.yaml"
        kept = [one for one in ("best", "last") if (path / "checkpoints" / f"{one}.ckpt").is_file()]
        raise DataError(
            f"run {name} has no {FOLDER}/: make them with `python cli.py predict --config "
            f"{config if config.is_file() else 'FILE'} --ckpt_path {kept[0] if kept else 'FILE'}`, or give another run"
        )
    if not (folder / FILE).is_file():
        raise DataError(f"{folder} has no {FILE}, which predict writes at its end: run predict again")
    return Column(name, folder, read_images(folder))


def column_labels(columns: Sequence[Column]) -> list[str]:
    """Names the methods; if two are alike, with as much of the runs' folders as tells all runs apart."""
    methods = []
    for column in columns:
        adapter = column.generated.adapter
        methods.append("no adapter" if adapter is None else str(adapter.get("class_path", "?")).rpartition(".")[2])
    # A run's folder may be called as another's (version_0): then its parent is named too.
    parts = [column.folder.resolve().parent.parts for column in columns]
    depth = next(k for k in range(1, 1 + max(map(len, parts))) if len({one[-k:] for one in parts}) == len(parts))
    return [
        method if methods.count(method) == 1 else f"{method}\n{Path(*one[-depth:])}"
        for method, one in zip(methods, parts, strict=True)
    ]


def common(columns: Sequence[Column]) -> list[Pair]:
    """Gives the prompts and seeds that all runs have, in the first one's order; `DataError` if there are none."""
    everywhere = set.intersection(*(set(column.pairs) for column in columns))
    if not everywhere:
        held = []
        for column in columns:
            prompts, seeds = (dict.fromkeys(map(str, part)) for part in zip(*column.pairs, strict=True))
            held.append(f"{column.run} has {listed(map(repr, prompts), 2)} with seeds {listed(seeds)}")
        raise DataError(f"no prompt and seed in common: {'; '.join(held)}; run predict with the same prompts and seeds")
    return [pair for pair in columns[0].pairs if pair in everywhere]


def chosen(
    pairs: Sequence[Pair], columns: Sequence[Column], prompts: Sequence[str] | None, seeds: Sequence[str] | None
) -> list[Pair]:
    """Chooses those of `pairs` with the given prompts and seeds, in the order in which these were given."""
    wanted = [list(dict.fromkeys(words or ())) for words in (prompts, seeds)]
    for k, option in enumerate(("--prompts", "--seeds")):
        there = list(dict.fromkeys(str(pair[k]) for pair in pairs))
        for word in wanted[k]:
            if word not in there:
                without = [one.run for one in columns if all(str(pair[k]) != word for pair in one.pairs)]
                where = f"not in {listed(without, 3)}" if without else "not with the same in all runs"
                near = closest(word, there) or f"; there are {listed(there)}"
                raise ConfigurationError(f"{option} {word}: {where}{near}")
        wanted[k] = wanted[k] or there
    left = [pair for pair in pairs if pair[0] in wanted[0] and str(pair[1]) in wanted[1]]
    if not left:
        raise ConfigurationError("no image that all runs have is of --prompts and of --seeds: leave one out")
    return sorted(left, key=lambda pair: (wanted[0].index(pair[0]), wanted[1].index(str(pair[1]))))


def notes(columns: Sequence[Column]) -> list[str]:
    """Says what makes the columns differ besides their adapters, and which images are left out."""
    found = []
    made = [one.generated for one in columns]
    settings = [{"model_name": one.model_name, "optimizer steps": one.step, **one.sampling} for one in made]
    for name in dict.fromkeys(name for one in settings for name in one):
        values = [one.get(name) for one in settings]
        if any(value != values[0] for value in values):
            given = listed((f"{one.run} {value}" for one, value in zip(columns, values, strict=True)), 10)
            found.append(f"the runs differ in {name}: {given}")
    shared = len(common(columns))
    more = [f"{len(one.pairs) - shared} of {one.run}'s {len(one.pairs)}" for one in columns if len(one.pairs) > shared]
    if more:
        found.append(f"left out, as not all runs have their prompt and seed: {listed(more)}")
    return found
