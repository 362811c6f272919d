"""Training tokens a second of length-grouped and of packed batches, against examples padded to a fixed length.

    python benchmarks/text_batching.py --model MODEL_FOLDER --data DATA_FOLDER --examples 256 --batch-size 16

The same examples, model and adapters; forward and backward of `CausalLMModule`, no optimizer. Batches of the three ways
take turns, so that a machine that slows down meanwhile slows all of them. Only real tokens count, never padding. The
summed losses of all examples are compared as well: the batches differ, the mathematics does not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import report
from torch import Tensor
from torch.nn.functional import pad

from pera_lightning import inject
from pera_lightning.adapters import LoRA
from pera_lightning.data import batching, length_grouping
from pera_lightning.data.tokenization import pad_token_id
from pera_lightning.tasks.causal_lm.commonsense import CommonsenseDataModule
from pera_lightning.tasks.causal_lm.module import CausalLMModule

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
Batch = dict[str, Tensor]


def make_batches(
    examples: Sequence[dict[str, Any]], *, batch_size: int, pad_id: int, length: int, seed: int = 0
) -> dict[str, list[Batch]]:
    """The batches of each way, all of the same examples.

    Args:
        examples: none longer than `length`.
        batch_size: examples in a batch; of packed ones on average.
        pad_id: fills up.
        length: to which the reference pads every example.
        seed: of all orders.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(examples))
    random = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    grouped = length_grouping.LengthGroupedSampler(lengths, batch_size, seed=seed).global_batches()
    packed = batching.pack(lengths, batching.capacity_for(lengths, batch_size), seed=seed)
    fill = {"input_ids": pad_id, "attention_mask": 0, "position_ids": 0, "labels": batching.IGNORE}

    def widened(batch: Batch) -> Batch:  # on the left, as the batch is padded
        return {name: pad(own, (length - own.shape[1], 0), value=fill[name]) for name, own in batch.items()}

    return {
        "padded": [widened(batching.collate_padded([examples[k] for k in one], pad_id=pad_id)) for one in random],
        "grouped": [batching.collate_padded([examples[k] for k in one], pad_id=pad_id) for one in grouped],
        "packed": [batching.collate_packed([examples[k] for k in one]) for one in packed],
    }


def take_turns(batches: dict[str, list[Batch]]) -> list[tuple[str, Batch]]:
    """All batches in one order in which each way is always equally far."""
    places = [
        ((k + 0.5) / len(own), number, name, batch)
        for number, (name, own) in enumerate(batches.items())
        for k, batch in enumerate(own)
    ]
    return [(name, batch) for _, _, name, batch in sorted(places, key=lambda place: place[:2])]


def real_tokens(batch: Batch) -> int:
    """Tokens that are no padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def measure(module: CausalLMModule, batches: dict[str, list[Batch]]) -> list[dict[str, Any]]:
    """A row of results for each way.

    Args:
        module: configured and adapted, in training mode, on its device.
        batches: of each way; the first way is what the others are compared with.
    """
    device = next(module.parameters()).device
    sums = {name: {"seconds": 0.0, "tokens": 0, "computed": 0, "loss": 0.0} for name in batches}
    longest = {name: max(own, key=lambda batch: batch["input_ids"].numel()) for name, own in batches.items()}
    for batch in longest.values():  # before anything is timed: memory is taken, kernels are chosen
        _step(module, batch, device)
    for name, batch in take_turns(batches):
        seconds, loss = _step(module, batch, device)
        own = sums[name]
        own["seconds"] += seconds
        own["loss"] += loss
        own["tokens"] += real_tokens(batch)
        own["computed"] += batch["input_ids"].numel()
    first = next(iter(sums.values()))
    return [
        {
            "batches": name,
            "steps": len(batches[name]),
            "tokens": own["tokens"],
            "padding": 1 - own["tokens"] / own["computed"],
            "seconds": own["seconds"],
            "tokens_per_second": own["tokens"] / own["seconds"],
            "ratio": (own["tokens"] / own["seconds"]) / (first["tokens"] / first["seconds"]),
            "summed_loss": own["loss"],
        }
        for name, own in sums.items()
    ]


def _step(module: CausalLMModule, batch: Batch, device: torch.device) -> tuple[float, float]:
    """Seconds of a forward and backward, and the loss."""
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    _wait(device)
    begin = time.perf_counter()
    loss = module._shared_step(batch)[0]
    loss.backward()
    _wait(device)
    seconds = time.perf_counter() - begin
    module.zero_grad(set_to_none=True)
    return seconds, float(loss.detach())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(model: str, *, rank: int, base_dtype: str, device: str) -> CausalLMModule:
    """The adapted module, in training mode.

    Args:
        model: folder or hub id.
        rank: of the LoRA on the five projections of the papers.
        base_dtype: of the base.
        device: where it goes.
    """
    torch.manual_seed(0)
    module = CausalLMModule(model, base_dtype=base_dtype)  # type: ignore[arg-type]
    module.adapter_injection = lambda network: inject(network, LoRA(rank=rank), targets=TARGETS)
    module.configure_model()
    return module.to(device).train()


def read_examples(
    data: str, train: list[str], *, model: str, examples: int, length: int, cache_dir: str | None = None
) -> list[dict[str, Any]]:
    """Examples drawn from the training examples of some sets, tokenised by the protocol hira.

    Args:
        data: folder of LLM-Adapters' files.
        train: the sets.
        model: folder or hub id of the tokenizer.
        examples: number of examples.
        length: tokens of an example at most; longer ones are cut.
        cache_dir: of tokenised examples; by default the usual one.
    """
    options = {"protocol": "hira", "tokenizer": model, "max_length": length, "cache_dir": cache_dir}
    module = CommonsenseDataModule(data, train=train, batching="random", **options)
    module.setup("fit")
    everything = module.train_dataloader().dataset
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(everything))[:examples]
    return [everything[int(k)] for k in order]


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table of Markdown."""
    lines = ["| batches | steps | padding | seconds | tokens a second | ratio |", "|---|---|---|---|---|---|"]
    for row in results:
        lines.append(
            f"| {row['batches']} | {row['steps']} | {100 * row['padding']:.1f} % | {row['seconds']:.1f} | "
            f"{row['tokens_per_second']:.1f} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table and the result as JSON, and returns it."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--data", required=True, help="folder of LLM-Adapters' files")
    parser.add_argument("--train", nargs="+", default=["ARC-Easy", "ARC-Challenge", "openbookqa"], help="sets")
    parser.add_argument("--examples", type=int, default=256, help="how many are drawn")
    parser.add_argument("--batch-size", type=int, default=16, help="examples in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens that the reference pads to, at most")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--base-dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache-dir", help="of tokenised examples; by default the usual one")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args(args)
    examples = read_examples(
        given.data,
        given.train,
        model=given.model,
        examples=given.examples,
        length=given.length,
        cache_dir=given.cache_dir,
    )
    module = build(given.model, rank=given.rank, base_dtype=given.base_dtype, device=given.device)
    batches = make_batches(
        examples, batch_size=given.batch_size, pad_id=pad_token_id(module.tokenizer), length=given.length
    )
    results = measure(module, batches)
    settings = {key: value for key, value in vars(given).items() if key not in ("json", "cache_dir")}
    result = {
        "settings": {
            **settings,
            "examples": len(examples),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "results": results,
    }
    report(table(results), result, given.json)
    return result


if __name__ == "__main__":
    main()
