"""The description of an injection as files hold it, checked once, so that what follows can rely on it.

It comes out of a JSON or a checkpoint that anybody may have written, cut or changed: every field that is needed must be
there, of its type, and nothing may be nested without end. Fields that are not known here stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pera_lightning.errors import CheckpointError, listed

FORMAT = 1
UNFROZEN = "unfrozen"  # the field of base parameters that other code has unfrozen; files before it have none
# A shape, and hashes if they are known; between them the type of a quantised tensor, see `fingerprint.py`.
_HASH = re.compile(r"(\d+(x\d+)*)?:((bool|u?int\d+|bits\w+):)?([0-9a-f]{16}(,[0-9a-f]{16})?)?")
_DEPTH, _SIZE = 16, 1_000_000  # of nesting, and number of values


def _is_int(value: Any) -> bool:
    return type(value) is int  # True is no number here


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _by_name(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def checked(value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(k, str) and check(v) for k, v in value.items())

    return checked


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 1


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _anything(value: Any) -> bool:
    return True


def _is_method(value: Any) -> bool:
    anything = _by_name(_anything)
    return anything(value) and _is_text(value.get("class_path")) and anything(value.get("init_args", {}))


# Field to its check, and to what it holds in words.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": (_is_method, "class_path and init_args"),
    "targets": (_are_names, "a list of names"),
    "trainable": (_are_names, "a list of names"),
    "fused": (_by_name(_by_name(_is_int)), "sizes by module and slice"),
    "seed": (_is_int, "an integer"),
    "layers": (_by_name(_are_names), "names of slices by layer"),
    "trained_modules": (_are_names, "a list of names"),
    "fingerprint": (_by_name(_is_hash), "hashes by layer"),
}
_OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    UNFROZEN: (_are_names, "a list of names"),
    "rest_of_base": (_by_name(_is_hash), "hashes by tensor"),
    "class_names": (_or_none(_are_names), "a list of names"),
    "trained_on": (_or_none(_by_name(_anything)), "what data say of themselves"),
    "trained_examples": (_is_tensor, "hashes of examples"),
}
_ROOT: dict[str, tuple[Callable[[Any], bool], str]] = {"root": (_is_text, "the path of the network in the module")}


def checked_description(given: Any, source: str, *, in_checkpoint: bool = False) -> dict[str, Any]:
    """The description of an injection out of a file, once it is known to be one.

    Args:
        given: what the file holds.
        source: the file, for the message.
        in_checkpoint: whether it is the entry of a checkpoint, which says where in the module the network is.

    Raises:
        CheckpointError: for another format, and for anything that `Injection.spec` would not give.
    """
    if not isinstance(given, dict):
        raise CheckpointError(f"{source} is damaged: it holds a {type(given).__name__} where an injection is described")
    if not _is_int(written := given.get("format", FORMAT if in_checkpoint else None)) or written != FORMAT:
        reader = f"this version{' of pera_lightning' if in_checkpoint else ''}"
        raise CheckpointError(f"{source} has format {_shown(written)}, {reader} reads {FORMAT}")
    if not _bounded(given):
        raise CheckpointError(f"{source} is damaged: its description of the injection is nested or long without end")
    needed = {**_FIELDS, **(_ROOT if in_checkpoint else {})}
    if missing := [name for name in needed if name not in given]:
        raise CheckpointError(f"{source} is damaged: its description of the injection has no {listed(missing)}")
    for name, (fits, what) in {**needed, **_OPTIONAL}.items():
        if name in given and not fits(given[name]):
            raise CheckpointError(f"{source} is damaged: {name}={_shown(given[name])}, where it has {what}")
    return given


def _bounded(given: Any) -> bool:
    """Whether nothing is nested deeper than `_DEPTH`, or within itself, and there are no more than `_SIZE` values."""
    level, size = [given], 0
    for _ in range(_DEPTH):
        inside = []
        for value in level:
            inside += (*value, *value.values()) if isinstance(value, Mapping) else value
            if (size := size + len(value)) > _SIZE:  # before the next one: a value may stand in many places
                return False
        level = [value for value in inside if isinstance(value, (Mapping, list, tuple, set, frozenset))]
        if not level:
            return True
    return False


def _shown(value: Any) -> str:
    """A value for a message, without what is inside of it."""
    return repr(value)[:100] if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
