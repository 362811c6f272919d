"""Models and tokenizers of transformers by hub id or folder: whatever keeps one from loading is one line.

Nothing that a folder or repository brings is run: code of its own is refused, of pickled weights tensors are read alone
(transformers' default).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pera_lightning.errors import ConfigurationError, PeraError, shorten
from pera_lightning.files import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For every `from_pretrained` of an Auto class: without it transformers asks on the terminal whether to run custom code.
NO_CUSTOM_CODE: dict[str, Any] = {"trust_remote_code": False}
_OFFERED = "auto_map"  # in a configuration: classes of transformers to files of the folder
_DAMAGED = (TypeError, KeyError, AttributeError, IndexError, EOFError, ArithmeticError)  # of values of another type


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by hub id or folder."""
    from transformers import AutoTokenizer  # which takes seconds, and `--help` does without

    with loading(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", **NO_CUSTOM_CODE)


@contextmanager
def loading(name: str, what: str) -> Iterator[None]:
    """Refuses a folder with code of its own, and turns every error while `what` is loaded from it into one line."""
    _refuse_custom_code(name, what)
    try:
        yield
    except PeraError:
        raise
    except Exception as error:  # transformers checks little of what a file says, and raises whatever comes of it
        raise explained(error, name, what) from error


def _refuse_custom_code(name: str, what: str) -> None:
    """Raises `ConfigurationError` for a folder whose configurations name Python files that lie in it."""
    folder = Path(name)
    for file in sorted(folder.glob("*config*.json")) if folder.is_dir() else ():
        try:
            found = parse_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # which loading it says
            continue
        offered = found.get(_OFFERED) if isinstance(found, dict) else None
        # "modeling_x.XModel", or a slow and a fast tokenizer; "org/name--modeling_x.XModel" is another repository's.
        classes = str(offered).replace("'", " ").replace('"', " ").split() if offered else []
        code = {f"{one.partition('.')[0]}.py" for one in classes if "." in one}
        if brought := sorted(one for one in code if (folder / one).is_file()):
            raise ConfigurationError(
                f"{what} in folder {name} brings code of its own ({brought[0]}, {_OFFERED} in {file.name}), which is "
                f"never run: give a model that transformers has; if it is one, take {_OFFERED} out of that file"
            )


def explained(error: Exception, name: str, what: str) -> ConfigurationError:
    """What kept the model or tokenizer (`what`) `name` from loading, in one line that says what to do."""
    lines = str(error).strip().split("\n")  # of which later ones list every class of transformers
    first = shorten(" ".join(lines[: 2 if lines[0].rstrip().endswith(":") else 1]))
    if isinstance(error, SafetensorError):
        return ConfigurationError(f"{what} {name}: a file of its weights is damaged ({first}); fetch it again")
    if isinstance(error, pickle.UnpicklingError):
        return ConfigurationError(
            f"{what} {name}: its pickled weights are damaged or hold more than tensors, and are not read; fetch them "
            "again, or give a folder with safetensors"
        )
    if isinstance(error, _DAMAGED):
        kind = type(error).__name__
        return ConfigurationError(f"{what} {name}: one of its files is damaged ({kind}: {first}); fetch it again")
    if "custom code" in first:
        return ConfigurationError(
            f"{what} {name} needs code of its own ({_OFFERED}), which is never run; give one that transformers has"
        )
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
