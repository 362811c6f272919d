"""Prompts as Stable Diffusion XL reads them: token ids for either text encoder, and the embeddings of both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from pera_lightning.errors import ConfigurationError, shorten
from pera_lightning.tasks.dreambooth.pipeline_files import find, read

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_LETTERS = 512  # of CLIP's vocabulary: each byte, and each at a word's end


def load_tokenizers(name: str, revision: str | None = None) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Loads the tokenizers of both text encoders."""
    from transformers import CLIPTokenizer

    made = []
    for part, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        find(name, f"{part}/tokenizer_config.json", revision)  # a missing one has a clear message there
        try:
            tokenizer = CLIPTokenizer.from_pretrained(name, subfolder=part, revision=revision or "main")
        except Exception as error:  # the library tokenizers raises nothing narrower
            raise ConfigurationError(f"{part} of model {name}: {shorten(str(error))[:200]}; fetch it again") from error
        size = read(name, f"{encoder}/config.json", revision).get("vocab_size")  # rows of its embedding
        if not _LETTERS <= len(tokenizer) <= (size or len(tokenizer)):
            has = f"has {len(tokenizer)} tokens, and {encoder} knows {size}"
            raise ConfigurationError(f"{part} of model {name} {has}; fetch it again")
        made.append(tokenizer)
    return made[0], made[1]


def tokenise(tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokenises B prompts for each text encoder, padded and cut to its length: two times (B, 77), int64.

    A warning says which words of a prompt are cut off, once for each prompt.
    """
    prompts = list(prompts)
    # What is cut off, by the first tokenizer: the second has the same words.
    first, longest = tokenizers[0], tokenizers[0].model_max_length
    for prompt in dict.fromkeys(prompts):
        full = first(prompt, verbose=False).input_ids  # uncut, with start and end
        if len(full) > longest:
            _warn_of_cut(prompt, first.decode(full[longest - 1 : -1]).strip(), longest)
    how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    one, two = (each(prompts, max_length=each.model_max_length, **how).input_ids for each in tokenizers)
    return one, two


@cache
def _warn_of_cut(prompt: str, lost: str, longest: int) -> None:
    rank_zero_warn(
        f"the text encoders read {longest} tokens, start and end included; of the prompt {shorten(prompt)[:60]!r} they "
        f"do not see {shorten(lost)[:200]!r}"
    )


def prompt_embeddings(encoders: Sequence[nn.Module], input_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeds token ids (B, L) of each encoder as the UNet takes them (arXiv 2307.01952, section 2.1).

    Returns:
        The states of both before their last layer, side by side, (B, L, D1 + D2), and the second one's projection of
        the full prompt, (B, P).
    """
    states, pooled = [], None
    for encoder, ids in zip(encoders, input_ids, strict=True):
        out = encoder(ids.to(next(encoder.parameters()).device), output_hidden_states=True)
        states.append(out.hidden_states[-2])  # before the last layer
        pooled = out[0]  # the second encoder's stays, its projection; the first has none
    return torch.cat(states, dim=-1), pooled  # 768 + 1280 wide in SDXL
