"""Whether what a checkpoint holds of a training (loops, callbacks, optimizers, schedulers) can be gone on from.

Lightning and torch take over what they find: a word where a number belongs ends the fit some steps later, a moment that
is not finite ruins it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch import __version__ as lightning_version
from torch import Tensor

from pera_lightning.errors import CheckpointError

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # torch.optim's, shaped as their parameters

_MOST_STEPS = 2**40


def check_callback_states(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` where the state of one of Lightning's callbacks is not such; before they take it."""
    states = checkpoint.get("callbacks") or {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # Others may keep values of several types by one name.
        if callback.state_key in states and type(callback).__module__.startswith("lightning."):
            _refuse(trainer, unlike(states[callback.state_key], callback.state_dict(), type(callback).__name__))


def check_training_state(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` where loops, optimizers or schedulers could not go on from what a checkpoint holds.

    Args:
        trainer: one whose optimizers and schedulers exist and have not taken anything over.
        checkpoint: what was read.
    """
    loop, saved = trainer.fit_loop, checkpoint["loops"]["fit_loop"]
    own = {"epoch_progress": loop.epoch_progress.state_dict(), **loop.epoch_loop.state_dict(prefix="epoch_loop.")}
    same_version = checkpoint.get("pytorch-lightning_version") == lightning_version  # others may have other entries
    _refuse(trainer, unlike(saved, own, "fit_loop", exact=same_version))
    _refuse(trainer, unlike(saved, {"state_dict": {"combined_loader": [{"ranks": []}]}}, "fit_loop"))
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for scheduler, state in zip(schedulers, checkpoint.get("lr_schedulers") or [], strict=False):
        _refuse(trainer, unlike(state, scheduler.state_dict(), type(scheduler).__name__))
    for optimizer, state in zip(trainer.optimizers, checkpoint.get("optimizer_states") or [], strict=False):
        _refuse(trainer, _unlike_optimizer(state, optimizer))


def _refuse(trainer: Trainer, wrong: str) -> None:
    if wrong:
        raise CheckpointError(f"{trainer.ckpt_path} is damaged, or of another fit: {wrong}")


def unlike(saved: Any, own: Any, where: str, *, exact: bool = False) -> str:
    """What is of another type in a saved state than in an object's own, in words; the empty string where nothing is.

    Args:
        saved: the state out of a file.
        own: the state that the object has now; what it does not hold, and what is None there, may be anything.
        where: what both are of, for the words.
        exact: whether `saved` has all that `own` has, and integers where it has them.
    """
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        if exact and (missing := [key for key in own if key not in saved]):
            return f"{where} has no {missing[0]}"
        found = (unlike(saved[key], own[key], f"{where}.{key}", exact=exact) for key in own if key in saved)
    elif isinstance(own, (list, tuple)) and isinstance(saved, (list, tuple)):
        found = (unlike(value, mine, f"{where}.{k}") for k, (value, mine) in enumerate(zip(saved, own, strict=False)))
    elif own is None or (_is_number(own) and _is_number(saved) and not (exact and type(saved) is not type(own))):
        return ""
    elif isinstance(own, Tensor) and isinstance(saved, Tensor):
        same = (saved.shape, saved.dtype) == (own.shape, own.dtype)
        return "" if same else f"{where} is of another size or type"
    else:
        return "" if type(saved) is type(own) else f"{where} is a {type(saved).__name__}, not a {type(own).__name__}"
    return next((wrong for wrong in found if wrong), "")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.dtype != torch.bool
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _unlike_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str:
    """What of an optimizer's saved state would end, or ruin, its first step."""
    numbers = {number for group in saved["param_groups"] for number in group["params"]}
    if lost := [number for number in saved["state"] if isinstance(number, int) and number not in numbers]:
        return f"the optimizer's state {lost[0]} belongs to none of its parameters"
    # One that was added in the training (`add_param_group`) is not there yet.
    sizes = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        then, now = (f"{len(each)} group(s) of {', '.join(map(str, each))} parameters" for each in sizes)
        return f"its optimizer has {then}, this fit's {now}: make the same before the fit, in configure_optimizers"
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        settings = {name: value for name, value in own.items() if name in optimizer.defaults}
        if "lr" in settings and "lr" not in group:
            return "the optimizer has no lr"
        if wrong := unlike(group, settings, "param_groups"):
            return wrong
        # Saved moments are numbered; the numbers stand in the groups, in the order of the parameters.
        for number, parameter in zip(group["params"], own["params"], strict=True):
            for name, value in saved["state"].get(number, {}).items():
                moment = name in _MOMENTS and (value is not None or name != "momentum_buffer")  # SGD's starts as None
                if moment and getattr(value, "shape", None) != parameter.shape:
                    return f"the optimizer's {name} does not have the shape {tuple(parameter.shape)} of its parameter"
                if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                    return f"the optimizer's {name} has values that are not finite"
                if name == "step" and not (_is_number(value) and 0 <= value < _MOST_STEPS and value == value // 1):
                    return f"the optimizer's step {value if _is_number(value) else type(value).__name__} counts none"
    return ""
