"""Merged weights for transformers: a folder for `from_pretrained`, with tokenizer and generation settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pera_lightning.errors import ConfigurationError, shorten
from pera_lightning.export.merged import MergedReport, export_merged

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_transformers(
    model: PreTrainedModel, folder: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> MergedReport:
    """Merges a model of transformers and writes a folder that its `from_pretrained` loads.

    Args:
        model: injected; merged in place, so hand over a copy to keep it.
        folder: made, in full or not at all.
        tokenizer: written with it.
        options: options of `pera_lightning.export.merged.export_merged`.
    """
    return export_merged(model, folder, lambda made: write_transformers(model, made, tokenizer), **options)


def write_transformers(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[str]:
    """Writes a plain model, its configuration and its tokenizer; gives notes, one line each.

    Args:
        model: without adapters, in the dtypes that its weights are to be loaded in.
        folder: exists.
        tokenizer: the model's; None writes none.

    Raises:
        ConfigurationError: where transformers does not write this model.
    """
    # Bases come with settings that transformers reads and does not write: a temperature without sampling, say.
    settings, wrong = getattr(model, "generation_config", None), ""
    try:
        if settings is not None:
            settings.validate(strict=True)
    except ValueError as error:
        wrong, model.generation_config = shorten(str(error))[:200], type(settings)()
    try:
        model.save_pretrained(folder)
        if wrong:
            settings.to_json_file(folder / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except ValueError as error:
        raise ConfigurationError(f"transformers does not write {type(model).__name__}: {shorten(str(error))}") from None
    finally:  # the caller's model keeps its settings
        if wrong:
            model.generation_config = settings
    return [f"generation_config.json is the base's as it was, of which transformers says: {wrong}"] if wrong else []
