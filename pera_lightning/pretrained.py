"""Tokenizers of transformers by hub id or folder, and what kept a model or tokenizer from loading, in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pera_lightning.errors import ConfigurationError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by hub id or folder."""
    from transformers import AutoTokenizer  # which takes seconds, and `--help` does without

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError, ImportError) as error:
        raise explained(error, name, "tokenizer") from error


def explained(error: Exception, name: str, what: str) -> ConfigurationError:
    """What kept the model or tokenizer (`what`) `name` from loading, in one line that says what to do."""
    first = shorten(str(error).strip().partition("\n")[0])  # after it transformers lists every class that it has
    if Path(name).is_dir():
        if what == "tokenizer" and not [*Path(name).glob("*tok*"), *Path(name).glob("vocab*")]:
            first = "it has no tokenizer (tokenizer.json); give the data module tokenizer="
        return ConfigurationError(f"{what} in folder {name}: {first}")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        return ConfigurationError(f"{what} {name}: there is no such folder")
    if not isinstance(error, OSError):  # it is there, and cannot be loaded
        return ConfigurationError(f"{what} {name}: {first}")
    # Unknown, private or gated, or the hub cannot be reached: the error says which.
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return ConfigurationError(
        f"{what} {name} cannot be loaded from the cache or {hub}: {first}; check the name and HF_ENDPOINT, `hf auth "
        "login` for a private or gated one, or give a local folder"
    )
