"""Makes the small vision transformer that the quickstart adapts.

A timm `VisionTransformer` of about 211,000 parameters is trained from scratch on the digits 0 to 4 of
scikit-learn's `load_digits` and written as a timm folder (`config.json` and `model.safetensors`), which

    timm.create_model("local-dir:pera_lightning/assets/vit_digits", pretrained=True, num_classes=5)

loads. The digits 5 to 9 are never shown to it: they are the new task that the quickstart adapts it to.

    python scripts/make_vit_digits.py --output pera_lightning/assets/vit_digits

It takes half a minute on one core. The run is seeded and uses one thread, so the same versions on the same kind of
processor give the same file; others give one that differs in rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import save_for_hf
from torch import Tensor, nn

PRETRAINING_DIGITS = (0, 1, 2, 3, 4)
IMAGE_SIZE = 8  # the images' own: nothing is resampled, so no library's interpolation can matter
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
MODEL_ARGS = {"img_size": IMAGE_SIZE, "patch_size": 2, "embed_dim": 80, "depth": 4, "num_heads": 4, "mlp_ratio": 2}


def digits_as_images(digits: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Reads the chosen digits as a vision transformer sees them.

    Args:
        digits: which of the ten to keep; their position in this tuple is the label.

    Returns:
        Images (n, 3, 8, 8), normalised, and labels (n,).
    """
    source = load_digits()
    keep = np.isin(source.target, digits)
    # Through 8 bits, as an image file would be: 16 grey levels over 0..255.
    grey = np.round(source.images[keep] * (255 / 16)).astype(np.uint8)
    images = torch.from_numpy(grey).float().div(255).unsqueeze(1).repeat(1, 3, 1, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    labels = torch.tensor([digits.index(digit) for digit in source.target[keep]])
    return (images - mean) / std, labels


def build(num_classes: int) -> nn.Module:
    """Builds the untrained network: 16 patches of 2×2 pixels, 4 blocks, 4 heads, width 80."""
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=num_classes, **MODEL_ARGS)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose most probable class is right."""
    model.eval()
    return (model(images).argmax(1) == labels).float().mean().item()


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    generator: torch.Generator,
) -> None:
    """Trains all weights with AdamW, the learning rate falling linearly to zero.

    Args:
        model: changed in place.
        images: (n, 3, 8, 8), normalised.
        labels: (n,).
        epochs: passes over the images.
        batch_size: images a step; the last, smaller batch of an epoch is left out.
        lr: the learning rate at the start.
        weight_decay: of AdamW, on every weight.
        generator: the source of the shuffling.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in order.split(batch_size):
            if len(batch) < batch_size:
                continue
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def main(arguments: list[str] | None = None) -> None:
    """Trains the network and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("pera_lightning/assets/vit_digits"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the shuffling and the held-out tenth")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the images")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # sums of many threads come in any order
    torch.manual_seed(options.seed)
    images, labels = digits_as_images(PRETRAINING_DIGITS)
    training, held_out = train_test_split(
        np.arange(len(labels)), test_size=0.1, stratify=labels.numpy(), random_state=options.seed
    )
    model = build(num_classes=len(PRETRAINING_DIGITS))
    train(
        model,
        images[training],
        labels[training],
        epochs=options.epochs,
        batch_size=32,
        lr=1e-3,
        weight_decay=0.05,
        generator=torch.Generator().manual_seed(options.seed),
    )
    print(f"held-out accuracy on digits 0 to 4: {accuracy(model, images[held_out], labels[held_out]):.3f}")

    save_for_hf(
        model,
        options.output,
        model_config={
            "label_names": [str(digit) for digit in PRETRAINING_DIGITS],
            # timm would copy the tag of the architecture's own default weights; these are not those.
            "pretrained_cfg": {"tag": "digits_0to4"},
        },
        safe_serialization=True,
        data_config={
            "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
        },
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"{total:,} parameters, {size:,} bytes in {options.output}")


if __name__ == "__main__":
    main()
