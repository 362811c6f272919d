"""The key of an evaluation: a hash of all that decides its answers, so that an interrupted one goes on with its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pera_lightning.data.tokenization import tokenizer_key
from pera_lightning.injection.state import adapter_state_dict, find_injected
from pera_lightning.tasks.causal_lm.decoding import end_ids
from pera_lightning.training import results

_SAMPLE = 1024  # about so many elements of each frozen tensor are hashed
# Words about a protocol, and what the data say of how they train: a test after a fit is the same test as one without.
_UNDECISIVE = ("origin", "max_length", "batching", "train_fraction", "split_seed", "sizes", "cut", "left_out")


def evaluation_key(model: nn.Module, data: Mapping[str, Any], stages: Sequence[str], network: Mapping[str, Any]) -> str:
    """Hashes weights, what they are computed with, tokenizer, protocol and test examples; every process must call it.

    Args:
        model: the network.
        data: `TextDataModule.description`.
        stages: names of the inferences that are tested.
        network: what was loaded, and how it computes.
    """
    protocol = {name: value for name, value in data["protocol"].items() if name not in _UNDECISIVE}
    if "sha256" in protocol:
        protocol["sha256"] = {name: value for name, value in protocol["sha256"].items() if name != "train"}
    ends = None if data["evaluation_protocol"].decoding is None else end_ids(model, data["tokenizer"])  # type: ignore[arg-type]
    installed = [results.versions()[name] for name in ("transformers", "torch")]
    facts = [list(stages), network, tokenizer_key(data["tokenizer"]), ends, protocol, *installed]
    return hashed(_deciding_tensors(model), facts)


def _deciding_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that was trained, and some elements of every other tensor."""
    trained = set(adapter_state_dict(model)) if find_injected(model) else set()
    for name, value in sorted(model.state_dict().items()):
        tensor = (value.full_tensor() if isinstance(value, DTensor) else value).detach().flatten()
        yield name, tensor if name in trained else tensor[:: max(len(tensor) // _SAMPLE, 1)]


def hashed(tensors: Iterable[tuple[str, Tensor]], facts: Any) -> str:
    """Sha256 (hex) of named tensors, without a copy of what lies in host memory, and of facts as JSON."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.cpu().contiguous().view(torch.uint8).numpy()))
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()
