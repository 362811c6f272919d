"""How far rounding alone can move two runs of the same arithmetic apart: bounds for runs under different strategies.

DDP and FSDP2 do the same sums, but on operands that lie elsewhere in memory, and MKL adds up in an order that depends
on their alignment; one process adds up twice the examples itself. So they agree to rounding, not to the bit.

**Gradients.** A computed sum of n terms is the exact sum of terms that are each off by a factor 1 + e, |e| <= n u, with
u the unit roundoff. Of sums one after the other the n add up. Through the tiny Llama of the tests (2 blocks of width
16, heads of 4, feed-forward 24, 130 words, at most 4 x 60 tokens):

    a block     16 norm + 16 q, k, v + 4 scores + 60 softmax + 60 values + 16 o + 16 norm + 16 up + 24 down = 228
    the rest    16 norm + 16 logits + 130 softmax + 240 loss                                                = 402
    backward    each of these once more, and 240 tokens for the gradient of a weight
    clipping    the norm over 500 trained numbers
    together    2 (2 x 228 + 402) + 240 + 500                                                               = 2456

in float32; the ViT has fewer. In bfloat16 the sums are kept in float32 and each result is rounded once: 2 blocks of 12
results, 3 for the rest, forward and backward, are 54. Two runs differ by twice that; and from the second step on they
start from parameters that differ by as much, relatively, so that S steps count S times. A gradient g is off by at most

    D = 2 S n u max|g|

**Parameters.** AdamW moves an element by lr m / sqrt(v); m is a weighted mean of its gradients and sqrt(v) a weighted
norm, with weights that sum to 1, so both are off by at most D, and |m| <= r sqrt(v), with r below 1.02 for up to
five steps (Cauchy-Schwarz; the weights are powers of 0.9 and 0.999). Hence a step is off by at most (1 + r) lr D /
sqrt(v), never by more than 2 r lr, and adding it to the parameter rounds four times.
"""

import torch

FLOAT32 = (2456, 2.0**-24)
BFLOAT16 = (54, 2.0**-8)
LR, BETAS = 0.01, (0.9, 0.999)


def gradient_bounds(end, roundings):
    """D of each trained parameter."""
    terms, unit = roundings
    steps = end["gradients"]
    largest = {name: max(step[name].abs().max() for step in steps) for name in steps[0]}
    return {name: 2 * len(steps) * terms * unit * value for name, value in largest.items()}


def parameter_bounds(end, roundings):
    """How far each element of each trained parameter may be off at the end."""
    bounds = {}
    for name, off in gradient_bounds(end, roundings).items():
        value = end["trained"][name]
        squares, bound = torch.zeros_like(value), 4 * len(end["gradients"]) * FLOAT32[1] * value.abs()
        for step, gradients in enumerate(end["gradients"], start=1):
            squares = BETAS[1] * squares + (1 - BETAS[1]) * gradients[name] ** 2
            root = (squares / (1 - BETAS[1] ** step)).sqrt()
            bound = bound + LR * (2.1 * off / root).clamp(max=2.1).nan_to_num(2.1)
        bounds[name] = bound
    return bounds


def assert_within(one, other, bounds):
    """Holds tensors of the same names within bounds, of one number or one for each element."""
    assert one.keys() == other.keys() == bounds.keys()
    for name, value in one.items():
        assert value.abs().max() > 0, name  # zeros would agree with anything
        over = (other[name] - value).abs() / bounds[name]
        assert over.max() <= 1, f"{name} is off by {over.max():.3g} of what rounding allows"


def assert_alike(one, other, roundings=FLOAT32):
    """Holds that two runs, as `strategy_runs.Watch` keeps them, differ by rounding only."""
    assert len(one["gradients"]) == len(other["gradients"]) > 0
    off = gradient_bounds(one, roundings)
    for first, second in zip(one["gradients"], other["gradients"], strict=True):
        assert_within(first, second, off)
    assert_within(one["trained"], other["trained"], parameter_bounds(one, roundings))
