"""What the loss of a language model keeps for the backward, with logits everywhere or only where there is a label.

    python benchmarks/loss_memory.py
    python benchmarks/loss_memory.py --vocabulary 152064 --examples 8 --length 256 --answer-length 16

Counted: every tensor that autograd saves from the last hidden states to the loss, by its storage, each storage once;
the head's weight, which all variants share and which is no activation, is left out. Sizes come from tensors on the meta
device: nothing is computed, so this takes a second and no memory at any size. Not counted: what the backward needs for
a while (for a chunk of the chunked loss, its logits in float32 and their gradient; in all variants the gradient of the
logits).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import report
from torch import Tensor, nn

from pera_lightning.data.batching import IGNORE, label_positions
from pera_lightning.tasks.causal_lm.loss import CHUNK, summed_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIB = 2**20


def saved_bytes(compute: Callable[[], Tensor], *, apart: Sequence[Tensor] = ()) -> int:
    """Bytes of the storages that autograd saves while `compute` runs, each storage once.

    Args:
        compute: gives the loss.
        apart: tensors whose storages are not counted, such as parameters.
    """
    kept: dict[int, Any] = {}  # the storages themselves: while they are held, no other has their address

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    excluded = {tensor.untyped_storage()._cdata for tensor in apart}
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = compute()
    assert loss.grad_fn is not None
    return sum(storage.nbytes() for key, storage in kept.items() if key not in excluded)


def answers_at_the_end(examples: int, length: int, answer_length: int) -> Tensor:
    """Labels (examples, length) of equally long examples that end in their answers."""
    labels = torch.full((examples, length), IGNORE)
    labels[:, length - answer_length :] = 0
    return labels


def measure(
    *, vocabulary: int, hidden: int, examples: int, length: int, answer_length: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row of results for each way to take the loss.

    Args:
        vocabulary: V.
        hidden: width of the last hidden states.
        examples: B, of the batch.
        length: T, tokens of each example.
        answer_length: tokens with a label at each example's end.
        dtype: of hidden states, head and logits.
    """
    head = nn.Linear(hidden, vocabulary, bias=False, device="meta", dtype=dtype).requires_grad_(False)
    labels = answers_at_the_end(examples, length, answer_length)
    positions = label_positions(labels)  # (K,)
    targets = {
        "all": F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten().to("meta"),  # as transformers shifts them
        "labelled": labels[:, positions + 1].flatten().to("meta"),
    }
    states = torch.empty(examples, length, hidden, device="meta", dtype=dtype, requires_grad=True)

    def everywhere() -> Tensor:
        return head(states).flatten(0, 1)  # (B T, V)

    def labelled() -> Tensor:
        return head(states[:, positions.to("meta")]).flatten(0, 1)  # (B K, V)

    def plain(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum")

    ways = {
        "all logits, cross_entropy in float32": lambda: plain(everywhere(), targets["all"]),
        "all logits, summed_loss": lambda: summed_loss(everywhere(), targets["all"]),
        "label-only logits, cross_entropy in float32": lambda: plain(labelled(), targets["labelled"]),
        "label-only logits, summed_loss": lambda: summed_loss(labelled(), targets["labelled"]),
    }
    sizes = {name: saved_bytes(way, apart=[head.weight]) for name, way in ways.items()}
    first = next(iter(sizes.values()))
    tokens = {name: examples * (len(positions) if name.startswith("label") else length) for name in sizes}
    return [
        {"loss": name, "logits": tokens[name], "saved_bytes": size, "share": size / first}
        for name, size in sizes.items()
    ]


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table of Markdown."""
    lines = ["| loss | tokens with logits | saved for backward, MiB | of the first |", "|---|---|---|---|"]
    for row in results:
        mib = row["saved_bytes"] / MIB
        lines.append(f"| {row['loss']} | {row['logits']:,} | {mib:,.1f} | {100 * row['share']:.1f} % |")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table and the result as JSON, and returns it."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--examples", type=int, default=16, help="in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens")
    parser.add_argument("--answer-length", type=int, default=8, help="tokens with a label, at the end of an example")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of hidden states and logits")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args(args)
    if not 0 < given.answer_length < given.length:
        parser.error(f"--answer-length {given.answer_length}: at least 1 and less than --length {given.length}")
    settings = {key: value for key, value in vars(given).items() if key != "json"}
    results = measure(**{**settings, "dtype": DTYPES[given.dtype]})
    result = {"settings": {**settings, "chunk": CHUNK, "torch": torch.__version__}, "results": results}
    report(table(results), result, given.json)
    return result


if __name__ == "__main__":
    main()
