"""Causal language models of transformers, by hub id or folder, and what is tried out on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pera_lightning.errors import ConfigurationError
from pera_lightning.training.transformers_models import check_complete, load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 8  # tokens
_LEAK = 1e-4  # of the change where one is due; what is masked adds exact zeros, in bfloat16 too


def load_network(name: str, **loading: Any) -> PreTrainedModel:
    """A causal language model, by hub id or folder; `load_pretrained` says what else it takes.

    Raises:
        ConfigurationError: if the model cannot be had, or files lack some of its weights.
    """
    from transformers import AutoModelForCausalLM

    network, found = load_pretrained(AutoModelForCausalLM, name, **loading)
    check_complete(name, found.get("missing_keys", ()))
    return network


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
    # Dropout would differ between the two forwards, and move the random state of the fit.
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
