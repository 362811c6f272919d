"""A folder of photographs by its path, or by its name on the hub, from where its files are fetched as they are."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pera_lightning.data.image_files import SUFFIXES
from pera_lightning.errors import DataError, shorten
from pera_lightning.tasks.dreambooth.photographs import METADATA

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def local_folder(name: str, argument: str) -> str:
    """Returns a path as it is if it exists or is not ``org/name``; else fetches that data set of the hub."""
    if Path(name).expanduser().exists() or not _HUB_ID.fullmatch(name):
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    here = f"{argument} {name} is no folder here, and"
    patterns = [f"*{suffix}" for kind in SUFFIXES for suffix in (kind, kind.upper())]
    try:
        return snapshot_download(name, repo_type="dataset", allow_patterns=[*patterns, "*.txt", METADATA])
    except GatedRepoError as error:  # also a RepositoryNotFoundError
        reason = f"the data set on {hub} is gated: ask for access on its page, then `hf auth login`", error
    except RepositoryNotFoundError as error:
        reason = f"there is no such data set on {hub} (or it is private): check the name", error
    except LocalEntryNotFoundError as error:
        reason = f"as a data set it is not in the cache and {hub} cannot be reached: set HF_ENDPOINT to another", error
    except Exception as error:  # of the hub's client and the HTTP library of that: no common base
        reason = f"as a data set of {hub} it cannot be had ({shorten(str(error))}): try again", error
    raise DataError(f"{here} {reason[0]}, or give a folder") from reason[1]
