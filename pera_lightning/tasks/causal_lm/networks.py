"""Causal language models of transformers, by hub id or folder; every way to fail put into words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.pretrained import explained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 8  # tokens
_LEAK = 1e-4  # of the change where one is due; what is masked adds exact zeros, in bfloat16 too


def load_network(
    name: str, *, dtype: torch.dtype, attn_implementation: str | None, revision: str | None, weights: bool = True
) -> PreTrainedModel:
    """A causal language model in `dtype`.

    Weights are read straight into that type, never cast by `Module.to`: that would cast the rotary frequencies too,
    which transformers keeps in float32.

    Args:
        name: hub id, or folder.
        dtype: type of the weights.
        attn_implementation: "sdpa", "eager", "flash_attention_2" …, by default transformers' choice.
        revision: branch, tag or commit of the hub's repository.
        weights: False builds from the configuration alone, with random weights.

    Raises:
        ConfigurationError: if the model cannot be had.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        if not weights:
            config = AutoConfig.from_pretrained(name, revision=revision or "main")
            return AutoModelForCausalLM.from_config(config, **options)
        network, found = AutoModelForCausalLM.from_pretrained(
            name, revision=revision or "main", output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise ConfigurationError(f"model {name}: a file of its weights is damaged ({error}); fetch it again") from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise explained(error, name, "model") from error
    _check_complete(name, found)
    return network


def _check_complete(name: str, found: Mapping[str, Any]) -> None:
    """Refuses a base with tensors that no file gave: transformers warns, and they would be random and stay so."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise ConfigurationError(
            f"model {name} has no weights for {len(missing)} of its tensors, which would be random: "
            f"{listed(missing, 2)}; give one that was saved whole, as a language model"
        )


def check_causal(model: PreTrainedModel) -> None:
    """Raises `ConfigurationError` if a token changes the logits before it.

    Tried out: transformers builds encoders such as BERT as language models too, and leaves them seeing all tokens, so
    that a loss on the answer is a loss on what the model has read.
    """
    ids = _probe(model)
    change = _change(model, ids, torch.cat([ids[:-1], ids[:1]]))
    if change[:-1].max() > _LEAK * change[-1]:
        raise ConfigurationError(
            f"{type(model).__name__} is not a causal language model: a token changes the logits before it; give a "
            "decoder (of an encoder's configuration, is_decoder is not set)"
        )


def check_packing(model: PreTrainedModel) -> None:
    """Raises `ConfigurationError` if examples of a packed sequence see each other in this model.

    Tried out, since whether positions that start again keep examples apart depends on the architecture and its
    attention: another first example must not change the logits of the second.
    """
    # Two examples of four tokens, packed; then the first in another order, the second as it was.
    ids, half = _probe(model), _PROBE // 2
    other = torch.cat([ids[:half].flip(0), ids[half:]])
    positions = torch.cat([torch.arange(half), torch.arange(half)]).to(ids.device)
    try:
        change = _change(model, ids, other, position_ids=positions[None])
    except TypeError as error:
        raise ConfigurationError(f"{type(model).__name__} takes no position_ids; use batching=grouped") from error
    if change[half:].max() > _LEAK * change[:half].max():
        raise ConfigurationError(
            f"{type(model).__name__} with attention {model.config._attn_implementation!r} lets packed examples see "
            "each other; use batching=grouped, or another attn_implementation"
        )


def _probe(model: PreTrainedModel) -> Tensor:
    """Different token ids, spread over the vocabulary, (8,)."""
    vocabulary = model.get_input_embeddings().num_embeddings
    device = next(model.parameters()).device
    return torch.arange(1, _PROBE + 1, device=device) * (vocabulary // (_PROBE + 2)) % vocabulary


@torch.no_grad()
def _change(model: PreTrainedModel, ids: Tensor, other: Tensor, **options: Tensor) -> Tensor:
    """How much each token's logits differ between two sequences, (T,); draws nothing at random."""
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        # A compiled model is not to be compiled for this length too. (Not by model.forward: FSDP gathers in a hook.)
        with torch.compiler.set_stance("force_eager"):
            one, two = (model(input_ids=i[None], use_cache=False, **options).logits[0].float() for i in (ids, other))
    finally:
        for module in model.modules():
            module.training = module in training
    return (one - two).abs().amax(-1)
