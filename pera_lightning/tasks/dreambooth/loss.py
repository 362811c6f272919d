"""The diffusion target, min-SNR weights of timesteps, and the loss of a DreamBooth batch; pure functions.

A noised latent at timestep t is √ᾱₜ x₀ + √(1 - ᾱₜ) ε, with ε ~ N(0, 1) (DDPM, arXiv 2006.11239, equation 4).

Legend: T timesteps of the schedule, B examples, … the axes of an example; alphas_cumprod is ᾱ (T,), t the examples'
timesteps (B,) int64, x0 and noise are (B, …), prediction_type is "epsilon" or "v_prediction".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")


def snr(alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """Computes signal-to-noise ratios ᾱₜ / (1 - ᾱₜ), (B,); 0 where ᾱₜ is."""
    alphas = _at(alphas_cumprod, t)  # (B,)
    return alphas / (1 - alphas)


def min_snr_weights(alphas_cumprod: Tensor, t: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Computes min-SNR weights (B,): min(SNR, γ) / SNR for noise, min(SNR, γ) / (SNR + 1) for v.

    arXiv 2303.09556, section 3: timesteps with little noise have a large SNR and would dominate; γ, 5 in the
    paper, caps their weight. Both are the same weight min(SNR, γ) of x₀'s error. At ᾱₜ = 0 the first is 1, its limit,
    and the second 0.
    """
    ratio = snr(alphas_cumprod, t)  # (B,)
    if prediction_type == "epsilon":
        return (gamma / ratio).clamp(max=1)  # min(SNR, γ) / SNR; in this order SNR = 0 gives 1, not 0 / 0
    return ratio.clamp(max=gamma) * (1 - _at(alphas_cumprod, t))  # 1 / (SNR + 1) is 1 - ᾱ


def add_noise(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """Computes noised examples √ᾱₜ x₀ + √(1 - ᾱₜ) ε, (B, …), of the schedule's type (float32)."""
    alphas = _at(alphas_cumprod, t, x0.ndim)
    return alphas.sqrt() * x0 + (1 - alphas).sqrt() * noise


def target(prediction_type: str, x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """Computes what the network learns to predict, (B, …): ε, or v = √ᾱₜ ε - √(1 - ᾱₜ) x₀.

    arXiv 2202.00512, appendix D.
    """
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
    """Draws noise ε + offset · n in float32, with ε ~ N(0, 1) of `shape` and one n ~ N(0, 1) per example and channel.

    With plain noise a network hardly learns the mean brightness of an image, since noise leaves it readable (N.
    Guttenberg, "Diffusion with offset noise", 2023, who takes 0.1). With offset 0 nothing more is drawn.

    Args:
        shape: (B, C, …).
        offset: standard deviation of n.
        generator: a generator on the device; by default the global one.
        device: where the noise is made.
    """
    noise = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    if offset:
        each = (*shape[:2], *(1 for _ in shape[2:]))  # the same value at all pixels of a channel
        noise += offset * torch.randn(each, generator=generator, device=device, dtype=torch.float32)
    return noise


def spread_timesteps(count: int, levels: int, total: int, generator: torch.Generator) -> Tensor:
    """Draws timesteps of `count` examples, one out of each of `levels` equal ranges, (count * levels,) int64.

    Args:
        count: number of examples; the timesteps of one are next to one another.
        levels: number of ranges that the schedule is divided into.
        total: T.
        generator: a generator on the CPU.
    """
    place = torch.arange(levels).repeat(count) + torch.rand(count * levels, generator=generator)  # in [0, levels)
    return (place / levels * total).long().clamp(max=total - 1)


def dreambooth_loss(
    prediction: Tensor, target: Tensor, weights: Tensor | None, is_prior: Tensor, prior_weight: float
) -> tuple[Tensor, Tensor]:
    """Computes (summed, count), whose quotient is mean(instances) + prior_weight · mean(priors).

    arXiv 2208.12242, equation 2. An example's loss is its weight times its mean squared error, so that min-SNR weights
    act on instances and priors alike, and the prior weight on the mean alone, however many priors there are. It is a
    sum because a step's mean is taken over ranks and accumulated batches (`training/normalised_loss.py`): sums of
    batches that hold instances and priors in one proportion, as all do, give the loss of the step. Batches of another
    proportion count by their instances.

    Nothing here depends on values, so that memory can be computed without them.

    Args:
        prediction: predictions (B, …) of any floating type; the error is taken in float32.
        target: targets (B, …).
        weights: weights (B,) of the examples; None for 1.
        is_prior: (B,) bool, true for the class images of prior preservation.
        prior_weight: λ of the paper.

    Returns:
        summed, float32, and count, int64: the instances, or the priors in a batch of these alone; both of shape ().
    """
    losses = (prediction.float() - target.float()).square().flatten(1).mean(1)  # (B,)
    if weights is not None:
        losses = losses * weights.to(losses)  # a weight an example
    instances, priors = (~is_prior).sum(), is_prior.sum()  # tensors, for no value is known to fake ones
    count = torch.where(instances > 0, instances, priors)
    # λ times a mean over priors, and times what the sum will be divided by; infinite and unused without priors.
    of_prior = prior_weight * count / priors
    return (losses * torch.where(is_prior, of_prior, 1.0)).sum(), count


def _at(alphas_cumprod: Tensor, t: Tensor, axes: int = 1) -> Tensor:
    """Gives ᾱₜ on the device of t, with as many axes as asked for, all but the first of length 1."""
    return alphas_cumprod.to(t.device)[t].reshape(-1, *(1 for _ in range(axes - 1)))
