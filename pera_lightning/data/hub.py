"""Loading a split of a data set of the hub, with every way to fail put into words."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pera_lightning.errors import DataError, shorten

if TYPE_CHECKING:
    import datasets


def load_table(repository: str, config_name: str | None, split: str, *, instead: str) -> datasets.Dataset:
    """Loads one split of a data set of the hub, from the cache if possible.

    Args:
        repository: ``org/name``.
        config_name: configuration of the data set, where it has several.
        split: name of the split.
        instead: what can be given in place of a data set of the hub, such as "a local folder"; ends messages.

    Raises:
        DataError: where the hub, the data set, its configuration or the split cannot be had.
    """
    import datasets

    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    elsewhere = f"or give {instead}"
    try:
        # It asks the hub for the newest revision, and takes the cache where the hub cannot be reached.
        return datasets.load_dataset(repository, config_name, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        what = "is gated: ask for access on its page" if "gated" in str(error) else "does not exist, or is private"
        raise DataError(
            f"data set {repository} on {hub} {what}; check the name, run `hf auth login`, {elsewhere}"
        ) from error
    except Exception as error:  # of datasets, its hub client and the HTTP library of that: no common base
        if isinstance(error, ConnectionError) or type(error).__module__.startswith(("httpx", "requests")):
            raise DataError(
                f"data set {repository} is not in the cache and {hub} cannot be reached ({shorten(str(error))}); set "
                f"HF_ENDPOINT to a hub that can, {elsewhere}"
            ) from error
        # An unknown split or configuration among them: the message of datasets lists what there is.
        config = f", configuration {config_name!r}" if config_name else ""
        raise DataError(f"data set {repository}{config}, split {split!r}: {shorten(str(error))}") from error
