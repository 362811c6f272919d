"""What the fingerprint of a base costs: seconds and bytes, beside the loading of its weights.

    python benchmarks/fingerprint_cost.py --model FOLDER

Measured on a language model of transformers in a folder, and computed from it for LLaMA-3-8B: its tensors at the
measured seconds a tensor, and its bytes at the measured speed of loading.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from report import report
from torch import nn

from pera_lightning.injection.fingerprint import SAMPLES, fingerprint, rest_of_base
from pera_lightning.injection.targets import resolve

LLAMA_3_8B = {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}  # else LlamaConfig's defaults
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def size_of(model: nn.Module) -> dict[str, int]:
    """Number of parameter tensors, their bytes, and the bytes of them that a fingerprint reads."""
    tensors = list(model.parameters())
    return {
        "tensors": len(tensors),
        "bytes": sum(t.numel() * t.itemsize for t in tensors),
        "bytes_read": sum(min(t.numel(), SAMPLES) * t.itemsize for t in tensors),
    }


def seconds_of(model: nn.Module, repeats: int) -> float:
    """Seconds of a fingerprint, the least of several."""
    layers = [target.path for target in resolve(model, TARGETS, {})]
    model.requires_grad_(False)
    least = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        known = fingerprint(model, layers)
        rest_of_base(model, known, set(), ())
        least = min(least, time.perf_counter() - begin)
    return least


def measure(folder: Path, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """A row for the model in a folder, measured, and one for LLaMA-3-8B, computed."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loads = []
    for _ in range(repeats):
        begin = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        loads.append(time.perf_counter() - begin)
    own = {"model": folder.name, **size_of(model), "load_seconds": min(loads), "seconds": seconds_of(model, repeats)}
    with torch.device("meta"):
        large = size_of(LlamaForCausalLM(LlamaConfig(**LLAMA_3_8B)).to(dtype))
    other = {
        "model": "LLaMA-3-8B, computed",
        **large,
        "load_seconds": own["load_seconds"] * large["bytes"] / own["bytes"],
        "seconds": own["seconds"] * large["tensors"] / own["tensors"],
    }
    return [{**row, "share": row["seconds"] / row["load_seconds"]} for row in (own, other)]


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table of Markdown."""
    lines = [
        "| model | tensors | GB | KB read | load, s | fingerprint, s | of the load |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        sizes = f"{row['tensors']} | {row['bytes'] / 1e9:.2f} | {row['bytes_read'] / 1e3:.1f}"
        times = f"{row['load_seconds']:.2f} | {row['seconds']:.3f} | {100 * row['share']:.2f} %"
        lines.append(f"| {row['model']} | {sizes} | {times} |")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table and the result as JSON, and returns it."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args(args)
    results = measure(given.model, getattr(torch, given.dtype), given.repeats)
    result = {"settings": {"dtype": given.dtype, "torch": torch.__version__}, "results": results}
    report(table(results), result, given.json)
    return result


if __name__ == "__main__":
    main()
