"""One line from jsonargparse's nested messages: which key, what was given, what is allowed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping

from pera_lightning.errors import closest, listed, shorten

# Lines that say what is wrong, the most telling first; the other lines only say where.
_TELLING = (
    r"Option '(?P<option>[^']+)' is not accepted",
    r"unrecognized arguments: (?P<unknown>\S+)",
    r"Expected a dot import path string: (?P<name>\S+)",
    r"(?:No module named|module .* has no attribute|cannot import name).*",
    r"Expected a (?!<class 'NoneType'>)(?!path but).*",
    r".*(?:required|not expected|is not valid|not a subclass|does not correspond).*",
)


def explain(message: str, options: Iterable[str] = (), classes: Mapping[str, Iterable[str]] | None = None) -> str:
    """Finds the telling line of a parser's message and puts the key before it.

    Args:
        message: what jsonargparse says, over one line or many.
        options: the command's own options (``--trainer.max_epochs``), for suggestions.
        classes: key ("adapter.method") to the short class names that it takes, for suggestions.

    Returns:
        One line.
    """
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    for pattern in _TELLING:
        found = re.search(pattern, message)
        if found:
            break
    else:
        return shorten(message)
    given = found.groupdict()
    text = found[0]
    if option := given.get("option"):
        text = _option(message, option)
    elif unknown := given.get("unknown"):
        options = list(options)
        text = f"unknown option {unknown}{closest(unknown, options)}"
    elif name := given.get("name"):
        names = list((classes or {}).get(key, ()))
        text = (
            f"class {name!r} is not known; there are {listed(names, 20)}, or give a dotted path{closest(name, names)}"
        )
    return shorten(f"{key}: {text}" if key else text)


def _option(message: str, option: str) -> str:
    """An option that a class does not take, with those that it does."""
    owner = re.findall(r"Problem with given class_path '([\w.]+)'", message)
    if not owner:
        return f"option {option!r} is not accepted"
    module, _, name = owner[-1].rpartition(".")
    allowed = _parameters(module, name)
    return f"{name} has no option {option!r}{closest(option, allowed)}; it has {', '.join(allowed) or 'none'}"


def _parameters(module: str, name: str) -> list[str]:
    cls = getattr(__import__(module, fromlist=[name]), name)
    return [p for p in inspect.signature(cls).parameters if p not in ("args", "kwargs")]
