"""Float64 references of every method, written from its formula with plain loops over elements.

They share no code with the package: no tensor products, no broadcasting. Each takes the method's hyperparameters, the
adapter's tensors by name, one input vector and the frozen weight, and gives the update of the output, Δy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Vector = list[float]
Matrix = list[list[float]]


def output(method: Any, tensors: dict[str, Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The adapted layer, W x + b + Δy, for each row of x (n, in): (n, out)."""
    named = {name: tensor.double().tolist() for name, tensor in tensors.items()}
    W = weight.double().tolist()
    b = [0.0] * len(W) if bias is None else bias.double().tolist()
    rows = []
    for point in x.double().tolist():
        base = times(W, point)
        update = REFERENCES[type(method).__name__](method, named, point, W)
        rows.append([base[o] + b[o] + update[o] for o in range(len(W))])
    return torch.tensor(rows, dtype=torch.float64)


def times(matrix: Matrix, vector: Vector) -> Vector:
    return [math.fsum(row[k] * vector[k] for k in range(len(vector))) for row in matrix]


def entry(B: Matrix, A: Matrix, o: int, i: int) -> float:
    """Element (o, i) of B A."""
    return math.fsum(B[o][k] * A[k][i] for k in range(len(A)))


def lora(method: Any, t: dict[str, Any], x: Vector, W: Matrix) -> Vector:
    """(alpha / r) B A x, less the same of the starting values where those are kept."""
    s = method.alpha / method.rank
    y = [s * value for value in times(t["B"], times(t["A"], x))]
    if "A0" in t:
        y = [a - s * b for a, b in zip(y, times(t["B0"], times(t["A0"], x)), strict=True)]
    return y


def pera(method: Any, t: dict[str, Any], x: Vector, W: Matrix) -> Vector:
    """(alpha / r) [Σ_i b_i (a_i · x) + Σ_{i ≤ j} (b_i ⊙ b_j) h_ij ((a_i ⊙ a_j) · x)], pairs row by row."""
    A, B, r = t["A"], t["B"], method.rank
    y = times(B, times(A, x))
    position = 0
    for i in range(r):
        for j in range(i, r):
            kept = {"full": True, "square": i == j, "cross": i < j, "linear": False}[method.terms]
            if not kept:
                continue
            z = t["h"][position] * math.fsum(A[i][k] * A[j][k] * x[k] for k in range(len(x)))
            position += 1
            for o in range(len(B)):
                y[o] += B[o][i] * B[o][j] * z
    assert position == len(t.get("h", []))
    return [method.alpha / r * value for value in y]


def hira(method: Any, t: dict[str, Any], x: Vector, W: Matrix) -> Vector:
    """Σ_i scale R_oi (B A)_oi x_i."""
    R = t.get("reference", W)
    return [
        math.fsum(method.scale * R[o][i] * entry(t["B"], t["A"], o, i) * x[i] for i in range(len(x)))
        for o in range(len(W))
    ]


def hilora(method: Any, t: dict[str, Any], x: Vector, W: Matrix) -> Vector:
    """Σ_i [W_oi (B₁ A₁)_oi + (alpha / lora_rank) (B₂ A₂)_oi] x_i."""
    s = method.alpha / method.lora_rank
    return [
        math.fsum(
            (W[o][i] * entry(t["hira.B"], t["hira.A"], o, i) + s * entry(t["lora.B"], t["lora.A"], o, i)) * x[i]
            for i in range(len(x))
        )
        for o in range(len(W))
    ]


def spline(k: int, order: int, z: float, knots: Sequence[float]) -> float:
    """The k-th B-spline of an order, by the recursion of Cox and de Boor for one number."""
    if order == 0:
        return 1.0 if knots[k] <= z < knots[k + 1] else 0.0
    left = (z - knots[k]) / (knots[k + order] - knots[k])
    right = (knots[k + order + 1] - z) / (knots[k + order + 1] - knots[k + 1])
    return left * spline(k, order - 1, z, knots) + right * spline(k + 1, order - 1, z, knots)


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "tanh": math.tanh,
    "sigmoid": lambda v: 1.0 / (1.0 + math.exp(-v)),
    "relu": lambda v: max(v, 0.0),
    "leaky_relu": lambda v: v if v > 0 else 0.01 * v,
}


def sigma(method: Any, t: dict[str, Any], z: Vector) -> Vector:
    """act(H act(z)) + w Σ_i b(z_i), each of the two where it is kept."""
    act = ACTIVATIONS[method.activation]
    out = [0.0] * len(z)
    if method.fixed:
        out = [act(v) for v in times(t["anl.self_projection"], [act(v) for v in z])]
    if method.learnable:
        low, high = method.grid_range
        size, order = method.grid_size, method.spline_order
        knots = [low + (high - low) * k / size for k in range(-order, size + order + 1)]
        total = [math.fsum(spline(k, order, v, knots) for v in z) for k in range(size + order)]
        out = [a + b for a, b in zip(out, times(t["anl.spline_weight"], total), strict=True)]
    return out


def aurora(method: Any, t: dict[str, Any], x: Vector, W: Matrix) -> Vector:
    """(alpha / r) B σ(A x), or (alpha / r) B σ(A) x with σ on each column of A where inference is static."""
    A = t["A"]
    if method.inference_mode == "static":
        columns = [sigma(method, t, [row[i] for row in A]) for i in range(len(x))]
        z = [math.fsum(columns[i][k] * x[i] for i in range(len(x))) for k in range(len(A))]
    else:
        z = sigma(method, t, times(A, x))
    return [method.alpha / method.rank * value for value in times(t["B"], z)]


def moslora(method: Any, t: dict[str, Any], x: Vector, W: Matrix) -> Vector:
    """(alpha / r) B M A x."""
    return [method.alpha / method.rank * value for value in times(t["B"], times(t["mixer"], times(t["A"], x)))]


REFERENCES: dict[str, Callable[[Any, dict[str, Any], Vector, Matrix], Vector]] = {
    "LoRA": lora,
    "PERA": pera,
    "HiRA": hira,
    "HiLoRA": hilora,
    "AuroRA": aurora,
    "MoSLoRA": moslora,
}
