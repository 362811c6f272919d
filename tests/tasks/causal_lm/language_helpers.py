"""Folders with very small language models and their tokenizer, batches of token sequences, and short runs."""

import json

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from pera_lightning import AdapterInjection
from pera_lightning.adapters import PERA
from pera_lightning.data.batching import collate_padded
from pera_lightning.tasks.causal_lm.examples import Example
from pera_lightning.tasks.causal_lm.module import CausalLMModule
from pera_lightning.tasks.causal_lm.protocols import prompts

# The words of the prompts, of the answers, and of some questions: about a hundred and thirty.
_BLANK = Example("", "", instruction="", input="", output="", answer="")
_TEXT = prompts.hira(_BLANK) + prompts.llm_adapters_training(_BLANK) + prompts.llm_adapters_evaluation(_BLANK)
_ANSWERS = "the correct answer is answer1 answer2 answer3 answer4 answer5 true false"
_QUESTIONS = " ".join(f"q{k}" for k in range(60)) + " Answer format: answer1/answer2 answer1/answer2/answer3"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
WORDS = list(dict.fromkeys([*SPECIAL.values(), *f"{_TEXT} {_ANSWERS} {_QUESTIONS}".split()]))
VOCABULARY = len(WORDS)
CONTEXT = 128
QV = ["q_proj", "v_proj"]


def tokenizer():
    """A word is a token; text that it decodes has single spaces."""
    backend = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def save_tiny(folder, kind="llama", *, seed=0, **options):
    """Saves a model of 2 blocks and width 16 (or as `options` say) with the tokenizer; returns the folder as text."""
    torch.manual_seed(seed)
    # Large weights: a freshly initialised model is nearly indifferent, and mistakes would not show.
    shape = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    shape |= {"initializer_range": 0.3, "tie_word_embeddings": False}
    usual = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **usual, **options}))
    elif kind == "gemma2":  # scores and logits are capped smoothly
        small = {"head_dim": 4, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 4, "sliding_window": 64}
        model = Gemma2ForCausalLM(Gemma2Config(**{**shape, **usual, **small, **options}))
    elif kind == "gpt2":
        small = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
        small |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = GPT2LMHeadModel(GPT2Config(**{**shape, **small, **options}))
    else:
        assert kind == "mamba"
        small = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
        model = MambaForCausalLM(MambaConfig(**{**shape, **small, **options}))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def examples(sizes, seed=0):
    """Rows of random tokens; `sizes` are pairs of length and first label."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(4, VOCABULARY, (length,), generator=generator).tolist(), "start": start}
        for length, start in sizes
    ]


def padded(rows):
    return collate_padded(rows, pad_id=2)


def loader(batches):
    """Of ready batches, in their order."""
    return DataLoader(list(batches), batch_size=None)


def module(folder, **options):
    return CausalLMModule(**{"model_name": str(folder), "lr": 0.01, "base_dtype": "float32", **options})


class Randomise(Callback):
    """Random trained parameters at the start: where B is zero, most gradients are, and mistakes would not show."""

    def __init__(self, std=0.2):
        self.std = std

    def on_fit_start(self, trainer, pl_module):
        if trainer.ckpt_path is None:
            randomise(pl_module, self.std)


def randomise(network, std=0.2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(network.named_parameters()):
        if parameter.requires_grad:
            parameter.data = std * torch.randn(parameter.shape, generator=generator)


class Gradients(Callback):
    """The gradients of every optimizer step: as clipping finds them, and as it leaves them."""

    def __init__(self):
        self.before, self.after = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(gradients(pl_module))

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if self.before:
            self.after.append(gradients(pl_module))

    def on_train_end(self, trainer, pl_module):
        self.after.append(gradients(pl_module))


def gradients(network):
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def make_trainer(folder, method=None, callbacks=(), targets=QV, trainable=(), **options):
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "default_root_dir": folder}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    first = AdapterInjection(method or PERA(rank=2), list(targets), list(trainable))
    options = {"devices": 1, **defaults, **quiet, **options}
    return Trainer(accelerator="cpu", callbacks=[first, *callbacks], **options)


def fit(folder, network, data, *, seed=0, val=None, ckpt=None, std=0.2, callbacks=(), **options):
    """Fits from random adapters and returns the trainer; data is a list of batches, a loader or a data module."""
    seed_everything(seed, verbose=False)
    trainer = make_trainer(folder, callbacks=[Randomise(std), *callbacks], **options)
    if isinstance(data, LightningDataModule):
        trainer.fit(network, datamodule=data, ckpt_path=ckpt)
    else:
        ready = [loader(d) if isinstance(d, list) else d for d in (data, val)]
        trainer.fit(network, *ready, ckpt_path=ckpt)
    return trainer


def trained(network):
    return {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}


def write_sets(folder, counts, seed=0, train=12):
    """LLM-Adapters' files: test sets of so many questions, and training examples of ARC-Easy."""
    generator = torch.Generator().manual_seed(seed)
    for name, count in {**counts, "ARC-Easy/train": train}.items():
        rows = []
        for k in range(count):
            length = int(torch.randint(2, 12, (), generator=generator))
            words = torch.randint(0, 60, (length,), generator=generator).tolist()
            answer = ["true", "false"][k % 2] if name == "boolq" else f"answer{1 + k % 3}"
            ending = "" if name == "boolq" else "\n\nAnswer format: answer1/answer2/answer3"
            question = " ".join(f"q{w}" for w in words) + ending
            rows.append(
                {"instruction": question, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
            )
        path = folder / f"{name}.json" if "/" in name else folder / name / "test.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    return folder
