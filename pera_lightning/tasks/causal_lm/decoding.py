"""Generation and scoring with a causal language model, in batches whose padding changes nothing.

Prompts are padded on the left, with the mask and the positions that make each see what it would see alone:

    ids        p  p  a  b  c
    mask       0  0  1  1  1
    positions  0  0  0  1  2

Of the model's own generation_config (sampling, temperature, penalties …) only the EOS ids apply: they belong to the
model, decoding to the protocol.

Legend: B prompts, T tokens of the longest, R different inputs, K last positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pera_lightning.data.batching import pad_left
from pera_lightning.data.tokenization import pad_token_id
from pera_lightning.errors import DataError
from pera_lightning.training.transformers_models import forward_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pera_lightning.tasks.causal_lm.protocols import Decoding


@dataclass(frozen=True)
class Generated:
    """What a model wrote after one prompt."""

    ids: list[int]  # the new tokens, without the EOS that ended them
    text: str  # the same as text, special tokens left out
    score: float | None  # with beams, the summed log-probability by the number of new tokens, EOS included; else None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    synced: bool = False,
) -> list[Generated]:
    """Continues prompts, greedily or with beams; the caller has put the model into evaluation mode.

    Args:
        model: a transformers causal language model.
        tokenizer: its own.
        prompts: B lists of token ids, one or more each.
        decoding: new tokens and beams; with beams transformers keeps (B beams, V) float32 of every step, for the score.
        synced: whether to go on until every rank is done, for models sharded over ranks.
    """
    from transformers import GenerationConfig

    if not prompts:
        return []
    if not all(prompts):
        raise DataError("a prompt of the batch has no tokens to continue")
    # The protocol's decoding, drawing nothing, and the model's and tokenizer's ends of a text.
    pad_id, ends, beams = pad_token_id(tokenizer), end_ids(model, tokenizer), decoding.num_beams > 1
    config = GenerationConfig(**asdict(decoding), do_sample=False)
    config.pad_token_id, config.eos_token_id = pad_id, ends or None
    config.return_dict_in_generate, config.output_scores = True, beams  # no sequences_scores without the scores
    # Positions are left to transformers: it makes the same ones from the mask, and moves them on at every step.
    ids, mask, _ = pad_left(prompts, pad_id, _device(model))  # (B, T)
    with _own_generation_config(model, GenerationConfig()):
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=synced)
    new = output.sequences[:, ids.shape[1] :].tolist()  # (B, up to max_new_tokens)
    scores = output.sequences_scores.tolist() if beams else [None] * len(new)
    return [_generated(tokenizer, ids, ends, score) for ids, score in zip(new, scores, strict=True)]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that end a generation: those of the model and the tokenizer's, sorted."""
    own = model.generation_config.eos_token_id
    return sorted({*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None})


def _generated(tokenizer: PreTrainedTokenizerBase, new: list[int], ends: list[int], score: float | None) -> Generated:
    """Cuts the new tokens at their first EOS: whatever follows there is padding."""
    ids = list(itertools.takewhile(lambda token: token not in ends, new))
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generated(ids=ids, text=text, score=score)


@contextlib.contextmanager
def _own_generation_config(model: PreTrainedModel, config: object) -> Iterator[None]:
    """Puts an empty config in the place of the model's: transformers fills what a given one leaves open from it."""
    kept, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = kept


@torch.no_grad()
def score_options(
    model: nn.Module, candidates: Sequence[Sequence[tuple[list[int], int]]], *, pad_id: int
) -> list[list[float]]:
    """log p(ids[start:] | ids[:start]) of every option of every question, in one forward.

    The last token of an option is predicted, never read. So options that differ in it alone are one input, and only
    the last K positions, K = the longest scored span, need logits.

    Args:
        model: a causal language model; its forward may do without position_ids and logits_to_keep.
        candidates: for each question its options, each (ids, start): score ids[start:]; `start` is 1 or more.
        pad_id: what to fill with.

    Returns:
        One list of summed log-probabilities a question: float32, natural logarithm.

    Raises:
        DataError: an option with nothing to score, or with nothing before it.
    """
    # 1. One input for all options that differ in their last token alone.
    users: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)  # input -> (question, option)
    for question, options in enumerate(candidates):
        for option, (ids, start) in enumerate(options):
            if not 1 <= start < len(ids):
                raise DataError(f"option {option} of question {question}: start {start} of {len(ids)} tokens")
            users[tuple(ids[:-1])].append((question, option))
    if not users:
        return [[] for _ in candidates]
    # 2. One forward; padded on the left, all inputs end in the last column, and their spans in the last K.
    keep = max(len(ids) - start for options in candidates for ids, start in options)
    ids, mask, positions = pad_left(list(users), pad_id, _device(model))  # (R, T)
    optional = {"position_ids": positions, "logits_to_keep": keep, "use_cache": False}
    taken = {name: optional[name] for name in optional.keys() & forward_arguments(model)}
    logits = model(input_ids=ids, attention_mask=mask, **taken).logits[:, -keep:]  # (R, K, V)
    # 3. Sum the log-probabilities of each option's span, which ends one token after its input.
    sums = {}
    for own, using in zip(logits, users.values(), strict=True):
        logs = own.float().log_softmax(-1)  # (K, V); one input at a time, V is large
        for question, option in using:
            tokens, start = candidates[question][option]
            span = torch.tensor(tokens[start:], device=logs.device)  # (S,)
            sums[question, option] = logs[keep - len(span) :].gather(-1, span[:, None]).sum()
    values = dict(zip(sums, torch.stack([*sums.values()]).tolist(), strict=True))  # one wait for the device
    return [[values[question, option] for option in range(len(options))] for question, options in enumerate(candidates)]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
