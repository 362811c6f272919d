"""Pipeline files: what a merged pipeline shares with its base, found in a folder or on the hub, and copied."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from pera_lightning.errors import ConfigurationError, listed, shorten
from pera_lightning.files import parse_json
from pera_lightning.pretrained import explained

INDEX = "model_index.json"
_SETTINGS = (".json", ".txt", ".model", ".jinja")  # of tokenizers, schedulers and configurations
_STEMS = ("model", "diffusion_pytorch_model")  # of files with weights: of transformers, and of diffusers
_WEIGHTS = (".safetensors", "-?????-of-?????.safetensors", ".safetensors.index.*json")

# A component's name to what is copied: the name it gets, and the file it is.
PipelineFiles = dict[str, dict[str, Path]]


def pipeline_files(
    base: str | Path, without: Collection[str], *, revision: str | None = None, variant: str | None = None
) -> PipelineFiles:
    """The files of a base pipeline, but for the components that somebody else writes.

    Args:
        base: folder of a pipeline, or its id on the hub; the hub's cache is used.
        without: names of components that are left out.
        revision: branch, tag or commit on the hub.
        variant: variant of the weights; a component without it is taken plain, as diffusers does.

    Returns:
        The files by component; ``""`` is the pipeline's own.

    Raises:
        ConfigurationError: where the base or one of its components cannot be had.
    """
    folder = _folder(str(base), [INDEX], revision)
    index = folder / INDEX
    if not index.is_file():
        raise ConfigurationError(f"{base} is not a pipeline of diffusers: it has no {INDEX}")
    try:
        entries = parse_json(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{index} is damaged: {shorten(str(error))}") from None
    # An entry [library, class] is a component; one of nulls is an optional one that this pipeline does without.
    components = [name for name, entry in entries.items() if isinstance(entry, list) and all(entry)]
    if absent := [name for name in without if name not in components]:
        raise ConfigurationError(f"the pipeline {base} has no {listed(absent)}, it has {listed(components, 9)}")
    own = {name: _files(str(base), name, revision, variant) for name in components if name not in without}
    return {"": {INDEX: index}, **own}


def copy_files(components: Mapping[str, Mapping[str, Path]], folder: Path) -> None:
    """Copies what `pipeline_files` found into a folder, file by file, without reading weights into memory."""
    for name, files in components.items():
        (folder / name).mkdir(exist_ok=True)
        for target, source in files.items():
            path = folder / name / target  # by its plain name
            shutil.copyfile(source, path)  # a cache of the hub has links, which are followed
            if target.endswith(".index.json"):
                _rename_shards(path)
            elif target in (INDEX, "config.json"):
                without_path(path)


def without_path(file: Path) -> None:
    """Takes out of a configuration where its base lay, which diffusers writes down."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _files(base: str, component: str, revision: str | None, variant: str | None) -> dict[str, Path]:
    """The files of one component by their plain names; of its weights the variant, or else the plain ones."""
    for kind in dict.fromkeys((variant, None)):
        wanted = [f"{component}/*{ending}" for ending in _SETTINGS]
        wanted += [f"{component}/{stem}{f'.{kind}' if kind else ''}{end}" for stem in _STEMS for end in _WEIGHTS]
        folder = _folder(base, wanted, revision) / component
        present = sorted(file for file in folder.glob("*") if file.is_file())
        weights = {plain: file for file in present if (plain := _plain_name(file.name, kind)) is not None}
        settings = {f.name: f for f in present if f.name.endswith(_SETTINGS) and ".index." not in f.name}
        if weights or (present and "config.json" not in settings):  # tokenizers and schedulers have no weights
            return settings | weights
    if not present:
        raise ConfigurationError(f"{component} of {base} is missing: give a complete base")
    has = f"{component} of {base} has no {' nor '.join(f'{stem}.safetensors' for stem in _STEMS)}"
    what = f"{has}, it has {listed([file.name for file in present], 4)}"
    raise ConfigurationError(f"{what}; pickles are not copied: save it anew, or give the variant")


def _plain_name(name: str, variant: str | None) -> str | None:
    """The name of a file of weights, or of the index of its shards, without the variant; None for other files."""
    plain = name.replace(f".{variant}", "", 1) if variant else name
    shard = r"-\d{5}-of-\d{5}\.safetensors"  # in the place of .safetensors, beside an index of all
    known = re.fullmatch(rf"({'|'.join(_STEMS)})({shard}|\.safetensors(\.index\.json)?)", plain)
    return plain if known and (plain != name or not variant) else None


def _rename_shards(file: Path) -> None:
    """Gives the shards in an index the plain names that they have now."""
    index = json.loads(file.read_text(encoding="utf-8"))
    shards = index["weight_map"]  # tensor to file
    index["weight_map"] = {tensor: re.sub(r"\.\w+-(\d{5}-of-)", r"-\1", shard) for tensor, shard in shards.items()}
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _folder(base: str, patterns: list[str], revision: str | None) -> Path:
    """The base's folder, with the files of these patterns in it where it is one of the hub's."""
    if Path(base).is_dir():
        return Path(base)
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise explained(error, base, "model") from error
