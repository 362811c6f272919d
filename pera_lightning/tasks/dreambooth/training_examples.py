"""What DreamBooth trains on: photographs of the subject and, where the prior is preserved, images of its class.

Row i is photograph i mod n, and class image i mod m with it. Nothing here has a state, so that any sampler serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pera_lightning.tasks.dreambooth.photographs import Photograph, open_image, seen, to_pixels

Example = dict[str, Any]


class TrainingRows(Dataset):
    """Rows of examples: a photograph of the subject, and an image of its class where there are any.

    Args:
        photographs: of the subject.
        class_images: of its class; may be empty. Files need not be there before they are drawn.
        size: height and width in pixels.
        crop: "center" or "random".
        flip: mirror every other picture, at random.
        repeats: times that each photograph comes in an epoch, at least.
    """

    def __init__(
        self,
        photographs: Sequence[Photograph],
        class_images: Sequence[Photograph],
        *,
        size: tuple[int, int],
        crop: str,
        flip: bool,
        repeats: int,
    ) -> None:
        self.photographs, self.class_images = list(photographs), list(class_images)
        self.size, self.crop, self.flip = size, crop, flip
        self._length = max(len(self.photographs) * repeats, len(self.class_images))
        self._encoded: Mapping[str, Mapping[str, Tensor]] | None = None

    def __len__(self) -> int:
        return self._length

    def use(self, encoded: Mapping[str, Mapping[str, Tensor]]) -> None:
        """From here on gives what the encoders made, by the photograph's id, in place of pixels and prompts."""
        self._encoded = encoded

    def __getitem__(self, number: int) -> list[Example]:
        if not 0 <= number < len(self):
            raise IndexError(number)  # ends `for row in rows`
        row = [self._example(self.photographs[number % len(self.photographs)], False)]
        if self.class_images:
            row.append(self._example(self.class_images[number % len(self.class_images)], True))
        return row

    def _example(self, photograph: Photograph, is_prior: bool) -> Example:
        about = {"is_prior": torch.tensor(is_prior), "ids": photograph.id}
        if self._encoded is not None:
            return {**self._encoded[photograph.id], **about}
        image, time_ids = seen(open_image(photograph.path), self.size, crop=self.crop, flip=self.flip)
        return {"pixel_values": to_pixels(image), "prompts": photograph.caption, "time_ids": time_ids, **about}


def collate(rows: Sequence[Sequence[Example]]) -> dict[str, Any]:
    """A batch of b rows: b examples of the subject and then, where there are any, b of its class; tensors stacked."""
    examples = [example for kind in zip(*rows, strict=True) for example in kind]
    return {
        name: torch.stack(values) if isinstance(values[0], Tensor) else values
        for name in examples[0]
        for values in [[example[name] for example in examples]]
    }
