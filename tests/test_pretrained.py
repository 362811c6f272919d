"""What a model folder may bring: nothing of it is run, and whatever is wrong with it is one line."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM

from pera_lightning.errors import ConfigurationError
from pera_lightning.pretrained import load_tokenizer
from pera_lightning.tasks.causal_lm.protocols.dialogue import bertscore
from pera_lightning.tasks.dreambooth.similarity import _had
from pera_lightning.training.transformers_models import load_pretrained
from tests.tasks.causal_lm.text_helpers import one_line


def load(folder):
    return load_pretrained(AutoModelForCausalLM, str(folder), dtype=torch.float32)


def load_config(folder):
    return _had(AutoConfig.from_pretrained, str(folder), "DINO model")


def load_processor(folder):
    return _had(AutoImageProcessor.from_pretrained, str(folder), "DINO image processor")


def score(folder):
    return bertscore([{"prediction": "a", "answer": "a"}], str(folder))


@pytest.fixture
def folder(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


@pytest.fixture
def asked(monkeypatch):
    """The questions put to a user who answers "y" to each."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda text="": questions.append(text) or "y")
    return questions


def write_code(folder, file, model_type, key):
    """Custom code in a folder, which says that it ran, and the configuration that names it."""
    (folder / "code.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\nclass C: pass\n")
    settings = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor"), "code.C")
    settings["auto_map"] = {**classes, "AutoTokenizer": ["code.C", None]}
    (folder / file).write_text(json.dumps({**settings, "model_type": model_type, key: "Strange"}))


@pytest.mark.parametrize("model_type", ["strange", "llama"])
@pytest.mark.parametrize(
    ("call", "file"),
    [
        (load, "config.json"),
        (load_config, "config.json"),
        (load_tokenizer, "tokenizer_config.json"),
        (load_processor, "preprocessor_config.json"),
        (score, "config.json"),
    ],
)
def test_custom_code_is_refused_without_a_question(folder, asked, call, file, model_type):
    write_code(folder, file, model_type, "image_processor_type" if call is load_processor else "tokenizer_class")
    with pytest.raises(ConfigurationError, match=r"brings code of its own \(code.py, auto_map in") as error:
        call(folder)
    one_line(error)
    # The code of another repository, which lies in none of its files.
    (folder / "code.py").rename(folder / "other.py")
    if model_type == "strange":
        with pytest.raises(ConfigurationError):
            call(folder)
    assert not asked
    assert not (folder / "RAN").exists()


def test_of_pickled_weights_tensors_are_read_and_nothing_else(folder):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "RAN"),)

    weights, file = load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save(weights, file)
    network, found = load(folder)
    assert not found["missing_keys"]
    assert torch.equal(network.state_dict()["lm_head.weight"], weights["lm_head.weight"])
    for content in (pickle.dumps(Evil()), b"<html>not found</html>", None):
        torch.save({**weights, "evil": Evil()}, file) if content is None else file.write_bytes(content)
        with pytest.raises(ConfigurationError, match="its pickled weights are damaged or hold more than tensors") as e:
            load(folder)
        one_line(e, str(folder))
    assert not (folder / "RAN").exists()


@pytest.mark.parametrize(
    ("call", "file", "content", "words"),
    [
        (load, "config.json", "null", "one of its files is damaged (TypeError"),
        (load, "config.json", '{"model_type": "llama", "num_attention_heads": 0}', ""),
        (load, "config.json", '{"model_type": "llama", "hidden_size": "x"}', "'hidden_size'"),
        (load, "config.json", "[" * 100_000, ""),
        (load_tokenizer, "tokenizer_config.json", "[1]", ""),
        (load_tokenizer, "tokenizer.json", "{}", ""),
        (load_tokenizer, "tokenizer.json", "null", ""),
    ],
)
def test_damaged_files_of_a_folder_are_one_line(folder, call, file, content, words):
    (folder / file).write_text(content)
    with pytest.raises(ConfigurationError) as error:
        call(folder)
    one_line(error, str(folder), words)
    assert not str(error.value).endswith(":")
