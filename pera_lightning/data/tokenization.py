"""From prompt and response to token ids, with any transformers tokenizer; no torch.

    ids   = [BOS] tokens(prompt + response) [EOS]
    start = length of the common prefix of ids and [BOS] tokens(prompt)

Prompt and response are tokenised as one text: a response alone gives other tokens with sentencepiece tokenizers (a
space in front), and with every BPE that merges over the border. A token that straddles the border belongs to the
response. So ids[start:] is what a masked loss learns, and what the scores of options sum over.

An EOS that the tokenizer appends by itself is never kept: after a prompt it would end the text before the response,
and after a response the protocol says whether one follows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pera_lightning.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["always", "tokenizer"]

# Texts handed to the tokenizer at once: enough for its threads, few enough that what it returns (offsets and more for
# every token) stays within some hundred MiB.
CHUNK = 2048


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, bos: Bos) -> list[list[int]]:
    """Token ids of texts as the tokenizer makes them with its special tokens, without an EOS it appends.

    Args:
        tokenizer: any transformers tokenizer.
        texts: the texts; special tokens written out in them count as the tokenizer counts them.
        bos: "always" prepends BOS where the tokenizer has one and the ids do not begin with it; "tokenizer" leaves
            that to the tokenizer.
    """
    if isinstance(texts, str):  # its characters would be taken for texts
        raise ConfigurationError("texts is one text; give a list of texts")
    first = tokenizer.bos_token_id if bos == "always" else None
    return [[first, *ids] if first is not None and ids[:1] != [first] else ids for ids in _tokenised(tokenizer, texts)]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str], *, bos: Bos, eos: bool
) -> list[tuple[list[int], int]]:
    """Token ids of prompt + response as one text, and where the response begins.

    Args:
        tokenizer: any transformers tokenizer.
        prompts: the prompts; equal ones (the options of a question) are tokenised once.
        responses: one response a prompt.
        bos: see `encode`.
        eos: append EOS.

    Returns:
        A pair (ids, start) a prompt: ids[:start] are tokens of the prompt alone too, ids[start:] are the response's.
    """
    if eos and tokenizer.eos_token_id is None:
        raise DataError(f"{type(tokenizer).__name__} has no EOS token, and the protocol ends a response with it")
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    encoded = encode(tokenizer, texts, bos=bos)
    unique = list(dict.fromkeys(prompts))  # each once, in order
    alone = dict(zip(unique, encode(tokenizer, unique, bos=bos), strict=True))
    ending = [tokenizer.eos_token_id] if eos else []
    # The start is found before EOS comes in: were it part of the ids, a prompt could hold an EOS at the same place.
    return [(ids + ending, common_prefix(ids, alone[prompt])) for ids, prompt in zip(encoded, prompts, strict=True)]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:  # nearly always so, and a comparison in C
        return shorter
    return next(place for place in range(shorter) if left[place] != right[place])


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to fill with: the pad token, else EOS, else 0. Masks and labels hide it, so it changes no result."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sha256 (hex) of what decides the ids a tokenizer makes: the key of tokenised data on disk.

    The same in every process, wherever the tokenizer was loaded from, and whatever padding or truncation its last
    call used.
    """
    special = ("bos", "eos", "unk", "pad")
    flags = ("add_bos_token", "add_eos_token", "split_special_tokens")
    facts = {
        "special": {name: getattr(tokenizer, f"{name}_token_id") for name in special},
        "flags": {name: getattr(tokenizer, name, None) for name in flags},
    }
    if getattr(tokenizer, "is_fast", False):
        facts["backend"] = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("padding", "truncation"):  # what the last call set, not what the tokenizer is
            facts["backend"].pop(name, None)
    else:
        facts["class"] = type(tokenizer).__name__
        facts["vocabulary"] = sorted(tokenizer.get_vocab().items())
        # Lower-casing and the like; texts are left out, since paths are among them.
        options = getattr(tokenizer, "init_kwargs", {})
        facts["options"] = {name: value for name, value in options.items() if isinstance(value, (bool, int))}
        pattern = getattr(tokenizer, "special_tokens_pattern", None)
        facts["pattern"] = pattern if isinstance(pattern, str) else None
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _tokenised(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    """Token ids of each text, with the special tokens of the tokenizer, less the EOS it appended."""
    appended = _appended(tokenizer)
    for begin in range(0, len(texts), CHUNK):
        sequences = tokenizer(
            list(texts[begin : begin + CHUNK]),
            add_special_tokens=True,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about texts over the model's length: the caller truncates and counts
        )["input_ids"]
        yield from (ids[: len(ids) - appended] for ids in sequences)


def _appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many EOS the tokenizer puts after every text.

    Counted once and not read off the end of the ids: a text may itself end with an EOS written out, and a BOS may have
    the same id.
    """
    if getattr(tokenizer, "is_fast", False):
        probe = tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)
        ids, added = probe["input_ids"], probe["special_tokens_mask"]
    else:  # what a slow tokenizer builds is right, its masks often are not; -1 stands for the tokens of a text
        ids = tokenizer.build_inputs_with_special_tokens([-1])
        added = [token != -1 for token in ids]
    pairs = zip(reversed(ids), reversed(added), strict=True)
    tail = itertools.takewhile(lambda pair: pair[1] and pair[0] == tokenizer.eos_token_id, pairs)
    return sum(1 for _ in tail)  # most tokenizers: 0
