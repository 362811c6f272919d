"""Folders of photographs: layouts, splits, modes of photographs, and everything that can be wrong with them."""

import numpy as np
import pytest
from PIL import Image

from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.tasks.image_classification import sources as image_sources
from tests.tasks.image_classification.image_helpers import class_folders, fill, image_module, sizes, split_folders


@pytest.fixture
def flat(tmp_path):
    return class_folders(tmp_path / "pets")


def test_class_folders_are_split_by_seed(flat):
    data = image_module(flat)
    assert data.class_names == ["cat", "dog", "eel"]
    assert sizes(data) == (17, 2, 5)
    images, labels, ids = next(iter(data.predict_dataloader()))
    assert images.shape == (5, 3, 8, 8)
    assert [data.class_names[label] for label in labels] == [one.split("/")[0] for one in ids]
    files = [file for split in data.split_record()["indices"].values() for file in split["rows"]]
    assert len(files) == len(set(files)) == 24
    assert "cat/more/00.png" in files
    assert "dog/00.JPG" in files
    other = image_module(flat, split_seed=1)
    assert other.split_record()["indices"] != data.split_record()["indices"]
    assert image_module(flat).split_record() == data.split_record()


def test_fractions(flat):
    assert sizes(image_module(flat, validation_fraction=0.5)) == (9, 10, 5)
    assert sizes(image_module(flat, test_fraction=0.5)) == (10, 2, 12)


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_split_folders(tmp_path, validation):
    data = image_module(split_folders(tmp_path, validation))
    assert sizes(data) == (8, 2, 4)
    assert data.split_record()["indices"]["validation"] == {"of": "validation", "rows": "all"}
    _, labels, ids = next(iter(data.predict_dataloader()))
    assert ids == ["test/cat/00.png", "test/cat/01.png", "test/dog/00.png", "test/dog/01.png"]
    assert labels.tolist() == [0, 0, 1, 1]


def test_a_missing_split_folder_is_cut_from_training(tmp_path):
    for name in ("cat", "dog"):
        fill(tmp_path / "train" / name, 10)
        fill(tmp_path / "test" / name, 1)
    data = image_module(tmp_path)
    assert sizes(data) == (18, 2, 2)
    with pytest.raises(ConfigurationError, match=r"test_fraction=0.3 would do nothing: .* its own test split"):
        image_module(tmp_path, test_fraction=0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "at least two classes; it holds none"),
        (lambda root: fill(root / "cat"), "it holds only cat/"),
        (lambda root: (fill(root / "cat"), (root / "dog").mkdir()), "dog has no images"),
        (
            lambda root: (split_folders(root), fill(root / "vall" / "cat")),
            "has the folders test, train, val, vall; needed are train/ and no others",
        ),
        (lambda root: (split_folders(root), fill(root / "valid" / "cat")), "valid; needed are train/ .* each once"),
        (
            lambda root: (fill(root / "test" / "cat"), fill(root / "val" / "cat")),
            "has the folders test, val; needed are train/",
        ),
        (lambda root: (split_folders(root), fill(root / "test" / "emu")), "test also has emu, unlike training"),
        (lambda root: (split_folders(root), fill(root / "train" / "emu")), "validation lacks emu, unlike training"),
        (lambda root: (fill(root / "cat", 3), fill(root / "dog", 1)), None),
        (lambda root: (fill(root / "cat", 1), fill(root / "dog", 1)), "too few"),
    ],
)
def test_folders_that_do_not_serve(tmp_path, make, message):
    make(tmp_path)
    if message is None:
        assert sizes(image_module(tmp_path)) == (2, 1, 1)
    else:
        with pytest.raises(DataError, match=message):
            image_module(tmp_path)


def test_missing_folder_names_what_is_close(flat):
    with pytest.raises(DataError, match=r"no 'pest' in .*; closest: pets"):
        image_module(flat.parent / "pest")
    with pytest.raises(DataError, match=r"no 'pest' in .*; closest: pets"):
        image_module(flat.parent / "pest" / "deeper")
    with pytest.raises(DataError, match="is a file"):
        image_module(flat / "cat" / "00.png")


def test_broken_photographs_are_named_at_setup(flat):
    (flat / "dog" / "03.JPG").write_bytes(b"not a photograph")
    (flat / "eel" / "05.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 broken image\(s\) under .*: dog/03.JPG, eel/05.png"):
        image_module(flat)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_truncated_photographs_are_named_when_read(flat, num_workers):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in sorted((flat / "dog").iterdir()):
        Image.fromarray(noise).save(name)
        name.write_bytes(name.read_bytes()[:-2000])
    data = image_module(flat, num_workers=num_workers)
    with pytest.raises(DataError, match=r"image dog/\d\d.JPG of .*pets cannot be read .*truncated"):
        list(data.train_dataloader())


def _saved(path, image, **options):
    image.save(path, **options)
    return Image.open(path)


def test_every_mode_becomes_upright_rgb(tmp_path):
    red = Image.new("RGB", (4, 2), (255, 0, 0))
    for index, (image, suffix) in enumerate(
        [(red, "png"), (red.convert("RGBA"), "png"), (red.quantize(4), "gif"), (red.quantize(4), "png")]
    ):
        turned = image_sources.to_rgb(_saved(tmp_path / f"{index}.{suffix}", image))
        assert turned.mode == "RGB"
        assert turned.getpixel((0, 0)) == (255, 0, 0)
    cyan = image_sources.to_rgb(_saved(tmp_path / "c.jpg", Image.new("CMYK", (8, 8), (255, 0, 0, 0))))
    assert cyan.getpixel((4, 4))[0] < 30
    assert cyan.getpixel((4, 4))[1] > 200
    for mode in ("L", "1"):
        assert image_sources.to_rgb(Image.new(mode, (2, 2), 0)).getpixel((0, 0)) == (0, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    upright = image_sources.to_rgb(_saved(tmp_path / "turned.jpg", red, exif=exif))
    assert upright.size == (2, 4)


def test_files_that_are_not_read_are_counted_by_kind_once(tmp_path):
    split_folders(tmp_path)
    for name in ("train/cat/IMG_1.HEIC", "train/dog/IMG_2.HEIC", "test/dog/a.jfif", "labels.csv", ".DS_Store"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="are not read") as notes:
        image_module(tmp_path)
    unread = [str(note.message) for note in notes if "are not read" in str(note.message)]
    assert len(unread) == 1
    assert (
        f"4 file(s) under {tmp_path} are not read: 1 .csv (labels.csv), 1 .jfif (test/dog/a.jfif), 2 .heic" in unread[0]
    )
    assert "images are read from .jpg, .jpeg" in unread[0]
    (tmp_path / "new").mkdir()
    fill(tmp_path / "new", 1)
    (tmp_path / "new" / "a.avif").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 .avif"):
        image_sources.predict_source(str(tmp_path / "new"), ["cat", "dog"])


def test_a_class_of_a_folder_made_on_a_mac_is_the_same_class(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for name in ("zoo", composed):
        fill(tmp_path / "train" / name, 8)
    for name in ("zoo", decomposed):
        fill(tmp_path / "test" / name, 1)
    data = image_module(tmp_path, classes=["zoo", decomposed])
    assert data.class_names == ["zoo", composed]
    assert sorted(data._images("test").labels.tolist()) == [0, 1]
    fill(tmp_path / "test" / "new" / decomposed, 1)
    assert image_sources.predict_source(str(tmp_path / "test" / "new"), [composed, "zoo"]).labels.tolist() == [0]
    fill(tmp_path / "train" / decomposed, 1)
    with pytest.raises(DataError, match=f"train has {composed} twice, written in two forms of Unicode"):
        image_module(tmp_path)


def test_known_labels_come_from_the_given_folder_and_below(tmp_path):
    """Not from what is above: of the user cat's photographs none is known to be a cat for that."""
    home = tmp_path / "cat"
    fill(home / "dog" / "cat", 1)
    fill(home / "dog", 1)
    fill(home / "photos", 1)

    def known(*given):
        source = image_sources.predict_source(given[0] if len(given) == 1 else [*given], ["cat", "dog"])
        return dict(zip(source.files, source.labels.tolist(), strict=True))

    dog, photos = str(home / "dog"), str(home / "photos")
    assert known(str(home)) == {"dog/00.png": 1, "dog/cat/00.png": 1, "photos/00.png": 0}
    assert known(photos) == {"00.png": -1}
    assert known(dog) == {"00.png": 1, "cat/00.png": 0}
    assert known(photos, dog, f"{home}/dog/00.png") == {
        f"{photos}/00.png": -1,
        f"{dog}/00.png": 1,
        f"{dog}/cat/00.png": 0,
    }


def test_predict_folder(flat, tmp_path):
    more = tmp_path / "new"
    fill(more, 2)
    fill(more / "some" / "dog", 1)
    fill(more / "emu", 1)
    data = image_module(flat, "predict", predict_folder=str(more))
    _, labels, ids = next(iter(data.predict_dataloader()))
    assert ids == ["00.png", "01.png", "emu/00.png", "some/dog/00.png"]
    assert labels.tolist() == [-1, -1, -1, 1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        image_module(flat, "predict", predict_folder=str(tmp_path / "empty"))
    with pytest.raises(DataError, match="closest: new"):
        image_module(flat, "predict", predict_folder=str(tmp_path / "mew"))
    (more / "01.png").write_text("broken")
    with pytest.raises(DataError, match=r"01\.png"):
        image_module(flat, "predict", predict_folder=str(more))
    image_module(flat, "fit", predict_folder=str(more))  # other stages do not read it
