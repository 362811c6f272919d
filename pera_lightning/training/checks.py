"""What the injection callback refuses before training starts, since it would go wrong in silence."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_warn
from torch import float32, float64

from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.injection.inject import adapter_parameter_names
from pera_lightning.injection.state import remember_unfrozen

_TRUE_PRECISIONS = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")


def check_position(callback: Callback, trainer: Trainer) -> None:
    """Raises `ConfigurationError` unless the callback is the first (weight averaging copies the model at its setup).

    Lightning puts its own finders of batch size and learning rate before all others; they wait for the fit.
    """
    others = (c for c in trainer.callbacks if not isinstance(c, (BatchSizeFinder, LearningRateFinder)))  # type: ignore[attr-defined]
    first = next(others)
    if first is not callback:
        raise ConfigurationError(
            f"{type(callback).__name__} must be the first callback, {type(first).__name__} comes before it: "
            f"Trainer(callbacks=[{type(callback).__name__}(…), …])"
        )


def check_precision(trainer: Trainer) -> None:
    """Raises `ConfigurationError` for precisions that cast the adapters too."""
    if trainer.precision in _TRUE_PRECISIONS:
        raise ConfigurationError(
            f"precision={trainer.precision} casts the adapters too, and their small updates vanish: load the base in "
            "low precision (base_dtype=bfloat16 in our modules) and train with precision=bf16-mixed or 32-true"
        )


def check_before_fit(trainer: Trainer, module: LightningModule) -> None:
    """Raises `ConfigurationError` where an adapter is in low precision, or a trained parameter in no optimizer."""
    parameters = dict(module.named_parameters())
    low = [n for n in sorted(adapter_parameter_names(module)) if parameters[n].dtype not in (float32, float64)]
    if low:
        raise ConfigurationError(
            f"{len(low)} adapter parameters are {parameters[low[0]].dtype}, float32 is needed: {listed(low, 2)}; "
            "cast the base before the injection, not after it"
        )
    # An optimizer that was made before the injection knows nothing of the adapters.
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    left = [name for name, p in parameters.items() if p.requires_grad and id(p) not in held]
    if left and trainer.optimizers:
        raise ConfigurationError(
            f"{len(left)} trained parameters are in no optimizer: {listed(left, 3)}; give configure_optimizers all "
            "parameters with requires_grad"
        )
    loose = remember_unfrozen(module)  # by a callback, or by the module itself
    if loose:  # wanted by some, forgotten by others
        rank_zero_warn(
            f"{len(loose)} base parameters are trained besides adapters and heads, and saved with them: "
            f"{listed(loose, 3)}; name their modules in trainable, or freeze them"
        )
