"""What all text data modules do: splits, batches of every kind, questions in order, and what they refuse."""

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Trainer

from pera_lightning.data.batching import IGNORE
from pera_lightning.data.length_grouping import LengthGroupedSampler
from pera_lightning.errors import ConfigurationError, DataError, UnknownNameError
from tests.tasks.causal_lm.text_helpers import ExamplesData, TextModule, attached, byte_tokenizer, examples_of, one_line

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@pytest.fixture
def build(tmp_path):
    def make(count=40, fn="fit", trainer=None, tokenizer=None, **options):
        options = {"validation_size": 6, "batch_size": 4, "cache_dir": str(tmp_path / "cache"), **options}
        data = ExamplesData(options.pop("rows", None) or examples_of(count), **options)
        attached(data, tokenizer, fn=fn, **(trainer or {}))
        data.setup(fn)
        return data

    return make


def texts(batch, tokenizer):
    """Each example of a batch as text, and the text of its labels."""
    rows = []
    if "attention_mask" in batch:
        parts = [(batch["input_ids"][i][m], batch["labels"][i][m]) for i, m in enumerate(batch["attention_mask"] == 1)]
    else:
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), len(ids)]
        parts = [(ids[a:b], labels[a:b]) for a, b in pairwise(starts)]
    for ids, labels in parts:
        learned = labels != IGNORE
        assert torch.equal(labels[learned], ids[learned])
        rows.append((tokenizer.decode(ids), tokenizer.decode(ids[learned])))
    return rows


def numbers(data, loader):
    """The number in the instruction of every example of an epoch."""
    return [
        int(text.partition("### Instruction:\n")[2].strip()[:3])
        for batch in loader
        for text, _ in texts(batch, data.tokenizer)
    ]


@pytest.mark.parametrize("batching", ["grouped", "packed", "random"])
def test_every_example_once_an_epoch_with_the_loss_on_the_answer(build, batching):
    data = build(batching=batching)
    loader = data.train_dataloader()
    assert Counter(numbers(data, loader)) == Counter(data.dataset("train").indices.tolist())
    answers = {learned for batch in loader for _, learned in texts(batch, data.tokenizer)}
    assert answers == {f"the correct answer is answer{k}</s>" for k in (1, 2)}
    if batching == "packed":
        assert all(len(batch["input_ids"]) == 1 for batch in loader)
        assert 7 <= len(loader) <= 11  # of 34 rows, about 4 at once
    else:
        assert len(loader) == 9


@pytest.mark.parametrize("batching", ["grouped", "packed", "random"])
def test_the_loss_on_the_whole_text(build, batching):
    data = build(protocol="llm_adapters", max_length=1000, batching=batching)
    for batch in data.train_dataloader():
        for text, learned in texts(batch, data.tokenizer):
            assert text.startswith("Below is an instruction")
            assert learned == text[1:]  # nothing predicts the first token, and this tokenizer puts no BOS there


def test_grouped_examples_are_of_similar_length_and_others_come_anew_each_epoch(build):
    data = build(200)
    loader = data.train_dataloader()
    spread = [int(b["attention_mask"].sum(1).max() - b["attention_mask"].sum(1).min()) for b in loader]
    random = [
        int(b["attention_mask"].sum(1).max() - b["attention_mask"].sum(1).min())
        for b in build(200, batching="random").train_dataloader()
    ]
    assert sum(spread) < sum(random) / 3
    first = numbers(data, loader)
    loader.sampler.set_epoch(1)
    assert first != numbers(data, loader)


def test_validation_examples_are_the_same_for_every_fraction_and_fractions_are_nested(build):
    parts = {f: build(100, train_fraction=f)._datasets for f in (0.1, 0.2, 0.5, 0.8, 1.0)}
    held = {tuple(part["validation"].indices.tolist()) for part in parts.values()}
    assert len(held) == 1
    assert len(next(iter(held))) == 6
    trained = [set(part["train"].indices.tolist()) for part in parts.values()]
    assert [len(rows) for rows in trained] == [10, 19, 47, 76, 94]
    for small, large in pairwise(trained):
        assert small < large
    assert trained[-1] | set(*held) == set(range(100))
    assert not trained[-1] & set(*held)


def test_the_split_follows_its_own_seed_alone(build):
    def held(**options):
        return build(100, **options).dataset("validation").indices.tolist()

    one = held()
    torch.manual_seed(5)
    assert held(batch_size=2, batching="random") == one
    assert held(split_seed=1) != one
    # Written down: other releases of numpy must not draw others.
    assert one == [2, 3, 11, 13, 20, 92]


def test_validation_batches_keep_the_order(build):
    data = build(eval_batch_size=5)
    loader = data.val_dataloader()
    assert numbers(data, loader) == data.dataset("validation").indices.tolist()
    assert [len(batch["input_ids"]) for batch in loader] == [5, 1]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_validation_examples(build, world):
    """Six examples; with four processes two fill up, without a label."""
    whole = next(iter(build(eval_batch_size=6).val_dataloader()))
    shares = []
    for rank in range(world):
        (batch,) = build(eval_batch_size=6, trainer={"world_size": world, "global_rank": rank}).val_dataloader()
        assert len(batch["labels"]) == -(-6 // world)
        shares += [row[row != -100].tolist() for row in batch["labels"]]
    expected = [row[row != -100].tolist() for row in whole["labels"]]
    assert sorted(shares) == sorted([*expected, *[[]] * (len(shares) - 6)])
    assert all(expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_sampler_knows_the_processes(build, rank, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    data = build(trainer={"world_size": 2, "global_rank": rank})
    sampler = data.train_dataloader().sampler
    assert isinstance(sampler, LengthGroupedSampler)
    assert (sampler.num_replicas, sampler.rank, sampler.seed, sampler.batch_size) == (2, rank, 3, 4)
    both = [LengthGroupedSampler(sampler.lengths, 4, num_replicas=2, rank=r, seed=3) for r in (0, 1)]
    assert list(sampler) == list(both[rank])
    assert set(both[0]) | set(both[1]) == set(range(34))


def test_what_is_cut_is_said(build):
    whole = build(max_length=1000).dataset("train")
    limit = int(min(whole.lengths)) - 15  # within the answer of the shortest row, before that of the longest
    with pytest.warns(UserWarning, match="were cut") as said:
        cut = build(max_length=limit).dataset("train")
    assert 0 < cut.dropped < 34
    assert len(cut) == 34 - cut.dropped
    assert set(cut.lengths.tolist()) == {limit}
    messages = [str(one.message) for one in said]
    expected = f"34 of 34 train examples are longer than {limit} tokens and were cut; {cut.dropped} of them lost"
    assert any(message.startswith(expected) for message in messages)


def test_a_run_writes_the_split_and_uses_the_sampler(tmp_path):
    data = ExamplesData(
        examples_of(30), validation_size=6, batch_size=4, cache_dir=str(tmp_path / "cache"), train_fraction=0.5
    )
    trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, logger=False, **QUIET)
    trainer.fit(TextModule(), datamodule=data)
    record = json.loads((tmp_path / "splits" / "commonsense.json").read_text())
    assert record["sizes"] == {"train": 12, "validation": 6}
    assert (record["seed"], len(record["validation"]), len(record["train"])) == (0, 6, 12)
    assert not set(record["validation"]) & set(record["train"])
    facts = data.protocol()
    assert facts["left_out"] == {"train": 0, "validation": 0}
    assert len(facts["sha256"]["train"]) == 64
    assert isinstance(trainer.train_dataloader.sampler, LengthGroupedSampler)
    assert trainer.global_step == 3


def test_a_fast_run_and_a_test_write_no_split(tmp_path):
    tests = {"ARC-Easy": examples_of(3, split="test")}
    for run, flag in (("fit", True), ("test", False)):
        data = ExamplesData(examples_of(30), tests, validation_size=6, cache_dir=str(tmp_path / "cache"))
        trainer = Trainer(default_root_dir=tmp_path, fast_dev_run=flag, logger=False, **QUIET)
        getattr(trainer, run)(TextModule(), datamodule=data)
    assert not (tmp_path / "splits").exists()


def test_questions_come_longest_first(tmp_path):
    sets = {"ARC-Easy": examples_of(9, split="test"), "ARC-Challenge": examples_of(12, "ARC-Challenge", "test")}
    data = ExamplesData((), sets, eval_batch_size=4, protocol="score", batch_size=2)
    module = TextModule()
    Trainer(default_root_dir=tmp_path, logger=False, **QUIET).test(module, datamodule=data, verbose=False)
    everything = [one.id for examples in sets.values() for one in examples]
    assert data.description()["test_ids"] == everything
    assert sorted(module.seen) == sorted(everything)
    assert module.seen[:9] == sorted(
        module.seen[:9], key=lambda name: -len(sets["ARC-Easy"][int(name[14:])].instruction)
    )
    loaders = data.test_dataloader()
    assert [len(loader) for loader in loaders] == [3, 3]
    batch = next(iter(loaders[0]))
    assert [len(question.prompt) for question in batch] == sorted((len(q.prompt) for q in batch), reverse=True)
    assert all(len(q.candidates) == 2 for q in batch)
    prompt = data.tokenizer.decode(batch.questions[0].prompt)
    assert prompt.endswith("### Response:\n")


def test_processes_have_as_many_questions(tmp_path):
    """Five questions over two processes: the last of them fills up."""
    asked = []
    for rank in range(2):
        data = ExamplesData((), {"ARC-Easy": examples_of(5, split="test")}, eval_batch_size=2)
        attached(data, fn="test", world_size=2, global_rank=rank).setup("test")
        (loader,) = data.test_dataloader()
        assert [len(batch) for batch in loader] == [2, 1]
        asked.append([question.example.id for batch in loader for question in batch])
    assert set(asked[0]) | set(asked[1]) == {f"ARC-Easy/test/{k}" for k in range(5)}
    assert asked[0][-1] == asked[1][-1]


def test_the_first_examples_of_each_set(build):
    data = attached(ExamplesData((), {"ARC-Easy": examples_of(5, split="test")}, test_limit=2), fn="test")
    data.setup("test")
    assert data.description()["test_ids"] == ["ARC-Easy/test/0", "ARC-Easy/test/1"]


def test_a_tokenizer_without_padding_is_said_once(build, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        data = build(tokenizer=byte_tokenizer(pad_token=None))
        batch = next(iter(data.train_dataloader()))
        next(iter(data.val_dataloader()))
    assert caplog.text.count("no padding token") == 1
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == 1).all()  # EOS, unseen
    assert (batch["labels"][padding] == IGNORE).all()


def test_a_tokenizer_by_name(tmp_path):
    folder = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(folder)
    data = ExamplesData(examples_of(10), tokenizer=str(folder), validation_size=2, cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    assert len(data.dataset("train")) == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_fraction": 0}, ["train_fraction=0: a number in (0, 1] is needed"]),
        ({"train_fraction": 1.5}, ["train_fraction", "1.5"]),
        ({"batching": "pack"}, ["batching='pack'", "grouped, packed, random", "closest: packed"]),
        ({"max_length": 1}, ["max_length=1: an integer of at least 2"]),
        ({"batch_size": 0}, ["batch_size=0: an integer of at least 1"]),
        ({"validation_size": 0}, ["validation_size=0"]),
        ({"test_limit": 0}, ["test_limit=0"]),
        ({"split_seed": -1}, ["split_seed=-1"]),
    ],
)
def test_values_that_are_not_allowed(options, words):
    with pytest.raises((ConfigurationError, UnknownNameError)) as error:
        ExamplesData(**options)
    one_line(error, *words)


def test_an_unknown_protocol():
    with pytest.raises(UnknownNameError) as error:
        ExamplesData(protocol="hera")
    one_line(error, "commonsense protocol='hera' does not exist", "hira, llm_adapters, strict, score", "closest: hira")


def test_data_that_cannot_serve(build, tmp_path):
    with pytest.raises(DataError) as error:
        build(6)
    one_line(error, "validation_size=6 leaves nothing to train on, of 6 training examples")
    with pytest.raises(DataError) as error:
        build(max_length=20)
    one_line(error, "max_length=20 leaves no train example with a label: all 34", "raise it")
    bad = examples_of(3, split="test")
    bad[1] = type(bad[1])(**{**{f: getattr(bad[1], f) for f in bad[1].__slots__}, "answer": "answer7"})
    data = attached(ExamplesData((), {"ARC-Easy": bad}), fn="test")
    with pytest.raises(DataError) as error:
        data.setup("test")
    one_line(error, "ARC-Easy/test/1", "'answer7' is not one of its options answer1, answer2")


def test_no_tokenizer_and_one_that_is_missing(tmp_path):
    data = ExamplesData(examples_of(10), validation_size=2, cache_dir=str(tmp_path))
    with pytest.raises(ConfigurationError) as error:
        data.setup("fit")
    one_line(error, "no tokenizer", "tokenizer=")
    data = ExamplesData(examples_of(10), tokenizer=str(tmp_path / "none"), validation_size=2, cache_dir=str(tmp_path))
    with pytest.raises(ConfigurationError) as error:
        data.setup("fit")
    one_line(error, "there is no such folder")


def test_loaders_before_setup():
    data = ExamplesData()
    for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader, data.predict_dataloader):
        with pytest.raises(ConfigurationError) as error:
            loader()
        one_line(error, "there after setup(); call it first")


def test_a_question_is_the_same_in_training_and_test(build):
    data = build(10, validation_size=2)
    data.tests = {"ARC-Easy": examples_of(12, split="test")}
    data.setup("test")
    train, test = data.example_hashes("train"), data.example_hashes("test")
    assert (len(train), len(test)) == (8, 12)
    assert len({*train} & {*test}) == 8
