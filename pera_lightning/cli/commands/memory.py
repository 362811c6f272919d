"""`params --memory`: a table of the memory per device that training by a config needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pera_lightning.data import batching
from pera_lightning.errors import ConfigurationError, closest
from pera_lightning.tasks.causal_lm.data import TextDataModule
from pera_lightning.tasks.causal_lm.module import CausalLMModule
from pera_lightning.tasks.dreambooth.data import DreamBoothDataModule
from pera_lightning.tasks.dreambooth.module import DreamBoothModule
from pera_lightning.tasks.image_classification import transforms
from pera_lightning.tasks.image_classification.data import ImageDataModule
from pera_lightning.tasks.image_classification.module import ImageClassificationModule
from pera_lightning.tasks.sequence_classification.data import GLUEDataModule
from pera_lightning.tasks.sequence_classification.module import SequenceClassificationModule
from pera_lightning.tasks.sequence_classification.networks import positions
from pera_lightning.training.memory import DeviceMemory, as_fake, device_memory, fake_like, measure_step
from pera_lightning.training.module import AdapterModule

DEVICES = (8, 32)
_UNITS = {"GiB": 2**30, "MiB": 2**20}
_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_SHORT = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}  # as Lightning takes them too
_ROWS = {
    "base": "base weights",
    "adapters": "adapters",
    "heads": "heads",
    "buffers": "buffers",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "buckets": "gradient buckets",
    "gathered": "gathered units",
    "kept": "kept for the backward",
    "besides": "for a while, at the peak",
}


def device_counts(text: str) -> tuple[int, ...]:
    """The numbers of devices in ``"8,32"``.

    Raises:
        ConfigurationError: for anything else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 1 for word in words):
        raise ConfigurationError(f"devices={text!r}: whole numbers from 2 on are needed, such as 8,32")
    return tuple(dict.fromkeys(map(int, words)))


def memory_table(
    module: AdapterModule,
    data: Any,
    *,
    precision: Any,
    devices: Sequence[int] = DEVICES,
    answer_length: int | None = None,
    as_on_cuda: bool = True,
) -> str:
    """Computes the memory of a training step per device and lays it out, strategy by strategy.

    Args:
        module: with its injected network on the meta device, which becomes a fake one.
        data: the config's data module, for the shape of its batches; it reads nothing.
        precision: the trainer's.
        devices: numbers of devices for FSDP2.
        answer_length: tokens with a label in each row, where the protocol trains on answers; see `text_batch`.
        as_on_cuda: counts what CUDA keeps, not what the CPU does.

    Raises:
        ConfigurationError: where there is no batch for this module and data, or a value does not fit.
    """
    name = _SHORT.get(str(precision or "32-true"), str(precision or "32-true"))
    if name not in _AUTOCAST:
        raise ConfigurationError(
            f"trainer.precision={precision}: --memory knows {', '.join(_AUTOCAST)}{closest(name, _AUTOCAST)}"
        )
    module.model.train()  # type: ignore[union-attr]
    mode = as_fake(module.model)  # type: ignore[arg-type]
    arguments: tuple[Any, ...]
    if isinstance(module, CausalLMModule) and isinstance(data, TextDataModule):
        batch, assumed = text_batch(module, data, mode, answer_length)
        arguments = (batch,)
    elif answer_length is not None:
        raise ConfigurationError(f"answer_length={answer_length} acts on language models and their data only")
    elif isinstance(module, ImageClassificationModule) and isinstance(data, ImageDataModule):
        batch, assumed = image_batch(module, data, mode)
        arguments = (batch, module.hparams["label_smoothing"])
    elif isinstance(module, SequenceClassificationModule) and isinstance(data, GLUEDataModule):
        batch, assumed = sequence_batch(module, data, mode)
        arguments = (batch,)
    elif isinstance(module, DreamBoothModule) and isinstance(data, DreamBoothDataModule):
        batch, assumed = photograph_batch(module, data, mode)
        arguments = (batch,)
    else:
        raise ConfigurationError(
            f"--memory knows no batch of {type(data).__name__} for {type(module).__name__}: it takes CausalLMModule "
            "with a text data module, ImageClassificationModule with ImageDataModule, "
            "SequenceClassificationModule with GLUEDataModule, and DreamBoothModule with DreamBoothDataModule"
        )
    step = measure_step(
        module.model,  # type: ignore[arg-type]
        lambda: module._shared_step(*arguments)[0].sum(),  # of the losses of examples, where it is not their mean
        autocast=_AUTOCAST[name],
        as_on_cuda=as_on_cuda,
    )
    columns = {"1 device": device_memory(module.model, step), "DDP": device_memory(module.model, step, strategy="ddp")}
    for count in devices:
        columns[f"FSDP2 on {count}"] = device_memory(module.model, step, strategy="fsdp2", devices=count)
    kept = "computed again" if module.hparams.get("activation_checkpointing") else "kept"
    small = module.hparams.get("optimizer") == "adamw8bit"
    optimizer = "AdamW in float32, of whose moments adamw8bit has a quarter" if small else "AdamW"
    return "\n".join(
        [
            *_lines(columns, f"base weights ({module.hparams['base_dtype']})"),
            f"Assumed: on each device {assumed}; precision {name}; activations {kept}; {optimizer}, not compiled.",
            "Computed, not measured. Not in it: the device's context, workspaces of its libraries, fragmentation, "
            "buffers of the communication, evaluation.",
        ]
    )


def text_batch(
    module: CausalLMModule, data: TextDataModule, mode: FakeTensorMode, answer_length: int | None = None
) -> tuple[dict[str, torch.Tensor], str]:
    """The largest batch of token rows, and what was assumed of it, in words.

    Rows are as long as the data's limit and the model's context allow, all but the first with a token of padding, since
    padding in any row costs an attention mask.

    Args:
        module: with its network.
        data: for the size of its batches.
        mode: makes the fake tensors; labels are real, since they decide which logits are computed.
        answer_length: tokens with a label at each row's end, where the protocol trains on answers; by default as many
            as it lets the model generate, and all where it generates nothing.
    """
    protocol, size = data.evaluation, data.batch_size
    context = getattr(module.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore
    length = min(data.max_length, context or data.max_length)
    start = 0
    if protocol.loss_on == "answer":
        generated = length if protocol.decoding is None else protocol.decoding.max_new_tokens
        start = max(length - (answer_length or generated), 0)
    elif answer_length is not None:
        raise ConfigurationError(f"answer_length={answer_length}: protocol {protocol.name} has labels on all tokens")
    packed = data.batching == "packed"
    if packed:
        batch = batching.collate_packed([{"input_ids": [0] * length, "start": start}] * size)
    else:
        short = {"input_ids": [0] * (length - 1), "start": max(start - 1, 0)}
        batch = batching.collate_padded([{"input_ids": [0] * length, "start": start}, *[short] * (size - 1)], pad_id=0)
    if size == 1:  # nothing to tell apart; transformers finds that out from the values, which fake tensors have not
        batch = {name: batch[name] for name in ("input_ids", "labels")}
    fake = {name: value if name == "labels" else fake_like(value, mode) for name, value in batch.items()}
    where = f"on the last {length - start} tokens of each" if start else "on all tokens"
    return fake, f"{size} rows of {length:,} tokens{', packed' if packed else ''}, labels {where}"


def image_batch(
    module: ImageClassificationModule, data: ImageDataModule, mode: FakeTensorMode
) -> tuple[tuple[torch.Tensor, torch.Tensor], str]:
    """A batch of images as the data module makes them, and what was assumed of it, in words."""
    size = transforms.resolve(data.transform, data.given, module.data_config).size
    images = torch.empty(data.batch_size, 3, *size, device="meta")
    labels = torch.empty(data.batch_size, dtype=torch.int64, device="meta")
    words = f"{data.batch_size} images of {size[0]}x{size[1]} pixels"
    return (fake_like(images, mode), fake_like(labels, mode)), words


def sequence_batch(
    module: SequenceClassificationModule, data: GLUEDataModule, mode: FakeTensorMode
) -> tuple[dict[str, torch.Tensor], str]:
    """The largest batch of labelled rows, and what was assumed of it, in words.

    Rows are as long as the data's limit and the model's positions allow, all but the first with a token of padding.
    """
    length = min(data.max_length, positions(module.model) or data.max_length)  # type: ignore[arg-type]
    example = {"input_ids": [0] * length, "label": 0.0 if data.task.regression else 0}
    short = {**example, "input_ids": [0] * (length - 1)}
    batch = batching.collate_classified([example, *[short] * (data.batch_size - 1)], pad_id=0)
    fake = {name: value if name == "labels" else fake_like(value, mode) for name, value in batch.items()}
    return fake, f"{data.batch_size} rows of {length:,} tokens"


def photograph_batch(
    module: DreamBoothModule, data: DreamBoothDataModule, mode: FakeTensorMode
) -> tuple[dict[str, Any], str]:
    """A batch of latents, class images included, and what was assumed of it, in words.

    The VAE is no part of the network: where nothing is cached, it comes on top.
    """
    height, width = data.size
    count = data.batch_size * (2 if data.uses_prior else 1)
    latents = (4, height // 8, width // 8)
    shapes = {"latent_mean": latents, "latent_std": latents, "time_ids": (6,), **module.text_shapes()}
    fake = {name: fake_like(torch.empty(count, *shape, device="meta"), mode) for name, shape in shapes.items()}
    fake |= {name: value.long() for name, value in fake.items() if name.startswith("input_ids")}
    kinds = f", {data.batch_size} of them of the class" if data.uses_prior else ""
    besides = "" if data.cache else "; the VAE, which stays where latents are not cached, comes on top"
    batch = {**fake, "is_prior": torch.arange(count) >= data.batch_size}  # real, since it decides what is computed
    return batch, f"{count} images of {height}x{width} pixels{kinds}{besides}"


def _lines(columns: dict[str, DeviceMemory], base: str) -> list[str]:
    """The table, rows of nothing left out."""
    largest = max(column.total for column in columns.values())
    unit = next((u for u, size in _UNITS.items() if largest >= size), "MiB")
    names = {**_ROWS, "base": base, "total": "sum"}
    values = {key: [getattr(column, key) for column in columns.values()] for key in names}
    rows = [(f"Memory per device, {unit}", [*columns])]
    for key, row in values.items():
        if any(row):
            rows.append((names[key], [f"{value / _UNITS[unit]:,.1f}" if value else "-" for value in row]))
    first = max(len(label) for label, _ in rows)
    widths = [max(len(row[k]) for _, row in rows) for k in range(len(columns))]
    return [
        "  ".join([label.ljust(first), *(cell.rjust(w) for cell, w in zip(row, widths, strict=True))])
        for label, row in rows
    ]
