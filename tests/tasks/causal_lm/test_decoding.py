import copy
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pera_lightning.errors import DataError
from pera_lightning.tasks.causal_lm.decoding import Generated, end_ids, generate, pad_left, score_options
from pera_lightning.tasks.causal_lm.protocols import Decoding
from pera_lightning.training.transformers_models import forward_arguments

VOCABULARY, EOS, PAD = 100, 1, 2
SHAPE = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": PAD}


def llama(tied=False):
    torch.manual_seed(3)
    # Large weights: a freshly initialised model is nearly indifferent, and ties would hide every mistake.
    config = LlamaConfig(
        **SHAPE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(4)
    config = GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


class Sums(nn.Module):
    """A causal model without positions whose forward takes nothing optional."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids, attention_mask):
        hidden = (self.embedding(input_ids) * attention_mask[..., None]).cumsum(1)
        return SimpleNamespace(logits=self.head(hidden))


MODELS = {"llama": llama, "tied": lambda: llama(tied=True), "gpt2": gpt2, "sums": Sums}


@pytest.fixture(scope="module", params=["llama", "tied", "gpt2"])
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<s>", "</s>", "<pad>", "<unk>", *(f"w{place}" for place in range(4, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def random_ids(generator, length):
    return torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()


def random_prompts(count=16):
    generator = torch.Generator().manual_seed(0)
    return [random_ids(generator, 1 + (7 * row) % 19) for row in range(count)]


def random_candidates(count=16):
    """Options of unlike lengths and starts, and options that differ in their last token alone."""
    generator = torch.Generator().manual_seed(1)
    candidates = []
    for row, prompt in enumerate(random_prompts(count)):
        stem = prompt + random_ids(generator, 3)
        same = [([*stem, last], len(prompt)) for last in (10, 11, 12, 13)]
        unlike = [(prompt + random_ids(generator, length), len(prompt)) for length in (1, 2, 5)]
        candidates.append(same + unlike[: row % 4])
    return candidates


def alone(model, ids, start):
    """The score of one option: no padding, no mask, double precision, one token after the other."""
    logs = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0].log_softmax(-1)
    return sum(logs[place - 1, ids[place]].item() for place in range(start, len(ids)))


def greedy(model, prompt, most, ends=(EOS,)):
    """Greedy generation without cache, mask or padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture
def complaints(caplog, monkeypatch):
    """What transformers logs and what Python warns of."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [record.getMessage() for record in caplog.records] + [str(one.message) for one in caught]


def test_pad_left():
    ids, mask, positions = pad_left([[5, 6, 7], [8]], PAD, "cpu")
    assert ids.tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert {tensor.dtype for tensor in (ids, mask, positions)} == {torch.int64}


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_each_option_alone(name):
    model = MODELS[name]()
    candidates = random_candidates()
    scores = score_options(model, candidates, pad_id=PAD)
    model = copy.deepcopy(model).double()
    for options, row in zip(candidates, scores, strict=True):
        expected = [alone(model, ids, start) for ids, start in options]
        assert row == pytest.approx(expected, abs=2e-4, rel=1e-5)


def test_scores_do_not_depend_on_the_batch(model):
    candidates = random_candidates()
    together = score_options(model, candidates, pad_id=PAD)
    for options, row in zip(candidates, together, strict=True):
        assert score_options(model, [options], pad_id=0) == [pytest.approx(row, rel=1e-5, abs=1e-5)]


class Seen:
    """What the forward of a model was given."""

    def __init__(self, model, monkeypatch):
        self.calls, self.real = [], model.forward
        monkeypatch.setattr(model, "forward", self.record)

    def record(self, *unnamed, **given):
        self.calls.append({**given, "grad": torch.is_grad_enabled()})
        return self.real(*unnamed, **given)


def test_equal_inputs_are_computed_once(monkeypatch):
    model = llama()
    seen = Seen(model, monkeypatch)
    candidates = [[([5, 6, 7, last], 2) for last in (10, 11, 12, 13)], [([8, 6, last], 2) for last in (10, 11)]]
    candidates += [[([5, 6, 7, 20], 3)], []]
    scores = score_options(model, candidates, pad_id=PAD)
    (call,) = seen.calls
    assert call["input_ids"].tolist() == [[5, 6, 7], [PAD, 8, 6]]
    assert [len(row) for row in scores] == [4, 2, 1, 0]
    assert scores[2][0] == pytest.approx(alone(model, [5, 6, 7, 20], 3), abs=1e-4)


def test_the_head_sees_the_scored_positions_alone(monkeypatch):
    model = llama()
    widths = []
    model.lm_head.register_forward_pre_hook(lambda _, given: widths.append(tuple(given[0].shape)))
    score_options(model, [[(list(range(4, 20)), 14), (list(range(30, 40)), 7)]], pad_id=PAD)
    assert widths == [(2, 3, 32)]


def test_scores_are_summed_in_float32():
    logits = torch.randn(1, 6, VOCABULARY, generator=torch.Generator().manual_seed(2)).bfloat16() * 5
    model = Sums().bfloat16()
    model.head.register_forward_hook(lambda *_: logits)
    ids = random_ids(torch.Generator().manual_seed(3), 7)
    expected = logits[0].double().log_softmax(-1)[torch.arange(1, 6), ids[2:]].sum().item()
    assert score_options(model, [[(ids, 2)]], pad_id=PAD) == [[pytest.approx(expected, rel=1e-6)]]


def test_no_candidates():
    assert score_options(llama(), [], pad_id=PAD) == []
    assert score_options(llama(), [[], []], pad_id=PAD) == [[], []]


@pytest.mark.parametrize(("ids", "start"), [([5, 6], 0), ([5, 6], 2), ([5], 1), ([5, 6], 7)])
def test_an_option_that_cannot_be_scored(ids, start):
    with pytest.raises(DataError, match=f"option 1 of question 0.*start {start} of {len(ids)} tokens"):
        score_options(llama(), [[([5, 6, 7], 1), (ids, start)]], pad_id=PAD)


def test_scoring_leaves_no_graph_and_no_cache(monkeypatch):
    model = llama()
    seen = Seen(model, monkeypatch)
    score_options(model, [[([5, 6, 7], 1)]], pad_id=PAD)
    assert (seen.calls[0]["use_cache"], seen.calls[0]["grad"]) == (False, False)


@pytest.mark.parametrize("pad", ["<pad>", None])  # without one the EOS fills, and transformers would guess no mask
@pytest.mark.parametrize("beams", [1, 4])
def test_generation_does_not_depend_on_the_batch(model, tokenizer, beams, pad):
    decoding = Decoding(max_new_tokens=10, num_beams=beams)
    tokenizer, prompts = copy.deepcopy(tokenizer), random_prompts()
    tokenizer.pad_token = pad
    together = generate(model, tokenizer, prompts, decoding)
    for prompt, made in zip(prompts, together, strict=True):
        (single,) = generate(model, tokenizer, [prompt], decoding)
        assert (single.ids, single.text) == (made.ids, made.text)
        assert (single.score is None) == (made.score is None) == (beams == 1)
        assert single.score is None or single.score == pytest.approx(made.score, abs=1e-5)


def test_greedy_generation_is_the_plain_loop(model, tokenizer):
    prompts = random_prompts()
    made = generate(model, tokenizer, prompts, Decoding(max_new_tokens=12))
    assert [one.ids for one in made] == [greedy(model, prompt, 12) for prompt in prompts]
    assert made[0] == Generated(ids=made[0].ids, text=tokenizer.decode(made[0].ids), score=None)


def test_the_score_of_beams_is_the_mean_log_probability(model, tokenizer, monkeypatch):
    prompts, decoding = random_prompts(), Decoding(max_new_tokens=8, num_beams=4)
    stop = generate(model, tokenizer, prompts[:1], decoding)[0].ids[1]  # so that some do end
    monkeypatch.setattr(model.generation_config, "eos_token_id", stop)
    exact, lengths = copy.deepcopy(model).double(), set()
    for prompt, made in zip(prompts, generate(model, tokenizer, prompts, decoding), strict=True):
        lengths.add(len(made.ids))
        wholes = [prompt + made.ids + end for end in ([[stop], [EOS]] if len(made.ids) < 8 else [[]])]
        means = [alone(exact, whole, len(prompt)) / (len(whole) - len(prompt)) for whole in wholes]
        assert any(made.score == pytest.approx(mean, abs=1e-4) for mean in means)
    assert 8 in lengths
    assert len(lengths) > 1


@pytest.mark.parametrize("beams", [1, 4])
def test_the_models_own_settings_do_not_leak_in(tokenizer, beams, complaints):
    model, prompts, decoding = llama(), random_prompts(6), Decoding(max_new_tokens=8, num_beams=beams)
    expected = generate(model, tokenizer, prompts, decoding)
    own = model.generation_config
    leaking = {"do_sample": True, "temperature": 5.0, "top_p": 0.5, "top_k": 3, "repetition_penalty": 9.0}
    leaking |= {"no_repeat_ngram_size": 1, "length_penalty": -3.0, "min_new_tokens": 8, "max_length": 21}
    leaking |= {"early_stopping": True, "suppress_tokens": expected[0].ids}
    for name, value in leaking.items():
        setattr(own, name, value)
    assert generate(model, tokenizer, prompts, decoding) == expected
    assert model.generation_config is own
    assert all(getattr(own, name) == value for name, value in leaking.items())
    assert complaints() == []


def test_the_models_settings_come_back_after_an_error(tokenizer, monkeypatch):
    model = llama()
    own = model.generation_config
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(TypeError):
        generate(model, tokenizer, [[5]], Decoding(max_new_tokens=2))
    assert model.generation_config is own


@pytest.mark.parametrize("beams", [1, 4])
def test_every_eos_ends_a_generation(tokenizer, beams):
    model, decoding = llama(), Decoding(max_new_tokens=8, num_beams=beams)
    prompt = random_prompts()[3]
    (free,) = generate(model, tokenizer, [prompt], decoding)
    model.generation_config.eos_token_id = [99, free.ids[2]]
    (made,) = generate(model, tokenizer, [prompt], decoding)
    assert free.ids[2] not in made.ids
    if beams == 1:
        assert made.ids == free.ids[: free.ids.index(free.ids[2])]


def test_examples_that_end_early_hold_no_padding(tokenizer):
    model, decoding = llama(), Decoding(max_new_tokens=8)
    prompts = random_prompts(6)
    free = generate(model, tokenizer, prompts, decoding)
    stop = free[0].ids[1]
    model.generation_config.eos_token_id = stop
    made = generate(model, tokenizer, prompts, decoding)
    assert [one.ids for one in made] == [greedy(model, prompt, 8, (EOS, stop)) for prompt in prompts]
    assert len({len(one.ids) for one in made}) > 1


def test_special_tokens_are_in_the_ids_and_not_in_the_text(tokenizer, monkeypatch):
    model = llama()
    tokens = [0, 5, 6, EOS, 7]
    output = SimpleNamespace(sequences=torch.tensor([[9, *tokens]]))
    given = {}
    monkeypatch.setattr(model, "generate", lambda **arguments: given.update(arguments) or output)
    assert generate(model, tokenizer, [[9]], Decoding(max_new_tokens=5), synced=True) == [
        Generated(ids=[0, 5, 6], text="w5 w6", score=None)
    ]
    assert given["synced_gpus"] is True
    generate(model, tokenizer, [[9]], Decoding(max_new_tokens=5))
    assert given["synced_gpus"] is False


@pytest.mark.parametrize(
    ("own", "of_tokenizer", "ends"),
    [(None, None, []), (5, None, [5]), ([7, 5], 6, [5, 6, 7]), (None, 1, [1]), ([], 1, [1]), (1, 1, [1])],
)
def test_end_ids(own, of_tokenizer, ends):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert end_ids(model, SimpleNamespace(eos_token_id=of_tokenizer)) == ends


@pytest.mark.parametrize("beams", [1, 3])
def test_without_pad_token_and_without_any_eos(tokenizer, beams, complaints):
    model, bare = llama(), copy.deepcopy(tokenizer)
    bare.pad_token = bare.eos_token = None
    model.generation_config.eos_token_id = None
    prompts, decoding = random_prompts(5), Decoding(max_new_tokens=6, num_beams=beams)
    made = generate(model, bare, prompts, decoding)
    assert [len(one.ids) for one in made] == [6] * 5
    assert [generate(model, bare, [prompt], decoding)[0].ids for prompt in prompts] == [one.ids for one in made]
    assert complaints() == []


def test_no_prompts_and_empty_prompts(tokenizer):
    assert generate(llama(), tokenizer, [], Decoding(max_new_tokens=2)) == []
    with pytest.raises(DataError, match="a prompt of the batch has no tokens"):
        generate(llama(), tokenizer, [[5], []], Decoding(max_new_tokens=2))


def test_forward_arguments_see_through_wrappers():
    names = forward_arguments(llama())
    assert {"input_ids", "attention_mask", "position_ids", "logits_to_keep"} <= names
    assert forward_arguments(Sums()) == {"self", "input_ids", "attention_mask"}
    assert forward_arguments(torch.compile(llama(), backend="eager")) == names
    assert "logits_to_keep" not in forward_arguments(torch.compile(Sums(), backend="eager"))


def test_scores_through_peft():
    peft = pytest.importorskip("peft")
    candidates = random_candidates(5)
    expected = score_options(gpt2(), candidates, pad_id=PAD)
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(gpt2(), config).eval()
    for row, plain in zip(score_options(wrapped, candidates, pad_id=PAD), expected, strict=True):
        assert row == pytest.approx(plain, rel=1e-5)
