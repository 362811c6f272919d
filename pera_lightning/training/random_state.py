"""The state of every random generator that a training step may draw from."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch


def capture(own: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The states of python's, numpy's, torch's and this process's device's generators, and of others.

    Args:
        own: further generators, which `restore` is given in the same order.

    Returns:
        Tensors and numbers only, which load under ``torch.load(weights_only=True)``.
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "own": [generator.get_state() for generator in own],
    }
    return {**state, **{name: getattr(torch, name).get_rng_state() for name in devices()}}


def devices(state: Collection[str] | None = None) -> list[str]:
    """Kinds of devices with a generator of their own: those in use, or those of a captured `state`."""
    kinds = ("cuda", "xpu", "mps")
    return [name for name in kinds if (_in_use(getattr(torch, name)) if state is None else name in state)]


def _in_use(device: Any) -> bool:
    if device is torch.mps:
        return torch.backends.mps.is_available()
    return device.is_available() and device.is_initialized()  # asking would initialise it, which forbids forks


def restore(state: dict[str, Any], own: Sequence[torch.Generator] = ()) -> None:
    """Sets what `capture` returned."""
    for generator, saved in zip(own, state["own"], strict=False):  # a loader may have got one since
        generator.set_state(saved.cpu())
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].cpu().numpy().astype(np.uint32)  # as numpy wants them
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    for name in devices(state):
        if (torch.backends.mps if name == "mps" else getattr(torch, name)).is_available():
            getattr(torch, name).set_rng_state(state[name].cpu())
