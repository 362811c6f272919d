"""Causal language models of transformers, by hub id or folder; every way to fail put into words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pera_lightning.errors import ConfigurationError
from pera_lightning.evaluation.pretrained import explained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_network(
    name: str, *, dtype: torch.dtype, attn_implementation: str | None, revision: str | None, weights: bool = True
) -> PreTrainedModel:
    """A causal language model in `dtype`.

    Weights are read straight into that type, never cast by `Module.to`: that would cast the rotary frequencies too,
    which transformers keeps in float32.

    Args:
        name: hub id, or folder.
        dtype: of the weights.
        attn_implementation: "sdpa", "eager", "flash_attention_2" …, by default transformers' choice.
        revision: branch, tag or commit of the hub's repository.
        weights: False builds from the configuration alone, with random weights.

    Raises:
        ConfigurationError: where the model cannot be had.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        if weights:
            return AutoModelForCausalLM.from_pretrained(name, revision=revision or "main", **options)
        config = AutoConfig.from_pretrained(name, revision=revision or "main")
        return AutoModelForCausalLM.from_config(config, **options)
    except (OSError, ValueError, ImportError) as error:
        raise explained(error, name, "model") from error


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raises `ConfigurationError` where rows of a packed sequence see each other in this model.

    Tried out, since whether positions that start again keep rows apart depends on the architecture and its attention:
    another first row must not change the logits of the second.
    """
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    first = torch.arange(8, device=device) % vocabulary
    positions = torch.cat([torch.arange(4), torch.arange(4)])[None].to(device)
    other = first.clone()
    other[:4] = (other[:4] + vocabulary // 2) % vocabulary
    training = model.training
    model.eval()
    try:
        here, there = (
            model(input_ids=ids[None], position_ids=positions, use_cache=False).logits[0].float()  # (8, V)
            for ids in (first, other)
        )
    except TypeError as error:
        raise ConfigurationError(f"{type(model).__name__} takes no position_ids; use batching=grouped") from error
    finally:
        model.train(training)
    change = (here - there).abs().amax(-1)  # of each token's logits
    if change[4:].max() > 1e-3 * change[:4].max():  # relative: nothing is exact in bfloat16
        raise ConfigurationError(
            f"{type(model).__name__} with attention {model.config._attn_implementation!r} lets packed rows see each "
            "other; use batching=grouped, or another attn_implementation"
        )
