"""A real language model: fit, resume and test as a user runs them, and exports that say the same; minutes, all slow."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pera_lightning import export_peft, export_transformers, inject
from pera_lightning.adapters import PERA
from pera_lightning.cli.main import main
from pera_lightning.merging.merge import adapted_layers
from pera_lightning.tasks.causal_lm.commonsense import CommonsenseDataModule
from pera_lightning.tasks.causal_lm.decoding import generate
from pera_lightning.tasks.causal_lm.protocols import protocol
from pera_lightning.tasks.causal_lm.questions import make_questions
from tests.real.smollm2 import build_smollm2, write_questions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PROMPTS = ["The capital of France is", "Three animals that swim:", "Water boils at"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "data")


def options(model: Path, data: Path, folder: Path, steps: int, name: str) -> list[str]:
    values = {
        "config": "configs/commonsense_smollm2.yaml",
        "model.model_name": model,
        "model.lr": 2e-3,
        "model.lr_schedule": "constant",
        "model.warmup_steps": 0,
        "data.folder": data,
        "data.train": "ARC-Easy",
        "data.test": "[ARC-Easy]",
        "data.cache_dir": folder / "cache",
        "data.validation_size": 2,
        "data.batch_size": 2,
        "data.eval_batch_size": 12,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.logger.init_args.save_dir": folder,
        "trainer.logger.init_args.name": name,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def losses(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for file in sorted(folder.glob("events*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found += [e.value for e in events.Scalars("train/loss")]
    return found


def test_fit_resume_and_test(model_folder: Path, questions: Path, tmp_path: Path) -> None:
    def run(command: str, steps: int, name: str, *more: str) -> None:
        main([command, *options(model_folder, questions, tmp_path, steps, name), *more])

    run("fit", 4, "whole")
    run("fit", 2, "parts")
    run("fit", 4, "parts", "--ckpt_path", str(tmp_path / "parts" / "checkpoints" / "last.ckpt"))
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    seen = losses(tmp_path / "whole")
    assert len(seen) == 4
    assert sum(seen[-2:]) < 0.5 * sum(seen[:2])

    run("test", 4, "whole", "--ckpt_path", "last")
    result = json.loads((tmp_path / "whole" / "results-last.json").read_text(encoding="utf-8"))
    lines = (
        (tmp_path / "whole" / "predictions-last" / "score" / "ARC-Easy.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert result["n"] == {"test": 12}
    assert [json.loads(line)["id"] for line in lines] == [f"ARC-Easy/test/{k}" for k in range(12)]
    assert result["metrics"]["test/accuracy"] == sum(json.loads(line)["correct"] for line in lines) / 12


def test_answers_do_not_depend_on_the_batch(model_folder: Path, questions: Path) -> None:
    hira = protocol("commonsense", "hira")
    data = CommonsenseDataModule(str(questions), test=["ARC-Easy"], protocol="hira")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    asked = make_questions(hira, tokenizer, data.test_examples()["ARC-Easy"][:3])
    prompts = [tokenizer("Name one animal.")["input_ids"], *(q.prompt for q in asked)]  # very unlike in length
    network = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    together = generate(network, tokenizer, prompts, hira.decoding)
    alone = [generate(network, tokenizer, [prompt], hira.decoding)[0] for prompt in prompts]
    for a, b in zip(together, alone, strict=True):
        assert a.text == b.text or abs(a.score - b.score) < 1e-4, (a, b)
    assert len({a.text for a in together}) > 1


@torch.no_grad()
def adapted(folder: Path) -> PreTrainedModel:
    """With updates that change what is said, products of the factors included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inject(model, PERA(rank=8, alpha=8), TARGETS, seed=0)
    draw = torch.Generator().manual_seed(0)
    for _, layer in adapted_layers(model):
        adapter = layer.adapters["all"]
        adapter.B.copy_(0.05 * torch.randn(adapter.B.shape, generator=draw))
        adapter.h.copy_(50 * torch.randn(adapter.h.shape, generator=draw))
    return model.eval()


@torch.no_grad()
def said(model: PreTrainedModel, folder: Path) -> list[tuple[Tensor, list[int]]]:
    """Logits, and the greedy continuation, of each prompt."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        found.append((model(input_ids=ids).logits, text[0].tolist()))
    return found


def change(one: list, other: list) -> float:
    return max(float((a - b).abs().max()) for (a, _), (b, _) in zip(one, other, strict=True))


def test_exports_say_the_same(model_folder: Path, tmp_path: Path) -> None:
    folder = model_folder
    model = adapted(folder)
    ours = said(model, folder)
    linear = [layer.adapters["all"].h for _, layer in adapted_layers(model)]
    kept = [h.clone() for h in linear]
    for h in linear:
        h.data.zero_()
    assert change(ours, said(model, folder)) > 0.1  # the products matter
    for h, value in zip(linear, kept, strict=True):
        h.data.copy_(value)

    report = export_peft(model, tmp_path / "peft", base_name=str(folder))
    assert set(report.ranks.values()) == {44}
    assert not report.errors
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert change(ours, said(base, folder)) > 1
    theirs = said(peft.PeftModel.from_pretrained(base, tmp_path / "peft"), folder)
    assert change(ours, theirs) < 1e-4
    assert [text for _, text in ours] == [text for _, text in theirs]

    export_transformers(model, tmp_path / "merged", tokenizer=AutoTokenizer.from_pretrained(folder))
    merged = said(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "merged")
    assert change(ours, merged) < 1e-3  # float32 over 30 layers, see docs/merging.md
    assert [text for _, text in ours] == [text for _, text in merged]
