"""The updates of an adapted model as LoRAs, one for each projection, for formats that know nothing else.

Most updates are a LoRA exactly (see `LinearAdapter.low_rank_update`). The row blocks of a fused projection become one
LoRA of the whole projection, with zeros in the rows of no block. Where a rank is given, larger updates are cut to it by
a truncated SVD, the best approximation of that rank there is, with the relative error ‖ΔW' − ΔW‖ / ‖ΔW‖ (Frobenius).

Shapes: in, out features of a projection; R rank of an update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.adapters.base import LowRankUpdate
from pera_lightning.errors import NotMergeableError, listed
from pera_lightning.merging.merge import adapted_layers

# What is cut away is then at most a hundredth of the update's squared norm.
MAX_ERROR = 0.1


@dataclass(frozen=True)
class ExportedUpdate:
    """The update of one projection.

    Attributes:
        update: of the whole projection, on the CPU.
        error: relative error of the cut; None where the update is exact.
    """

    update: LowRankUpdate
    error: float | None = None


@torch.no_grad()
def low_rank_updates(
    model: nn.Module, rank: int | None = None, max_error: float = MAX_ERROR
) -> dict[str, ExportedUpdate]:
    """The update of every adapted layer of a model, by the layer's path.

    Args:
        model: injected, not merged.
        rank: cuts larger updates to this rank; None takes exact updates only.
        max_error: the largest relative error of a layer that is taken.

    Raises:
        NotMergeableError: where an update has no low rank and none is given, where a layer's error is too large, or
            where an update has NaN or infinite values.
    """
    found = {}
    for path, layer in adapted_layers(model):
        try:
            found[path] = _exported(layer, rank)
        except NotMergeableError as error:
            raise NotMergeableError(f"{path}: {error}") from None
    broken = [path for path, each in found.items() if not _finite(each.update)]
    if broken:
        raise NotMergeableError(f"the updates of {listed(broken, 3)} have NaN or infinite values")
    wrong = {path: each.error for path, each in found.items() if each.error is not None and each.error > max_error}
    if wrong:
        worst = sorted(wrong, key=lambda path: -wrong[path])
        raise NotMergeableError(
            f"cut to rank {rank}, {len(wrong)} of {len(found)} layers lose more than max_error={max_error:g}: "
            f"{listed([f'{path} {wrong[path]:.2g}' for path in worst], 3)} (relative); take a larger rank, raise "
            "max_error, or export merged weights"
        )
    return found


def _exported(layer: AdaptedLayer, rank: int | None) -> ExportedUpdate:
    try:
        update = whole_update(layer)
    except NotMergeableError as error:
        matrix = whole_matrix(layer)  # raises where there is no matrix either
        if rank is None:
            hint = "give a rank to cut it to by SVD, with the error reported, or export merged weights"
            raise NotMergeableError(f"{error}: {hint}") from None
        update, cut = cut_matrix(matrix, rank)
        return ExportedUpdate(_on_cpu(update), cut)
    if rank is None or update.rank <= rank:
        return ExportedUpdate(_on_cpu(update))
    update, cut = cut_update(update, rank)
    return ExportedUpdate(_on_cpu(update), cut)


def whole_update(layer: AdaptedLayer) -> LowRankUpdate:
    """The exact update of all rows of a layer: A (R, in) and B (out, R), R the sum of the row blocks' ranks.

    Raises:
        NotMergeableError: where the update of a row block is no LoRA.
    """
    parts = {block: adapter.low_rank_update() for block, adapter in layer.adapters.items()}  # type: ignore[operator]
    rows = layer.base_weight().shape[0]
    first = next(iter(parts.values()))
    if len(parts) == 1 and first.B.shape[0] == rows:
        return first
    columns = []
    for block, part in parts.items():
        column = part.B.new_zeros(rows, part.rank)
        column[layer.slices[block]] = part.B if part.scale == first.scale else part.B * part.scale / first.scale
        columns.append(column)
    bias = None
    if any(part.bias is not None for part in parts.values()):
        bias = first.B.new_zeros(rows)
        for block, part in parts.items():
            if part.bias is not None:
                bias[layer.slices[block]] = part.bias
    return LowRankUpdate(torch.cat([part.A for part in parts.values()]), torch.cat(columns, 1), first.scale, bias)


def whole_matrix(layer: AdaptedLayer) -> Tensor:
    """ΔW of all rows of a layer, (out, in), at least float32."""
    weight = layer.base_weight()
    matrix = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    for block, adapter in layer.adapters.items():
        rows = layer.slices[block]
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
    _check_finite(update.A, update.B)
    q_b, r_b = torch.linalg.qr(update.B.double())  # (out, k), (k, R)
    q_a, r_a = torch.linalg.qr(update.A.double().T)  # (in, k'), (k', R)
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
    return update, (float(squares[rank:].sum()) / total) ** 0.5 if total else 0.0


def padded(updates: Mapping[str, LowRankUpdate]) -> dict[str, LowRankUpdate]:
    """The same updates with one rank and one scale for all: zero rows are added, and other scales go into B."""
    rank = max(update.rank for update in updates.values())
    scales = {update.scale for update in updates.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    return {path: _padded(update, rank, scale) for path, update in updates.items()}


def _padded(update: LowRankUpdate, rank: int, scale: float) -> LowRankUpdate:
    more = rank - update.rank
    B = update.B if update.scale == scale else update.B * (update.scale / scale)
    return LowRankUpdate(F.pad(update.A, (0, 0, 0, more)), F.pad(B, (0, more)), scale, update.bias)


def _on_cpu(update: LowRankUpdate) -> LowRankUpdate:
    bias = None if update.bias is None else update.bias.detach().cpu()
    return LowRankUpdate(update.A.detach().cpu(), update.B.detach().cpu(), update.scale, bias)


def _finite(update: LowRankUpdate) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in (update.A, update.B, update.bias) if t is not None)


def _check_finite(*tensors: Tensor) -> None:
    # LAPACK does not come back from NaN with a message that a reader could use.
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NotMergeableError("the update has NaN or infinite values")
