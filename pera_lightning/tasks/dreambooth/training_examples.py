"""The data set of DreamBooth: photographs of the subject and, with prior preservation, images of its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pera_lightning.tasks.dreambooth.photographs import Photograph
from pera_lightning.tasks.dreambooth.preprocessing import crop_to, open_image, to_pixels

Example = dict[str, Any]


class TrainingExamples(Dataset):
    """Pairs of a photograph and a class image; lists of one without class images.

    Pair i of an epoch is photograph i mod n, and class image i mod m. Stateless, so that any sampler serves.

    Each photograph comes `repeats` times in an epoch, or more often if class images outnumber them. `load` gives
    what a batch holds of an image and its caption: `load_pixels` or `look_up`.
    """

    def __init__(
        self,
        photographs: Sequence[Photograph],
        class_images: Sequence[Photograph],
        repeats: int,
        load: Callable[[Photograph], Example],
    ) -> None:
        self.photographs, self.class_images, self.load = list(photographs), list(class_images), load
        self._length = max(len(self.photographs) * repeats, len(self.class_images))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> list[Example]:
        if not 0 <= number < len(self):
            raise IndexError(number)  # ends `for example in examples`
        pair = []
        for images, is_prior in ((self.photographs, False), (self.class_images, True)):
            if images:  # the shorter of the two starts again
                one = images[number % len(images)]
                pair.append({**self.load(one), "is_prior": torch.tensor(is_prior), "ids": one.id})
        return pair


def load_pixels(photograph: Photograph, size: tuple[int, int], crop: str = "center", flip: bool = False) -> Example:
    """Loads pixels and caption, to be encoded in the step: random crops and flips differ each time; see `crop_to`."""
    image, time_ids = crop_to(open_image(photograph.path), size, crop=crop, flip=flip)
    return {"pixel_values": to_pixels(image), "prompts": photograph.caption, "time_ids": time_ids}


def look_up(photograph: Photograph, encoded: Mapping[str, Mapping[str, Tensor]]) -> Example:
    """Gives latents and embeddings of an image by its id, as `encode_photographs` made them."""
    return dict(encoded[photograph.id])


def collate(pairs: Sequence[Sequence[Example]]) -> dict[str, Any]:
    """Collates b pairs into b examples of the subject and then, if there are any, b of its class; tensors stacked."""
    examples = [example for kind in zip(*pairs, strict=True) for example in kind]  # the subject's, then the class's
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    return {name: torch.stack(column) if isinstance(column[0], Tensor) else column for name, column in columns.items()}
