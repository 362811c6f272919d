"""Tokenizers of transformers by hub id or folder, and what kept a model or tokenizer from loading, in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pera_lightning.errors import ConfigurationError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by hub id or folder.

    Raises:
        ConfigurationError: where it cannot be had.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError, ImportError) as error:
        raise explained(error, name, "tokenizer") from error


def explained(error: Exception, name: str, what: str) -> ConfigurationError:
    """What kept a model or tokenizer from loading, in one line that says what to do.

    Args:
        error: raised by transformers.
        name: hub id or folder, as given.
        what: "model" or "tokenizer".
    """
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    text = str(error)
    first = shorten(text.strip().partition("\n")[0])  # after it transformers lists every class that it has
    if Path(name).is_dir():
        if what == "tokenizer" and not any(Path(name).glob("*tok*")) and not any(Path(name).glob("vocab*")):
            return ConfigurationError(
                f"folder {name} has no tokenizer (tokenizer.json); give the data module tokenizer="
            )
        return ConfigurationError(f"{what} in folder {name}: {first}")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        return ConfigurationError(f"{what} {name}: there is no such folder")
    if "gated" in text:
        return ConfigurationError(
            f"{what} {name} on {hub} is gated: ask for access on its page, then `hf auth login`, or give a local folder"
        )
    if "not a local folder" in text or "is not a valid model identifier" in text:
        return ConfigurationError(
            f"no {what} {name} on {hub} (or it is private), and no folder of that name here; check the name, "
            "`hf auth login` if it is private, or give a local folder"
        )
    if "couldn't connect" in text.lower() or "cannot find the requested files" in text.lower():
        return ConfigurationError(
            f"{what} {name} is not in the cache and {hub} cannot be reached; set HF_ENDPOINT to a hub that can, or "
            "give a local folder"
        )
    return ConfigurationError(f"{what} {name}: {first}")
