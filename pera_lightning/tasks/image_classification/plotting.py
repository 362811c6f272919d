"""Figures for the loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED = 30  # from here on, names and numbers in the cells would not be read


def confusion_figure(matrix: Tensor, names: list[str], title: str) -> Figure:
    """Draws a confusion matrix of counts (classes, classes), rows true, columns predicted, coloured by rows' shares."""
    from matplotlib.figure import Figure

    shares = matrix.float() / matrix.sum(1, keepdim=True).clamp(min=1)  # a class without examples has none
    count = len(names)
    figure = Figure(figsize=(min(14, 3 + 0.45 * count),) * 2, layout="constrained")  # inches
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted", ylabel="true")
    if count <= _NAMED:
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
        for i, j in matrix.nonzero().tolist():
            colour = "white" if shares[i, j] > 0.5 else "black"  # readable on dark and light cells
            axes.text(j, i, int(matrix[i, j]), ha="center", va="center", color=colour, fontsize=8)
    return figure
