"""What a file asks of a plain model is done completely, or the model is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pera_lightning.errors import CheckpointError
from pera_lightning.injection.state import find_injected

# The attributes in which a module keeps its parameters, buffers, submodules and hooks.
_HOLDERS = [name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))]


@contextmanager
def as_it_was(model: nn.Module, source: str) -> Iterator[None]:
    """Undoes, after an error, what was done within to the modules of a plain model, and to what of it is trained.

    The error becomes a `CheckpointError` about `source`. A model that is adapted already is left to the caller. Values
    of tensors are not kept: they are to be written afterwards, when nothing is refused any more.
    """
    if find_injected(model) is not None:
        yield
        return
    modules = {module: (type(module), dict(vars(module))) for module in model.modules()}
    held = [(holder, holder.copy()) for m in modules for name, holder in vars(m).items() if name in _HOLDERS]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException as error:
        for module, (kind, attributes) in modules.items():
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
        for holder, content in held:  # the same objects, which others may hold too
            holder.clear()
            holder.update(content)
        for parameter, needed in trained:
            parameter.requires_grad_(needed)
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"{source} does not fit this {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error
