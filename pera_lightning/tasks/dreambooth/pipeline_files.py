"""A Stable Diffusion XL pipeline as diffusers saves it, in a folder or on the hub: its files, and whether it is one.

Everywhere `name` is a hub id or folder, `revision` a branch, tag or commit of the hub's repository, `part` a network's
folder there ("" for `name` itself), `variant` that of the weights' files, such as "fp16".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.files import parse_json
from pera_lightning.pretrained import explained

INDEX = "model_index.json"
PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
FACTOR = 8  # pixels to a latent, in height and width
CHANNELS = 4  # of latents
_TIME_IDS = 6
_BLOCK, _BLOCKS = 1 << 16, 64  # bytes


def find(name: str, file: str, revision: str | None = None) -> Path:
    """Finds a file of a folder or of a repository of the hub, fetched if it is not in the cache."""
    from transformers.utils import cached_file

    if Path(name).is_dir():
        if (Path(name) / file).is_file():
            return Path(name) / file
        raise ConfigurationError(f"folder {name} has no {file}; give a complete one, as diffusers saves it")
    if Path(name).is_file():
        how = "from_single_file(FILE).save_pretrained(FOLDER)"
        raise ConfigurationError(f"model {name} is a file, and a folder is needed: diffusers' {how}")
    try:
        return Path(str(cached_file(name, file, revision=revision or "main")))
    except Exception as error:  # of transformers, the hub's client and the HTTP library of that: no common base
        if "does not appear to have a file named" in str(error):
            raise ConfigurationError(f"repository {name} has no {file}; give a complete one") from error
        raise explained(error, name, "model") from error


def read(name: str, file: str, revision: str | None = None) -> dict[str, Any]:
    """Reads a JSON file of a folder or repository; see `find`."""
    path = find(name, file, revision)
    try:
        return {**parse_json(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, OSError) as error:
        raise ConfigurationError(f"{path} is damaged: {error}; fetch it again") from error


def check_sdxl(name: str, revision: str | None = None) -> dict[str, Any]:
    """Refuses all but Stable Diffusion XL (arXiv 2307.01952) with both text encoders; returns its model_index.json."""
    if find_spec("diffusers") is None:
        raise ConfigurationError("Stable Diffusion XL needs diffusers: pip install 'pera-lightning[diffusion]'")
    index = read(name, INDEX, revision)
    # The pipeline's class; a refiner has the same kind of UNet, and one text encoder.
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise ConfigurationError(f"model {name} is a {kind}, and Stable Diffusion XL ({PIPELINES[0]}) is needed")
    lacking = [part for part in ("text_encoder", "text_encoder_2") if not any(index.get(part) or [])]
    if lacking:
        raise ConfigurationError(f"model {name} has no {listed(lacking)}, as a refiner of SDXL: give the base model")
    # The UNet's inputs are as wide as the text encoders and the six sizes make them; inpainting has more channels.
    unet = read(name, "unet/config.json", revision)
    one, two = (read(name, f"{part}/config.json", revision) for part in ("text_encoder", "text_encoder_2"))
    width = one.get("hidden_size", 0) + two.get("hidden_size", 0)  # their states lie side by side
    time_width = unet.get("addition_time_embed_dim") or 0  # of each of the six sizes
    expected = {
        "addition_embed_type": "text_time",
        "cross_attention_dim": width,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "projection_class_embeddings_input_dim": _TIME_IDS * time_width + two.get("projection_dim", 0),
    }
    wrong = [f"{key}={unet.get(key)!r} for {value!r}" for key, value in expected.items() if not _is(unet, key, value)]
    if wrong:
        raise ConfigurationError(f"model {name}: its UNet is not SDXL's for these text encoders: {listed(wrong, 2)}")
    return index


def _is(config: dict[str, Any], key: str, value: Any) -> bool:
    found = config.get(key, CHANNELS if key.endswith("_channels") else None)  # diffusers' default
    return all(x == value for x in found) if isinstance(found, list) else found == value  # one a block


def check_size(height: int, width: int) -> None:
    """Raises `ConfigurationError` for sizes in pixels that have no latents."""
    if height <= 0 or width <= 0 or height % FACTOR or width % FACTOR:
        raise ConfigurationError(f"an image of {height} × {width} pixels: both must be multiples of {FACTOR}")


def failed(error: Exception, name: str, part: str, variant: str | None) -> ConfigurationError:
    """Explains in one line why a network's weights could not be loaded."""
    what = f"{part} of model {name}" if part else f"model {name}"
    text = str(error)
    if isinstance(error, SafetensorError) or any(
        words in text for words in ("deserializing", "Unable to load weights", "git-lfs")
    ):
        return ConfigurationError(f"{what}: a file of its weights is damaged; fetch it again")
    if "no file named" in text or "not appear to have a file" in text:
        of = "in safetensors' format" if variant is None else f"of variant={variant!r}"
        there = sorted(file.name for file in (Path(name) / part).glob("*.safetensors*"))
        return ConfigurationError(f"{what}: it has no weights {of}; it has {listed(there, 3) or 'none'}: see variant")
    return explained(error, name, "model")


def identity(name: str, file: str, parts: Iterable[str], revision: str | None = None) -> str:
    """Identifies networks, to tell them from another revision's or a changed folder's: the hub's commit, or a sha256.

    The hash is of the JSON and text files, and of the size of every other file with 4 MB of it, evenly spaced: weights
    of a network that was trained on differ everywhere. `file` is one that is there.
    """
    path = find(name, file, revision)
    if not Path(name).is_dir():
        commit = re.search(r"snapshots/([^/]+)/", path.as_posix())  # in the hub's cache
        return commit[1] if commit else revision or "main"
    # A folder has no commit: its files are hashed.
    digest = hashlib.sha256()
    for part in parts:
        for found in sorted(p for p in (Path(name) / part).iterdir() if p.is_file() and not p.name.startswith(".")):
            size = found.stat().st_size  # bytes
            digest.update(f"{part}/{found.name}:{size}\n".encode())
            step = max(_BLOCK, size // _BLOCKS)  # small files are read in full
            with found.open("rb") as stream:
                for start in range(0, size, step):
                    stream.seek(start)
                    digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
