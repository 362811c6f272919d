"""Protocols: everything that decides a result beside model and data, under one name that is written into the result.

Prompt bytes, what the loss covers, decoding and how an answer is read from text move accuracies more than the choice
of adapter does. Each protocol is a set of pure functions of a row; no tokenizer and no model here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pera_lightning.errors import ConfigurationError, UnknownNameError, closest
from pera_lightning.tasks.causal_lm.examples import Row


def same_word(prediction: str | None, row: Row) -> bool:
    """Whether the prediction is the row's answer, letter by letter."""
    return prediction is not None and prediction == row.answer


def accept(row: Row) -> None:
    """Takes any row."""


def no_options(row: Row) -> tuple[str, ...]:
    """No answer words, of tasks whose answers are free text."""
    return ()


def itself(option: str) -> str:
    """The option itself, as the text to score."""
    return option


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is generated: greedy or beam search, never sampling, so that a result can be had twice.

    Args:
        max_new_tokens: at most so many tokens after the prompt.
        num_beams: 1 is greedy.
        length_penalty: beams compare summed log-probability / tokens to this power.
        no_repeat_ngram_size: no n-gram of the text, its prompt included, of this many tokens comes twice; 0 allows all.
    """

    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("num_beams", 1), ("no_repeat_ngram_size", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; decoding needs at least {least}")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to train on a task and to measure it.

    A prediction record, which `summarise` takes, is a mapping with at least ``id``, ``set``, ``output`` (the generated
    text), ``prediction`` (what `extract` found, or None), ``answer`` and ``correct`` (what `is_correct` says).

    Args:
        name: unique among the protocols of its task.
        task: ``"commonsense"``, ``"maths"`` or ``"dialogue"``.
        origin: where each choice is from, and which are ours.
        training_prompt: everything before the response, byte for byte.
        evaluation_prompt: what the model is given to answer.
        response: the text trained on right after the training prompt, without EOS.
        loss_on: the response alone, or the prompt too.
        bos: "always": one BOS in front wherever the tokenizer has such a token; "tokenizer": as the tokenizer does by
            itself.
        max_length: default limit of a training row in tokens, special ones included.
        decoding: None where nothing is generated and `options` are compared by log-probability.
        extract: the answer in a generated text (prompt excluded), or None where there is none.
        options: the answer words of a row; empty where the task has none.
        option_response: the text whose log-probability stands for an option; used where `decoding` is None.
        is_correct: whether what `extract` gave is right. Compare with this: equal numbers may be written differently.
        check: raises DataError for a row that cannot be tested; says nothing of training rows.
        summarise: prediction records of one set to its metrics.
        main_metric: the metric to report and to average over sets.
    """

    name: str
    task: str
    origin: str
    training_prompt: Callable[[Row], str]
    evaluation_prompt: Callable[[Row], str]
    response: Callable[[Row], str]
    loss_on: Literal["answer", "all"]
    bos: Literal["always", "tokenizer"]
    max_length: int
    decoding: Decoding | None
    extract: Callable[[str, Row], str | None]
    options: Callable[[Row], tuple[str, ...]]
    summarise: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]]
    main_metric: str
    option_response: Callable[[str], str] = itself
    is_correct: Callable[[str | None, Row], bool] = same_word
    check: Callable[[Row], None] = accept

    def describe(self) -> dict[str, Any]:
        """Primitives for a results file, with both prompts as a row of placeholders gives them."""
        blank = Row("", "", instruction="{instruction}", input="", output="{output}", answer="")
        return {
            "name": self.name,
            "task": self.task,
            "origin": self.origin,
            "training_prompt": self.training_prompt(blank),
            "evaluation_prompt": self.evaluation_prompt(blank),
            "loss_on": self.loss_on,
            "bos": self.bos,
            "max_length": self.max_length,
            "decoding": None if self.decoding is None else asdict(self.decoding),
            "main_metric": self.main_metric,
        }


_PROTOCOLS: dict[str, dict[str, Protocol]] = {}


def register(one: Protocol) -> Protocol:
    """Adds a protocol under its task and name, and gives it back.

    Raises:
        ConfigurationError: where the task has one of this name.
    """
    names = _PROTOCOLS.setdefault(one.task, {})
    if one.name in names:
        raise ConfigurationError(f"task {one.task!r} has a protocol {one.name!r} already; give this one another name")
    names[one.name] = one
    return one


def protocols(task: str) -> Mapping[str, Protocol]:
    """Name to protocol of one task, in order of registration.

    Raises:
        UnknownNameError: where there is no such task.
    """
    if task not in _PROTOCOLS:
        raise UnknownNameError(
            f"task {task!r} does not exist; one of {', '.join(_PROTOCOLS)}{closest(task, _PROTOCOLS)}"
        )
    return dict(_PROTOCOLS[task])


def protocol(task: str, name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        UnknownNameError: where the task or the name does not exist.
    """
    names = protocols(task)
    if name not in names:
        raise UnknownNameError(
            f"protocol {name!r} does not exist for {task}; one of {', '.join(names)}{closest(name, names)}"
        )
    return names[name]
