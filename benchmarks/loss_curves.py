"""The training losses of several runs in one picture, from what TensorBoard has of them.

    python benchmarks/loss_curves.py runs/lora runs/pera --output losses.png

Each run is a log folder; its name is the label. The thin line is what was logged, the thick one its mean over
`--window` logged values; points are the validation loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def scalars(folder: Path, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a tag over all event files of a run; where a resumed run logged a step again, its last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, float] = {}
    for file in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if tag in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars(tag)}
    steps = sorted(found)
    return np.array(steps), np.array([found[step] for step in steps])


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and up to `window` - 1 before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(folders: Sequence[Path], output: Path, window: int = 10, highest: float | None = None) -> dict[str, float]:
    """Draws the curves.

    Args:
        folders: log folders.
        output: PNG, PDF or SVG.
        window: logged values to average.
        highest: upper end of the loss axis.

    Returns:
        The last smoothed training loss of each run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    last = {}
    for folder in folders:
        steps, values = scalars(folder, "train/loss")
        if not len(steps):
            raise SystemExit(f"{folder} has no train/loss in TensorBoard's files; give the log folder of a run")
        mean = smoothed(values, window)
        (line,) = axes.plot(steps, mean, linewidth=2, label=folder.name)
        axes.plot(steps, values, linewidth=0.5, alpha=0.4, color=line.get_color())
        axes.plot(*scalars(folder, "val/loss"), "o", color=line.get_color())
        last[folder.name] = float(mean[-1])
    axes.set(xlabel="optimizer steps", ylabel="loss of a token, nats", ylim=(0, highest))
    axes.legend()
    figure.savefig(output, dpi=120)
    plt.close(figure)
    return last


def main(args: Sequence[str] | None = None) -> None:
    """Draws, and prints the last losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="log folders of runs")
    parser.add_argument("--output", type=Path, required=True, help="PNG, PDF or SVG")
    parser.add_argument("--window", type=int, default=10, help="logged values to average")
    parser.add_argument("--highest", type=float, help="upper end of the loss axis")
    given = parser.parse_args(args)
    for name, value in draw(given.folders, given.output, given.window, given.highest).items():
        print(f"{name:<30} {value:.4f}")
    print(given.output)


if __name__ == "__main__":
    main()
