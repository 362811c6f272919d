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
_PUBLIC = "pera_lightning.adapters"  # where every method of this package can be imported from
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
    """The method called `name` by a user: a registered one, or a dotted path to a class, which is imported."""
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
    """Rebuilds a method from `Method.spec`, which may come out of a file: nothing that it names is imported.

    Raises:
        CheckpointError: for a method that is not registered (or defined) by anything imported so far, and for
            hyperparameters that it does not take.
    """
    name = spec["class_path"]
    cls = _defined().get(name)
    if cls is None:
        raise CheckpointError(
            f"the method {name!r} is not registered here, and a file does not decide what is imported: import the "
            f"package that registers it, if you trust that; there are {', '.join(_METHODS)}"
        )
    try:
        return cls(**spec.get("init_args", {}))
    except Exception as error:  # other people's checks of their own values may raise anything
        raise CheckpointError(f"{cls.__name__} does not take the stored hyperparameters: {error}") from None


def _defined() -> dict[str, type[Method]]:
    """The methods of everything imported so far, by every name under which a file may hold them."""
    found: dict[str, type[Method]] = {}
    # A method given by a dotted path need not be registered: its class exists once its own package is imported.
    every = [Method]
    for cls in every:
        every += cls.__subclasses__()  # this list grows while it is read
        found[f"{cls.__module__}.{cls.__qualname__}"] = cls
    for short, cls in _METHODS.items():  # last: they win over a class of the same path that was imported earlier
        found |= dict.fromkeys((short, f"{cls.__module__}.{cls.__qualname__}", f"{_PUBLIC}.{short}"), cls)
    return found
