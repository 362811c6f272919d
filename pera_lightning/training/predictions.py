"""Files of predictions: gathered from all processes, each example once, in the order of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from pera_lightning.files import atomic_write
from pera_lightning.training.distributed import all_gather_object, merge_shards
from pera_lightning.training.results import output_name


def write_predictions(
    trainer: Trainer, predicted: Mapping[str, Sequence[tuple]], as_text: Callable[[Sequence[tuple]], str]
) -> None:
    """Writes files of predictions into the run's folder and prints where; every process must call it.

    Each checkpoint has a folder of its own, see `results.output_name`.

    Args:
        trainer: trainer of the run; in a fast_dev_run nothing is written.
        predicted: by name of the file what this process predicted for each of its examples, their ids first.
        as_text: makes the text of a file of its predictions.
    """
    shards = all_gather_object(predicted)
    run = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is asked on every rank
    if trainer.fast_dev_run or not trainer.is_global_zero:
        return
    folder = run / output_name(trainer, run, "predictions")
    folder.mkdir(parents=True, exist_ok=True)
    for name in predicted:
        merged = merge_shards([shard[name] for shard in shards])  # what filled up a shard comes once
        atomic_write(folder / name, as_text(merged).encode())
        print(f"Predictions of {len(merged)} examples: {folder / name}", flush=True)
