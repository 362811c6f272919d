"""What modules ask of any model of transformers."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING

from torch import nn

from pera_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """The names of the arguments that a model's forward spells out; looked up once a class."""
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps all models in one class
    if hasattr(model, "get_base_model"):  # PEFT names few arguments and passes all of them on
        model = model.get_base_model()
    return _arguments_of(type(model))


@functools.lru_cache(maxsize=64)
def _arguments_of(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def recompute_activations(model: PreTrainedModel) -> None:
    """Has the activations of each block computed again in the backward, instead of kept, if the model's class can."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigurationError(f"{type(model).__name__} cannot checkpoint activations; leave it out")
    old = getattr(model, "gradient_checkpointing_enable", None)  # its name before transformers 5
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})


def check_extremes(model: PreTrainedModel, longest: int, highest: int) -> None:
    """Raises `ConfigurationError` where examples are longer than the context or have ids that the model lacks.

    Args:
        model: language model of transformers.
        longest: number of tokens of the longest training or validation example.
        highest: the highest token id among them, padding included.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ConfigurationError(
            f"training examples have up to {longest} tokens, and the model's context is {context}; set the data's "
            f"max_length to {context} or less"
        )
    vocabulary = model.get_input_embeddings().num_embeddings  # more than the config's where they were resized
    if highest >= vocabulary:
        raise ConfigurationError(
            f"the examples have token id {highest}, and the model has embeddings for ids up to {vocabulary - 1}; "
            "give the tokenizer of this model"
        )
