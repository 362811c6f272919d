"""How like a subject generated images are, and how like their prompts: DINO, CLIP-I and CLIP-T of DreamBooth.

DreamBooth (arXiv 2208.12242, section 4): DINO and CLIP-I are mean cosines between the embeddings of generated and real
images, CLIP-T is the cosine between an image's embedding and its prompt's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from pera_lightning.errors import ConfigurationError, DataError, listed
from pera_lightning.pretrained import explained

if TYPE_CHECKING:
    from PIL import Image

BATCH = 32  # images or prompts at once
# transformers' names of networks whose first token stands for the whole image
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # files that describe one


class Similarity:
    """DINO and CLIP networks, and what they say of images. They are in float32 whatever the precision of the training.

    No `nn.Module`, so that a Lightning module that holds one neither counts, saves nor shards it.

    Args:
        dino: hub id or folder of a vision transformer, by default the paper's ViT-S/16; None for no `dino`.
        clip: hub id or folder of a CLIP model; None for neither `clip_i` nor `clip_t`.
        device: where they are held.

    Raises:
        ConfigurationError: where a model cannot be had or is of another kind, or there is none.
    """

    def __init__(
        self,
        dino: str | None = "facebook/dino-vits16",
        clip: str | None = "openai/clip-vit-base-patch32",
        device: torch.device | str = "cpu",
    ) -> None:
        if dino is None and clip is None:
            raise ConfigurationError("neither a DINO nor a CLIP model is given; name one, or leave the metrics out")
        self._images: dict[str, Callable[[Sequence[Image.Image]], Tensor]] = {}
        self._texts = None
        self._known: dict[tuple[str, bytes], Tensor] = {}  # embeddings of references
        if dino is not None:
            self._images["dino"] = _Dino(dino, device).images
        if clip is not None:
            both = _Clip(clip, device)
            self._images["clip_i"], self._texts = both.images, both.texts

    def scores(
        self, images: Sequence[Image.Image], prompts: Sequence[str], references: Sequence[Image.Image]
    ) -> dict[str, Any]:
        """Cosines of generated images, from -1 to 1.

        Args:
            images: n generated images, of any sizes.
            prompts: the prompt of each; CLIP reads no more than its 77 tokens of one.
            references: photographs of the subject; each is embedded at its first call only.

        Returns:
            The means `dino`, `clip_i` (to all references) and `clip_t` (to the own prompt), without those whose model
            is None; and `images`, n dicts of the same keys, one an image.

        Raises:
            DataError: no images, no references, another number of prompts, or something that is no PIL image.
        """
        _check(images, prompts, references)
        columns = {}
        for key, embed in self._images.items():
            generated = embed(images)  # (n, D)
            columns[key] = (generated @ self._once(key, embed, references).T).mean(1)
            if key == "clip_i" and self._texts is not None:
                columns["clip_t"] = (generated * self._texts(prompts)).sum(1)
        rows = [dict(zip(columns, row, strict=True)) for row in torch.stack([*columns.values()], 1).tolist()]
        return {**{key: column.mean().item() for key, column in columns.items()}, "images": rows}

    def _once(
        self, key: str, embed: Callable[[Sequence[Image.Image]], Tensor], images: Sequence[Image.Image]
    ) -> Tensor:
        """Embeddings (m, D) of references, kept by their pixels."""
        names = [(key, _digest(image)) for image in images]
        new = {name: image for name, image in zip(names, images, strict=True) if name not in self._known}
        if new:
            self._known.update(zip(new, embed([*new.values()]), strict=True))
        return torch.stack([self._known[name] for name in names])


def _check(images: Sequence[Image.Image], prompts: Sequence[str], references: Sequence[Image.Image]) -> None:
    from PIL import Image

    if isinstance(prompts, str) or len(prompts) != len(images):
        number = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise DataError(f"{len(images)} images and {number}; give a list with the prompt of each image")
    for what, pictures in (("images", images), ("references", references)):
        if not len(pictures):
            raise DataError(f"no {what} to compare; give at least one")
        kinds = {type(picture).__name__ for picture in pictures if not isinstance(picture, Image.Image)}
        if kinds:  # a tensor in [0, 1] would be scaled down by 255 once more, without a word
            raise DataError(f"{what} has {listed(sorted(kinds))}; give PIL images")


def _digest(image: Image.Image) -> bytes:
    return hashlib.sha256(repr((image.mode, image.size)).encode() + image.convert("RGB").tobytes()).digest()


# ---- the networks ---------------------------------------------------------------------------------------------------


class _Network:
    """A frozen network of transformers and the image processor saved with it.

    Args:
        name: hub id or folder.
        what: it is called in messages.
        types: transformers' names of the kinds that fit.
        device: where it is held.
    """

    def __init__(self, name: str, what: str, types: Sequence[str], device: torch.device | str) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        kind = _had(AutoConfig.from_pretrained, name, f"{what} model").model_type
        if kind not in types:
            raise ConfigurationError(f"{what} model {name} is of type {kind!r}; give one of {listed(types)}")
        options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
        if kind == "vit":
            options["add_pooling_layer"] = False  # DINO has none, and a random one would be made
        network, found = _had(AutoModel.from_pretrained, name, f"{what} model", **options)
        if missing := sorted(found["missing_keys"]):
            raise ConfigurationError(
                f"{what} model {name} has no weights for {len(missing)} of its tensors, which would be random: "
                f"{listed(missing, 2)}; give one that was saved whole"
            )
        self.network = network.eval().requires_grad_(False).to(device)
        folder = Path(name)
        if folder.is_dir() and not any((folder / file).is_file() for file in PROCESSORS):
            raise ConfigurationError(
                f"folder {name} of the {what} model has no image processor ({PROCESSORS[0]}); add that of the model"
            )
        self.processor = _had(AutoImageProcessor.from_pretrained, name, f"{what} image processor")

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of length 1, (n, D) float64 on the CPU."""

        def embed(part: Sequence[Image.Image]) -> Tensor:
            pixels = self.processor([image.convert("RGB") for image in part], return_tensors="pt")["pixel_values"]
            return self.of_pixels(pixels.to(self.network.device, torch.float32))

        return self.normalised(embed, images)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) of processed images (B, 3, H, W)."""
        raise NotImplementedError

    @torch.no_grad()
    def normalised(self, embed: Callable[[Sequence[Any]], Tensor], items: Sequence[Any]) -> Tensor:
        """What `embed` gives for parts of the items, as rows of length 1; outside of any autocast."""
        with torch.autocast(self.network.device.type, enabled=False):
            parts = [embed(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
        return F.normalize(torch.cat(parts).cpu().double(), dim=-1)


class _Dino(_Network):
    def __init__(self, name: str, device: torch.device | str) -> None:
        super().__init__(name, "DINO", DINO_TYPES, device)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        return self.network(pixel_values=pixels).last_hidden_state[:, 0]  # the class token


class _Clip(_Network):
    def __init__(self, name: str, device: torch.device | str) -> None:
        from transformers import AutoTokenizer

        super().__init__(name, "CLIP", ("clip",), device)
        self.tokenizer = _had(AutoTokenizer.from_pretrained, name, "CLIP tokenizer")
        tokens, known = len(self.tokenizer), self.network.config.text_config.vocab_size
        # Without its files transformers 5 makes one of special tokens alone, to which all prompts are the same.
        if not len(self.tokenizer.all_special_ids) < tokens <= known:
            raise ConfigurationError(
                f"the tokenizer of CLIP model {name} has {tokens} tokens, and the model {known}; add the model's own "
                "(tokenizer.json, or vocab.json and merges.txt)"
            )

    def of_pixels(self, pixels: Tensor) -> Tensor:
        return _tensor(self.network.get_image_features(pixel_values=pixels))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of length 1, (n, D) float64 on the CPU; equal texts are computed once."""
        longest = self.network.config.text_config.max_position_embeddings

        def embed(part: Sequence[str]) -> Tensor:
            ids = self.tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            ids = ids.to(self.network.device)
            features = self.network.get_text_features(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
            return _tensor(features)

        unique = list(dict.fromkeys(texts))
        return self.normalised(embed, unique)[[unique.index(text) for text in texts]]


def _tensor(features: Any) -> Tensor:
    """Features as transformers before 5 gives them; since then they are in the pooled output of another class."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _had(load: Callable[..., Any], name: str, what: str, **options: Any) -> Any:
    """What a loader of transformers gives, or what kept it, in one line."""
    try:
        return load(name, **options)
    except SafetensorError as error:
        raise ConfigurationError(
            f"{what} {name}: a file of its weights is damaged ({error}); fetch it again"
        ) from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise explained(error, name, what) from error
