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
    r".*(?:required|not expected|is not valid|not a subclass|does not correspond).*",
    r"- (?!Expected a |Not a valid |Problem with |a class path|a dict )(?P<alternative>.+)",
    r"(?P<expected>Expected a (?!<class 'NoneType'>)(?!path but).*)",
)


def explain(message: str, options: Iterable[str] = (), classes: Mapping[str, Iterable[str]] | None = None) -> str:
    """Finds the telling line of a parser's message and puts the key before it.

    Args:
        message: message of jsonargparse, over one line or many.
        options: options of the command (``--trainer.max_epochs``), for suggestions.
        classes: short class names that a key ("adapter.method") takes, for suggestions.
    """
    # Errors of nested parsers are nested too: the parts of the key come one after the other.
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    for pattern in _TELLING:
        found = re.search(pattern, message)
        if found:
            break
    else:
        return shorten(message)
    # Each kind of line has its own wording; those without a group are clear as they are.
    given = found.groupdict()
    text = found[0].strip().removeprefix("- ")
    if option := given.get("option"):
        text = _option(message, option)
    elif unknown := given.get("unknown"):
        options = list(options)
        text = f"unknown option {unknown}{closest(unknown, options)}"
    elif name := given.get("name"):
        names = list((classes or {}).get(key, ()))
        there = f"there are {listed(names, 20)}, or give" if names else "give"
        text = f"class {name!r} is not known; {there} a dotted path{closest(name, names)}"
    elif alternative := given.get("alternative"):
        text = alternative
    elif given.get("expected"):
        text = _expected(message)
    elif "are required" in text and (owner := _owner(message)):
        text = f"{owner.rpartition('.')[2]}: {text}"
    return shorten(f"{key}: {text}" if key else text)


def _owner(message: str) -> str:
    """The class that a message is about, as a dotted path; the innermost one."""
    return (re.findall(r"Problem with given class_path '([\w.]+)'", message) or [""])[-1]


def _expected(message: str) -> str:
    """A line with the types or values that are allowed, and what was given."""
    kinds = []
    for kind in re.findall(r"Expected a (?!path but)(.+?)(?:\. Got value: .*)?$", message, re.MULTILINE):
        # "<class 'int'>" becomes int, "typing.Literal['a', 'b']" one of 'a', 'b'.
        plain = re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", kind)
        values = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
        word = plain[1] if plain else f"one of {values[1]}" if values else kind
        if word not in (*kinds, "NoneType"):  # None is what leaving out means, and is never wanted
            kinds.append(word)
    given = re.search(r"(?:Got value|Given value): (.*)", message)
    text = f"{' or '.join(kinds)} is needed"
    if given:
        values = re.findall(r"'([^']*)'", text)
        text += f"; given {given[1]}{closest(given[1], values)}"
    return text


def _option(message: str, option: str) -> str:
    """A line for an option that a class does not take, with those that it takes."""
    owner = _owner(message)
    if not owner:
        return f"option {option!r} is not accepted"
    module, _, name = owner.rpartition(".")  # the path of the module, and the class's name
    allowed = _parameters(module, name)
    return f"{name} has no option {option!r}{closest(option, allowed)}; it has {', '.join(allowed) or 'none'}"


def _parameters(module: str, name: str) -> list[str]:
    """The options of a class; where it hands **options on, those of the class above too."""
    names: dict[str, None] = {}
    for cls in getattr(__import__(module, fromlist=[name]), name).__mro__:
        if "__init__" in vars(cls):
            parameters = inspect.signature(cls.__init__).parameters.values()
            rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
            names |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
            if not rest:
                break
    # In the order of the signatures, the class's own first.
    return [n for n in names if n != "self"]
