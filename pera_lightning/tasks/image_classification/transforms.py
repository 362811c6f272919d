"""From a picture to a tensor: named transforms, on torchvision's transforms v2.

A named transform decides what training and evaluation do to a picture. What it needs to know of the model (size, mean,
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
    """What a model expects of its pictures.

    Attributes:
        size: height and width in pixels.
        mean: of red, green and blue, on a scale of 0 to 1.
        std: standard deviation of the same.
        interpolation: one of `INTERPOLATIONS`.
        crop_pct: side of the evaluation crop over the side that the picture is resized to; None where no crop is made.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float | None


def _compose(first: list[Any], of: Preprocessing) -> Transform:
    import torch
    from torchvision.transforms import v2

    # Normalised as floats in [0, 1], after all that works on the picture's own pixels.
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(of.mean, of.std), v2.ToPureTensor()]
    return v2.Compose([*first, *last])


def _mode(of: Preprocessing) -> Any:
    from torchvision.transforms import InterpolationMode

    return InterpolationMode(of.interpolation)


def _resize_crop(of: Preprocessing) -> list[Any]:
    """The short side to size / crop_pct, then the middle."""
    from torchvision.transforms import v2

    assert of.crop_pct is not None
    return [v2.Resize(math.floor(of.size[0] / of.crop_pct), interpolation=_mode(of)), v2.CenterCrop(of.size)]


def _fourierft(of: Preprocessing, training: bool) -> Transform:
    from torchvision.transforms import v2

    if not training:
        return _compose(_resize_crop(of), of)
    return _compose([v2.RandomResizedCrop(of.size, interpolation=_mode(of)), v2.RandomHorizontalFlip()], of)


def _center(of: Preprocessing, training: bool) -> Transform:
    return _compose(_resize_crop(of), of)


def _resize(of: Preprocessing, training: bool) -> Transform:
    from torchvision.transforms import v2

    return _compose([v2.Resize(of.size, interpolation=_mode(of))], of)


def _timm(of: Preprocessing, training: bool) -> Transform:
    from timm.data import create_transform

    return create_transform(
        input_size=(3, *of.size),
        is_training=training,
        mean=of.mean,
        std=of.std,
        interpolation=of.interpolation,
        crop_pct=of.crop_pct,
    )


@dataclass(frozen=True)
class NamedTransform:
    """A named way to prepare pictures.

    Attributes:
        build: makes the transform for training (True) or evaluation (False).
        fixed: values that it sets unless the user gave others.
        crops: whether `crop_pct` means anything to it.
        square: whether height and width must be equal.
    """

    build: Callable[[Preprocessing, bool], Transform]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    crops: bool = True
    square: bool = False


TRANSFORMS: dict[str, NamedTransform] = {
    # FourierFT's, which AuroRA follows: random resized crop and horizontal flip; evaluation resizes to the very size
    # it then crops. Its code leaves the interpolation to torchvision, that is, bilinear.
    "fourierft": NamedTransform(_fourierft, fixed={"interpolation": "bilinear", "crop_pct": 1.0}, square=True),
    # No augmentation: training sees what evaluation sees.
    "center": NamedTransform(_center, square=True),
    # timm's own defaults (they add colour jitter), with the model's data configuration.
    "timm": NamedTransform(_timm),
    # The whole picture resized to the exact size, nothing cut off: for digits and other small pictures.
    "none": NamedTransform(_resize, crops=False),
}


def check_given(
    transform: str,
    image_size: int | None,
    mean: list[float] | None,
    std: list[float] | None,
    interpolation: str | None,
    crop_pct: float | None,
) -> dict[str, Any]:
    """Checks what the user gave for a `Preprocessing`.

    Returns:
        The fields given, under their names in `Preprocessing`.

    Raises:
        ConfigurationError: for a value out of range, or one that the transform would ignore.
        UnknownNameError: for an unknown transform or interpolation.
    """
    check_choice(transform, "transform", tuple(TRANSFORMS))
    if image_size is not None:
        check_positive_int(image_size, "image_size")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != 3:
            raise ConfigurationError(f"{name} takes three numbers (red, green, blue); given {list(values)}")
    if std is not None and min(std) <= 0:
        raise ConfigurationError(f"std must be above 0; given {list(std)}")
    if interpolation is not None:
        check_choice(interpolation, "interpolation", INTERPOLATIONS)
    if crop_pct is not None:
        check_in_range(crop_pct, "crop_pct", gt=0, le=1)
        if not TRANSFORMS[transform].crops:
            raise ConfigurationError(f"transform {transform!r} crops nothing, so crop_pct={crop_pct} would do nothing")
    fields = {
        "size": None if image_size is None else (image_size, image_size),
        "mean": None if mean is None else tuple(mean),
        "std": None if std is None else tuple(std),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
    }
    return {name: value for name, value in fields.items() if value is not None}


def resolve(transform: str, given: Mapping[str, Any], data_config: Mapping[str, Any] | None) -> Preprocessing:
    """Puts a `Preprocessing` together: what was given, then what the transform fixes, then the model's.

    Args:
        transform: a name of `TRANSFORMS`.
        given: what `check_given` returned.
        data_config: the model's, in timm's form (`input_size` as (3, H, W), `mean`, `std`, `interpolation`,
            `crop_pct`); None if no model says.

    Raises:
        ConfigurationError: if something is still missing, or does not suit the transform.
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
        raise ConfigurationError(
            f"transform {transform!r} needs {', '.join(missing)}, and no model with a data_config says: give them to "
            "the data module"
        )
    size = found["size"]
    if chosen.square and size[0] != size[1]:
        raise ConfigurationError(
            f"transform {transform!r} makes square images, the model takes {size[0]}x{size[1]}; give image_size, or "
            "use the transform 'timm' or 'none'"
        )
    return Preprocessing(
        size=(int(size[0]), int(size[1])),
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=str(found["interpolation"]),
        crop_pct=float(found["crop_pct"]) if chosen.crops else None,
    )


def build(transform: str, of: Preprocessing, *, training: bool) -> Transform:
    """Makes the transform: an RGB picture in, a float32 tensor (3, H, W) out.

    Args:
        transform: a name of `TRANSFORMS`.
        of: what the model expects.
        training: with its augmentation, drawn from torch's and python's global generators (those that a
            DataLoader seeds in its workers); else the evaluation form, which is deterministic.
    """
    return TRANSFORMS[transform].build(of, training)
