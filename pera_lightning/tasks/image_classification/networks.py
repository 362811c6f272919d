"""timm networks by name, hub id, folder, or as shipped with this package."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pera_lightning.errors import ConfigurationError, closest, shorten

_WEIGHTS = "model.safetensors"
_PICKLED = (".bin", ".pth", ".pt", ".tar")
ASSETS = Path(__file__).resolve().parents[2] / "assets"


def timm_name(model_name: str) -> str:
    """The name as timm takes it: ``asset:NAME`` (shipped with this package) and folders become ``local-dir:…``."""
    import timm

    if model_name.startswith("asset:"):
        folder = ASSETS / model_name.removeprefix("asset:")
        if not (folder / "config.json").is_file():
            have = ", ".join(sorted(p.name for p in ASSETS.iterdir() if p.is_dir()))
            raise ConfigurationError(f"model_name={model_name!r}: no such asset; there are: {have}")
        return f"local-dir:{folder}"
    folder = Path(model_name.removeprefix("local-dir:"))
    if model_name.startswith("local-dir:") or folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigurationError(f"model_name={model_name!r}: {folder} has no config.json, as timm's folders have")
        return f"local-dir:{folder.resolve()}"
    if ":" in model_name:  # hf-hub:org/name
        return model_name
    # timm's names are architecture.tag; the tag says which weights.
    name, _, tag = model_name.partition(".")
    if not timm.is_model(name):
        near = closest(name, timm.list_models())
        raise ConfigurationError(f"model_name={model_name!r} is not a model of timm, a folder or an hf-hub: id{near}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise ConfigurationError(f"model_name={model_name!r}: {name} has the weights {', '.join(tags) or 'none'}")
    return model_name


def create(model_name: str, *, pretrained: bool, image_size: int | None) -> nn.Module:
    """Makes a timm network with its own head, for images of `image_size` pixels, by default the network's own."""
    import timm

    name = timm_name(model_name)
    if pretrained and name.startswith("local-dir:"):
        _refuse_pickled(model_name, Path(name.removeprefix("local-dir:")))
    options = {} if image_size is None else {"img_size": image_size}  # not all architectures take one
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        if image_size is not None and "img_size" in str(error):
            raise ConfigurationError(f"image_size={image_size}: {name} takes any size, leave it out") from None
        raise _unloadable(model_name, error) from error
    except Exception as error:  # timm checks little of what a folder's files say
        raise _unloadable(model_name, error) from error


def _unloadable(model_name: str, error: Exception) -> ConfigurationError:
    why = f"cannot be loaded: {shorten(str(error))[:200] or type(error).__name__}"
    return ConfigurationError(f"model_name={model_name!r} {why}; give a timm folder, or set HF_ENDPOINT")


def _refuse_pickled(model_name: str, folder: Path) -> None:
    """Refuses a folder whose weights are pickled: older versions of timm run what such a file says."""
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled and not (folder / _WEIGHTS).is_file():  # which timm prefers
        raise ConfigurationError(
            f"model_name={model_name!r}: {pickled[0]} is pickled and may run code; save its weights as {_WEIGHTS}"
        )
