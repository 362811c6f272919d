"""The diffusion loss against plain loops in float64, written from the papers, and against diffusers' scheduler."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pera_lightning.tasks.dreambooth.loss import add_noise, dreambooth_loss, min_snr_weights, offset_noise, snr, target

T, GAMMA = 50, 5.0
SHAPE = (3, 2, 5)  # of an example; its axes differ


def schedule(zero_terminal=False):
    alphas = torch.linspace(0.9995, 0.002, T)
    if zero_terminal:
        alphas[-1] = 0.0
    return alphas


def draw(batch, seed=0):
    """x0, noise, prediction (B, …) and timesteps (B,) from both sides of SNR = gamma."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(batch, *SHAPE, generator=generator) for _ in range(3)]
    return *tensors, torch.randint(0, T, (batch,), generator=generator)


def numbers(tensor):
    return [float(value) for value in tensor.flatten()]


def plain_weight(alpha, kind):
    """Min-SNR's weight of the error of x0, min(SNR, gamma), in terms of the error that is predicted.

    x0 = (x_t - sqrt(1 - a) eps) / sqrt(a), so the error of x0 is (1 - a) / a times that of eps, 1 / SNR; and
    x0 = sqrt(a) x_t - sqrt(1 - a) v, so it is (1 - a) times that of v.
    """
    ratio = alpha / (1 - alpha)
    return min(ratio, GAMMA) * ((1 - alpha) / alpha if kind == "epsilon" else 1 - alpha)


def plain_target(alpha, x, e, kind):
    """v is the derivative of x_t by the angle phi, where cos(phi) = sqrt(a) (arXiv 2202.00512, appendix D)."""
    phi = math.acos(math.sqrt(alpha))
    return e if kind == "epsilon" else math.cos(phi) * e - math.sin(phi) * x


def plain_loss(x0, noise, prediction, t, alphas, kind, is_prior, prior_weight, weighted):
    """Mean of the instances, plus prior_weight times the mean of the priors."""
    of = {False: [], True: []}
    for i, prior in enumerate(is_prior):
        alpha = float(alphas[t[i]])
        squares = []
        for x, e, p in zip(numbers(x0[i]), numbers(noise[i]), numbers(prediction[i]), strict=True):
            squares.append((p - plain_target(alpha, x, e, kind)) ** 2)
        of[prior].append((plain_weight(alpha, kind) if weighted else 1.0) * sum(squares) / len(squares))
    return sum(of[False]) / max(len(of[False]), 1) + prior_weight * sum(of[True]) / max(len(of[True]), 1)


def ours(x0, noise, prediction, t, alphas, kind, is_prior, prior_weight, weighted):
    weights = min_snr_weights(alphas, t, GAMMA, kind) if weighted else None
    wanted = target(kind, x0, noise, alphas, t)
    return dreambooth_loss(prediction, wanted, weights, torch.tensor(is_prior), prior_weight)


MIXES = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "min-snr"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("prior_weight", [0.0, 1.0, 0.3])
def test_every_mix_of_four_rows_is_the_plain_loop(kind, prior_weight, weighted):
    alphas = schedule()
    for number, is_prior in enumerate(MIXES):
        case = draw(4, seed=number)
        rest = (alphas, kind, is_prior, prior_weight, weighted)
        summed, count = ours(*case, *rest)
        instances = 4 - sum(is_prior)
        assert count.item() == (instances or 4)
        assert (summed / count).item() == pytest.approx(plain_loss(*case, *rest), rel=2e-5), is_prior


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_other_batch_sizes(batch):
    case = draw(batch)
    rest = (schedule(), "epsilon", [i % 3 == 1 for i in range(batch)], 0.7, True)
    summed, count = ours(*case, *rest)
    assert (summed / count).item() == pytest.approx(plain_loss(*case, *rest), rel=2e-5)


@pytest.mark.parametrize(
    ("is_prior", "parts"),
    [
        ([False] * 4, [[0], [1, 2, 3]]),
        ([True] * 4, [[0, 1], [2, 3]]),
        ([False, False, True, True], [[0, 2], [1, 3]]),
        ([False, False, False, True, True, True], [[2, 3], [0, 1, 4, 5]]),
        ([False, False, True, False, False, True], [[0, 1, 2], [3, 4, 5]]),
    ],
    ids=["instances", "priors", "halves", "unequal", "two to one"],
)
def test_parts_of_one_proportion_sum_to_the_whole(is_prior, parts):
    """What ranks and accumulated batches hold: their sums over their counts are the loss of the large batch."""
    x0, noise, prediction, t = draw(len(is_prior))
    rest = (schedule(), "v_prediction")
    whole = plain_loss(x0, noise, prediction, t, *rest, is_prior, 0.3, True)
    sums = [ours(x0[p], noise[p], prediction[p], t[p], *rest, [is_prior[i] for i in p], 0.3, True) for p in parts]
    assert (sum(s for s, _ in sums) / sum(n for _, n in sums)).item() == pytest.approx(whole, rel=2e-5)


def test_the_gradient_is_that_of_the_loss():
    x0, noise, prediction, t = draw(3)
    is_prior = [False, True, True]
    summed, count = ours(x0, noise, prediction.requires_grad_(), t, schedule(), "epsilon", is_prior, 0.5, True)
    (summed / count).backward()
    per = math.prod(SHAPE)
    for i, (share, step) in enumerate(zip([1, 0.5 / 2, 0.5 / 2], t.tolist(), strict=True)):
        weight = plain_weight(float(schedule()[step]), "epsilon")
        expected = share * weight * 2 / per * (prediction[i] - noise[i]).double()
        torch.testing.assert_close(prediction.grad[i].double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    """In float16 the squares of errors above 256 would be infinite."""
    _, noise, prediction, _ = draw(4)
    low = (300 * prediction).to(dtype).requires_grad_()
    flags = torch.tensor([False, False, True, True])
    summed, count = dreambooth_loss(low, noise, None, flags, 1.0)
    squares = (low.detach().double() - noise.double()).square().flatten(1).mean(1)
    assert summed.dtype == torch.float32
    assert (summed / count).item() == pytest.approx((squares[:2].mean() + squares[2:].mean()).item(), rel=1e-5)
    summed.backward()
    assert low.grad.dtype == dtype
    # The target is not rounded to the prediction's type either.
    near, zeros = torch.full((1, 4), 1.001), torch.ones(1, 4, dtype=dtype)
    assert dreambooth_loss(zeros, near, None, flags[:1], 1.0)[0].item() == pytest.approx(1e-6, rel=1e-2)


# ---- the schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_weights_of_every_timestep(kind):
    alphas, t = schedule(), torch.arange(T)
    weights = min_snr_weights(alphas, t, GAMMA, kind)
    assert weights.tolist() == pytest.approx([plain_weight(float(a), kind) for a in alphas], rel=1e-4)
    assert snr(alphas, t).tolist() == pytest.approx([float(a) / (1 - float(a)) for a in alphas], rel=1e-4)
    assert snr(alphas, t).min() < GAMMA < snr(alphas, t).max()  # gamma cuts some and not all


@pytest.mark.parametrize(("kind", "limit"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_zero_terminal_snr(kind, limit):
    """arXiv 2305.08891: no signal at the last timestep. Weights, targets and gradients stay finite."""
    alphas, t = schedule(zero_terminal=True), torch.tensor([T - 1, 0])
    x0, noise, prediction, _ = draw(2)
    assert snr(alphas, t)[0] == 0
    assert min_snr_weights(alphas, t, GAMMA, kind)[0] == limit
    assert torch.equal(add_noise(x0, noise, alphas, t)[0], noise[0])
    assert torch.equal(target("v_prediction", x0, noise, alphas, t)[0], -x0[0])
    summed, _ = ours(x0, noise, prediction.requires_grad_(), t, alphas, kind, [False, True], 1.0, True)
    summed.backward()
    assert summed.isfinite()
    assert prediction.grad.isfinite().all()
    assert prediction.grad[1].abs().max() > 0


@pytest.mark.parametrize("rescaled", [False, True])
def test_noise_and_velocity_are_those_of_diffusers(rescaled):
    from diffusers import DDPMScheduler

    sdxl = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDPMScheduler(**sdxl, rescale_betas_zero_snr=rescaled)
    alphas = scheduler.alphas_cumprod
    x0, noise, _, _ = draw(6)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    torch.testing.assert_close(add_noise(x0, noise, alphas, t), scheduler.add_noise(x0, noise, t))
    torch.testing.assert_close(target("v_prediction", x0, noise, alphas, t), scheduler.get_velocity(x0, noise, t))
    assert target("epsilon", x0, noise, alphas, t) is noise


def test_what_is_computed_without_values():
    """Memory is estimated with tensors that have no values; nothing may ask for one."""
    with FakeTensorMode():
        x0, noise, prediction = (torch.randn(4, *SHAPE) for _ in range(3))
        alphas, t, is_prior = torch.rand(T), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool)
        weights = min_snr_weights(alphas, t, GAMMA, "v_prediction")
        wanted = target("v_prediction", x0, noise, alphas, t)
        summed, count = dreambooth_loss(prediction, wanted, weights, is_prior, 1.0)
    assert summed.shape == count.shape == ()


# ---- the noise ------------------------------------------------------------------------------------------------------


def test_offset_noise_adds_one_number_per_example_and_channel():
    shape = (3, 4, 6, 7)

    def generator():
        return torch.Generator().manual_seed(1)

    one, other = generator(), generator()
    plain = offset_noise(shape, 0.0, one)
    assert torch.equal(plain, torch.randn(shape, generator=other))
    assert torch.equal(one.get_state(), other.get_state())  # nothing more was drawn
    added = offset_noise(shape, 0.1, generator()) - plain
    torch.testing.assert_close(added, added[:, :, :1, :1].expand(shape))
    assert len({round(value, 5) for value in added[:, :, 0, 0].flatten().tolist()}) == 12
    many = offset_noise((200, 100, 1, 1), 3.0, generator())
    assert many.var().item() == pytest.approx(1 + 3.0**2, rel=0.05)


def test_the_global_generator_is_the_default():
    torch.manual_seed(0)
    first = offset_noise((2, 3, 4), 0.1)
    assert not torch.equal(first, offset_noise((2, 3, 4), 0.1))
    torch.manual_seed(0)
    assert torch.equal(first, offset_noise((2, 3, 4), 0.1))
