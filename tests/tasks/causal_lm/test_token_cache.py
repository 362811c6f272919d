"""Tokenised examples: written once, keyed by all that decides them, never half of them."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from pera_lightning.data.cached_tables import cache_folder
from pera_lightning.errors import DataError
from pera_lightning.tasks.causal_lm import token_cache
from pera_lightning.tasks.causal_lm.examples import digest
from pera_lightning.tasks.causal_lm.protocols import protocol
from pera_lightning.tasks.causal_lm.token_cache import PackedDataset, TokenDataset, tokenised
from tests.tasks.causal_lm.text_helpers import byte_tokenizer, examples_of, one_line

HIRA, ADAPTERS = protocol("commonsense", "hira"), protocol("commonsense", "llm_adapters")


def cached(rows, protocol, tokenizer, folder):
    return tokenised(rows, protocol, tokenizer, folder, sha256=digest(rows))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_second_time_nothing_is_tokenised(tmp_path):
    rows, tokenizer = examples_of(5), byte_tokenizer()
    first = cached(rows, HIRA, tokenizer, tmp_path / "new")
    assert tokenizer.texts >= 10  # of each row the prompt, and prompt and response
    again = byte_tokenizer()
    second = cached(examples_of(5), HIRA, again, tmp_path / "new")
    assert again.texts == 0
    assert first[:] == second[:]
    assert len(files(tmp_path / "new")) == 1


def test_another_tokenizer_protocol_or_example_is_another_file(tmp_path):
    rows, tokenizer = examples_of(3), byte_tokenizer()
    cached(rows, HIRA, tokenizer, tmp_path)
    cached(rows, HIRA, byte_tokenizer(eos_token="<pad>"), tmp_path)
    cached(rows, ADAPTERS, tokenizer, tmp_path)
    cached(rows[:2], HIRA, tokenizer, tmp_path)
    cached(rows[::-1], HIRA, tokenizer, tmp_path)
    assert len(files(tmp_path)) == 5
    tokenizer.padding_side = "right"  # decides no ids, as other words on where the protocol is from
    cached(rows, replace(HIRA, origin="elsewhere"), tokenizer, tmp_path)
    assert len(files(tmp_path)) == 5


def test_more_examples_than_are_written_at_once(tmp_path, monkeypatch):
    rows, tokenizer = examples_of(11), byte_tokenizer()
    whole = cached(rows, HIRA, tokenizer, tmp_path / "a")[:]
    monkeypatch.setattr(token_cache, "_CHUNK", 4)
    assert cached(rows, HIRA, tokenizer, tmp_path / "b")[:] == whole


@pytest.mark.parametrize(("chosen", "learned"), [(HIRA, "answer"), (ADAPTERS, "all")])
def test_where_the_labels_are(tmp_path, chosen, learned):
    tokenizer, rows = byte_tokenizer(), examples_of(4)
    for row, one in zip(rows, cached(rows, chosen, tokenizer, tmp_path), strict=True):
        ids = one["input_ids"]
        text = chosen.training_prompt(row) + row.output + "</s>"
        assert tokenizer.decode(ids) == ("<s>" if learned == "answer" else "") + text
        expected = row.output + "</s>" if learned == "answer" else text
        assert tokenizer.decode(ids[one["start"] :]) == expected


def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(token_cache, "_CHUNK", 2)
    calls = iter([token_cache.encode_pairs, fail])
    monkeypatch.setattr(token_cache, "encode_pairs", lambda *a, **k: next(calls)(*a, **k))
    with pytest.raises(RuntimeError, match="in the middle"):
        cached(examples_of(5), HIRA, byte_tokenizer(), tmp_path)
    assert files(tmp_path) == []


def test_a_writer_that_is_killed_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    real, done = token_cache.encode_pairs, []

    def encode(*args, **options):
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return real(*args, **options)

    tokenizer = byte_tokenizer()
    child = os.fork()
    if not child:
        try:
            monkeypatch.setattr(token_cache, "_CHUNK", 2)
            monkeypatch.setattr(token_cache, "encode_pairs", encode)
            cached(examples_of(9), HIRA, tokenizer, tmp_path)
        finally:
            os._exit(1)  # pytest must not go on in here
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    left = files(tmp_path)
    assert left
    assert not any(name.endswith(".arrow") for name in left)
    assert len(cached(examples_of(9), HIRA, byte_tokenizer(), tmp_path)) == 9


def test_a_damaged_file_and_a_folder_that_is_none(tmp_path):
    cached(examples_of(3), HIRA, byte_tokenizer(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"not arrow at all")
    with pytest.raises(DataError) as error:
        cached(examples_of(3), HIRA, byte_tokenizer(), tmp_path)
    one_line(error, file.name, "is damaged", "delete it")
    with pytest.raises(DataError) as error:
        cached(examples_of(3), HIRA, byte_tokenizer(), file / "below")
    one_line(error, f"cannot be kept in {file}", "Not a directory", "another cache_dir")


def test_the_folder_follows_that_of_datasets(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert cache_folder() == tmp_path / "pera_lightning"


@pytest.mark.parametrize("chosen", [HIRA, ADAPTERS])
@pytest.mark.parametrize("max_length", [1, 2, 190, 196, 222, 230, 1000])
def test_what_is_cut_and_left_out_against_brute_force(tmp_path, chosen, max_length):
    table = cached(examples_of(30), chosen, byte_tokenizer(), tmp_path)
    indices = np.array([3, 4, 7, 11, 20, 29, 0])
    rows = TokenDataset(table, indices, max_length)
    kept, cut, dropped = [], 0, 0
    for index in indices.tolist():
        ids, start = table[index]["input_ids"], table[index]["start"]
        cut += len(ids) > max_length
        ids = ids[:max_length]
        labelled = [place for place in range(len(ids)) if place >= start and place >= 1]
        if labelled:
            kept.append((index, ids, start))
        dropped += not labelled
    assert (rows.cut, rows.dropped, rows.indices.tolist()) == (cut, dropped, [index for index, _, _ in kept])
    assert rows.lengths.tolist() == [len(ids) for _, ids, _ in kept]
    assert [rows[k] for k in range(len(rows))] == [{"input_ids": ids, "start": start} for _, ids, start in kept]


def test_packed_examples_are_lists_of_examples(tmp_path):
    rows = TokenDataset(cached(examples_of(4), HIRA, byte_tokenizer(), tmp_path), np.arange(4), 1000)
    packed = PackedDataset(rows, [[2, 0], [3]])
    assert (len(packed), packed[0], packed[1]) == (2, [rows[2], rows[0]], [rows[3]])
