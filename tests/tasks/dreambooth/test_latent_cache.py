"""Cached latents and embeddings: keys, files, damage, shares of processes; and the folder of class images."""

import json
import threading

import pytest
import torch

from pera_lightning.errors import DataError
from pera_lightning.tasks.dreambooth import latent_cache as dreambooth_cache
from pera_lightning.tasks.dreambooth.class_images import ClassImages, class_image_name
from pera_lightning.tasks.dreambooth.latent_cache import cache_key, cached
from tests.tasks.dreambooth.data_helpers import CPU, PROMPT, StandIn, data_module, drawn, fill, photograph

MADE_BY = {"model_name": "tiny", "steps": 4, "size": (16, 16)}


def encoded(photos, folder, encoders=None, **arguments):
    """A data module with a filled cache, and the encoders that filled it."""
    encoders = encoders or StandIn()
    data = data_module(photos, encoders=encoders, cache=True, cache_dir=str(folder), **arguments)
    data.train_dataloader()
    return data, encoders


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_keys_change_with_all_that_decides_and_with_nothing_else():
    image = ("image", {"sha256": "a" * 64, "size": [64, 32]}, {"vae": "one", "dtype": "float32"})
    others = [
        ("prompt", *image[1:]),
        (image[0], {**image[1], "sha256": "b" * 64}, image[2]),
        (image[0], {**image[1], "size": [32, 64]}, image[2]),
        (*image[:2], {"vae": "two", "dtype": "float32"}),
        (*image[:2], {"vae": "one"}),
    ]
    assert len({cache_key(*one) for one in (image, *others)}) == 6
    assert cache_key(*image) == cache_key(*image[:2], dict(reversed(image[2].items())))


def test_another_run_computes_only_what_is_new(tmp_path):
    photos, folder = fill(tmp_path / "dog"), tmp_path / "cache"
    _, first = encoded(photos, folder)
    assert (first.images, first.texts) == (3, [PROMPT])
    (photos / "00.png").rename(photos / "zz.png")
    _, again = encoded(photos, folder, batch_size=3, repeats=2)
    assert (again.images, again.texts) == (0, [])
    for changed, expected in [
        ({"resolution": [16, 24]}, (3, [])),
        ({"instance_prompt": "a picture of sks dog"}, (0, ["a picture of sks dog"])),
        ({"encoders": StandIn(vae="two")}, (3, [])),
        ({"encoders": StandIn(text="two")}, (0, [PROMPT])),
    ]:
        _, encoders = encoded(photos, folder, **changed)
        assert (encoders.images, encoders.texts) == expected, changed
    photograph(32, 48, 9).save(photos / "zz.png")
    _, encoders = encoded(photos, folder)
    assert encoders.images == 1


# ---- files ----------------------------------------------------------------------------------------------------------


def test_cached_batches_are_the_encoders_results(tmp_path):
    photos = fill(tmp_path / "dog", 3)
    (photos / "01.txt").write_text("sks dog asleep on a sofa")
    plain = data_module(photos, batch_size=2)
    data, encoders = encoded(photos, tmp_path / "cache", batch_size=2)
    assert sorted(encoders.texts) == [PROMPT, "sks dog asleep on a sofa"]
    for expected, batch in zip(drawn(plain), drawn(data), strict=True):
        assert set(batch) == {
            *("latent_mean", "latent_std", "prompt_embeds", "pooled_prompt_embeds", "time_ids", "is_prior", "ids")
        }
        assert batch["ids"] == expected["ids"]
        mean, std = StandIn().latents(expected["pixel_values"], CPU)
        embeds, pooled = StandIn().prompts(expected["prompts"], CPU)
        for name, value in [
            ("latent_mean", mean),
            ("latent_std", std),
            ("prompt_embeds", embeds.float()),
            ("pooled_prompt_embeds", pooled.float()),
            ("time_ids", expected["time_ids"]),
            ("is_prior", expected["is_prior"]),
        ]:
            assert batch[name].dtype == value.dtype, name
            assert torch.equal(batch[name], value), name


def test_equal_images_are_encoded_once_held_once_and_both_trained_on(tmp_path):
    photos = fill(tmp_path / "dog", 1)
    (photos / "copy.png").write_bytes((photos / "00.png").read_bytes())
    (photos / "copy.txt").write_text("another sks dog")
    data, encoders = encoded(photos, tmp_path / "cache")
    assert encoders.images == 1
    rows = [row for (row,) in data.train_dataloader().dataset]
    assert [row["ids"] for row in rows] == [str(photos / "00.png"), str(photos / "copy.png")]
    assert rows[0]["latent_mean"].data_ptr() == rows[1]["latent_mean"].data_ptr()
    assert not torch.equal(rows[0]["prompt_embeds"], rows[1]["prompt_embeds"])


@pytest.mark.parametrize("damage", ["cut", "other", "empty", "nan"])
def test_a_damaged_file_is_noted_and_made_anew(tmp_path, damage):
    photos, folder = fill(tmp_path / "dog"), tmp_path / "cache"
    data, _ = encoded(photos, folder)
    before = drawn(data)
    path = next(iter(folder.glob("image-*")))
    if damage == "nan":
        tensors = dreambooth_cache.read(folder, path.stem)
        dreambooth_cache.write(folder, path.stem, {**tensors, "latent_std": tensors["latent_std"] * torch.nan})
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-3], "other": b"no tensors at all", "empty": b""}[damage])
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged \(.*\) and is computed again"):
        data, encoders = encoded(photos, folder)
    assert encoders.images == 1
    for one, other in zip(before, drawn(data), strict=True):
        assert torch.equal(one["latent_std"], other["latent_std"])
    assert encoded(photos, folder)[1].images == 0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("image", r"latents of image .*dog/00.png: NaN or infinite; .*sdxl-vae-fp16-fix"),
        ("prompt", r"embeddings of prompt 'a photo of sks dog': NaN or infinite; let the text encoders run in float32"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_is_not_kept(tmp_path, what, message):
    photos, folder = fill(tmp_path / "dog", 1), tmp_path / "cache"
    with pytest.raises(DataError, match=message):
        encoded(photos, folder, StandIn(nan=[what]))
    assert not any(name.startswith(what) for name in files(folder))


def test_a_photograph_that_is_damaged_in_its_middle_is_named_before_anything_is_made(tmp_path):
    photos = fill(tmp_path / "dog", 2)
    photograph(64, 64).save(photos / "half.jpg")
    (photos / "half.jpg").write_bytes((photos / "half.jpg").read_bytes()[:-200])
    with pytest.raises(DataError, match=r"image .*half.jpg cannot be read \(.*\); replace or remove it"):
        data_module(photos)


def test_a_cache_folder_that_is_a_file(tmp_path):
    photos = fill(tmp_path / "dog", 1)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        encoders = StandIn()
        with pytest.raises(DataError, match=r"file\S* cannot be written: .*; make room, or choose another folder"):
            encoded(photos, folder, encoders)
        assert encoders.images == 0


def test_the_folder_by_default_is_beside_the_tokenised_examples(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    data_module(fill(tmp_path / "dog", 1), cache=True).train_dataloader()
    assert len(files(tmp_path / "pera_lightning" / "dreambooth")) == 2


# ---- processes ------------------------------------------------------------------------------------------------------


def test_processes_compute_disjoint_shares_and_all_have_all(tmp_path, monkeypatch):
    """Two threads stand for two processes that see one folder."""
    keys, made = [f"image-{n}" for n in range(7)], {0: [], 1: []}
    meeting, said = threading.Barrier(2, timeout=20), {}

    def gather(value):
        said[threading.current_thread().name] = value
        meeting.wait()
        return [said["0"], said["1"]]

    monkeypatch.setattr(dreambooth_cache, "all_gather_object", gather)

    def run(rank):
        def make(key):
            made[rank].append(key)
            return {"value": torch.tensor([float(key[6:])])}

        results[rank] = cached(tmp_path, keys, make, rank=rank, world=2)

    dreambooth_cache.write(tmp_path, keys[0], {"value": torch.zeros(1)})
    results = {}
    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == {0: ["image-2", "image-4", "image-6"], 1: ["image-1", "image-3", "image-5"]}
    for rank in (0, 1):
        found, computed = results[rank]
        assert computed == 3
        assert {key: value["value"].item() for key, value in found.items()} == {key: float(key[6:]) for key in keys}


def test_where_one_process_fails_the_others_stop_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(dreambooth_cache, "all_gather_object", lambda reason: [reason, "latents of image a.png: NaN"])
    with pytest.raises(DataError, match=r"^process 1: latents of image a.png: NaN$"):
        cached(tmp_path, ["image-0", "image-1"], lambda key: {"value": torch.zeros(1)}, rank=0, world=2)
    with pytest.raises(DataError, match=r"^mine$"):
        cached(tmp_path, ["image-2"], lambda key: (_ for _ in ()).throw(DataError("mine")), rank=0, world=2)


# ---- class images ---------------------------------------------------------------------------------------------------


def test_files_of_a_folder_of_class_images_that_are_not_read_are_named(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 .heic \(IMG_1.HEIC\)"):
        assert ClassImages(tmp_path, "a photo of dog", 4).generated
    (tmp_path / "class_images.json").write_text('{"prompt": "a photo of dog"}')
    (tmp_path / "grid.png").write_bytes(b"")  # an image that is none of those that were generated
    with pytest.warns(UserWarning, match=r"1 .heic .*, 1 .png \(grid.png\)"):
        ClassImages(tmp_path, "a photo of dog", 4)


def test_a_run_that_was_killed_makes_only_what_is_missing(tmp_path):
    folder = tmp_path / "class" / "dog"
    first = ClassImages(folder, "a photo of dog", 4)
    assert first.missing() == [0, 1, 2, 3]
    first.claim(MADE_BY)
    for number in (0, 2):
        first.add(number, photograph(16, 16, number))
    assert files(folder) == ["00000.png", "00002.png", "class_images.json"]
    record = json.loads((folder / "class_images.json").read_text())
    assert record == {"prompt": "a photo of dog", "model_name": "tiny", "steps": 4, "size": [16, 16]}
    again = ClassImages(folder, "a photo of dog", 4)
    assert not again.own
    assert again.missing() == [1, 3]
    again.claim(MADE_BY)
    with pytest.raises(DataError, match=r"2 of 4 class images are missing in .*: the fit generates them"):
        again.require_all()
    for number in again.missing():
        again.add(number, photograph(16, 16, number))
    again.require_all()
    assert ClassImages(folder, "a photo of dog", 3).missing() == []
    assert len(ClassImages(folder, "a photo of dog", 3).photographs()) == 3
    photograph(16, 16).save(folder / "grid.png")  # laid beside them, and none of them
    assert [one.path.name for one in ClassImages(folder, "a photo of dog", 0).photographs()] == [
        class_image_name(number) for number in range(4)
    ]
    assert ClassImages(folder, "a photo of dog", 6).missing() == [4, 5]


def test_images_of_another_prompt_or_model_are_refused(tmp_path):
    ClassImages(tmp_path, "a photo of dog", 2).claim(MADE_BY)
    with pytest.raises(DataError, match="made with prompt 'a photo of dog', not 'a photo of cat'; give another, or"):
        ClassImages(tmp_path, "a photo of cat", 2)
    images = ClassImages(tmp_path, "a photo of dog", 2)
    with pytest.raises(DataError, match="made with model_name 'tiny', not 'large', steps 4, not 5; give another, or"):
        images.claim({**MADE_BY, "model_name": "large", "steps": 5})
    with pytest.raises(DataError, match="made with steps 4, not 5; give another, or"):
        images.claim({**MADE_BY, "steps": 5})
    for number in (0, 1):
        images.add(number, photograph(16, 16, number))
    images.claim({**MADE_BY, "steps": 5})  # none is missing: nothing is mixed
    with pytest.raises(DataError, match="made with model_name 'tiny', not 'large'; give"):
        images.claim({**MADE_BY, "model_name": "large"})
    (tmp_path / "class_images.json").write_text("{")
    with pytest.raises(DataError, match=r"class_images.json cannot be read \(.*\); give another class_folder"):
        ClassImages(tmp_path, "a photo of dog", 2)


def test_photographs_of_ones_own_are_taken_as_they_are(tmp_path):
    fill(tmp_path, 3)
    (tmp_path / "01.txt").write_text("a brown dog")
    images = ClassImages(tmp_path, "a photo of dog", 2)
    assert images.own
    assert images.missing() == []
    with pytest.warns(UserWarning, match="no caption of their own"):
        found = images.photographs()
    assert [(one.path.name, one.caption) for one in found] == [("00.png", "a photo of dog"), ("01.png", "a brown dog")]
    with pytest.warns(UserWarning, match="no caption of their own"):
        assert len(ClassImages(tmp_path, "a photo of dog", 0).photographs()) == 3
    with pytest.raises(DataError, match="has 3 images of your own, and num_class_images=10: add some"):
        ClassImages(tmp_path, "a photo of dog", 10)


def test_class_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="has 0 images of your own, and num_class_images=0: add some"):
        ClassImages(tmp_path / "none", "a photo of dog", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is a file; give a folder of class images"):
        ClassImages(tmp_path / "file", "a photo of dog", 1)
    with pytest.raises(DataError, match=r"deeper/.* cannot be written: .*; make room, or choose another folder"):
        ClassImages(tmp_path / "file" / "deeper", "a photo of dog", 1).claim({})


def test_a_writer_that_is_killed_leaves_no_image(tmp_path, monkeypatch):
    images = ClassImages(tmp_path, "a photo of dog", 2)
    images.claim({})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        images.add(0, photograph(16, 16))
    assert files(tmp_path) == ["class_images.json"]
    assert ClassImages(tmp_path, "a photo of dog", 2).missing() == [0, 1]
