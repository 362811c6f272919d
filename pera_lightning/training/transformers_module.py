"""What the modules around models of transformers share: their options, the tokenizer, and the merged folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.pretrained import load_tokenizer
from pera_lightning.training.normalised_loss import NormalisedLossModule
from pera_lightning.training.precision import DTYPES, release_heads
from pera_lightning.training.transformers_models import check_extremes, recompute_activations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TransformersModule(NormalisedLossModule):
    """Base of the modules whose network is a model of transformers.

    Args:
        model_name: hub id or folder.
        attn_implementation: "sdpa", "eager", "flash_attention_2" …; by default transformers' choice.
        activation_checkpointing: computes the activations of each block again in the backward instead of keeping them.
        compile: compiles the network, after the injection.
        revision: branch, tag or commit of the hub's repository.
    """

    def __init__(
        self,
        model_name: str,
        attn_implementation: str | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        revision: str | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self._data: Mapping[str, Any] = {}  # what the data say of themselves, their `description`

    def agree(self) -> None:
        self._data = self.data_description()

    def check_extremes(self) -> None:
        """Raises `ConfigurationError` for data with longer examples or other token ids than the network takes."""
        if extremes := self._data.get("extremes"):
            check_extremes(self.model, *extremes)  # type: ignore[arg-type]

    def loading(self, weights: bool) -> dict[str, Any]:
        """The arguments of `load_pretrained` that the hyperparameters hold."""
        names = ("attn_implementation", "revision")
        return {"dtype": DTYPES[self.hparams["base_dtype"]], "weights": weights, **{n: self.hparams[n] for n in names}}

    def finish_network(self) -> None:
        if self.hparams["activation_checkpointing"]:
            recompute_activations(self.model)  # type: ignore[arg-type]
        if self.hparams["compile"]:
            self.model.compile()  # type: ignore[union-attr]  # in place: names in the state dict stay

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(self.hparams["model_name"], self.hparams["revision"])

    def data_requirements(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer}

    def write_network(self, folder: Path, data: Any = None, class_names: Sequence[str] | None = None) -> list[str]:
        from pera_lightning.export.transformers import write_transformers

        # Heads were trained in float32; a folder of transformers has one precision.
        notes, dtype = [], self.hparams["base_dtype"]
        if heads := release_heads(self.model, DTYPES[dtype]):  # type: ignore[arg-type]
            notes.append(f"{listed(heads)} was trained in float32 and is {dtype}, as the base is")
        if class_names is not None and len(class_names) == self.hparams.get("num_labels"):
            config = self.model.config  # type: ignore[union-attr]
            config.id2label = dict(enumerate(class_names))
            config.label2id = {name: k for k, name in config.id2label.items()}
        try:
            # Data that are given here need not be those of the trainer.
            name = getattr(data, "description", self.data_description)().get("tokenizer_name")
            tokenizer = self.tokenizer if name is None else load_tokenizer(name)
        except ConfigurationError as error:
            tokenizer = None
            notes.append(f"no tokenizer was written: {error}")
        return notes + write_transformers(self.model, folder, tokenizer)  # type: ignore[arg-type]
