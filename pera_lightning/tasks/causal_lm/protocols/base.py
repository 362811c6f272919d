"""What a protocol is, and the registry of all of them.

Prompt bytes, what the loss covers, decoding and how an answer is read from text move accuracies more than the choice
of adapter does. Each protocol is a set of pure functions of an example; no tokenizer and no model here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.causal_lm.examples import Example
from pera_lightning.validation import check_choice, check_in_range, check_positive_int

# Defaults of a protocol's functions; no lambdas, so that data modules can be pickled.


def _no_options(example: Example) -> tuple[str, ...]:
    return ()


def _is_answer(prediction: str | None, example: Example) -> bool:
    return prediction == example.answer


def _accept(example: Example) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is generated: greedy or beam search, never sampling, so that a result can be had twice."""

    max_new_tokens: int  # after the prompt, at most
    num_beams: int = 1  # 1 is greedy
    length_penalty: float = 1.0  # beams compare summed log-probability / tokens to this power
    no_repeat_ngram_size: int = 0  # tokens of the n-grams that may not come twice, the prompt included; 0 allows all

    def __post_init__(self) -> None:
        check_positive_int(self.max_new_tokens, "max_new_tokens")
        check_positive_int(self.num_beams, "num_beams")
        check_in_range(self.no_repeat_ngram_size, "no_repeat_ngram_size", ge=0, integer=True)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to train on a task and to measure it.

    A prediction, which `summarise` takes, is a mapping with at least ``id``, ``set``, ``output`` (the generated text),
    ``prediction`` (what `extract` found, or None), ``answer`` and ``correct`` (what `is_correct` says).
    """

    name: str  # unique among the protocols of its task
    task: str  # "commonsense", "maths" or "dialogue"
    origin: str  # where each choice is from, and which are ours
    training_prompt: Callable[[Example], str]  # everything before the response, byte for byte
    evaluation_prompt: Callable[[Example], str]  # what the model is given to answer
    response: Callable[[Example], str]  # the text trained on right after the training prompt, without EOS
    loss_on: Literal["answer", "all"]  # the response alone, or the prompt too
    bos: Literal["always", "tokenizer"]  # one in front if the tokenizer has it, or as the tokenizer does by itself
    max_length: int  # default limit of a training example in tokens, special ones included
    decoding: Decoding | None  # None where nothing is generated and `options` are compared by log-probability
    extract: Callable[[str, Example], str | None]  # the answer in a generated text without its prompt, if any
    summarise: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]]  # predictions of one set to its metrics
    main_metric: str  # what is reported and averaged over sets
    options: Callable[[Example], tuple[str, ...]] = _no_options  # the answer words of an example; none for free text
    option_response: Callable[[str], str] = str  # the text whose log-probability stands for an option
    is_correct: Callable[[str | None, Example], bool] = _is_answer  # whether what `extract` gave is right
    check: Callable[[Example], None] = _accept  # raises DataError for an example that cannot be tested

    def describe(self) -> dict[str, Any]:
        """Primitives for a results file, with both prompts as an example of placeholders gives them."""
        blank = Example("", "", instruction="{instruction}", input="", output="{output}", answer="")
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


_PROTOCOLS: dict[str, dict[str, Protocol]] = {}  # by task and name


def register(one: Protocol) -> Protocol:
    """Adds a protocol under its task and name, and gives it back; raises `ConfigurationError` for a name taken."""
    if one.name in _PROTOCOLS.setdefault(one.task, {}):
        raise ConfigurationError(f"task {one.task!r} has a protocol {one.name!r} already; give this one another name")
    _PROTOCOLS[one.task][one.name] = one
    return one


def protocols(task: str) -> Mapping[str, Protocol]:
    """Name to protocol of one task, in order of registration; raises `UnknownNameError` for an unknown task."""
    check_choice(task, "task", tuple(_PROTOCOLS))
    return dict(_PROTOCOLS[task])


def protocol(task: str, name: str) -> Protocol:
    """The protocol of a name; raises `UnknownNameError` for an unknown task or name."""
    names = protocols(task)
    check_choice(name, f"{task} protocol", tuple(names))
    return names[name]
