"""Similarity of generated images to a subject and to their prompts: DINO, CLIP-I and CLIP-T of DreamBooth.

DreamBooth (arXiv 2208.12242, section 4): DINO and CLIP-I are mean cosines between the embeddings of generated and real
images, CLIP-T is the cosine between an image's embedding and its prompt's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.pretrained import NO_CUSTOM_CODE, loading
from pera_lightning.tasks.dreambooth.networks import check_complete

if TYPE_CHECKING:
    from PIL import Image

BATCH = 32  # images or prompts at once
# transformers' names of networks whose first token stands for the entire image
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # files that describe one


class Similarity:
    """Measures images by DINO and CLIP networks, in float32 whatever the precision of the training.

    Not an `nn.Module`, so that a Lightning module that holds one neither counts, saves nor shards it.

    Args:
        dino: hub id or folder of a vision transformer, the paper's is ViT-S/16; None leaves out `dino`.
        clip: hub id or folder of a CLIP model; None leaves out `clip_i` and `clip_t`.
        device: where they are held.
    """

    def __init__(self, dino: str | None, clip: str | None, device: torch.device | str = "cpu") -> None:
        self._images: dict[str, _Network] = {}
        if dino is not None:
            self._images["dino"] = _Network(dino, "DINO", DINO_TYPES, device)
        if clip is not None:
            self._images["clip_i"] = _Network(clip, "CLIP", ("clip",), device)

    def scores(
        self, images: Sequence[Image.Image], prompts: Sequence[str], references: Sequence[Image.Image]
    ) -> dict[str, Any]:
        """Computes cosines of generated images, from -1 to 1.

        Args:
            images: n generated images, of any sizes.
            prompts: the prompt of each, of which CLIP reads 77 tokens.
            references: photographs of the subject.

        Returns:
            The means `dino`, `clip_i` (to all references) and `clip_t` (to the own prompt), without those whose model
            is None; and `images`, n dicts of the same keys, one an image.
        """
        columns = {}
        for key, network in self._images.items():
            generated = network.images(images)  # (n, D)
            # Embeddings have length 1, so products are cosines: the mean over all photographs.
            columns[key] = (generated @ network.images(references).T).mean(1)
            if key == "clip_i":  # and with each image's own prompt
                columns["clip_t"] = (generated * network.texts(prompts)).sum(1)
        each = [dict(zip(columns, values, strict=True)) for values in torch.stack([*columns.values()], 1).tolist()]
        return {**{key: column.mean().item() for key, column in columns.items()}, "images": each}


class _Network:
    """A frozen network of transformers, with the image processor and, for CLIP, the tokenizer saved with it."""

    def __init__(self, name: str, what: str, types: Sequence[str], device: torch.device | str) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

        # 1. The network, of a kind whose embeddings are known here.
        kind = _had(AutoConfig.from_pretrained, name, f"{what} model").model_type
        if kind not in types:
            raise ConfigurationError(f"{what} model {name} is of type {kind!r}; give one of {listed(types)}")
        options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
        if kind == "vit":
            options["add_pooling_layer"] = False  # DINO has none, and a random one would be made
        network, found = _had(AutoModel.from_pretrained, name, f"{what} model", **options)
        check_complete(f"{what} model {name}", found)
        self.network = network.eval().requires_grad_(False).to(device)  # used, never trained
        # 2. Its image processor: without a file transformers takes the defaults of the type.
        folder = Path(name)
        if folder.is_dir() and not any((folder / file).is_file() for file in PROCESSORS):
            raise ConfigurationError(f"folder {name} of the {what} model has no image processor ({PROCESSORS[0]})")
        self.processor = _had(AutoImageProcessor.from_pretrained, name, f"{what} image processor")
        if kind != "clip":
            return
        # 3. Its tokenizer. Without files transformers 5 makes one of special tokens alone, to which prompts are equal.
        self.tokenizer = _had(AutoTokenizer.from_pretrained, name, "CLIP tokenizer")
        tokens, known = len(self.tokenizer), network.config.text_config.vocab_size
        if not len(self.tokenizer.all_special_ids) < tokens <= known:
            has = f"has {tokens} tokens, and the model {known}"
            raise ConfigurationError(f"the tokenizer of CLIP model {name} {has}; add the model's own (tokenizer.json)")

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeds images: (n, D) of length 1, float64 on the CPU."""

        def embed(batch: Sequence[Image.Image]) -> Tensor:
            pixels = self.processor([image.convert("RGB") for image in batch], return_tensors="pt")["pixel_values"]
            return self.of_pixels(pixels.to(self.network.device, torch.float32))

        return self._normalised(embed, images)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Embeds processed images (B, 3, H, W): (B, D), CLIP's projection or the state of the class token."""
        if self.network.config.model_type == "clip":
            return _tensor(self.network.get_image_features(pixel_values=pixels))
        return self.network(pixel_values=pixels).last_hidden_state[:, 0]  # of (B, tokens, D)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts: (n, D) of length 1, float64 on the CPU; equal texts are computed once."""
        longest = self.network.config.text_config.max_position_embeddings

        def embed(batch: Sequence[str]) -> Tensor:
            ids = self.tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            ids = ids.to(self.network.device)
            return _tensor(self.network.get_text_features(ids["input_ids"], attention_mask=ids["attention_mask"]))

        unique = list(dict.fromkeys(texts))  # prompts come once a seed
        return self._normalised(embed, unique)[[unique.index(text) for text in texts]]

    @torch.no_grad()
    def _normalised(self, embed: Callable[[Sequence[Any]], Tensor], items: Sequence[Any]) -> Tensor:
        """Embeds items batch by batch, outside of any autocast, and scales embeddings to length 1."""
        with torch.autocast(self.network.device.type, enabled=False):
            batches = [embed(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
        return F.normalize(torch.cat(batches).cpu().double(), dim=-1)  # (n, D)


def _tensor(features: Any) -> Tensor:
    """Gives features as transformers before 5 does; since then they are the pooled output of another class."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _had(load: Callable[..., Any], name: str, what: str, **options: Any) -> Any:
    """Calls a loader of transformers, whose errors become one line."""
    with loading(name, what):
        return load(name, **NO_CUSTOM_CODE, **options)
