"""Whether what a fit is to leave are the weights that a callback made of it, as weight averaging does.

`StochasticWeightAveraging` keeps its average beside the module, in no checkpoint, and puts it into the module when
training ends; so do averages of other people. Lightning's `WeightAveraging` writes its average into every checkpoint,
which are then chosen among as always.
"""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from pera_lightning.injection.state import frozen_names


class AveragedWeights:
    """Compares what is trained before and after the other callbacks' `on_train_end`."""

    def __init__(self) -> None:
        self._before: dict[str, float] | None = None

    def training_ends(self, module: LightningModule) -> None:
        """Notes the weights; to be called before all other callbacks."""
        self._before = _sums(module)

    def put_into(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether a callback has put other weights into the module than training left there."""
        before, self._before = self._before, None
        callbacks: list = trainer.callbacks  # type: ignore[attr-defined]
        if before is None or any(isinstance(callback, WeightAveraging) for callback in callbacks):
            return False
        # Before its epoch for the statistics of batch norms, which is a last one, the average is there already.
        swa = [callback for callback in callbacks if isinstance(callback, StochasticWeightAveraging)]
        return any(trainer.current_epoch > callback.swa_end for callback in swa) or _sums(module) != before


def _sums(module: LightningModule) -> dict[str, float]:
    """The sum of each trained tensor, of this process's part of it: no copy, which the device may have no room for."""
    frozen = frozen_names(module)
    return {name: _local(p).detach().sum().item() for name, p in module.named_parameters() if name not in frozen}


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
