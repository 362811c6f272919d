"""The updates of an adapted model as LoRAs, one for each projection, for formats that know nothing else.

Most updates are a LoRA exactly (see `LinearAdapter.low_rank_update`). The slices of a fused projection become one LoRA
of the full projection, zero in what is not adapted. Where a rank is given, larger updates are cut to it by a truncated
SVD, the best approximation of that rank there is, with the relative error ‖ΔW' − ΔW‖ / ‖ΔW‖ (Frobenius).

Shapes: in, out features of a projection; R rank of an update.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.adapters.base import LowRankUpdate
from pera_lightning.errors import NotMergeableError, listed
from pera_lightning.merging.merge import adapted_layers

# What is cut away is then at most a hundredth of the update's squared norm.
MAX_ERROR = 0.1


@torch.no_grad()
def low_rank_updates(
    model: nn.Module, rank: int | None = None, max_error: float = MAX_ERROR
) -> tuple[dict[str, LowRankUpdate], dict[str, float]]:
    """The update of every adapted layer of a model, on the CPU, by the layer's path; and the error of each cut.

    Args:
        model: injected, not merged.
        rank: cuts larger updates to this rank; None takes exact updates only.
        max_error: the largest relative error of a layer that is taken.

    Raises:
        NotMergeableError: for an update of full rank without `rank`, too large an error, or NaN or infinite values.
    """
    updates, errors = {}, {}
    for path, layer in adapted_layers(model):
        try:
            update, error = _exported(layer, rank)
        except NotMergeableError as reason:
            raise NotMergeableError(f"{path}: {reason}") from None
        A, B, bias = (None if t is None else t.detach().cpu() for t in (update.A, update.B, update.bias))
        updates[path] = LowRankUpdate(A, B, update.scale, bias)  # type: ignore[arg-type]
        if error is not None:
            errors[path] = error
    # A cut that loses too much is refused, naming the worst layers.
    worst = sorted((path for path in errors if errors[path] > max_error), key=lambda path: -errors[path])
    if worst:
        raise NotMergeableError(
            f"cut to rank {rank}, {len(worst)} of {len(updates)} layers lose more than max_error={max_error:g}: "
            f"{listed([f'{path} {errors[path]:.2g}' for path in worst], 3)}; take a larger rank or max_error, or "
            "export merged weights"
        )
    return updates, errors


def _exported(layer: AdaptedLayer, rank: int | None) -> tuple[LowRankUpdate, float | None]:
    """The exact update of a layer where it has one of the rank, else the nearest one and its error."""
    try:
        update = full_update(layer)
    except NotMergeableError as reason:
        matrix = full_matrix(layer)  # raises where not even a matrix exists
        if rank is None:
            how = "give a rank to cut it to by SVD, or export merged weights"
            raise NotMergeableError(f"{reason}: {how}") from None
        return cut_matrix(matrix, rank)
    _check_finite(update.A, update.B, update.bias)
    return cut_update(update, rank) if rank is not None and update.rank > rank else (update, None)


def full_update(layer: AdaptedLayer) -> LowRankUpdate:
    """The exact update of a layer: A (R, in) and B (out, R), R the sum of the ranks of its slices, if all are LoRAs."""
    updates = {name: adapter.low_rank_update() for name, adapter in layer.adapters.items()}  # type: ignore[operator]
    rows = layer.base_weight().shape[0]
    first = next(iter(updates.values()))
    if len(updates) == 1 and first.B.shape[0] == rows:
        return first
    # The slices' A one below the other, and beside each other their B and constants, zero in all other rows.
    columns, bias = [], first.B.new_zeros(rows)
    for name, update in updates.items():
        own, column = layer.slices[name], update.B.new_zeros(rows, update.rank)
        column[own] = update.B if update.scale == first.scale else update.B * update.scale / first.scale
        columns.append(column)
        if update.bias is not None:
            bias[own] = update.bias
    constant = any(update.bias is not None for update in updates.values())
    A = torch.cat([update.A for update in updates.values()])  # (R, in)
    return LowRankUpdate(A, torch.cat(columns, 1), first.scale, bias if constant else None)


def full_matrix(layer: AdaptedLayer) -> Tensor:
    """ΔW of a layer, (out, in), at least float32."""
    weight = layer.base_weight()
    matrix = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    for name, adapter in layer.adapters.items():
        rows = layer.slices[name]
        matrix[rows] = adapter.delta_weight(weight[rows])  # type: ignore[operator]
    return matrix


def cut_matrix(matrix: Tensor, rank: int) -> tuple[LowRankUpdate, float]:
    """The nearest update of a rank to ΔW (out, in), and its relative error."""
    _check_finite(matrix)
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    return _cut(u, sigma, vh, rank)


def cut_update(update: LowRankUpdate, rank: int) -> tuple[LowRankUpdate, float]:
    """The nearest update of a smaller rank, and its relative error; its bias stays.

    With B = Q_b R_b and Aᵀ = Q_a R_a, the singular values of ΔW are those of the small matrix s · R_b R_aᵀ.
    """
    q_b, r_b = torch.linalg.qr(update.B.double())  # (out, k), (k, R)
    q_a, r_a = torch.linalg.qr(update.A.double().T)  # (in, k'), (k', R)
    # A matrix of R x R and not of out x in.
    u, sigma, vh = torch.linalg.svd(update.scale * r_b @ r_a.T, full_matrices=False)
    found, error = _cut(q_b @ u, sigma, vh @ q_a.T, rank)
    dtype = update.A.dtype
    return LowRankUpdate(found.A.to(dtype), found.B.to(dtype), found.scale, update.bias), error


def _cut(u: Tensor, sigma: Tensor, vh: Tensor, rank: int) -> tuple[LowRankUpdate, float]:
    """Keeps the largest singular values, shared evenly by both factors."""
    squares = sigma.double().square()
    total = float(squares.sum())
    root = sigma[:rank].sqrt()
    update = LowRankUpdate(root[:, None] * vh[:rank], u[:, :rank] * root)
    # The error is what was cut away: the other singular values.
    return update, (float(squares[rank:].sum()) / total) ** 0.5 if total else 0.0


def padded(updates: Mapping[str, LowRankUpdate]) -> dict[str, LowRankUpdate]:
    """The same updates with one rank and one scale for all: zero rows are added, and other scales go into B."""
    rank = max(update.rank for update in updates.values())
    scales = {update.scale for update in updates.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    even = {}
    for path, update in updates.items():
        more = rank - update.rank  # rows of A and columns of B that change nothing
        B = update.B if update.scale == scale else update.B * (update.scale / scale)
        even[path] = LowRankUpdate(F.pad(update.A, (0, 0, 0, more)), F.pad(B, (0, more)), scale, update.bias)
    return even


def _check_finite(*tensors: Tensor | None) -> None:
    # LAPACK does not come back from NaN with a message that a reader could use.
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None):
        raise NotMergeableError("the update has NaN or infinite values")
