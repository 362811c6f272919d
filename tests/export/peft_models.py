"""What the tests of the export share: small bases, adapted models with trained-looking adapters, and peft's reading."""

import copy
import warnings

import timm
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pera_lightning import inject
from pera_lightning.adapters import LinearAdapter

TOKENS = 40


def llama(blocks=2, **options):
    torch.manual_seed(0)
    shape = {"vocab_size": TOKENS, "hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": blocks}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **options})).eval()


def gpt2(blocks=2):
    torch.manual_seed(0)
    shape = {"vocab_size": TOKENS, "n_embd": 16, "n_head": 4, "n_positions": 32, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(**shape, n_layer=blocks)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def bert():
    torch.manual_seed(0)
    shape = {"vocab_size": TOKENS, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    config = BertConfig(**shape, num_hidden_layers=2, num_labels=3, initializer_range=0.3)
    return BertForSequenceClassification(config).eval()


def vit():
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **shape).eval()
    nn.init.normal_(model.head.weight)
    return model


BASES = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit}
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn[q,v]", "mlp.c_fc"], "bert": ["query"], "vit": ["qkv[q,v]"]}
HEADS = {"llama": [], "gpt2": [], "bert": ["classifier"], "vit": ["head"]}


def inputs(name, rows=3):
    generator = torch.Generator().manual_seed(5)
    if name == "vit":
        return torch.randn(rows, 3, 8, 8, generator=generator)
    return torch.randint(0, TOKENS, (rows, 9), generator=generator)


@torch.no_grad()
def outputs(model, x):
    """In float64, where the order of a processor's sums does not count: what remains is the weights' own rounding."""
    given = copy.deepcopy(model).double().eval()(x.double() if x.is_floating_point() else x)
    return getattr(given, "logits", given)


@torch.no_grad()
def stir(model, spread=0.3, seed=1):
    """Adapters as after a training, and heads that have moved."""
    torch.manual_seed(seed)
    adapters = [module for module in model.modules() if isinstance(module, LinearAdapter)]
    own = {id(p) for adapter in adapters for p in adapter.parameters()}
    for p in model.parameters():
        if p.requires_grad:
            p.add_(spread * torch.randn_like(p)) if id(p) in own else p.add_(torch.randn_like(p))
    return model.eval()


def adapted(name, method, targets=None, heads=None, **options):
    model = BASES[name](**options)
    inject(model, method, targets or TARGETS[name], HEADS[name] if heads is None else heads, seed=0)
    return stir(model)


def in_peft(base, folder):
    """The base with what peft reads from a folder; nothing may be missing or left over."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(base, str(folder)).eval()


def apart(a, b):
    return float((a - b).abs().max())
