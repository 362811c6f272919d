"""What a diffusion network is to predict, how timesteps count, and the loss of a DreamBooth batch; pure functions.

A noised latent at timestep t is √ᾱₜ x₀ + √(1 - ᾱₜ) ε, with ε ~ N(0, 1) (DDPM, arXiv 2006.11239, equation 4).

Legend: T timesteps of the schedule, B examples, … the axes of an example.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pera_lightning.errors import ConfigurationError, UnknownNameError, closest, listed

PREDICTION_TYPES = ("epsilon", "v_prediction")


def check_prediction_type(prediction_type: str) -> None:
    """Raises `ConfigurationError` or `UnknownNameError` for what a network may predict and we have no loss for."""
    if prediction_type == "sample":
        raise ConfigurationError(
            "the scheduler's prediction_type is 'sample', for which there is no loss here; give a model that predicts "
            f"{' or '.join(PREDICTION_TYPES)}"
        )
    if prediction_type not in PREDICTION_TYPES:
        near = closest(str(prediction_type), PREDICTION_TYPES)
        raise UnknownNameError(
            f"prediction_type {prediction_type!r} does not exist; there are {listed(PREDICTION_TYPES)}{near}"
        )


def snr(alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """Signal-to-noise ratios ᾱₜ / (1 - ᾱₜ), (B,); 0 where ᾱₜ is.

    Args:
        alphas_cumprod: ᾱ, (T,).
        t: timesteps, (B,) int64.
    """
    alphas = _at(alphas_cumprod, t)
    return alphas / (1 - alphas)


def min_snr_weights(alphas_cumprod: Tensor, t: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR weights (B,): min(SNR, γ) / SNR for noise, min(SNR, γ) / (SNR + 1) for v (arXiv 2303.09556, section 3).

    Both are the same weight min(SNR, γ) of x₀'s error. At ᾱₜ = 0 the first is 1, its limit, and the second 0.

    Args:
        alphas_cumprod: ᾱ, (T,).
        t: timesteps, (B,) int64.
        gamma: γ; the paper takes 5.
        prediction_type: "epsilon" or "v_prediction".

    Raises:
        ConfigurationError: γ is not a positive number, or prediction_type is "sample".
        UnknownNameError: there is no such prediction_type.
    """
    check_prediction_type(prediction_type)
    if not 0 < gamma < math.inf:
        raise ConfigurationError(f"min-SNR gamma is {gamma}; a positive number is needed (5 in the paper)")
    ratio = snr(alphas_cumprod, t)
    if prediction_type == "epsilon":
        return (gamma / ratio).clamp(max=1)  # in this order 0 gives 1, not 0 / 0
    return ratio.clamp(max=gamma) * (1 - _at(alphas_cumprod, t))  # 1 / (SNR + 1) is 1 - ᾱ


def add_noise(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """Noised examples √ᾱₜ x₀ + √(1 - ᾱₜ) ε, (B, …), of the schedule's type (float32).

    Args:
        x0: (B, …).
        noise: ε, (B, …).
        alphas_cumprod: ᾱ, (T,).
        t: timesteps, (B,) int64.
    """
    alphas = _at(alphas_cumprod, t, x0.ndim)
    return alphas.sqrt() * x0 + (1 - alphas).sqrt() * noise


def target(prediction_type: str, x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """What the network is to predict, (B, …): ε, or v = √ᾱₜ ε - √(1 - ᾱₜ) x₀ (arXiv 2202.00512, appendix D).

    Args:
        prediction_type: "epsilon" or "v_prediction".
        x0: (B, …).
        noise: ε, (B, …).
        alphas_cumprod: ᾱ, (T,).
        t: timesteps, (B,) int64.

    Raises:
        ConfigurationError: prediction_type is "sample".
        UnknownNameError: there is no such prediction_type.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return noise
    alphas = _at(alphas_cumprod, t, x0.ndim)
    return alphas.sqrt() * noise - (1 - alphas).sqrt() * x0


def offset_noise(
    shape: Sequence[int],
    offset: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Noise ε + offset · n in float32, with ε ~ N(0, 1) of `shape` and one n ~ N(0, 1) per example and channel.

    With plain noise a network hardly learns the mean brightness of an image, since noise leaves it readable (N.
    Guttenberg, "Diffusion with offset noise", 2023, who takes 0.1). With offset 0 nothing more is drawn.

    Args:
        shape: (B, C, …).
        offset: standard deviation of n.
        generator: of the device; by default the global one.
        device: where the noise is made.
    """
    noise = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    if offset:
        each = (*shape[:2], *(1 for _ in shape[2:]))
        noise += offset * torch.randn(each, generator=generator, device=device, dtype=torch.float32)
    return noise


def spread_timesteps(count: int, levels: int, total: int, generator: torch.Generator) -> Tensor:
    """Timesteps of `count` examples, one at random out of each of `levels` equal parts, (count * levels,) int64.

    Args:
        count: of examples; those of one are next to one another.
        levels: parts of the schedule.
        total: T.
        generator: of the CPU.
    """
    place = torch.arange(levels).repeat(count) + torch.rand(count * levels, generator=generator)
    return (place / levels * total).long().clamp(max=total - 1)


def dreambooth_loss(
    prediction: Tensor, target: Tensor, weights: Tensor | None, is_prior: Tensor, prior_weight: float
) -> tuple[Tensor, Tensor]:
    """(summed, count), whose quotient is mean(instances) + prior_weight · mean(priors) (arXiv 2208.12242, equation 2).

    An example's loss is its weight times its mean squared error, so that min-SNR weights act on instances and priors
    alike, and the prior weight on the mean alone, however many priors there are. Rows are written as one sum because
    a step's mean is taken over ranks and accumulated batches (see `step_mean.py`): the sums of parts that hold
    instances and priors in one proportion, as all batches do, give the loss of the whole. Parts of another proportion
    count by their instances.

    Nothing here depends on values, so that memory can be computed without them.

    Args:
        prediction: (B, …), any floating type; the error is taken in float32.
        target: (B, …).
        weights: (B,) of examples; None for 1.
        is_prior: (B,) bool, the class images of prior preservation.
        prior_weight: λ of the paper.

    Returns:
        summed, float32, and count, int64: the instances, or the priors where there is nothing else; both of shape ().
    """
    losses = (prediction.float() - target.float()).square().flatten(1).mean(1)  # (B,)
    if weights is not None:
        losses = losses * weights.to(losses)
    instances, priors = (~is_prior).sum(), is_prior.sum()
    count = torch.where(instances > 0, instances, priors)
    of_prior = prior_weight * count / priors  # a mean over priors, times what it will be divided by; without any unused
    return (losses * torch.where(is_prior, of_prior, 1.0)).sum(), count


def _at(alphas_cumprod: Tensor, t: Tensor, axes: int = 1) -> Tensor:
    """ᾱₜ on the device of t, with as many axes as asked for, all but the first of length 1."""
    return alphas_cumprod.to(t.device)[t].reshape(-1, *(1 for _ in range(axes - 1)))
