"""GLUE's data module: every example once, batches of every kind, the split protocols, the cache, predictions' ids."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from pera_lightning import GLUEDataModule
from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.tasks.sequence_classification.loss import balanced_weights
from pera_lightning.tasks.sequence_classification.tasks import TASKS
from tests.tasks.causal_lm.text_helpers import TextModule, one_line
from tests.tasks.sequence_classification.glue_helpers import CLS, PAD, SEP, glue, numbers, pair_tokenizer, pairs, write


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.jsonl", pairs(41))
    write(tmp_path / "validation.jsonl", pairs(21))
    write(tmp_path / "test.jsonl", pairs(9, label=-1))
    return tmp_path


@pytest.mark.parametrize("batching", ["grouped", "random"])
def test_every_example_is_trained_on_once_an_epoch_in_another_order_each_time(folder, batching):
    data = glue(folder, batching=batching)
    torch.manual_seed(0)
    first = numbers(data.train_dataloader())
    assert sorted(first) == list(range(41))
    loader = data.train_dataloader()
    if batching == "grouped":
        loader.sampler.set_epoch(1)
    assert numbers(loader) != first


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_label_stays_with_its_text_in_every_loader(folder, num_workers):
    write(folder / "test.jsonl", pairs(9))
    data = glue(folder, split_protocol="red", num_workers=num_workers, tokenizer=(tokenizer := pair_tokenizer()))
    data.setup("test")
    data.setup("predict")
    for name in ("train", "val", "test", "predict"):
        for batch in getattr(data, f"{name}_dataloader")():
            numbered = [int(text[:3]) for text in tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]
            assert batch["labels"].tolist() == [k % 2 for k in numbered]
            assert batch.get("ids", numbered) == ([str(k) for k in numbered] if name == "predict" else numbered)


def test_a_batch_is_padded_on_the_right_with_its_own_length_mask_and_token_types(folder):
    data = glue(folder, tokenizer=pair_tokenizer(pad_type_id=3))
    widths = set()
    for batch in data.val_dataloader():
        ids, mask, types = batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
        widths.add(ids.shape[1])
        assert {ids.dtype, mask.dtype, types.dtype, batch["labels"].dtype} == {torch.int64}
        assert mask.sum(1).max() == ids.shape[1]
        for row, on, kind in zip(ids.tolist(), mask.tolist(), types.tolist(), strict=True):
            length = sum(on)
            assert on == [1] * length + [0] * (len(row) - length)
            assert row[length:] == [PAD] * (len(row) - length)
            first = row.index(SEP) + 1
            assert row[0] == CLS
            assert row[length - 1] == SEP
            assert kind == [0] * first + [1] * (length - first) + [3] * (len(row) - length)
    assert len(widths) > 1
    assert max(widths) <= data.extremes()[0] == max(b["input_ids"].shape[1] for b in data.train_dataloader())
    assert "ids" not in batch


def test_a_tokenizer_without_token_types_gives_batches_without(folder):
    batch = next(iter(glue(folder, tokenizer=pair_tokenizer(types=False)).train_dataloader()))
    assert {*batch} == {"input_ids", "attention_mask", "labels"}


def test_single_texts_and_regression(tmp_path):
    rows = [{"text": f"{k:03d}", "score": k / 10} for k in range(8)]
    files = {f"{s}_file": write(tmp_path / f"{s}.csv", rows) for s in ("train", "validation")}
    options = {"text_columns": ["text"], "label_column": "score", "regression": True, "split_protocol": "red"}
    data = glue(tmp_path, task="custom", **options, **files)
    said = data.description()
    assert (said["num_labels"], said["class_names"], said["class_counts"]) == (1, [], None)
    assert (said["metrics"], said["selection"]) == (("pearson", "spearman"), "pearson")
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].dtype == torch.float32
    values = {round(v, 4) for b in data.train_dataloader() for v in b["labels"].tolist()}
    assert values == {round(k / 10, 4) for k in range(8)}


def test_over_two_processes_each_evaluated_example_counts_once_and_fillers_have_no_label(folder):
    for stage, loader in (("fit", "val_dataloader"), ("test", "test_dataloader"), ("predict", "predict_dataloader")):
        seen, sizes = [], []
        for rank in (0, 1):
            data = glue(folder, stage, split_protocol="red", trainer={"world_size": 2, "global_rank": rank})
            batches = list(getattr(data, loader)())
            sizes.append([len(batch["labels"]) for batch in batches])
            seen += numbers(batches) if stage != "predict" else [i for batch in batches for i in batch["ids"]]
        assert sizes[0] == sizes[1]
        if stage == "predict":  # fillers repeat an id: whoever writes them keeps each once
            assert {*seen} == {str(k) for k in range(9)}
        else:
            assert max(Counter(seen).values()) == 1
            assert len(seen) == {"fit": 11, "test": 10}[stage]


def test_regression_fillers_are_minus_100_and_no_nan(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": 2.5, "idx": k} for k in range(5)]
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", rows)
    data = glue(tmp_path, task="stsb", batch_size=1, trainer={"world_size": 2, "global_rank": 1})
    labels = [batch["labels"] for batch in data.val_dataloader()]  # a batch of a filler alone among them
    assert {label.dtype for label in labels} == {torch.float32}
    assert torch.cat(labels).tolist() == [2.5, 2.5, -100.0]


def test_predicted_examples_are_in_the_order_of_the_file_with_the_ids_of_its_idx(folder):
    write(folder / "test.jsonl", [{**row, "idx": 100 - row["idx"]} for row in pairs(9, label=-1)])
    batches = list(glue(folder, "predict").predict_dataloader())
    assert [i for batch in batches for i in batch["ids"]] == [str(100 - k) for k in range(9)]
    assert {label for batch in batches for label in batch["labels"].tolist()} == {-100}


def test_the_parts_of_a_protocol_are_what_the_loaders_give(folder):
    data = glue(folder, split_protocol="red")
    data.setup("test")
    selection, scored = numbers(data.val_dataloader()), numbers(data.test_dataloader())
    assert len(selection) == 11
    assert sorted(selection + scored) == list(range(21))
    both = glue(folder)
    both.setup("test")
    assert sorted(numbers(both.val_dataloader())) == sorted(numbers(both.test_dataloader())) == list(range(21))
    assert [d.protocol()["selected_on_test"] for d in (data, both)] == [False, True]
    assert data.protocol()["sizes"] == {"train": 41, "validation": 11, "test": 10}


def test_one_protocol_and_split_seed_give_the_same_parts_at_fit_and_at_test_alone(folder):
    fitted = glue(folder, split_protocol="red")
    fitted.setup("test")
    alone = glue(folder, "test", split_protocol="red")
    assert numbers(alone.test_dataloader()) == numbers(fitted.test_dataloader())
    other = glue(folder, "test", split_protocol="red", split_seed=43)
    assert sorted(numbers(other.test_dataloader())) != sorted(numbers(alone.test_dataloader()))


def test_mnli_has_two_sets_in_every_stage(tmp_path):
    rows = [{"premise": f"{k:03d}", "hypothesis": "h", "label": k % 3, "idx": k} for k in range(10)]
    write(tmp_path / "train.jsonl", rows)
    for name, count in (("matched", 8), ("mismatched", 6)):
        write(tmp_path / f"validation_{name}.jsonl", rows[:count])
        write(tmp_path / f"test_{name}.jsonl", [{**row, "label": -1} for row in rows[:count]])
    data = glue(tmp_path, task="mnli", split_protocol="red")
    data.setup("test")
    data.setup("predict")
    assert data.description()["test_sets"] == ["matched", "mismatched"]
    assert [len(numbers(loader)) for loader in data.val_dataloader()] == [4, 3]
    assert [len(numbers(loader)) for loader in data.test_dataloader()] == [4, 3]
    assert [sum(len(b["ids"]) for b in loader) for loader in data.predict_dataloader()] == [8, 6]


def test_a_test_set_with_labels_is_scored_on_by_own_test_alone(tmp_path):
    rows = {split: [{"t": f"{k:03d}", "label": "yn"[k % 2]} for k in range(n)] for split, n in (("a", 6), ("b", 5))}
    files = {f"{s}_file": write(tmp_path / f"{s}.tsv", rows["a"]) for s in ("train", "validation")}
    files["test_file"] = write(tmp_path / "test.tsv", rows["b"])
    data = glue(tmp_path, "test", task="custom", text_columns=["t"], split_protocol="own_test", **files)
    assert len(numbers(data.test_dataloader())) == 5
    assert data.class_names == ["n", "y"]
    assert data.protocol()["sizes"] == {"test": 5}
    data.setup("fit")
    assert len(numbers(data.val_dataloader())) == 6
    with pytest.warns(UserWarning, match="split_protocol=full_validation scores on the validation file; test_file is"):
        data = glue(tmp_path, "test", task="custom", text_columns=["t"], **files)
    assert len(numbers(data.test_dataloader())) == 6


def test_a_set_that_is_not_whole_is_said(folder):
    with pytest.warns(UserWarning, match=r"jsonl has 21 examples, rte's validation set as published has 277"):
        glue(folder, "test")
    mnli = TASKS["mnli"]
    assert [mnli.size(s) for s in ("train", "validation_matched", "test_mismatched")] == [None, 9815, 9847]


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_own_test_refuses_a_test_set_without_labels_before_any_training(folder, stage):
    with pytest.raises(DataError) as error:
        glue(folder, stage, split_protocol="own_test")
    one_line(error, "test", "without label", "protocol=red")
    (folder / "test.jsonl").unlink()
    with pytest.raises(DataError) as error:
        glue(folder, stage, split_protocol="own_test")
    one_line(error, "no test.jsonl")


def test_validating_reads_no_test_set(folder):
    (folder / "test.jsonl").unlink()
    assert len(numbers(glue(folder, "validate", split_protocol="own_test").val_dataloader())) == 21


def test_evaluation_has_batches_of_its_own_size(folder):
    data = glue(folder, split_protocol="red", batch_size=4, eval_batch_size=7)
    for stage in ("test", "predict"):
        data.setup(stage)
    largest = {
        name: max(len(batch["labels"]) for batch in getattr(data, f"{name}_dataloader")())
        for name in ("train", "val", "test", "predict")
    }
    assert largest == {"train": 4, "val": 7, "test": 7, "predict": 7}


def test_the_order_of_training_examples_is_that_of_the_runs_seed(folder, monkeypatch):
    orders = []
    for seed in ("3", "4", "3"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        orders.append(numbers(glue(folder).train_dataloader()))
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]


def test_examples_are_tokenised_once_and_the_cache_knows_length_and_texts(folder):
    tokenizer = pair_tokenizer()
    glue(folder, tokenizer=tokenizer)
    made = tokenizer.texts
    assert made >= 62
    glue(folder, tokenizer=tokenizer, split_protocol="red", train_limit=5, batch_size=2)
    assert tokenizer.texts == made
    glue(folder, tokenizer=tokenizer, max_length=20)
    assert tokenizer.texts > made
    files = sorted(path.name for path in (folder / "cache").iterdir())
    assert len(files) == 4
    write(folder / "train.jsonl", pairs(40))
    glue(folder, tokenizer=tokenizer)
    assert len(list((folder / "cache").iterdir())) == 5


def test_a_damaged_cache_file_is_named(folder):
    glue(folder)
    for path in (folder / "cache").iterdir():
        path.write_bytes(b"nonsense")
    with pytest.raises(DataError) as error:
        glue(folder)
    one_line(error, "damaged", "delete it")


@pytest.mark.parametrize("cache", ["file", "file/below"])
def test_a_cache_folder_that_is_a_file_is_named_as_one(folder, cache):
    (folder / "file").write_text("")
    with pytest.raises(DataError) as error:
        glue(folder, cache_dir=str(folder / cache))
    one_line(error, f"cannot be kept in {folder / cache}", "choose another cache_dir")


@pytest.mark.parametrize("longer", ["sentence1", "sentence2"])
def test_long_pairs_lose_tokens_of_the_longer_text_and_are_counted(folder, longer):
    if longer == "sentence2":
        rows = [{**r, "sentence1": r["sentence2"], "sentence2": r["sentence1"]} for r in pairs(41)]
        write(folder / "train.jsonl", rows)
    data = glue(folder, max_length=14)
    long = [r for r in pairs(41) if len(r["sentence1"]) + len(r["sentence2"]) + 3 > 14]
    assert 0 < len(long) < 41
    assert data.protocol()["cut"]["train"] == len(long)
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape[1] <= 14
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
            assert ids[: sum(mask)].count(SEP) == 2  # the second text is there, and its end
    with pytest.raises(ConfigurationError) as error:
        glue(folder, max_length=4)
    one_line(error, "max_length=4", "3 special tokens")


def test_grouping_lowers_the_share_of_padding_and_says_by_how_much(tmp_path):
    write(tmp_path / "train.jsonl", pairs(400))
    write(tmp_path / "validation.jsonl", pairs(8))
    shares = {}
    for batching in ("grouped", "random"):
        data = glue(tmp_path, batching=batching)
        torch.manual_seed(0)
        masks = [batch["attention_mask"] for batch in data.train_dataloader()]
        shares[batching] = 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
    said = data.protocol()["padding"]
    assert said["grouped"] == pytest.approx(shares["grouped"], abs=1e-4)
    assert said["random"] == pytest.approx(shares["random"], abs=0.05)
    assert said["grouped"] < said["random"] / 3


def test_limited_training_examples_are_drawn_by_the_seed_and_nested(folder):
    drawn = {n: numbers(glue(folder, train_limit=n).train_dataloader()) for n in (5, 10, 100)}
    assert [len(rows) for rows in drawn.values()] == [5, 10, 41]
    assert {*drawn[5]} < {*drawn[10]}
    assert {*drawn[5]} != {*range(5)}
    assert {*drawn[5]} != {*numbers(glue(folder, train_limit=5, split_seed=1).train_dataloader())}


def test_balanced_weights_are_those_of_the_examples_trained_on(tmp_path):
    write(tmp_path / "train.jsonl", [{**row, "label": int(k < 10)} for k, row in enumerate(pairs(40))])
    write(tmp_path / "validation.jsonl", pairs(4))

    def weights(data):
        said = data.description()
        return balanced_weights(said["class_counts"], said["class_names"])

    assert weights(glue(tmp_path)).tolist() == pytest.approx([40 / 60, 40 / 20])
    with pytest.raises(DataError) as error:
        weights(glue(tmp_path, train_limit=1))
    one_line(error, "entailment", "train_limit")


def test_a_run_records_its_examples_and_a_later_test_does_not_overwrite_them(folder, tmp_path):
    log = tmp_path / "logs"
    data = glue(folder, split_protocol="red", train_limit=7, trainer={"log_dir": str(log)})
    record = json.loads((log / "splits" / "rte.json").read_text())
    assert record["sizes"] == {"train": 7, "validation": 11, "test": 10}
    assert (record["protocol"], record["seed"], record["selected_on_test"]) == ("red", 42, False)
    parts = record["parts"]
    assert sorted(parts["train"]["rows"]) == sorted(numbers(data.train_dataloader()))
    assert sorted(parts["validation"]["rows"] + parts["test"]["rows"]) == list(range(21))
    assert parts["test"]["ids"] == [str(row) for row in parts["test"]["rows"]]
    assert parts["test"]["of"] == "validation"
    data.setup("test")
    assert [path.name for path in (log / "splits").iterdir()] == ["rte.json"]
    glue(folder, "test", split_protocol="red", trainer={"log_dir": str(log)})
    assert json.loads((log / "splits" / "rte.json").read_text()) == record
    assert json.loads((log / "splits" / "rte-test.json").read_text())["parts"]["test"] == parts["test"]


class Classifier(TextModule):
    """Counts what it is given."""

    def __init__(self):
        super().__init__(pair_tokenizer())
        self.rows = Counter()

    def training_step(self, batch, batch_idx):
        self.rows["train"] += len(batch["labels"])
        return self.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.rows["val"] += len(batch["labels"])

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.rows["test"] += len(batch["labels"])

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        self.rows["predict"] += len(batch["ids"])


def test_through_a_trainer_with_the_modules_tokenizer(folder):
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        default_root_dir=folder / "run",
        logger=False,
        **options,
    )
    module = Classifier()
    data = GLUEDataModule(
        "rte", folder=str(folder), split_protocol="red", batch_size=8, cache_dir=str(folder / "cache")
    )
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    assert module.rows == {"train": 41, "val": 11, "test": 10, "predict": 9}

    own = GLUEDataModule("rte", folder=str(folder), split_protocol="own_test", cache_dir=str(folder / "cache"))
    with pytest.raises(DataError, match="without label"):
        trainer.fit(module, own)
    assert module.rows["train"] == 41


def test_counting_parameters_needs_no_data_for_glue():
    assert [GLUEDataModule(task).expected_classes() for task in ("rte", "mnli", "stsb")] == [2, 3, 1]


def test_nothing_is_there_before_setup_and_a_tokenizer_is_needed(folder):
    data = GLUEDataModule("rte", folder=str(folder))
    with pytest.raises(ConfigurationError, match="setup"):
        data.train_dataloader()
    data.trainer = SimpleNamespace(lightning_module=None, world_size=1, state=SimpleNamespace(fn="fit"))
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        data.setup("fit")


def test_the_former_name_of_the_split_protocol_acts_and_says_so(folder):
    with pytest.warns(UserWarning, match="protocol=red acts as split_protocol, as it is called now: give that"):
        data = glue(folder, protocol="red")
    assert data.split_protocol == "red"
    with pytest.raises(ConfigurationError, match="split_protocol=full_validation and protocol=red, its former name"):
        glue(folder, protocol="red", split_protocol="full_validation")  # one of a config, say
    assert data.protocol()["sizes"] == {"train": 41, "validation": 11, "test": 10}
    assert glue(folder).split_protocol == "full_validation"
