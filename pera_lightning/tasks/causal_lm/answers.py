"""Answers of a model to a batch of questions: generated, or the likeliest option, with prompts that fit the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor

from pera_lightning.data.tokenization import pad_token_id
from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.causal_lm.decoding import generate, score_options
from pera_lightning.tasks.causal_lm.protocols import Protocol
from pera_lightning.tasks.causal_lm.questions import Question
from pera_lightning.training.transformers_models import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: Protocol, questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """Answers questions as a protocol says.

    Returns:
        For each question ``output`` (text), ``prediction`` (what was found in it, or None), ``tokens`` (how many were
        computed), ``left_out`` (tokens of the prompt that did not fit), and ``scores`` or ``beam_score``.
    """
    if protocol.decoding is None:
        return _scored(model, tokenizer, protocol, questions)
    return _generated(model, tokenizer, protocol, questions)


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether the processes gather weights together, so that each must do as many forwards as the others."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def _scored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: Protocol, questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """The likeliest option of each question; its tokens are those of the prompt and of all options."""
    fitting = [_fit_candidates(model, q) for q in questions]  # (candidates, tokens left out) of each
    scores = score_options(model, [candidates for candidates, _ in fitting], pad_id=pad_token_id(tokenizer))
    answers = []
    for q, own, (candidates, left_out) in zip(questions, scores, fitting, strict=True):
        prediction = q.options[max(range(len(own)), key=own.__getitem__)]  # of equal ones the first
        answers.append(
            {
                "scores": dict(zip(q.options, own, strict=True)),
                "output": protocol.option_response(prediction),
                "prediction": prediction,
                "tokens": len(q.prompt) - left_out + sum(len(ids) - start for ids, start in candidates),
                "left_out": left_out,
            }
        )
    return answers


def _generated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: Protocol, questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """What is generated after each prompt; its tokens are the new ones."""
    new = protocol.decoding.max_new_tokens  # type: ignore[union-attr]
    # Prompt and new tokens together fit the context; a prompt that is too long loses tokens after its first.
    left_out = [_excess(model, len(q.prompt) + new, len(q.prompt)) for q in questions]
    prompts = [_without(q.prompt, left) for q, left in zip(questions, left_out, strict=True)]
    texts = generate(model, tokenizer, prompts, protocol.decoding, synced=is_sharded(model))  # type: ignore[arg-type]
    return [
        {
            "beam_score": one.score,
            "output": one.text,
            "prediction": protocol.extract(one.text, q.example),
            "tokens": len(one.ids),
            "left_out": left,
        }
        for q, one, left in zip(questions, texts, left_out, strict=True)
    ]


def _excess(model: PreTrainedModel, needed: int, prompt: int) -> int:
    """How many tokens of a prompt must go so that `needed` positions fit the model's context."""
    context = context_length(model)
    excess = 0 if context is None else max(needed - context, 0)
    if excess > prompt - 2:  # the first token stays, and one more
        raise ConfigurationError(
            f"the model's context of {context} tokens has no room for a prompt and {needed - prompt} tokens after it; "
            "use another protocol or model"
        )
    return excess


def _fit_candidates(model: PreTrainedModel, question: Question) -> tuple[list[tuple[list[int], int]], int]:
    """The options of a question after the end of its prompt, the same for all; how many tokens were left out."""
    longest = max(len(ids) - 1 for ids, _ in question.candidates)  # the last token is not read
    left = _excess(model, longest, min(start for _, start in question.candidates))
    return [(_without(ids, left), start - left) for ids, start in question.candidates], left


def _without(ids: list[int], left: int) -> list[int]:
    """Ids less the `left` ones after the first, which may be BOS."""
    return [*ids[:1], *ids[1 + left :]]
