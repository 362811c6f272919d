"""The DreamBooth data module: batches, priors, order and draws, prompts, caching's conditions."""

import pickle
from collections import Counter

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.tasks.dreambooth import class_images as dreambooth_classes
from pera_lightning.tasks.dreambooth import latent_cache as dreambooth_cache
from pera_lightning.tasks.dreambooth import subject_prompts
from pera_lightning.tasks.dreambooth.data import DreamBoothDataModule
from pera_lightning.tasks.dreambooth.preprocessing import crop_to, to_pixels
from pera_lightning.training.data_order import Progress, make_resumable
from tests.tasks.dreambooth.data_helpers import PROMPT, Generator, StandIn, attach, data_module, drawn, fill, photograph

CLASS = {"class_prompt": "a photo of dog"}


def with_prior(photos, count=5, **arguments):
    """A data module with so many class images of one's own."""
    folder = fill(photos.parent / "class", count, first=50)
    return data_module(photos, class_folder=str(folder), **CLASS, **arguments)


# ---- training batches -----------------------------------------------------------------------------------------------


def test_a_training_batch(photos):
    (photos / "01.txt").write_text("sks dog asleep")
    with pytest.warns(UserWarning, match="2 of 3 images"):
        data = data_module(photos, batch_size=2, resolution=[16, 32])
    batches = drawn(data)
    assert [len(batch["ids"]) for batch in batches] == [2, 1]
    captions = {}
    for batch in batches:
        assert set(batch) == {"pixel_values", "prompts", "time_ids", "is_prior", "ids"}
        count = len(batch["ids"])
        assert batch["pixel_values"].shape == (count, 3, 16, 32)
        assert batch["pixel_values"].dtype == batch["time_ids"].dtype == torch.float32
        assert batch["time_ids"].tolist() == [[32, 48, 2, 0, 16, 32]] * count
        assert batch["is_prior"].dtype == torch.bool
        assert not batch["is_prior"].any()
        captions |= dict(zip(batch["ids"], batch["prompts"], strict=True))
        for pixels, name in zip(batch["pixel_values"], batch["ids"], strict=True):
            expected, _ = crop_to(photograph(32, 48, seed=int(name[-6:-4])), (16, 32))
            assert torch.equal(pixels, to_pixels(expected))
    assert captions == {str(photos / f"0{n}.png"): text for n, text in enumerate((PROMPT, "sks dog asleep", PROMPT))}


@pytest.mark.parametrize(("repeats", "images", "length"), [(1, 5, 5), (2, 5, 6), (4, 5, 12), (1, 2, 3)])
def test_a_batch_with_the_prior_has_as_many_of_each_and_an_epoch_has_all(photos, repeats, images, length):
    batches = drawn(with_prior(photos, images, batch_size=4, repeats=repeats))
    own, prior = Counter(), Counter()
    for batch in batches:
        half = len(batch["ids"]) // 2
        assert batch["is_prior"].tolist() == [False] * half + [True] * half
        assert batch["prompts"] == [PROMPT] * half + ["a photo of dog"] * half
        assert len(batch["pixel_values"]) == len(batch["time_ids"]) == 2 * half
        own.update(batch["ids"][:half])
        prior.update(batch["ids"][half:])
    assert [len(batch["ids"]) // 2 for batch in batches] == [min(4, length - k) for k in range(0, length, 4)]
    for counts, number in ((own, 3), (prior, images)):
        assert sum(counts.values()) == length
        assert len(counts) == number
        assert max(counts.values()) - min(counts.values()) <= 1


def test_pair_i_is_photograph_and_class_image_i(photos):
    pairs = list(with_prior(photos, 5).train_dataloader().dataset)
    names = [[example["ids"][-6:] for example in pair] for pair in pairs]
    assert names == [[f"0{n % 3}.png", f"{50 + n}.png"] for n in range(5)]


def test_order_and_draws_follow_the_seed_and_epochs_differ(photos):
    def epoch(data, seed):
        batches = drawn(data, seed)
        return [name for b in batches for name in b["ids"]], torch.cat([b["pixel_values"] for b in batches])

    options = {"crop": "random", "flip": True, "repeats": 4}
    names, pixels = epoch(data_module(photos, **options), 7)
    again, same = epoch(data_module(photos, **options), 7)
    assert names == again
    assert torch.equal(pixels, same)
    others, different = epoch(data_module(photos, **options), 8)
    assert names != others
    assert not torch.equal(pixels, different)
    data = data_module(photos, repeats=4)
    torch.manual_seed(0)
    assert [b["ids"] for b in data.train_dataloader()] != [b["ids"] for b in data.train_dataloader()]


def test_workers_give_other_draws_each_epoch_and_the_same_by_seed(photos):
    data = data_module(photos, crop="random", flip=True, num_workers=2, repeats=2)
    loader = data.train_dataloader()

    def epochs():
        torch.manual_seed(1)
        return [torch.cat([batch["time_ids"] for batch in loader]) for _ in range(2)]

    first, second = epochs()
    assert not torch.equal(first, second)
    assert all(torch.equal(*pair) for pair in zip((first, second), epochs(), strict=True))
    assert pickle.loads(pickle.dumps(loader.dataset))[0][0]["ids"] == str(photos / "00.png")  # for spawned workers


@pytest.mark.parametrize("cache", [False, True])
def test_a_loader_resumes_in_the_middle_of_an_epoch(photos, tmp_path, cache):
    options = {} if cache else {"crop": "random", "flip": True}
    data = data_module(photos, repeats=3, cache=cache, cache_dir=str(tmp_path / "cache"), **options)
    done = 0

    def loader():
        return make_resumable(data.train_dataloader(), lambda: Progress(epoch=0, batches=done, complete=False))

    kept = "time_ids" if cache else "pixel_values"
    torch.manual_seed(3)
    whole = loader()
    rest = []
    for number, batch in enumerate(whole, start=1):
        if number == 4:
            done = 4
            state = whole.state_dict()
        if number > 4:
            rest.append((batch["ids"], batch[kept]))
    torch.manual_seed(99)
    resumed = loader()
    resumed.load_state_dict(state)
    found = [(batch["ids"], batch[kept]) for batch in resumed]
    assert [ids for ids, _ in found] == [ids for ids, _ in rest]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, rest, strict=True))


def test_class_images_are_generated_and_all_is_encoded_when_the_loader_is_asked_for(photos, tmp_path):
    encoders, generator = StandIn(), Generator()
    cache = {"cache": True, "cache_dir": str(tmp_path / "cache")}
    options = {**cache, "class_folder": str(tmp_path / "new"), "num_class_images": 5, **CLASS}
    data = data_module(photos, encoders=encoders, generator=generator, **options)
    assert encoders.images == 0
    assert generator.seeds == []
    loader = data.train_dataloader()
    assert len(loader) == 5
    assert generator.seeds == [0, 1, 2, 3, 4]
    assert encoders.images == 8
    assert sorted(encoders.texts) == ["a photo of dog", PROMPT]
    batches = list(loader)
    assert all("latent_mean" in batch and "pixel_values" not in batch for batch in batches)
    assert [batch["is_prior"].tolist() for batch in batches] == [[False, True]] * 5
    assert len({batch["ids"][1] for batch in batches}) == 5
    assert data.train_dataloader().dataset is loader.dataset  # which Lightning may ask for again


def test_another_fit_encodes_by_its_own_encoders(photos, tmp_path):
    data = data_module(photos, cache=True, cache_dir=str(tmp_path / "cache"))
    before = data.train_dataloader().dataset
    other = StandIn(vae="two")
    attach(data, other).setup("fit")
    assert data.train_dataloader().dataset is not before
    assert other.images == 3


def test_without_a_cache_nothing_is_encoded(photos):
    encoders = StandIn()
    assert "pixel_values" in drawn(data_module(photos, encoders=encoders))[0]
    assert encoders.images == 0


def test_a_cache_needs_a_module_with_encoders(photos):
    data = DreamBoothDataModule(str(photos), PROMPT)
    data.setup("fit")
    with pytest.raises(ConfigurationError, match="to have encoders: set cache=false"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "adapted", "reason"),
    [
        ({"crop": "random"}, False, "crop=random draws another part"),
        ({"flip": True}, False, "flip=true mirrors"),
        ({}, True, "text encoders with adapters change"),
    ],
)
def test_what_changes_is_not_cached(photos, arguments, adapted, reason):
    def set_up(cache):
        data = DreamBoothDataModule(str(photos), PROMPT, resolution=16, cache=cache, **arguments)
        attach(data, adapts_text_encoders=adapted).setup("fit")

    with pytest.raises(ConfigurationError, match=f"{reason}.*: set cache=false"):
        set_up(True)
    set_up(False)


# ---- class images ---------------------------------------------------------------------------------------------------


def test_class_images_are_generated_once_and_another_run_goes_on(photos, tmp_path):
    folder = tmp_path / "new"
    arguments = {"class_folder": str(folder), "num_class_images": 3, **CLASS}

    def fit(model="tiny"):
        generator = Generator(model)
        data = data_module(photos, generator=generator, **arguments)
        assert len(drawn(data)) == 3
        return generator.seeds

    assert fit() == [0, 1, 2]
    assert fit() == []
    (folder / "00001.png").unlink()
    with pytest.raises(DataError, match="made with model_name 'tiny', not 'other'"):
        fit("other")
    assert fit() == [1]
    with pytest.raises(DataError, match="made with model_name 'tiny', not 'other'"):
        fit("other")


@pytest.mark.parametrize("trained", [{"is_trained": True}, {"ckpt_path": "last.ckpt"}])
def test_a_trained_network_generates_none(photos, tmp_path, trained):
    options = {"class_folder": str(tmp_path / "new"), "num_class_images": 3, **CLASS}
    data = attach(DreamBoothDataModule(str(photos), PROMPT, resolution=16, cache=False, **options), **trained)
    data.setup("fit")
    with pytest.raises(DataError, match=r"3 of 3 class images are missing in .* without --ckpt_path"):
        data.train_dataloader()
    assert not (tmp_path / "new").exists()


def test_every_process_has_the_list_of_the_first(photos, tmp_path, monkeypatch):
    """The others may look only when the first generates images already."""
    generator = Generator()
    options = {"class_folder": str(tmp_path / "new"), "num_class_images": 3, **CLASS}
    data = DreamBoothDataModule(str(photos), PROMPT, resolution=16, cache=False, **options)
    attach(data, generator=generator, global_rank=1, world_size=2).setup("fit")
    (tmp_path / "new").mkdir()

    def gather(own):
        return [[0, 2] if isinstance(own, list) else None, own]

    for part in (dreambooth_classes, dreambooth_cache):
        monkeypatch.setattr(part, "all_gather_object", gather)
    with pytest.raises(DataError, match=r"2 of 3 class images are missing in .* that all processes must see"):
        data.train_dataloader()
    assert generator.seeds == [2]


def test_photographs_of_ones_own_are_never_added_to(photos):
    data = with_prior(photos, 4, num_class_images=2)
    assert {name for b in drawn(data) for name in b["ids"] if "class" in name} == {
        str(photos.parent / "class" / f"{n}.png") for n in (50, 51)
    }
    assert not list((photos.parent / "class").glob("*.json"))


# ---- the hub --------------------------------------------------------------------------------------------------------


def test_photographs_of_the_hub_are_its_files_and_a_folder_goes_first(photos, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, *, repo_type, allow_patterns):
        asked.append((name, repo_type))
        assert {"*.jpg", "*.PNG", "*.txt", "*.caption", "*metadata.jsonl", "*metadata.csv"} <= set(allow_patterns)
        return str(photos)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    data = DreamBoothDataModule("someone/dog", PROMPT)
    data.prepare_data()
    data.setup("test")
    assert asked == [("someone/dog", "dataset")] * 2
    assert list(data.protocol()["sha256"]) == ["00.png", "01.png", "02.png"]
    assert data.protocol()["instance_folder"] == "someone/dog"
    fill(tmp_path / "someone" / "dog", 1)
    assert list(data_module("someone/dog", "test").protocol()["sha256"]) == ["00.png"]
    assert len(asked) == 2


def test_a_folder_that_is_neither_here_nor_in_the_cache_of_the_hub():
    with pytest.raises(
        DataError, match=r"instance_folder no/where is not a folder, and as a data set .* cannot be had"
    ):
        data_module("no/where", "test")


# ---- what the module asks for ---------------------------------------------------------------------------------------


def test_references_are_what_the_network_sees_each_content_once(photos):
    (photos / "copy.png").write_bytes((photos / "00.png").read_bytes())
    data = data_module(photos, "test", crop="random", flip=True, resolution=[16, 32])
    images = data.reference_images()
    assert [image.size for image in images] == [(32, 16)] * 3
    for number, image in enumerate(images):
        assert np.array_equal(np.asarray(image), np.asarray(crop_to(photograph(32, 48, number), (16, 32))[0]))


def test_the_protocol_says_what_was_trained_on(photos):
    import hashlib
    import json

    data = with_prior(photos, 4, batch_size=2, validation_prompts=["{} at night"])
    said = json.loads(json.dumps(data.protocol()))
    assert said["subject"] == "sks dog"
    assert said["class_images"] == 4
    assert said["resolution"] == [16, 16]
    assert said["prompts"] == {"validation": ["sks dog at night"]}
    assert said["captions"] == dict.fromkeys(["00.png", "01.png", "02.png"], PROMPT)
    assert said["sha256"]["01.png"] == hashlib.sha256((photos / "01.png").read_bytes()).hexdigest()


class Probe(L.LightningModule):
    """Keeps the batches that Lightning brings."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), {"train": [], "val": [], "test": []}

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 2
        return torch.optim.SGD([self.weight], 0.1)

    def data_requirements(self):
        return {"encoders": StandIn()}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return batch["latent_mean"].mean() * self.weight

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)


@pytest.mark.parametrize("validation", [None, ["{} at sea"]])
def test_lightning_trains_on_cached_batches_and_validates_where_there_are_prompts(photos, tmp_path, validation):
    data = DreamBoothDataModule(
        str(photos), PROMPT, resolution=16, batch_size=2, cache_dir=str(tmp_path / "c"), validation_prompts=validation
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, num_sanity_val_steps=0, **quiet)
    probe = Probe()
    trainer.fit(probe, data)
    trainer.test(probe, data, verbose=False)
    assert [len(batch["ids"]) for batch in probe.seen["train"]] == [2, 1]
    assert [batch["prompt"] for batch in probe.seen["val"]] == [["sks dog at sea"]] * len(validation or [])
    assert len(probe.seen["test"]) == 4 * len(subject_prompts.PROMPTS)
