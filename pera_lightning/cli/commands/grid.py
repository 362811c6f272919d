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
    """Writes a grid: a column for each run, a row for each prompt and seed that all of them have."""
    options = read_options(args)
    output = Path(options.output)
    # All that can be wrong is found before images are read, which takes long.
    if output.suffix.lower() != ".png":
        raise ConfigurationError(f"--output {output}: a grid is a PNG, give a name that ends in .png")
    if output.exists() and not options.overwrite:
        raise ConfigurationError(f"{output} exists: give another --output, or --overwrite")
    columns = [read_column(name) for name in options.runs]
    folders = [column.folder.resolve() for column in columns]
    if len(set(folders)) < len(folders):
        raise ConfigurationError(f"--runs {' '.join(options.runs)}: one is given twice")
    if output.resolve().parent in folders:
        raise ConfigurationError(f"--output {output} lies among a run's images: give another place")
    # A column is a run, a row a prompt and seed that every run has.
    labels = options.labels or column_labels(columns)
    if len(labels) != len(columns):
        raise ConfigurationError(f"--labels has {len(labels)} and --runs {len(columns)}: give a label for each run")
    rows = chosen(common(columns), options.prompts, options.seeds)
    check_shape(len(rows), len(columns))  # before images are read
    # Images are read at the size that a page shows, so that many of them fit into memory.
    side = useful_side(len(rows) * len(columns))
    files = [column.pairs for column in columns]  # by prompt and seed
    images = [[read_image(pairs[row], side) for pairs in files] for row in rows]
    grid = labelled_grid(images, [f"{shorten(prompt)}\nseed {seed}" for prompt, seed in rows], labels)
    try:
        size = save_image(grid, output)
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written ({error.strerror}): give another --output") from None
    names = ", ".join(shorten(label) for label in labels)
    print(f"Wrote {output} ({megabytes(size)}): {len(rows)} prompts and seeds x {len(columns)} runs ({names})")
    print(*(f"  note: {note}\n" for note in notes(columns)), sep="", end="", flush=True)


def read_options(args: Sequence[str]) -> Namespace:
    """Reads the options of `grid`; argparse's complaints become a `ConfigurationError`."""
    parser = _Parser(prog="python cli.py grid", description=(run.__doc__ or "").splitlines()[0], allow_abbrev=False)
    many = {"nargs": "+", "action": "extend"}
    parser.add_argument("--runs", **many, required=True, metavar="RUN", help="folders of runs that predict was run for")
    parser.add_argument("--output", required=True, metavar="FILE.png", help="the file to write; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace the file where it exists")
    parser.add_argument("--labels", **many, metavar="LABEL", help="of the columns (default: the runs' methods)")
    parser.add_argument("--prompts", **many, metavar="PROMPT", help="only these, in this order (default: all)")
    parser.add_argument("--seeds", **many, metavar="SEED", help="only these, in this order (default: all)")
    options = parser.parse_args(list(args))
    # 0,1 as sweep takes them too; compared as words, since any integer may be a seed.
    options.seeds = [word for words in options.seeds or () for word in words.split(",") if word]
    return options


def read_column(name: str) -> Column:
    """Reads what images a run has; `name` is the folder of the run, or of its images."""
    path = Path(name)
    folder = path if path.name == FOLDER and (path / FILE).is_file() else path / FOLDER
    if not path.is_dir():
        around = [str(one) for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
        raise DataError(f"run {name} does not exist{closest(name, around)}")
    if not (folder / FILE).is_file():
        raise DataError(
            f"run {name} has no {FOLDER}/{FILE}, which predict writes at its end: run `python cli.py predict --config "
            f"{path / 'config.yaml'} --ckpt_path last`, or give another run"
        )
    return Column(name, folder, read_images(folder))


def column_labels(columns: Sequence[Column]) -> list[str]:
    """Names the methods; where two are the same, with as much of the runs' folders as tells all runs apart."""
    methods = []
    for column in columns:
        adapter = column.generated.adapter
        methods.append("no adapter" if adapter is None else str(adapter.get("class_path", "?")).rpartition(".")[2])
    # Folders of runs are often called the same (version_0): parents are added until the names differ.
    parts = [column.folder.resolve().parent.parts for column in columns]
    depth = next(k for k in range(1, 1 + max(map(len, parts))) if len({one[-k:] for one in parts}) == len(parts))
    return [
        method if methods.count(method) == 1 else f"{method}\n{Path(*one[-depth:])}"
        for method, one in zip(methods, parts, strict=True)
    ]


def common(columns: Sequence[Column]) -> list[Pair]:
    """Gives the prompts and seeds that all runs have, in the first one's order; `DataError` if there are none."""
    everywhere = set.intersection(*(set(column.pairs) for column in columns))  # prompts and seeds
    if not everywhere:
        # What each run has, so that the reader sees which prompts or seeds differ.
        held = []
        for column in columns:
            prompts, seeds = (dict.fromkeys(map(str, values)) for values in zip(*column.pairs, strict=True))
            held.append(f"{column.run} has {listed(map(repr, prompts), 2)} with seeds {listed(seeds)}")
        raise DataError(f"no prompt and seed in common: {'; '.join(held)}; run predict with the same prompts and seeds")
    return [pair for pair in columns[0].pairs if pair in everywhere]


def chosen(pairs: Sequence[Pair], prompts: Sequence[str] | None, seeds: Sequence[str] | None) -> list[Pair]:
    """Chooses those of `pairs` with the given prompts and seeds, in the order in which these were given."""
    wanted = []
    for k, (option, words) in enumerate((("--prompts", prompts), ("--seeds", seeds))):
        there = list(dict.fromkeys(str(pair[k]) for pair in pairs))
        for word in words or ():
            if word not in there:
                have = f"{listed(there)}{closest(word, there)}"
                raise ConfigurationError(f"{option} {word}: not in all runs; they have {have}")
        wanted.append(list(words or there))  # by default all, in their order
    left = [pair for pair in pairs if pair[0] in wanted[0] and str(pair[1]) in wanted[1]]
    if not left:
        raise ConfigurationError("no image that all runs have is of --prompts and of --seeds: leave one out")
    # By the places of prompt and seed among the words given.
    return sorted(left, key=lambda pair: (wanted[0].index(pair[0]), wanted[1].index(str(pair[1]))))


def notes(columns: Sequence[Column]) -> list[str]:
    """Says what makes the columns differ besides their adapters, and which images are left out."""
    # Settings that decide an image: where they differ, the adapters are not all that is compared.
    found = []
    made = [one.generated for one in columns]
    settings = [{"model_name": one.model_name, "optimizer steps": one.step, **one.sampling} for one in made]
    for name in dict.fromkeys(name for one in settings for name in one):
        values = [one.get(name) for one in settings]
        if any(value != values[0] for value in values):
            given = listed((f"{one.run} {value}" for one, value in zip(columns, values, strict=True)), 10)
            found.append(f"the runs differ in {name}: {given}")
    shared = len(common(columns))  # rows of the grid, if none are chosen
    more = [f"{len(one.pairs) - shared} of {one.run}'s {len(one.pairs)}" for one in columns if len(one.pairs) > shared]
    if more:
        found.append(f"left out, as not all runs have their prompt and seed: {listed(more)}")
    return found
