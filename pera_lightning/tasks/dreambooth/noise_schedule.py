"""The scheduler of a pipeline: what images are sampled with, and the noise schedule that its UNet is trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pera_lightning.errors import ConfigurationError, shorten
from pera_lightning.tasks.dreambooth.loss import PREDICTION_TYPES
from pera_lightning.tasks.dreambooth.pipeline_files import read
from pera_lightning.validation import check_choice

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def load_scheduler(
    name: str, revision: str | None = None, prediction_type: str | None = None, steps: int = 1
) -> SchedulerMixin:
    """Makes the scheduler that the pipeline samples with, once it is known to take that many steps."""
    import diffusers

    # The class that the pipeline names, in diffusers' version here.
    kind = (read(name, "model_index.json", revision).get("scheduler") or [None, None])[1]
    maker = getattr(diffusers, str(kind), None)
    config = read(name, "scheduler/scheduler_config.json", revision)
    if prediction_type is not None:
        config = {**config, "prediction_type": prediction_type}
    try:
        if maker is None:
            raise ValueError("there is no such class")
        scheduler = maker.from_config(config)
    except (ValueError, NotImplementedError, ImportError, TypeError) as error:
        why = f"cannot be made by diffusers {diffusers.__version__}: {shorten(str(error))[:200]}"
        raise ConfigurationError(f"scheduler {kind} of model {name} {why}") from error
    most = scheduler.config.get("num_train_timesteps", steps)
    if not 1 <= steps <= most:
        raise ConfigurationError(f"{steps} sampling steps, and there are 1 to {most}; 20 to 50 are usual")
    return scheduler


def noise_alphas(name: str, revision: str | None = None, prediction_type: str | None = None) -> tuple[Tensor, str]:
    """Reads the noise schedule that a pipeline's UNet is trained with.

    Returns:
        ᾱ (T,) in float32, the share of the signal in the variance, and what is predicted: `prediction_type`, else what
        the scheduler says. With ``rescale_betas_zero_snr`` the last ᾱ is zero (arXiv 2305.08891, algorithm 1).
    """
    from diffusers import DDPMScheduler

    scheduler = load_scheduler(name, revision)
    config = scheduler.config
    if "beta_schedule" not in config:
        kind = type(scheduler).__name__
        raise ConfigurationError(f"model {name} is for {kind}, which has no schedule of β as DDPM's; give another")
    predicts = prediction_type or config.get("prediction_type") or "epsilon"
    check_choice(predicts, "prediction_type", PREDICTION_TYPES)
    # The same β as the sampler's, in the scheduler of the training (DDPM).
    options = {key: config[key] for key in _SCHEDULE if key in config}
    ddpm = DDPMScheduler(rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)), **options)
    return ddpm.alphas_cumprod.float(), predicts
