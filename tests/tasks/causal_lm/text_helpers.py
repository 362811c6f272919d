"""What the tests of text data share: a tokenizer of bytes, small files, a module that has a tokenizer."""

import json
from types import SimpleNamespace

import lightning.pytorch as L
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pera_lightning.tasks.causal_lm.data import TextDataModule
from pera_lightning.tasks.causal_lm.examples import Example

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts the texts that it is given."""

    texts = 0

    def __call__(self, text, *args, **kwargs):
        self.texts += 1 if isinstance(text, str) else len(text)
        return super().__call__(text, *args, **kwargs)


def byte_tokenizer(**special):
    """A token a byte, and nothing that it cannot decode."""
    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return CountingTokenizer(tokenizer_object=backend, **{**SPECIAL, **special})


class TextModule(L.LightningModule):
    """Has a tokenizer, and nothing to learn."""

    def __init__(self, tokenizer=None):
        super().__init__()
        self.tokenizer = tokenizer or byte_tokenizer()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def data_requirements(self):
        return {"tokenizer": self.tokenizer}

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        return None

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen += [question.example.id for question in batch]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ExamplesData(TextDataModule):
    """Examples from memory."""

    task = "commonsense"

    def __init__(self, examples=(), tests=None, protocol="hira", **options):
        super().__init__(protocol=protocol, **options)
        self.examples, self.tests = list(examples), tests or {}

    def training_examples(self):
        return self.examples

    def test_examples(self):
        return self.tests


def attached(data, tokenizer=None, **trainer):
    """The data module as it is within a run."""
    facts = {"world_size": 1, "global_rank": 0, "fast_dev_run": False, "log_dir": None, "is_global_zero": True}
    state = SimpleNamespace(fn=trainer.pop("fn", "fit"))
    data.trainer = SimpleNamespace(**{**facts, **trainer}, state=state, lightning_module=TextModule(tokenizer))
    return data


def examples_of(count, set_name="ARC-Easy", split="train"):
    """Examples of different lengths, whose instruction says their number."""
    return [
        Example(
            id=f"{set_name}/{split}/{k}",
            set=set_name,
            instruction=f"{k:03d}{'?' * (7 * k % 23)}\n\nAnswer format: answer1/answer2",
            input="",
            output=f"the correct answer is answer{k % 2 + 1}",
            answer=f"answer{k % 2 + 1}",
        )
        for k in range(count)
    ]


def entry(number, **fields):
    """An example as LLM-Adapters' files have it."""
    answer = f"answer{number % 4 + 1}"
    return {
        "instruction": f"question {number}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
        **fields,
    }


def write_json(path, entries, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, entries)) if lines else json.dumps(entries)
    path.write_text(text, encoding="utf-8")
    return path


def one_line(error, *words):
    """Holds that an error is one line with these words."""
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
