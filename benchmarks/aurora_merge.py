"""What merging costs AuroRA: test accuracy dynamic, static, calibrated, and with the adapter removed, over seeds.

    python benchmarks/aurora_merge.py --seeds 0 1 2 3 4 --output runs/aurora_merge

Trains the quickstart (or another image config with AuroRA) once for each seed, about a minute each on two cores; seeds
that are trained already are measured again only. The merged rows are measured after `merge`, on the merged weights.
Calibration takes training images and no labels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from pera_lightning.adapters.aurora import AuroRALayer
from pera_lightning.cli.main import main as command
from pera_lightning.cli.trained_run import Trained, TrainedCLI
from pera_lightning.merging.merge import merge, unmerge
from pera_lightning.merging.merge_error import Measured, evaluating, merge_error

ROWS = ("dynamic", "static", "calibrated", "adapter removed")


def trained(config: str, seed: int, output: Path, words: Sequence[str]) -> Trained:
    """The best checkpoint of a run with this seed, trained where it is not there."""
    folder = output / f"seed_{seed}"
    best = folder / "checkpoints" / "best.ckpt"
    if not best.is_file():
        where = ["--trainer.logger.init_args.save_dir", str(output), "--trainer.logger.init_args.name", folder.name]
        command(["fit", "--config", config, "--seed_everything", str(seed), *where, *words])
    return Trained(TrainedCLI(["--ckpt_path", str(best)]))


@contextmanager
def removed(network: nn.Module) -> Iterator[None]:
    """Within this context the adapters do nothing; the trained head stays."""
    kept = {layer: layer.B.detach().clone() for layer in network.modules() if isinstance(layer, AuroRALayer)}
    with torch.no_grad():
        for layer in kept:
            layer.B.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, value in kept.items():
                layer.B.copy_(value)


@torch.no_grad()
def score(network: nn.Module, loader: Any) -> tuple[float, float, Measured]:
    """Accuracy, mean cross-entropy, and the logits, of all test images."""
    with evaluating(network):
        given = [(network(batch[0]), batch[1]) for batch in loader]
    logits, labels = (torch.cat(parts) for parts in zip(*given, strict=True))
    loss = nn.functional.cross_entropy(logits, labels).item()
    return (logits.argmax(-1) == labels).float().mean().item(), loss, Measured([logits], [None])


def measure(run: Trained, batches: int) -> dict[str, dict[str, float]]:
    """Each row's accuracy, loss, and relative change of the logits against the dynamic model."""
    network, forward = run.module.model, run.module.outputs_and_loss
    fit = run.calibration_batches(batches)
    run.data.setup("test")
    loader = run.data.test_dataloader()
    *figures, before = score(network, loader)
    rows = {"dynamic": [*figures, 0.0, 0.0]}
    for mode in ("static", "calibrated"):
        started = time.perf_counter()
        merge(network, mode=mode, batches=fit if mode == "calibrated" else None, forward=forward)
        seconds = time.perf_counter() - started
        *figures, after = score(network, loader)
        rows[mode] = [*figures, merge_error(before, after).outputs, seconds]
        unmerge(network)
    with removed(network):
        *figures, after = score(network, loader)
    rows["adapter removed"] = [*figures, merge_error(before, after).outputs, 0.0]
    return {name: dict(zip(("accuracy", "loss", "change", "seconds"), rows[name], strict=True)) for name in ROWS}


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """The results as a table in Markdown."""
    seeds = list(results)
    lines = [f"| | {' | '.join(f'seed {s}' for s in seeds)} | mean ± sd | loss | change of the logits |"]
    lines.append("|---" * (len(seeds) + 4) + "|")
    for name in ROWS:
        rows = [results[seed][name] for seed in seeds]
        accuracy = [row["accuracy"] for row in rows]
        spread = f" ± {stdev(accuracy):.3f}" if len(rows) > 1 else ""
        cells = [*(f"{value:.3f}" for value in accuracy), f"{mean(accuracy):.3f}{spread}"]
        cells += [f"{mean(row['loss'] for row in rows):.3f}", f"{mean(row['change'] for row in rows):.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Trains what is missing, measures, prints the table and writes `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml", help="of images, with AuroRA")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--batches", type=int, default=8, help="training batches to calibrate with")
    parser.add_argument("--output", type=Path, default=Path("runs/aurora_merge"))
    given, words = parser.parse_known_args(args)  # what else is given changes the config
    results = {}
    for seed in given.seeds:
        results[seed] = measure(trained(given.config, seed, given.output, words), given.batches)
    print(table(results))
    seconds = mean(rows["calibrated"]["seconds"] for rows in results.values())
    print(f"\n{given.batches} batches to calibrate with, {seconds:.1f} s a merge")
    (given.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
