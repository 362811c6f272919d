import json
import logging
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from pera_lightning.data import tokenization as encoding
from pera_lightning.data.tokenization import (
    common_prefix,
    encode,
    encode_pairs,
    pad_token_id,
    tokenizer_key,
)
from pera_lightning.errors import ConfigurationError, DataError

PROMPT, RESPONSE = "### Response:\n", "true"


def template(single, special):
    return processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=special)


def byte_level(post=None, merges=((":", "a"), ("t", "r")), **special):
    """Bytes, and merges that may join a prompt and its response."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", "<pad>", *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if post is not None:
        backend.post_processor = template(post, [("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def sentencepiece_like():
    """A space in front of every text becomes part of its first token, as in LLaMA-2's."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("\n", -3.0), ("▁true", -1.0), ("true", -1.0)]
    pieces += [(letter, -5.0) for letter in "#:Respontu"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.post_processor = template("<s> $A", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


class Letters(PreTrainedTokenizer):
    """A slow tokenizer of letters that wraps texts in BOS and EOS, and, as many do, has no mask to say so."""

    def __init__(self, lower=False, letters="abcdefgh", **kwargs):
        self.words = {word: place for place, word in enumerate(["<s>", "</s>", "<unk>", *letters])}
        self.lower = lower
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", lower=lower, **kwargs)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return dict(self.words)

    def _tokenize(self, text, **kwargs):
        return list(text.lower() if self.lower else text)

    def _convert_token_to_id(self, token):
        return self.words.get(token, 2)

    def _convert_id_to_token(self, index):
        return [*self.words][index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [0, *token_ids_0, 1]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        return [0] * len(token_ids_0)


def ids_of(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def test_bos_as_the_tokenizer_does_or_always():
    plain = byte_level(bos_token="<s>", eos_token="</s>")
    adding = byte_level("<s> $A", bos_token="<s>", eos_token="</s>")
    without = byte_level(eos_token="</s>")
    a, b = ids_of(plain, "a", "b")
    assert encode(plain, ["ab"], bos="tokenizer") == [[a, b]]
    assert encode(plain, ["ab"], bos="always") == [[0, a, b]]
    assert encode(adding, ["ab"], bos="tokenizer") == encode(adding, ["ab"], bos="always") == [[0, a, b]]
    assert encode(without, ["ab"], bos="always") == [[a, b]]


@pytest.mark.parametrize("post", ["<s> $A </s>", "$A </s>", "<s> $A </s> </s>"])
def test_an_appended_eos_goes_and_one_in_the_text_stays(post):
    tokenizer = byte_level(post, bos_token="<s>", eos_token="</s>")
    a = ids_of(tokenizer, "a")[0]
    front = [0] if post.startswith("<s>") else []
    rows = encode(tokenizer, ["a", "a</s>", "</s>", ""], bos="tokenizer")
    assert rows == [[*front, a], [*front, a, 1], [*front, 1], front]


def test_a_bos_with_the_id_of_the_eos_stays():
    # Several models have one token for both: what is appended must not be told by the id alone.
    tokenizer = byte_level("<s> $A <s>", bos_token="<s>", eos_token="<s>")
    assert encode(tokenizer, ["", "a"], bos="tokenizer") == [[0], [0, *ids_of(tokenizer, "a")]]


def test_an_unknown_word_that_is_the_eos_stays():
    # As in GPT-2, whose unknown token is its EOS.
    backend = Tokenizer(models.WordLevel({"</s>": 0, "b": 1}, unk_token="</s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="</s>", eos_token="</s>")
    assert encode(tokenizer, ["a", "b"], bos="tokenizer") == [[0], [1]]


def test_other_tokens_at_the_end_stay():
    tokenizer = byte_level("$A </s>", bos_token="<s>", eos_token="<pad>")
    assert encode(tokenizer, ["a"], bos="tokenizer") == [[*ids_of(tokenizer, "a"), 1]]


def test_a_slow_tokenizer():
    tokenizer = Letters()
    assert encode(tokenizer, ["ab", "z", ""], bos="always") == [[0, 3, 4], [0, 2], [0]]
    assert encode_pairs(tokenizer, ["ab"], ["c"], bos="always", eos=True) == [([0, 3, 4, 5, 1], 3)]


def test_one_text_instead_of_a_list():
    with pytest.raises(ConfigurationError, match="a list of texts"):
        encode(byte_level(), "ab", bos="tokenizer")


def test_many_texts_in_order(monkeypatch):
    tokenizer = byte_level("<s> $A </s>", bos_token="<s>", eos_token="</s>")
    texts = [str(number) for number in range(23)]
    alone = [encode(tokenizer, [text], bos="always")[0] for text in texts]
    monkeypatch.setattr(encoding, "CHUNK", 5)
    assert encode(tokenizer, texts, bos="always") == alone
    assert encode(tokenizer, [], bos="always") == []


def test_long_texts_are_whole_and_give_no_warning(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = byte_level(bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=4)
    tokenizer(["abcdef", "b"], padding=True, truncation=True)  # leaves its settings behind
    caplog.clear()
    assert [len(ids) for ids in encode(tokenizer, ["abcdef", "b"], bos="always")] == [7, 2]
    assert not caplog.records


def test_the_response_begins_after_the_prompt():
    tokenizer = byte_level("<s> $A", bos_token="<s>", eos_token="</s>")
    ((ids, start),) = encode_pairs(tokenizer, [PROMPT], [RESPONSE], bos="always", eos=True)
    assert ids[:start] == encode(tokenizer, [PROMPT], bos="always")[0]
    assert ids[start:] == [*ids_of(tokenizer, "tr", "u", "e"), 1]
    ((plain, same),) = encode_pairs(tokenizer, [PROMPT], [RESPONSE], bos="always", eos=False)
    assert (plain, same) == (ids[:-1], start)


def test_a_token_over_the_border_is_the_responses():
    tokenizer = byte_level("<s> $A", bos_token="<s>", eos_token="</s>")
    ((ids, start),) = encode_pairs(tokenizer, ["b:"], ["ac"], bos="always", eos=False)
    assert ids == [0, *ids_of(tokenizer, "b", ":a", "c")]
    assert start == 2  # <s> b


def test_a_response_alone_has_other_tokens():
    tokenizer = sentencepiece_like()
    alone = encode(tokenizer, [RESPONSE], bos="tokenizer")[0][1:]
    assert alone == ids_of(tokenizer, "▁true")
    ((ids, start),) = encode_pairs(tokenizer, ["Response:\n"], [RESPONSE], bos="always", eos=True)
    assert ids[start:] == [*ids_of(tokenizer, "true"), 2]
    assert ids[start - 1] == ids_of(tokenizer, "\n")[0]


@pytest.mark.parametrize("eos", [True, False])
def test_empty_prompt_and_empty_response(eos):
    tokenizer = byte_level(bos_token="<s>", eos_token="</s>")
    end = [1] if eos else []
    a = ids_of(tokenizer, "a")[0]
    pairs = encode_pairs(tokenizer, ["", "a", ""], ["a", "", ""], bos="always", eos=eos)
    assert pairs == [([0, a, *end], 1), ([0, a, *end], 2), ([0, *end], 1)]
    assert encode_pairs(tokenizer, [""], ["a"], bos="tokenizer", eos=eos) == [([a, *end], 0)]


def test_an_eos_written_in_the_prompt_does_not_hide_the_appended_one():
    tokenizer = byte_level(merges=(), bos_token="<s>", eos_token="</s>")
    ((ids, start),) = encode_pairs(tokenizer, ["a</s>"], [""], bos="tokenizer", eos=True)
    assert (ids[1:], start) == ([1, 1], 2)


def test_equal_prompts_are_tokenised_once(monkeypatch):
    tokenizer = byte_level("<s> $A", bos_token="<s>", eos_token="</s>")
    seen = []
    real = encoding._tokenised
    monkeypatch.setattr(encoding, "_tokenised", lambda made, texts: seen.append(list(texts)) or real(made, texts))
    pairs = encode_pairs(tokenizer, ["p", "q", "p"], ["1", "2", "3"], bos="always", eos=False)
    assert seen == [["p1", "q2", "p3"], ["p", "q"]]
    assert [start for _, start in pairs] == [2, 2, 2]


def test_pairs_that_do_not_fit():
    with pytest.raises(DataError, match="has no EOS token"):
        encode_pairs(byte_level(bos_token="<s>"), ["a"], ["b"], bos="always", eos=True)
    with pytest.raises(ValueError, match="shorter"):
        encode_pairs(byte_level(bos_token="<s>"), ["a", "b"], ["b"], bos="always", eos=False)


@pytest.mark.parametrize(
    ("left", "right", "length"),
    [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2], 2), ([1, 5, 3], [1, 2, 3], 1), ([2], [1], 0)],
)
def test_common_prefix(left, right, length):
    assert common_prefix(left, right) == length


def test_pad_token_or_eos_or_zero():
    assert pad_token_id(byte_level(bos_token="<s>", eos_token="</s>", pad_token="<pad>")) == 2
    assert pad_token_id(byte_level(bos_token="<s>", eos_token="</s>")) == 1
    assert pad_token_id(byte_level(eos_token="</s>", pad_token="<s>")) == 0
    assert pad_token_id(byte_level()) == 0


def test_keys_are_equal_between_loads_and_calls(tmp_path):
    tokenizer = byte_level("<s> $A", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "two")
    one, two = (PreTrainedTokenizerFast.from_pretrained(tmp_path / name) for name in ("one", "two"))
    key = tokenizer_key(one)
    assert key == tokenizer_key(two)
    assert len(key) == 64
    two(["abc", "b"], padding=True, truncation=True, max_length=2)
    assert tokenizer_key(two) == key


def test_keys_are_equal_between_processes(tmp_path):
    byte_level("<s> $A", bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import PreTrainedTokenizerFast as T; "
        "from pera_lightning.data.tokenization import tokenizer_key; "
        "print(tokenizer_key(T.from_pretrained(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert there == tokenizer_key(PreTrainedTokenizerFast.from_pretrained(tmp_path))


def test_keys_differ_where_the_ids_may():
    tokenizers = [
        byte_level(),
        byte_level(bos_token="<s>"),
        byte_level(bos_token="<s>", eos_token="</s>"),
        byte_level(bos_token="</s>", eos_token="<s>"),
        byte_level("<s> $A", bos_token="<s>", eos_token="</s>"),
        byte_level("<s> $A </s>", bos_token="<s>", eos_token="</s>"),
        byte_level(merges=(("t", "r"),), bos_token="<s>"),
        sentencepiece_like(),
        Letters(),
        Letters(lower=True),
        Letters(letters="abc"),
    ]
    assert len({tokenizer_key(tokenizer) for tokenizer in tokenizers}) == len(tokenizers)
    assert tokenizer_key(Letters()) == tokenizer_key(Letters())


def test_no_torch_needed():
    code = "import json, sys; import pera_lightning.data.tokenization; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers"} & set(json.loads(out))
