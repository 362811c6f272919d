"""From an image to a tensor: named transforms, on torchvision's transforms v2.

A named transform decides what training and evaluation do to an image. What it needs to know of the model (size, mean,
standard deviation, interpolation, crop) is a `Preprocessing`, put together from three places: what the user gave
wins, then what the transform itself fixes, then the model's own data configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pera_lightning.errors import ConfigurationError
from pera_lightning.validation import check_choice, check_in_range, check_positive_int

if TYPE_CHECKING:
    import torch
    from PIL import Image

    Transform = Callable[[Image.Image], torch.Tensor]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its images.

    Attributes:
        size: height and width in pixels.
        mean: of red, green and blue, on a scale of 0 to 1.
        std: standard deviation of the same.
        interpolation: one of `INTERPOLATIONS`.
        crop_pct: side of the evaluation crop over the side that the image is resized to; None where no crop is made.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float | None


@dataclass(frozen=True)
class NamedTransform:
    """What a named transform, which `build` makes, wants of a `Preprocessing`.

    Attributes:
        fixed: values that it sets unless the user gave others.
        crops: whether `crop_pct` means anything to it.
        square: whether height and width must be equal.
    """

    fixed: Mapping[str, Any] = field(default_factory=dict)
    crops: bool = True
    square: bool = False


TRANSFORMS: dict[str, NamedTransform] = {
    # FourierFT's, which AuroRA follows: random resized crop and horizontal flip; evaluation resizes to the very size
    # it then crops. Its code leaves the interpolation to torchvision, that is, bilinear.
    "fourierft": NamedTransform(fixed={"interpolation": "bilinear", "crop_pct": 1.0}, square=True),
    # No augmentation: training sees what evaluation sees.
    "center": NamedTransform(square=True),
    # timm's own defaults (they add colour jitter), with the model's data configuration.
    "timm": NamedTransform(),
    # The entire image resized to the exact size, nothing cut off: for digits and other small images.
    "none": NamedTransform(crops=False),
}


def build(transform: str, of: Preprocessing, *, training: bool) -> Transform:
    """Makes the transform: an RGB image in, a float32 tensor (3, H, W) out.

    Args:
        transform: a name of `TRANSFORMS`.
        of: what the model expects.
        training: with its augmentation, drawn from torch's and python's global generators (those that a
            DataLoader seeds in its workers); else the evaluation form, which is deterministic.
    """
    if transform == "timm":
        from timm.data import create_transform

        size = {"input_size": (3, *of.size), "interpolation": of.interpolation, "crop_pct": of.crop_pct}
        return create_transform(is_training=training, mean=of.mean, std=of.std, **size)
    import torch
    from torchvision.transforms import InterpolationMode, v2

    mode = InterpolationMode(of.interpolation)
    if transform == "fourierft" and training:
        first = [v2.RandomResizedCrop(of.size, interpolation=mode), v2.RandomHorizontalFlip()]
    elif transform == "none":
        first = [v2.Resize(of.size, interpolation=mode)]
    else:  # the short side to size / crop_pct, then the middle
        assert of.crop_pct is not None
        first = [v2.Resize(math.floor(of.size[0] / of.crop_pct), interpolation=mode), v2.CenterCrop(of.size)]
    # Normalised as floats in [0, 1], after all that works on the image's own pixels.
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(of.mean, of.std), v2.ToPureTensor()]
    return v2.Compose([*first, *last])


def check_given(transform: str, **values: Any) -> dict[str, Any]:
    """Checks what the user gave for a `Preprocessing`, and returns it by the names of its fields.

    Args:
        transform: a name of `TRANSFORMS`.
        values: image_size, mean, std, interpolation and crop_pct; those that are None are not given.
    """
    check_choice(transform, "transform", tuple(TRANSFORMS))
    given = {name: value for name, value in values.items() if value is not None}
    if "image_size" in given:
        check_positive_int(given["image_size"], "image_size")
        given["size"] = (given["image_size"], given.pop("image_size"))
    for name in sorted({"mean", "std"} & given.keys()):
        if len(given[name]) != 3 or (name == "std" and min(given[name]) <= 0):
            raise ConfigurationError(f"{name} takes three numbers (red, green, blue), std above 0; given {given[name]}")
    if "interpolation" in given:
        check_choice(given["interpolation"], "interpolation", INTERPOLATIONS)
    if "crop_pct" in given:
        check_in_range(given["crop_pct"], "crop_pct", gt=0, le=1)
        if not TRANSFORMS[transform].crops:  # nothing accepts what it ignores
            raise ConfigurationError(f"transform {transform!r} crops nothing, so crop_pct would do nothing")
    return given


def resolve(transform: str, given: Mapping[str, Any], data_config: Mapping[str, Any] | None) -> Preprocessing:
    """Puts a `Preprocessing` together: what was given, then what the transform fixes, then the model's.

    Args:
        transform: a name of `TRANSFORMS`.
        given: what `check_given` returned.
        data_config: the model's, in timm's form (`input_size` as (3, H, W), `mean`, `std`, `interpolation`,
            `crop_pct`); None if no model says.
    """
    chosen = TRANSFORMS[transform]
    # Later ones win: the model's, what the transform fixes, what was given.
    model = dict(data_config or {})
    if "input_size" in model:
        channels, height, width = model["input_size"]
        if channels != 3:
            raise ConfigurationError(f"the model takes {channels} channels; the images of this data module have 3")
        model["size"] = (height, width)
    found = {**model, **chosen.fixed, **given}
    needed = ("size", "mean", "std", "interpolation", *(("crop_pct",) if chosen.crops else ()))
    missing = ["image_size" if name == "size" else name for name in needed if found.get(name) is None]
    if missing:
        lacks = f"needs {', '.join(missing)}, and no model with a data_config says"
        raise ConfigurationError(f"transform {transform!r} {lacks}: give them to the data module")
    size = found["size"]
    if chosen.square and size[0] != size[1]:
        takes = f"the model takes {size[0]}x{size[1]}"
        raise ConfigurationError(f"transform {transform!r} makes square images, {takes}; give image_size, or 'timm'")
    crop_pct = float(found["crop_pct"]) if chosen.crops else None
    return Preprocessing(tuple(size), tuple(found["mean"]), tuple(found["std"]), found["interpolation"], crop_pct)
