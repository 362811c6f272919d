"""The prompts, byte for byte: spaces at line ends are part of them, since they change the tokens.

LLM-Adapters (its `finetune.py` and `commonsense_evaluate.py`) writes templates as indented strings, so that 16 spaces
stand in front of each line, and the two files differ: after the first sentence training has two spaces (one if the
example has an input) and evaluation one (none), and where training has a line of 16 spaces evaluation has an empty one.
HiRA, which PERA follows, has no indentation and one template for both. The protocols hira, strict, score, last_number
and self_persona use it.
"""

from __future__ import annotations

from typing import Any

from pera_lightning.tasks.causal_lm.examples import Example

TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TASK_AND_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_INDENT = " " * 16


def llm_adapters_training(example: Example) -> str:
    """What LLM-Adapters trains on, up to the output."""
    head = f"{TASK_AND_INPUT} \n\n" if example.input else f"{TASK}  \n\n"
    return head + _indented(example, blank=f"\n{_INDENT}\n")


def llm_adapters_evaluation(example: Example) -> str:
    """What LLM-Adapters generates from; it ends in the 16 spaces of the line of the answer."""
    head = f"{TASK_AND_INPUT}\n\n" if example.input else f"{TASK} \n\n"
    return head + _indented(example, blank="\n\n")


def _indented(one: Example, blank: str) -> str:
    middle = f"{_INDENT}### Input:\n{_INDENT}{one.input}{blank}" if one.input else ""
    return f"{_INDENT}### Instruction:\n{_INDENT}{one.instruction}{blank}{middle}{_INDENT}### Response:\n{_INDENT}"


def hira(example: Example) -> str:
    """HiRA's prompt, for training and evaluation. Its data have no input: the form with one is ours."""
    head = TASK_AND_INPUT if example.input else TASK
    middle = f"### Input:\n{example.input}\n\n" if example.input else ""
    return f"{head}  \n\n### Instruction:\n{example.instruction}\n\n{middle}### Response:\n"


def output(example: Example) -> str:
    """The response trained on: the example's output as it is."""
    return example.output


# What every protocol with HiRA's template has; the 512 tokens are ours.
HIRA_FORM: dict[str, Any] = {
    "training_prompt": hira,
    "evaluation_prompt": hira,
    "response": output,
    "loss_on": "answer",
    "bos": "always",
    "max_length": 512,
}
