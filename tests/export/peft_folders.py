"""Folders that peft itself writes, changed where a test wants that, for the tests of their import."""

import json
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from pera_lightning import load_peft
from pera_lightning.errors import CheckpointError
from pera_lightning.injection.inject import injection_of
from tests.export.peft_models import BASES, in_peft, inputs, outputs

LAYERS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query"], "vit": ["qkv"]}
HEADS = {"llama": None, "gpt2": None, "bert": ["classifier"], "vit": ["head"]}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "vit": None}


@torch.no_grad()
def trained(name, config, folder, **base):
    """Saves what peft makes of a base, with values as after a training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(BASES[name](**base), config)
        torch.manual_seed(2)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
        model.save_pretrained(str(folder))


def read_by_peft(name, folder, **base):
    """The outputs of what peft reads, which is the truth: the order of patterns is another one in the file."""
    return outputs(in_peft(BASES[name](**base), folder), inputs(name))


def heads(name):
    return HEADS[name] and [*HEADS[name]]  # peft extends the list


def lora(name="llama", **options):
    usual = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": LAYERS[name],
        "task_type": TASKS[name],
        "modules_to_save": heads(name),
    }
    return LoraConfig(**{**usual, **options})


def hira(name="llama", **options):
    usual = {"r": 3, "target_modules": LAYERS[name], "task_type": TASKS[name], "modules_to_save": heads(name)}
    return peft.HiraConfig(**{**usual, **options})


def rewrite(folder, **values):
    """Changes a folder's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def retensor(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refused(model, folder, match, error=CheckpointError):
    """Holds that a folder is refused in one line, and that the model is as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=match) as caught:
        load_peft(model, folder)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert injection_of(model) is None
    assert all(p.requires_grad for p in model.parameters())
