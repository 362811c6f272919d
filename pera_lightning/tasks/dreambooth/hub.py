"""A folder of photographs by its path, or by its name on the hub, from where its files are fetched as they are."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pera_lightning.data.image_files import SUFFIXES
from pera_lightning.errors import DataError, shorten
from pera_lightning.tasks.dreambooth.captions import BESIDE, METADATA

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def local_folder(name: str, argument: str) -> str:
    """Returns a path as it is if it exists or is not ``org/name``; else fetches that data set of the hub."""
    if Path(name).expanduser().exists() or not _HUB_ID.fullmatch(name):
        return name
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for kind in SUFFIXES for suffix in (kind, kind.upper())]
    patterns += [f"*{ending}" for ending in (*BESIDE, *METADATA)]  # at any depth
    try:
        return snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
    except Exception as error:  # of the hub's client and the HTTP library of that: no common base
        hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        what = f"{argument} {name} is not a folder, and as a data set of {hub} it cannot be had"
        raise DataError(f"{what} ({shorten(str(error))}): check the name and HF_ENDPOINT, or give a folder") from error
