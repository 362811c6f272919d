"""`results.json`: what a test measured, of what, and with what."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from pera_lightning import __version__
from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.adapters.aurora import acting_layers
from pera_lightning.files import atomic_write
from pera_lightning.injection.inject import injection_of
from pera_lightning.injection.state import find_injected
from pera_lightning.training.training_data import trained_on_at_test

FILE = "results.json"
_PACKAGES = ("torch", "lightning", "timm", "transformers", "datasets", "diffusers", "torchmetrics")


def versions() -> dict[str, str]:
    """Versions of this package, Python, and the installed ones among those that matter to a result."""
    found = {"pera_lightning": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in bytes: resident, and on the CUDA device where one was used."""
    # Linux gives kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def inference_stages(model: nn.Module) -> dict[str, str]:
    """The stages that a test has, and the row of the papers' tables that each stands for.

    An AuroRA whose inference is dynamic is tested twice.
    """
    merged = {m.merged for m in model.modules() if isinstance(m, AdaptedLayer) and m.merged}  # modes of the merges
    modes = {layer.inference_mode for layer in acting_layers(model)}
    if "dynamic" in modes:
        return {"test": "dynamic, the paper's AuroRA-D", "test_static": "static, the paper's row AuroRA"}
    if merged:
        return {"test": f"merged: {', '.join(sorted(merged))}"}
    return {"test": "static" if modes else "linear"}


def about(module: LightningModule, task: str) -> dict[str, Any]:
    """What was tested, the beginning of a result's `protocol`: a module with a hyperparameter `model_name`."""
    checkpoint = module.trainer.ckpt_path
    return {
        "task": task,
        "model_name": module.hparams["model_name"],  # type: ignore[index]
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }


def collect(module: nn.Module, metrics: Mapping[str, float], **facts: Any) -> dict[str, Any]:
    """A result as primitives.

    Args:
        module: module that was tested; its injection gives method, hyperparameters and parameter counts.
        metrics: values by name.
        facts: further entries, e.g. protocol, n, seconds.
    """
    found = find_injected(module)
    mark = injection_of(found[1]) if found else None
    seed = os.environ.get("PL_GLOBAL_SEED")  # by seed_everything
    injected = mark and {
        "method": mark.method.spec(),
        "targets": list(mark.targets),
        "trainable": list(mark.trainable),
        "trainable_parameters": mark.report.trainable_parameters,
        "total_parameters": mark.report.total_parameters,
    }
    return {
        **(injected or {"method": None}),
        **facts,
        "metrics": metrics,
        "seed": None if seed is None else int(seed),
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
    }


def scored(data: dict[str, Any] | None, training: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the data say of themselves at test, with `selected_on_test` as it is for this checkpoint.

    If the same examples were split otherwise in training, some that are scored on selected, and a warning says so.
    `training` is the protocol of the data that the checkpoint was trained with, None if it is not known.
    """
    cut = ("split_protocol", "split_seed")  # what decides who selects
    if not data or not training or all(data.get(key) == training.get(key) for key in cut):
        return data
    same = {*data.get("sha256", {}).values()} & {*training.get("sha256", {}).values()}  # files that both read
    if not same or data.get("selected_on_test"):
        return data
    # The files are the same, the draw is another: some that are scored on now chose the checkpoint.
    was, now = (", ".join(f"{key}={of.get(key)}" for key in cut) for of in (training, data))
    rank_zero_warn(f"the checkpoint was selected with {was}, and is scored with {now}: on examples that selected it")
    return {**data, "selected_on_test": True}


def output_name(trainer: Trainer, folder: Path, name: str) -> str:
    """The name of a file or folder of results in a run's folder, by the checkpoint that is measured.

    It is `name` for the checkpoint that the run keeps first, mostly the best one, and for weights in memory;
    ``results-last.json`` and the like for another of its checkpoints, ``results-none.json`` for the untrained network,
    and a name with a digest of the path for another run's checkpoint. So no result is written over another's.
    """
    which = _measured(trainer, folder)
    return f"{Path(name).stem}-{which}{Path(name).suffix}" if which else name


def _measured(trainer: Trainer, folder: Path) -> str | None:
    adapter = next((c for c in trainer.callbacks if hasattr(c, "untrained")), None)  # type: ignore[attr-defined]
    if adapter is not None and adapter.untrained:
        return "none"
    if trainer.ckpt_path is None:
        return None
    file, first = Path(str(trainer.ckpt_path)).resolve(), trainer.checkpoint_callback
    if adapter is not None and adapter.best_checkpoint and file == Path(adapter.best_checkpoint).resolve():
        return None
    keepers = [Path(k.dirpath) for k in trainer.checkpoint_callbacks if getattr(k, "dirpath", None)]
    places = [place.resolve() for place in (folder / "checkpoints", *keepers)]
    own = file.parent in (*places, folder.resolve(), Path(trainer.default_root_dir).resolve())
    if not own and any(next(place.glob("*.ckpt"), None) for place in places):
        return f"{file.stem}-{sha256(str(file).encode()).hexdigest()[:8]}"
    return None if file.stem == (getattr(first, "filename", None) or "best") else file.stem


def record(module: LightningModule, metrics: Mapping[str, float], **facts: Any) -> dict[str, Any] | None:
    """Writes what `collect` gives into the run's folder and prints where; every process must call it.

    Returns what was written, on the process that did.
    """
    trainer = module.trainer
    folder = trainer.log_dir  # asked on every rank
    if folder is None or not trainer.is_global_zero or trainer.fast_dev_run:
        return None
    result = collect(module, metrics, **facts, **trained_on_at_test(module))
    name = output_name(trainer, Path(folder), FILE)
    print(f"Results: {write(Path(folder), result, name)}", flush=True)
    return result


def as_text(result: dict[str, Any]) -> str:
    """A result as `results.json` holds it."""
    return json.dumps(result, indent=1) + "\n"


def write(folder: Path, result: dict[str, Any], name: str = FILE) -> Path:
    """Writes `results.json`, or a file of another name, into a run's folder, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    atomic_write(path, as_text(result).encode())
    return path
