"""Data sets of the hub: columns, splits, kinds of labels, and every way to fail."""

import datasets
import pytest
from PIL import Image

from pera_lightning.errors import DataError
from pera_lightning.tasks.image_classification.data import ImageDataModule
from tests.tasks.image_classification.image_helpers import FakeHub, fill, image_module, photographs, sizes


@pytest.fixture
def hub(monkeypatch):
    return FakeHub(monkeypatch)


def test_hub_ids_with_their_own_columns_and_splits(hub):
    names = ("text", "kind")
    columns = {"image_column": "text", "label_column": "kind", "config_name": "big"}
    hub.add("org/name", "learn", [0, 1] * 10, images=photographs(20), columns=names)
    hub.add("org/name", "check", [0, 1], images=photographs(2), columns=names)
    hub.add("org/name", "final", [1, 0, 1], images=photographs(3), columns=names)
    data = image_module(
        "org/name", train_split="learn", validation_split="check", test_split="final", num_workers=2, **columns
    )
    assert sizes(data) == (20, 2, 3)
    assert data.class_names == ["a", "b"]
    assert set(hub.asked) == {("org/name", "big", split) for split in ("learn", "check", "final")}
    images, labels, ids = next(iter(data.predict_dataloader()))
    assert images.shape == (3, 3, 8, 8)
    assert labels.tolist() == [1, 0, 1]
    assert ids == ["0", "1", "2"]
    assert sizes(image_module("org/name", train_split="learn", test_split="final", **columns)) == (18, 2, 3)
    assert sizes(image_module("org/name", train_split="learn", **columns)) == (14, 2, 4)


def test_a_class_order_of_its_own_is_mapped_by_name(hub):
    hub.add("org/name", "train", [0, 1] * 10)
    hub.add("org/name", "test", [0, 0, 1], names=("b", "a"))
    data = image_module("org/name", test_split="test")
    assert data._images("test").labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("kind", "labels", "names"), [("string", ["y", "x"], ["x", "y"]), ("int64", [20, 3], ["3", "20"])]
)
def test_plain_label_columns_are_numbered_in_sorted_order(hub, kind, labels, names):
    hub.add("org/name", "train", labels * 10, kind=datasets.Value(kind))
    data = image_module("org/name")
    assert data.class_names == names
    assert set(data._images("train").labels.tolist()) == {0, 1}
    hub.add("org/name", "test", ["z" if kind == "string" else 7], kind=datasets.Value(kind))
    with pytest.raises(DataError, match=r"'test' has [z7] in column 'label' that training lacks"):
        image_module("org/name", test_split="test")


def test_a_test_split_without_labels_can_be_predicted_only(hub):
    hub.add("org/name", "train", [0, 1] * 10)
    hub.add("org/name", "test", [-1, -1], images=photographs(2))
    data = image_module("org/name", test_split="test")
    assert next(iter(data.predict_dataloader()))[1].tolist() == [-1, -1]
    with pytest.raises(DataError, match="2 of 2 test images of org/name have no label"):
        data.test_dataloader()
    hub.add("org/name", "train", [0, 1, -1] * 10)
    with pytest.raises(DataError, match="train images of org/name have no label"):
        image_module("org/name", test_split="test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_column": "lable"}, "no column 'lable': give label_column, one of image, label"),
        ({"image_column": "img"}, "no column 'img': give image_column, one of image, label"),
        ({"image_column": "label"}, "column 'label' holds no images but int64"),
        ({"label_column": "image"}, "column 'image' holds no classes"),
        ({"test_split": "strange"}, "also has c, unlike training; every split needs the same classes"),
        ({"test_split": "empty"}, "'empty' has no examples"),
        ({"test_split": "rare"}, "no training image of b, but test has some"),
    ],
)
def test_hub_data_that_does_not_serve(hub, arguments, message):
    hub.add("org/name", "train", ([0, 1] if arguments.get("test_split") != "rare" else [0, 0]) * 10)
    hub.add("org/name", "strange", [0], names=("a", "b", "c"))
    hub.add("org/name", "empty", [])
    hub.add("org/name", "rare", [0, 1])
    with pytest.raises(DataError, match=message):
        image_module("org/name", **arguments)


def test_an_example_without_an_image_is_named(hub):
    hub.add("org/name", "train", [0, 1] * 10)
    with pytest.raises(DataError, match=r"image \d+ cannot be read \(the example has no image\)"):
        next(iter(image_module("org/name").val_dataloader()))


def test_images_as_plain_bytes_are_decoded(hub, tmp_path):
    fill(tmp_path / "x", 1)
    row = {"bytes": (tmp_path / "x" / "00.png").read_bytes(), "path": None}
    features = datasets.Features(
        {
            "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "label": datasets.Value("int8"),
        }
    )
    table = datasets.Dataset.from_dict({"image": [row] * 10, "label": [0, 1] * 5}, features=features)
    hub.tables["org/name", "train"] = table
    assert next(iter(image_module("org/name").train_dataloader()))[0].shape == (7, 3, 8, 8)


def test_other_formats_are_not_opened_from_the_hub_either(hub, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.ico")
    images = [{"bytes": (tmp_path / "a.ico").read_bytes(), "path": None}] * 20
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 10})
    table = table.cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    hub.tables["org/name", "train"] = table
    with pytest.raises(DataError, match=r"image \d+ cannot be read \(cannot identify"):
        next(iter(image_module("org/name").val_dataloader()))


NOT_FOUND = datasets.exceptions.DatasetNotFoundError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "http://hub.example cannot be reached.*HF_ENDPOINT.*local folder"),
        (
            NOT_FOUND("Dataset 'x' doesn't exist"),
            "data set org/name on http://hub.example does not exist.*hf auth login",
        ),
        (NOT_FOUND("Dataset 'x' is a gated dataset"), "is gated: ask for access .*hf auth login"),
        (ValueError('Unknown split "train". Should be one of\n [a]'), r"split 'train': Unknown split .* one of \[a\]"),
    ],
)
def test_hub_failures_are_one_clear_line(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    with pytest.raises(DataError, match=message) as caught:
        ImageDataModule("org/name").prepare_data()
    assert "\n" not in str(caught.value)
