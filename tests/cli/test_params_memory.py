"""`params --memory`: the table, what it was computed for, and wrong input."""

import json
import re

import pytest
import torch

from tests.run_helpers import QUICKSTART, ROOT

PERA_CONFIG = str(ROOT / "configs" / "commonsense_llama3_pera.yaml")
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
MIB, GIB = 2**20, 2**30


def model_folder(folder, **shape):
    """A folder with nothing but a config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **shape}))
    return folder


@pytest.fixture
def small(tmp_path):
    """A Llama of 2 blocks whose weights, about 50 MiB in float32, exist nowhere."""
    shape = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 1024}
    return model_folder(tmp_path / "small", **shape, vocab_size=8000)


@pytest.fixture
def memory(pera):
    """``memory(*options)``: label to the cells of its row, and the words below the table."""

    def run(*options, config=PERA_CONFIG):
        result = pera("params", "--config", config, "--memory", *options)
        assert result.code == 0, result.err
        lines = result.out.splitlines()
        first = next(k for k, line in enumerate(lines) if line.startswith("Memory per device"))
        last = next(k for k, line in enumerate(lines) if line.startswith("sum "))
        rows = [re.split(r"  +", line) for line in lines[first : last + 1]]
        table = {label: [float(c.replace(",", "").replace("-", "0")) for c in cells] for label, *cells in rows[1:]}
        assert "Injected " in result.out
        return rows[0], table, lines[last + 1 :]

    return run


def test_the_table_of_the_quickstart(memory):
    head, table, words = memory(config=QUICKSTART)
    assert head == ["Memory per device, MiB", "1 device", "DDP", "FSDP2 on 8", "FSDP2 on 32"]
    for column in range(4):
        parts = sum(cells[column] for label, cells in table.items() if label != "sum")
        assert table["sum"][column] == pytest.approx(parts, abs=0.6)
    assert table["base weights (float32)"][0] == pytest.approx(210960 * 4 / MIB, abs=0.05)
    assert words[0].startswith("Assumed: on each device 32 images of 8x8 pixels; precision 32-true; activations kept;")
    assert words[1].startswith("Computed, not measured.")


def test_a_language_model_without_weights(memory, small):
    head, table, words = memory("--model.model_name", small, "--devices", "4", "--data.batch_size", "3")
    assert head[1:] == ["1 device", "DDP", "FSDP2 on 4"]
    attention, rest = 512 * (512 + 64 * 8 * 2 + 512), 512 * 1024 * 3
    base = 2 * 8000 * 512 + 2 * (attention + rest + 2 * 512) + 512
    assert table["base weights (bfloat16)"][0] == pytest.approx(base * 2 / MIB, abs=0.05)
    assert table["base weights (bfloat16)"][2] == pytest.approx(base * 2 / MIB / 4, abs=0.05)
    assert table["gradients"] == table["adapters"]
    assert table["AdamW's moments"][0] == pytest.approx(2 * table["adapters"][0], abs=0.1)
    assert table["gradient buckets"] == [0, table["adapters"][0], 0]
    assert table["gathered units"][:2] == [0, 0]
    assert words[0] == (
        "Assumed: on each device 3 examples of 512 tokens, labels on the last 16 tokens of each; precision bf16-mixed; "
        "activations computed again; AdamW, not compiled."
    )


def kept(result, at=0):
    return result[1]["kept for the backward"][at]


@pytest.mark.slow
def test_what_the_batch_costs(memory, small):
    options = ["--model.model_name", small, "--model.activation_checkpointing", "false", "--data.batch_size", "2"]
    options += ["--adapter.method", "LoRA"]  # PERA keeps its expanded factors too, whatever the batch
    first = memory(*options)
    assert kept(first) == kept(first, 3)  # the batch is that of one device
    assert 1.8 < kept(memory(*options, "--data.batch_size", "4")) / kept(first) < 2.1
    shorter = memory(*options, "--data.max_length", "128")
    assert "2 examples of 128 tokens" in shorter[2][0]
    assert kept(shorter) < kept(first) / 3
    again = memory(*options, "--model.activation_checkpointing", "true")
    assert kept(again) < kept(first) / 3
    # Logits in bfloat16, for 8 tokens of each row and for all.
    few = memory(*options, "--answer_length", "8")
    every = memory(*options, "--data.protocol", "llm_adapters", "--data.max_length", "512")
    assert "labels on all tokens" in every[2][0]
    assert kept(every) - kept(few) == pytest.approx(2 * (512 - 1 - 8) * 8000 * 2 / MIB, rel=0.05)
    packed = memory(*options, "--data.batching", "packed")
    assert "2 examples of 512 tokens, packed" in packed[2][0]
    assert kept(packed) == pytest.approx(kept(first), rel=0.2)


def test_examples_end_where_the_context_does(memory, tmp_path):
    shape = {**LLAMA_8B, "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    folder = model_folder(tmp_path / "short", **shape, max_position_embeddings=100)
    options = ["--model.model_name", folder, "--adapter.method.rank", "2", "--data.batch_size", "1"]
    assert "1 examples of 100 tokens" in memory(*options)[2][0]
    assert "labels on all tokens" in memory(*options, "--data.protocol", "score")[2][0]


def test_the_device_decides_what_dropout_keeps(memory, small):
    options = ["--model.model_name", small, "--data.batch_size", "2", "--model.activation_checkpointing", "false"]
    assert kept(memory(*options, "--trainer.accelerator", "cpu")) > kept(memory(*options))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--memory", "--devices", "8,1"], "devices='8,1': whole numbers from 2 on are needed"),
        (["--memory", "--devices", "8;32"], "devices='8;32': whole numbers from 2 on are needed"),
        (["--devices", "8"], "--devices acts with --memory only"),
        (["--answer_length", "8"], "--answer_length acts with --memory only"),
        (["--memory", "--answer_length", "0"], "answer_length=0: a positive integer is needed"),
        (["--memory", "--answer_length", "8"], "answer_length=8 acts on language models only"),
        (["--memory", "--trainer.precision", "bf16-true"], "--memory knows 32-true, bf16-mixed, 16-mixed; closest: bf"),
        (
            ["--memory", "--model", "lightning.pytorch.demos.boring_classes.BoringModel"],
            "BoringModel: params works on this package",
        ),
        (
            ["--memory", "--data", "lightning.pytorch.demos.boring_classes.BoringDataModule", "--model.num_classes=5"],
            "--memory knows no batch of BoringDataModule for ImageClassificationModule",
        ),
    ],
)
def test_wrong_input_is_one_line(pera, words, expected):
    result = pera("params", "--config", QUICKSTART, *words)
    assert result.code == 2
    assert expected in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_labels_on_all_tokens_take_no_answer_length(pera, small):
    words = ["--config", PERA_CONFIG, "--model.model_name", small, "--data.protocol", "llm_adapters"]
    result = pera("params", *words, "--memory", "--answer_length", "4")
    assert result.err.splitlines()[-1] == "error: answer_length=4: protocol llm_adapters has labels on all tokens"


@pytest.mark.slow
def test_llama_3_on_paper(memory, tmp_path):
    """A quarter of its 32 blocks, each of 218,112,000 weights: with all there are 8,030,261,248."""
    shape = {**LLAMA_8B, "num_hidden_layers": 8}
    head, table, _ = memory("--model.model_name", model_folder(tmp_path / "8B", **shape))
    assert head[0] == "Memory per device, GiB"
    weights = (8_030_261_248 - 24 * 218_112_000) * 2 / GIB
    assert table["base weights (bfloat16)"] == pytest.approx([weights, weights, weights / 8, weights / 32], abs=0.06)
    inputs = shape["num_hidden_layers"] * 16 * 512 * shape["hidden_size"] * torch.bfloat16.itemsize / GIB
    assert inputs < kept((head, table)) < inputs + 0.3  # and the logits of 16 tokens of each example
    blocks = (weights - 2 * 128256 * shape["hidden_size"] * 2 / GIB) / shape["num_hidden_layers"]
    root = 2 * 128256 * shape["hidden_size"] * 2 / GIB
    assert table["gathered units"][2] == pytest.approx(root + 3 * blocks, rel=0.05)
