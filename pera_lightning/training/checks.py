"""What the injection callback refuses, since it would go wrong in silence.

Most is looked at before the fit, some again at the first optimizer step and wherever a checkpoint is written: whatever
others do to an adapted module in between. What has become NaN is found by `finite.py`.
"""

from __future__ import annotations

from collections.abc import Collection

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_warn
from torch import float32, float64, nn

from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.adapters.base import LinearAdapter
from pera_lightning.errors import ConfigurationError, DataError, listed
from pera_lightning.injection.fingerprint import differing, fingerprint
from pera_lightning.injection.inject import adapter_parameter_names, injection_of, trained_parameter_names
from pera_lightning.injection.state import find_injected, frozen_names, remember_unfrozen

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
    """Raises `ConfigurationError` where adapters are not as the injection left them, or would not be trained."""
    check_adapters(module)
    _check_base(trainer, module)
    _check_not_frozen(trainer, module)
    check_in_optimizer(trainer, module)
    loose = remember_unfrozen(module)  # by a callback, or by the module itself
    if loose:  # wanted by some, forgotten by others
        rank_zero_warn(
            f"{len(loose)} base parameters are trained besides adapters and heads, and saved with them: "
            f"{listed(loose, 3)}; name their modules in trainable, or freeze them"
        )


def check_adapters(module: LightningModule) -> None:
    """Raises `ConfigurationError` where adapted layers were replaced, or adapters are in low precision."""
    found = find_injected(module)
    if found is None:
        return
    mark, parameters = injection_of(found[1]), dict(module.named_parameters())
    names = sorted(adapter_parameter_names(module))
    # Adapters that were swapped for others of their size are in no optimizer, which `check_in_optimizer` finds.
    if sum(parameters[n].numel() for n in names) != mark.report.adapter_parameters:  # type: ignore[union-attr]
        modules = dict(found[1].named_modules())
        lost = [path for path, slices in mark.layers.items() if not _carries(modules.get(path), slices)]  # type: ignore
        raise ConfigurationError(
            f"{len(lost)} adapted layers, or their adapters, were replaced after the injection: {listed(lost, 3)}; "
            "replace layers before it, in __init__ or configure_model"
        )
    low = [n for n in names if parameters[n].dtype not in (float32, float64)]
    if low:
        raise ConfigurationError(
            f"{len(low)} adapter parameters are {parameters[low[0]].dtype}, float32 is needed: {listed(low, 2)}; "
            "cast the base before the injection, not after it"
        )


def _carries(layer: nn.Module | None, slices: Collection[str]) -> bool:
    if not isinstance(layer, AdaptedLayer) or {*layer.adapters} != {*slices}:
        return False
    return all(isinstance(adapter, LinearAdapter) for adapter in layer.adapters.values())


def _check_base(trainer: Trainer, module: LightningModule) -> None:
    """Raises `ConfigurationError` where weights of adapted layers are not those that the injection saw."""
    prefix, root = find_injected(module)  # type: ignore[misc]
    mark, frozen = injection_of(root), frozen_names(module)
    if any(isinstance(module, AdaptedLayer) and module.merged for module in root.modules()):
        return  # which its forward refuses
    # What was unfrozen may have been trained, also by a fit before; shards have no fingerprint.
    if trainer.ckpt_path or not mark.layers or any(hasattr(p, "full_tensor") for p in module.parameters()):  # type: ignore
        return
    changed = differing(mark.fingerprint, fingerprint(root, mark.layers))  # type: ignore[union-attr]
    if changed := [path for path in changed if f"{prefix}{path}.weight" in frozen]:
        raise ConfigurationError(
            f"the weights of {len(changed)} adapted layers changed after the injection: {listed(changed, 3)}; load "
            "them before it, since adapters begin from them and checkpoints are told by them"
        )


def _check_not_frozen(trainer: Trainer, module: LightningModule) -> None:
    """Raises `ConfigurationError` for frozen adapters and heads; warns where a callback may thaw them later."""
    prefix, root = find_injected(module)  # type: ignore[misc]
    ours = {prefix + name for name in trained_parameter_names(root)}
    off = [name for name, p in module.named_parameters() if name in ours and not p.requires_grad]
    if not off:
        return
    text = f"{len(off)} parameters of adapters and heads were frozen after the injection: {listed(off, 3)}"
    if any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        rank_zero_warn(f"{text}; they are trained only once a callback unfreezes them")
    else:
        raise ConfigurationError(
            f"{text}; the injection freezes the base, so take that out of {type(module).__name__}'s "
            "configure_optimizers, or whatever did it"
        )


def check_in_optimizer(trainer: Trainer, module: LightningModule) -> None:
    """Raises `ConfigurationError` where a trained parameter is in no optimizer."""
    # An optimizer that was made before the injection knows nothing of the adapters.
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    left = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if left and trainer.optimizers:
        raise ConfigurationError(
            f"{len(left)} trained parameters are in no optimizer: {listed(left, 3)}; give configure_optimizers all "
            "parameters with requires_grad"
        )


def check_epoch(trainer: Trainer, module: LightningModule) -> None:
    """Raises `DataError` after an epoch without a batch; warns after a first one without an optimizer step."""
    batches = trainer.fit_loop.epoch_loop.batch_progress
    if not batches.current.processed:
        raise DataError("the train loader gave no batch in this epoch: look at its data set, sampler and drop_last")
    if not trainer.global_step and batches.total.processed == batches.current.processed:
        rank_zero_warn(
            f"no optimizer step in the first {batches.total.processed} batches, so nothing is trained or written: "
            f"{type(module).__name__} optimises by hand and has to call self.optimizers().step() (steps of an "
            "optimizer from use_pl_optimizer=False are not counted, and no checkpoint is written of them)"
        )


def check_not_empty(trainer: Trainer) -> None:
    """Raises `DataError` after a fit whose train loader had no batch; Lightning only notes that it has stopped."""
    if trainer.num_training_batches == 0 and trainer.limit_train_batches and not trainer.global_step:
        raise DataError(
            "nothing was trained: the train loader has no batch; are there fewer examples than a batch has, with "
            "drop_last?"
        )
