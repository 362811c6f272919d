"""What modules ask of any model of transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.pretrained import NO_CUSTOM_CODE, loading

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_pretrained(
    auto_class: Any,
    name: str,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    revision: str | None = None,
    weights: bool = True,
    prepare: Callable[[PretrainedConfig], None] | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model in `dtype`, and what transformers says of its loading.

    Weights are read straight into that type, never cast by `Module.to`: that would cast the rotary frequencies too,
    which transformers keeps in float32.

    Args:
        auto_class: class of transformers that finds the model's own, such as `AutoModelForCausalLM`.
        name: hub id, or folder.
        dtype: type of the weights.
        attn_implementation: "sdpa", "eager", "flash_attention_2" …, by default transformers' choice.
        revision: branch, tag or commit of the hub's repository.
        weights: False builds from the configuration alone, with random weights.
        prepare: called with the configuration, which it may change.
        options: further arguments of `from_pretrained`.

    Raises:
        ConfigurationError: if the model cannot be had.
    """
    from transformers import AutoConfig

    own: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        own["attn_implementation"] = attn_implementation
    revision = revision or "main"
    with loading(name, "model"):
        if prepare is not None or not weights:  # else transformers finds it, also that of a PEFT folder's base
            config = options["config"] = AutoConfig.from_pretrained(name, revision=revision, **NO_CUSTOM_CODE)
            if prepare is not None:
                prepare(config)
        if not weights:  # on the meta device, say: no file but the configuration is read
            return auto_class.from_config(config, **own), {}
        own |= NO_CUSTOM_CODE
        return auto_class.from_pretrained(name, revision=revision, output_loading_info=True, **own, **options)


def check_complete(name: str, missing: Iterable[str]) -> None:
    """Refuses a base with tensors that no file gave: transformers warns, and they would be random and stay so."""
    if missing := sorted(missing):
        raise ConfigurationError(
            f"model {name} has no weights for {len(missing)} of its tensors, which would be random: "
            f"{listed(missing, 2)}; give one that was saved in full"
        )


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


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that an example may have, special ones included; None for a model that sets no limit."""
    for path, module in model.base_model.named_modules():
        # RoBERTa counts positions from behind that of padding: of 514 there are 512 for tokens.
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_extremes(model: PreTrainedModel, longest: int, highest: int) -> None:
    """Raises `ConfigurationError` where examples are longer than the context or have ids that the model lacks.

    Args:
        model: the network.
        longest: number of tokens of the longest example.
        highest: highest token id, padding included.
    """
    context = context_length(model)
    if context is not None and longest > context:
        raise ConfigurationError(
            f"examples have up to {longest} tokens, and the model's context is {context}; set the data's max_length to "
            f"{context} or less"
        )
    vocabulary = model.get_input_embeddings().num_embeddings  # more than the config's where they were resized
    if highest >= vocabulary:
        raise ConfigurationError(
            f"the examples have token id {highest}, and the model has embeddings for ids up to {vocabulary - 1}; "
            "give the tokenizer of this model"
        )
