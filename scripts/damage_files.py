"""Damages copies of an adapter folder and of a checkpoint, loads each, and counts what came of it.

    python scripts/damage_files.py --copies 200

A small fit leaves both. Each copy is damaged in one way, drawn by a seed, and given to a fresh small model: a folder to
`load_adapter`, a checkpoint to `load_adapted` and to a fit that goes on from it for a step. Right is one of two: a
`PeraError` of one line, with the plain model as it was; or what the undamaged file gives, equal to the bit. Files are
damaged as they lie (cuts, flipped bits, a folder in a file's place), and in their content, written anew with checksums
that agree: as somebody would who means it. Exit code 1 for any other outcome.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pera_lightning import AdapterInjection, load_adapted, load_adapter
from pera_lightning.adapters import AuroRA
from pera_lightning.errors import PeraError

STEPS = 3
JUNK = ["junk", None, -7, 3.5, [], {}, [[[[]]]], {"a": {"b": [None]}}, True, "x" * 5000, float("nan"), 10**30]


class Small(LightningModule):
    """A network with adapters' targets, a norm and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width))
        self.norm, self.head = nn.BatchNorm1d(width), nn.Linear(width, 3)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


def fit(module: Small, folder: Path, steps: int, **options: Any) -> None:
    """Trains to a number of steps, all in one epoch."""
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    adapters = AdapterInjection(AuroRA(rank=2), ["body.0", "body.2"], ["head"])
    keep = ModelCheckpoint(folder / "checkpoints", filename="last", every_n_train_steps=STEPS)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=9, default_root_dir=folder,
        callbacks=[adapters, keep], **quiet,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True), **options)


# ---- kinds of damage: each changes a folder or file in place, with what `random` draws ------------------------------


def cut(file: Path, draw: random.Random) -> None:
    """The end is missing."""
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data))])


def flip(file: Path, draw: random.Random) -> None:
    """One bit is another."""
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(data))


def overwrite(file: Path, draw: random.Random) -> None:
    """Some bytes are others."""
    data = bytearray(file.read_bytes())
    start = draw.randrange(len(data))
    data[start : start + draw.randrange(1, 64)] = draw.randbytes(32)
    file.write_bytes(bytes(data))


def replace(file: Path, draw: random.Random) -> None:
    """Something else is in its place."""
    file.unlink()
    kind = draw.choice(["missing", "folder", "text", "nested"])
    if kind == "folder":
        file.mkdir()
    elif kind != "missing":
        file.write_text("<html>404</html>" if kind == "text" else '{"format":1,"a":' + "[" * 100_000 + "]" * 100_000)


def places(value: Any, keep: Callable[[tuple], bool] = lambda path: True, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all that is in nested dictionaries and lists, outer ones first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        if keep((*path, key)):
            yield (*path, key)
            yield from places(inside, keep, (*path, key))


def at(value: Any, path: tuple) -> Any:
    """What lies at a path."""
    for key in path:
        value = value[key]
    return value


def another_type(content: Any, draw: random.Random) -> None:
    """A value is of a type that has nothing to do with what belongs there."""
    # The checksums of a config are checked for what they are of, and need no damage of their own.
    path = draw.choice(list(places(content, lambda path: path[0] != "checksums")))
    before = at(content, path)
    number = isinstance(before, (int, float)) and not isinstance(before, bool)
    others = [v for v in JUNK if type(v) is not type(before) and not (number and isinstance(v, (int, float, bool)))]
    at(content, path[:-1])[path[-1]] = copy.deepcopy(draw.choice(others))


def missing_key(content: Any, draw: random.Random) -> None:
    """An entry is missing: of the file, of its tensors or of its description."""
    outer = [path for path in places(content) if len(path) == 1 or (path[0] in _NAMED and len(path) == 2)]
    path = draw.choice(outer)
    del at(content, path[:-1])[path[-1]]


def wrong_format(content: Any, draw: random.Random) -> None:
    """A format that this version does not know."""
    (content.get("pera_lightning") or content)["format"] = draw.choice([0, 2, 99, -1, "1", 1.0, True, None, [1]])


def greedy(content: Any, draw: random.Random) -> None:
    """Hyperparameters ask for more memory than there is."""
    values = (content.get("pera_lightning") or content)["method"]["init_args"]
    values[draw.choice(["grid_size", "spline_order", "rank"])] = draw.choice([10**7, 10**9, 10**12, 10**18, 10**40])


def not_a_method(content: Any, draw: random.Random) -> None:
    """Another class is named."""
    names = ["os.system", "LoRA", "", ".", "torch.nn.Linear", "no.such.Method", "pera_lightning.adapters.method.Method"]
    (content.get("pera_lightning") or content)["method"]["class_path"] = draw.choice(names)


def nest(content: Any, draw: random.Random) -> None:
    """A value is nested without end."""
    deep: list = []
    for _ in range(draw.choice([20, 150])):
        deep = [deep]
    described = content.get("pera_lightning") or content
    described[draw.choice([*described, "new"])] = deep


_NAMED = ("state_dict", "pera_lightning")  # parts of a checkpoint whose entries are all needed


def tensor(change: Callable[[Tensor, random.Random], Any]) -> Callable[[dict, random.Random], None]:
    """Damage to one tensor of a state dict."""

    def damage(state: dict, draw: random.Random) -> None:
        name = draw.choice([name for name in state if state[name].is_floating_point() and state[name].dim()])
        state[name] = change(state[name], draw)

    damage.__doc__ = change.__doc__
    return damage


def another_shape(value: Tensor, draw: random.Random) -> Tensor:
    """It has more, fewer or other dimensions."""
    shapes = [value.flatten(), value[..., :-1], value.unsqueeze(0), torch.cat([value, value]), value.new_zeros(0)]
    return draw.choice([each.clone() for each in shapes if each.shape != value.shape])


def another_dtype(value: Tensor, draw: random.Random) -> Tensor:
    """It is of integers, of truth values or complex."""
    return value.to(draw.choice([torch.int64, torch.int8, torch.bool, torch.complex64]))


def not_finite(value: Tensor, draw: random.Random) -> Tensor:
    """One value is NaN or infinite."""
    value = value.clone()
    value.view(-1)[draw.randrange(value.numel())] = draw.choice([float("nan"), float("inf"), -float("inf")])
    return value


def half_adapter(state: dict, draw: random.Random) -> None:
    """An adapter's tensor is in half precision."""
    name = draw.choice([name for name in state if ".adapters." in name])
    state[name] = state[name].to(draw.choice([torch.float16, torch.bfloat16]))


def extra_tensor(state: dict, draw: random.Random) -> None:
    """A frozen weight of the base, or something unknown, is among the tensors."""
    name, shape = draw.choice(
        [("body.0.weight", (16, 8)), ("body.2.bias", (16,)), ("norm.weight", (16,)), ("evil", (1,)), ("a\nb", (2,))]
    )
    state[name] = torch.full(shape, 7.0)


def lost_tensor(state: dict, draw: random.Random) -> None:
    """A tensor is missing."""
    del state[draw.choice(list(state))]


def renamed_tensor(state: dict, draw: random.Random) -> None:
    """A tensor has another name."""
    name = draw.choice(list(state))
    state[f"{name}s"] = state.pop(name)


RAW = {"cut": cut, "bit flipped": flip, "bytes overwritten": overwrite, "replaced": replace}
TENSORS: dict[str, Callable] = {
    "tensor's shape": tensor(another_shape), "tensor's type": tensor(another_dtype), "not finite": tensor(not_finite),
    "half-precision adapter": half_adapter, "extra tensor": extra_tensor, "tensor missing": lost_tensor,
    "tensor renamed": renamed_tensor,
}  # fmt: skip
CONTENT: dict[str, Callable] = {
    "value's type": another_type, "entry missing": missing_key, "format": wrong_format, "greedy method": greedy,
    "method's name": not_a_method, "nested": nest,
}  # fmt: skip


def damage_folder(kind: str, folder: Path, draw: random.Random) -> None:
    """Damages one of the two files of an adapter folder."""
    weights, config = folder / "adapter.safetensors", folder / "adapter_config.json"
    if kind in RAW:
        RAW[kind](draw.choice([weights, config]), draw)
        return
    described = json.loads(config.read_text())
    if kind in TENSORS:
        state = load(weights.read_bytes())
        TENSORS[kind](state, draw)
        data = save({name: value.contiguous() for name, value in state.items()})
        weights.write_bytes(data)
        described["sha256"] = hashlib.sha256(data).hexdigest()
    else:
        CONTENT[kind](described, draw)
        described.pop("checksums", None)  # as a folder of an earlier version, which has none
    config.write_text(json.dumps(described))


def damage_checkpoint(kind: str, file: Path, draw: random.Random) -> None:
    """Damages a checkpoint."""
    if kind in RAW:
        RAW[kind](file, draw)
        return
    content = torch.load(file, weights_only=True)
    if kind in TENSORS:
        moments = content["optimizer_states"][0]["state"][0]
        aims = [content["state_dict"]] * 3 + ([moments] if kind in ("tensor's shape", "not finite") else [])
        TENSORS[kind](draw.choice(aims), draw)
    else:
        CONTENT[kind](content, draw)
    torch.save(content, file)


# ---- what comes of it -----------------------------------------------------------------------------------------------


def facts(module: nn.Module) -> list[Any]:
    """What a refusal must leave: classes, what is trained, all values."""
    kinds = [(name, type(each).__name__) for name, each in module.named_modules()]
    return [kinds, [(name, p.requires_grad) for name, p in module.named_parameters()], bits(module)]


def bits(module: nn.Module) -> dict[str, bytes]:
    """The values of a module's tensors, by name."""
    return {name: value.detach().numpy().tobytes() for name, value in module.state_dict().items()}


def outcome(use: Callable[[Small], Any], right: dict[str, bytes]) -> str:
    """Uses a file with a fresh module: "refused", "equal", or what went wrong."""
    module = Small()
    before = facts(module)
    try:
        use(module)
    except PeraError as error:
        if len(str(error).splitlines()) != 1:
            return f"more than a line: {error!r}"
        return "refused" if facts(module) == before else "changed: refused, and the model is not as it was"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    return "equal" if bits(module) == right else "other: accepted, with another content"


def resumed(module: Small, file: Path, folder: Path) -> None:
    """Goes on with a fit for one step, in a module that is adapted for it whatever becomes of the checkpoint."""
    seed_everything(0, verbose=False)
    fit(module, folder, STEPS + 1, ckpt_path=str(file))


def main(words: list[str] | None = None) -> int:
    """Damages, loads, prints the counts by kind, and gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=200, help="of the folder, and as many of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        wrong = count(args.copies, args.seed, Path(name))
    for line in wrong:
        print(f"  {line}")
    verdict = f"WRONG: {len(wrong)}" if wrong else "ALL RIGHT"
    print(f"{verdict} of {args.copies} folders and {args.copies} checkpoints")
    return 1 if wrong else 0


def count(copies: int, seed: int, folder: Path) -> list[str]:
    """Prints the table; gives a line for everything that is not right."""
    seed_everything(0, verbose=False)
    whole = Small()
    fit(whole, folder / "run", STEPS)
    adapter, checkpoint = folder / "run" / "adapter", folder / "run" / "checkpoints" / "last.ckpt"
    further = Small()
    resumed(further, checkpoint, folder / "further")
    after, one_more = bits(whole), bits(further)
    kinds, table, wrong = [*RAW, *TENSORS, *CONTENT], Counter[tuple[str, str, str]](), []
    for number in range(copies):
        for what in ("folder", "checkpoint"):
            draw, kind = random.Random(f"{seed} {number} {what}"), kinds[number % len(kinds)]
            place = folder / f"{what} {number}"
            place.mkdir()
            if what == "folder":
                shutil.copytree(adapter, place / "adapter")
                damage_folder(kind, place / "adapter", draw)
                found = [outcome(lambda module, place=place: load_adapter(module, place / "adapter"), after)]
            else:
                file = Path(shutil.copy(checkpoint, place / "last.ckpt"))
                damage_checkpoint(kind, file, draw)
                found = [outcome(lambda module, file=file: load_adapted(module, file), after)]
                found.append(resumed_outcome(file, place, one_more))
            shutil.rmtree(place)
            for way, each in zip((what, "resumed fit"), found, strict=False):
                table[way, kind, each.partition(":")[0]] += 1
                if each not in ("refused", "equal"):
                    wrong.append(f"{way} {number}, {kind}: {each}")
    for way in ("folder", "checkpoint", "resumed fit"):  # the last of the same checkpoints
        for kind in kinds:
            counts = {each: n for (w, k, each), n in sorted(table.items()) if (w, k) == (way, kind)}
            print(f"{way:<12}{kind:<24}{', '.join(f'{n} {each}' for each, n in counts.items())}")
    return wrong


def resumed_outcome(file: Path, folder: Path, right: dict[str, bytes]) -> str:
    """As `outcome`, of a fit: its module is adapted by the fit itself, so that it is not as it was."""
    result = outcome(lambda module: resumed(module, file, folder), right)
    return "refused" if result.startswith("changed") else result


if __name__ == "__main__":
    sys.exit(main())
