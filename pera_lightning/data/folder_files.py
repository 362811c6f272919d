"""The files of a folder, and a word about those that nothing reads or that are not all of their set."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pera_lightning.errors import listed
from pera_lightning.files import nfc


def files_under(folder: Path) -> list[str]:
    """All files under a folder at any depth but hidden ones: relative paths, sorted by their names in Unicode's NFC.

    So copies of a folder on a Mac and elsewhere come in one order, of which splits are drawn.
    """
    found = []
    for top in sorted(folder.iterdir()):
        if top.is_dir():  # walked one by one, so that links to folders at the top are followed and loops are not
            found += [Path(at, name) for at, _, names in os.walk(top) for name in names]
        else:
            found.append(top)
    relative = [path.relative_to(folder) for path in found]
    visible = [path.as_posix() for path in relative if not any(part.startswith(".") for part in path.parts)]
    return sorted(visible, key=lambda name: (nfc(name), name))


def warn_of_unread(folder: Path, unread: Iterable[str], advice: str) -> None:
    """Warns, in one line, of files in a folder that nothing reads: how many of each suffix, with names.

    Args:
        folder: names it in the warning.
        unread: the files, relative to it.
        advice: ends the warning: what is read, and what to do.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # seconds, and most folders have no such files

    kinds: dict[str, list[str]] = {}
    for name in unread:
        kinds.setdefault(Path(name).suffix.lower() or "without a suffix", []).append(name)
    if not kinds:
        return
    counts = [f"{len(names)} {suffix} ({listed(names, 2)})" for suffix, names in kinds.items()]
    total = sum(map(len, kinds.values()))
    rank_zero_warn(f"{total} file(s) under {folder} are not read: {listed(counts)}; {advice}")


def warn_of_size(name: str, count: int, published: int | None, source: object) -> None:
    """Warns where a source has not as many examples as its set has as published, where that is known."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn

    if published not in (None, count):
        rank_zero_warn(
            f"{source} has {count} examples, {name} as published has {published}: results on it do not compare with "
            "those of others"
        )
