"""The register of methods: a new one is found by the command line, by checkpoints and by the contract test.

To add a method:

1. A file in this folder: formula and paper at its head, the mathematics as functions, a layer made from (context,
   method), and the method, a dataclass of hyperparameters that names its layer::

       class MineLayer(LowRankAdapter):  # or LinearAdapter, where it is not made of two factors
           def delta_output(self, x): ...

       @register_method
       @dataclass(frozen=True, kw_only=True)
       class Mine(LowRankMethod):
           layer: ClassVar = MineLayer

2. A line in `__init__.py`, which imports it, and values for the contract tests, see docs/architecture.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pera_lightning.adapters.method import Method
from pera_lightning.errors import CheckpointError, UnknownNameError, closest

_METHODS: dict[str, type[Method]] = {}
MethodType = TypeVar("MethodType", bound=type[Method])


def register_method(cls: MethodType) -> MethodType:
    """Class decorator that registers a method under its class name, which must not belong to another class."""
    known = _METHODS.get(cls.__name__)
    # A module that is imported anew, as notebooks do, may register its class again.
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"a method called {cls.__name__} is registered already, by {known.__module__}")
    _METHODS[cls.__name__] = cls
    return cls


def registered_methods() -> Mapping[str, type[Method]]:
    """Name to class of every registered method, in order of registration."""
    return dict(_METHODS)  # a copy: the register itself changes by `register_method` only


def method_class(name: str) -> type[Method]:
    """The method called `name`: a registered one, or a dotted path to a class of another package."""
    # A registered name, or the path under which a registered class saves itself.
    short = name.rpartition(".")[2]
    if name in _METHODS or (short in _METHODS and _METHODS[short].__module__ == name.rpartition(".")[0]):
        return _METHODS[short]
    # A class of another package, which need not be registered.
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two for odd dots
            raise UnknownNameError(f"method {name!r} cannot be imported: {error}") from None
        if isinstance(found, type) and issubclass(found, Method):
            return found
        raise UnknownNameError(f"{name!r} is not an adapter method: it does not derive from Method")
    raise UnknownNameError(f"method {name!r} does not exist; one of {', '.join(_METHODS)}{closest(name, _METHODS)}")


def method_from_spec(spec: Mapping[str, Any]) -> Method:
    """Rebuilds a method from `Method.spec`."""
    cls = method_class(spec["class_path"])
    try:
        return cls(**spec.get("init_args", {}))
    except TypeError as error:
        raise CheckpointError(f"{cls.__name__} does not take the stored hyperparameters: {error}") from None
