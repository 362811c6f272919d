"""The state of every random generator that a training step may draw from: capture, restore, and as plain tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def capture(own: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The states of python's, numpy's, torch's and this process's CUDA generator, and of others.

    Args:
        own: further generators, which `restore` is given in the same order.
    """
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    state["own"] = [generator.get_state() for generator in own]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # asking would initialise it, which forbids forks
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any], own: Sequence[torch.Generator] = ()) -> None:
    """Sets what `capture` returned."""
    for generator, saved in zip(own, state["own"], strict=False):  # a loader may have got one since
        generator.set_state(saved)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def to_plain(state: dict[str, Any]) -> dict[str, Any]:
    """The same as tensors and numbers, which load under ``torch.load(weights_only=True)``."""
    version, words, gauss = state["python"]
    _, keys, position, has_gauss, cached = state["numpy"]
    plain = {k: v for k, v in state.items() if k in ("torch", "cuda", "own")}
    plain["python"] = {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss}
    plain["numpy"] = {
        "keys": torch.from_numpy(keys.astype(np.int64)),
        "position": int(position),
        "has_gauss": int(has_gauss),
        "cached": float(cached),
    }
    return plain


def from_plain(plain: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `to_plain`."""
    python, numpy = plain["python"], plain["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    state = {k: v.cpu() for k, v in plain.items() if k in ("torch", "cuda")}
    state["own"] = plain["own"]
    state["python"] = (python["version"], tuple(python["words"].tolist()), python["gauss"])
    state["numpy"] = ("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"])
    return state
