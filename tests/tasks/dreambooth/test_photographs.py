"""DreamBooth's photographs: what a folder holds, captions, photographs of every kind, and what is cut out of them."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.tasks.dreambooth.photographs import Photograph, read_photographs, warn_of_unusual
from pera_lightning.tasks.dreambooth.preprocessing import cover, crop_to, open_image, sides, to_pixels
from tests.tasks.dreambooth.data_helpers import fill, photograph


def read(folder):
    return read_photographs(str(folder), "the prompt", "instance_folder")


def metadata(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def row(name, text):
    return {"file_name": name, "text": text, "other": 1}


# ---- folders and captions -------------------------------------------------------------------------------------------


def test_photographs_at_any_depth_by_name_and_nothing_else(tmp_path):
    fill(tmp_path / "more", 1)
    fill(tmp_path, 2)
    (tmp_path / "notes.md").write_text("no photograph")
    (tmp_path / "._00.png").write_text("left by a Mac")
    found = read(tmp_path)
    assert [one.path.relative_to(tmp_path).as_posix() for one in found] == ["00.png", "01.png", "more/00.png"]
    assert {one.caption for one in found} == {"the prompt"}
    assert [one.id for one in found] == [str(one.path) for one in found]


def test_folders_that_cannot_be_read(tmp_path):
    fill(tmp_path / "dog", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "iphone").mkdir()
    (tmp_path / "iphone" / "IMG_1.HEIC").write_bytes(b"heic")
    for name, message in [
        ("empty", r"instance_folder .*empty has no images \(.*\) at any depth; it has nothing"),
        ("iphone", r"has no images .*; it has IMG_1.HEIC"),
        ("dgo", "does not exist: no 'dgo' in .*; closest: dog"),
        ("dog/00.png", "is a file, not a folder"),
    ]:
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)
    (tmp_path / "dog" / "01.png").write_bytes(b"no photograph")
    with pytest.raises(DataError, match=r"1 broken image\(s\) under .*: 01.png"):
        read(tmp_path / "dog")


def test_captions_come_from_either_file_and_else_from_the_prompt(tmp_path):
    fill(tmp_path, 3)
    fill(tmp_path / "more", 1)
    metadata(tmp_path, row("./00.png", "sks\n asleep"), row("more/00.png", "sks awake"))
    (tmp_path / "01.txt").write_text("\ufeffsks in\nthe garden\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="1 of 4 images in .* have no caption of their own and take 'the prompt': 02"):
        found = {one.path.relative_to(tmp_path).as_posix(): one.caption for one in read(tmp_path)}
    assert found == {
        "00.png": "sks asleep",
        "01.png": "sks in the garden",
        "02.png": "the prompt",
        "more/00.png": "sks awake",
    }


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metadata.csv", 'file_name,text\n00.png,"sks, asleep"\nmore/00.png,sks awake\n'),
        ("../metadata.csv", 'file_name,text\nsub/00.png,"sks, asleep"\nsub/more/00.png,sks awake\n'),
        ("more/metadata.jsonl", None),
        ("00.caption", "sks, asleep\n"),
        ("00.CAPTION", "sks, asleep\n"),
    ],
)
def test_captions_as_other_tools_write_them(tmp_path, file, content):
    root = tmp_path / "sub"
    fill(root, 1)
    fill(root / "more", 1)
    if content is None:
        metadata(root / "more", row("00.png", "sks awake"))
        metadata(root, row("00.png", "sks, asleep"))
    else:
        (root / file).write_text(content)
    if file.lower() == "00.caption":
        (root / "more" / file).write_text("sks awake")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of it is left unread
        found = {
            one.path.relative_to(root).as_posix(): one.caption for one in read(root if file[0] != "." else tmp_path)
        }
    assert found == {"00.png": "sks, asleep", "more/00.png": "sks awake"}


def test_captions_of_names_that_a_mac_wrote(tmp_path):
    photograph(16, 16).save(tmp_path / "cafe\u0301.png")
    photograph(16, 16).save(tmp_path / "the\u0301.png")
    metadata(tmp_path, row("caf\u00e9.png", "a"))
    (tmp_path / "th\u00e9.txt").write_text("b")
    assert [one.caption for one in read(tmp_path)] == ["a", "b"]


def test_photographs_and_captions_that_are_not_read_are_named(tmp_path):
    fill(tmp_path, 2)
    for name in ("IMG_1.HEIC", "IMG_2.HEIC", "03.txt", "metadata.parquet"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 .txt \(03.txt\), 2 .heic \(IMG_1.HEIC, IMG_2.HEIC\), 1 .parquet") as notes:
        read(tmp_path)
    assert len(notes) == 1


def test_no_note_where_all_or_none_have_captions(tmp_path):
    fill(tmp_path, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(tmp_path)
        metadata(tmp_path, row("00.png", "a"))
        assert [one.caption for one in read(tmp_path)] == ["a"]
        (tmp_path / "00.txt").write_text("a")
        assert [one.caption for one in read(tmp_path)] == ["a"]


@pytest.mark.parametrize(
    ("rows", "beside", "message"),
    [
        ([row("05.png", "a"), row("00.png", "b")], None, r"names 1 image\(s\) that are not there: 05.png"),
        ([row("00.png", "a"), row("00.png", "b")], None, "00.png has two captions, in .*metadata.jsonl; keep one"),
        ([row("00.png", "a")], "b", "00.png has two captions, in .*metadata.jsonl and in .*00.txt"),
        ([row("00.png", " ")], None, "entry 0 of .* neither empty; it has file_name, text, other"),
        ([{"file_name": "00.png", "caption": "a"}], None, "needs a file_name and a text.* has file_name, caption"),
        (["00.png"], None, "entry 0 of .* has str"),
        ([], None, "has no examples"),
        ([row("00.png", "a")], " \n", "caption .*00.txt is empty"),
        ([row("IMG_1.HEIC", "a")], None, r"names 1 file\(s\) that are not read as images: IMG_1.HEIC; convert"),
        ([row("00.png", "\ud800")], None, "metadata.jsonl: the caption of 00.png holds half a character"),
    ],
)
def test_captions_that_cannot_be_used(tmp_path, rows, beside, message):
    fill(tmp_path, 1)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"heic")
    metadata(tmp_path, *rows)
    if beside is not None:
        (tmp_path / "00.txt").write_text(beside)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_unusual_photographs_are_noted_once_and_counted(tmp_path):
    fill(tmp_path, 2, size=(40, 40))
    sideways = Image.Exif()
    sideways[0x0112] = 6
    photograph(60, 20).save(tmp_path / "turned.jpg", exif=sideways)  # 20 by 60 once it is upright
    photograph(64, 64).save(tmp_path / "a.gif", save_all=True, append_images=[photograph(64, 64, 1)])
    with pytest.warns(UserWarning, match="of 4 images") as notes:
        warn_of_unusual(read(tmp_path), "photos", (32, 40))
    assert [str(note.message) for note in notes] == [
        "1 of 4 images in photos are smaller than 32x40 and are enlarged, the smallest from 20x60 (height x width); a "
        "lower resolution loses nothing of them",
        "1 of 4 images in photos have several frames, and the first is taken: a.gif",
    ]


def test_a_phone_photograph_with_a_second_one_inside_is_no_animation(tmp_path):
    photograph(32, 32).save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[photograph(8, 8)])
    with Image.open(tmp_path / "phone.jpg") as image:
        assert image.is_animated
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unusual([Photograph(tmp_path / "phone.jpg", "")], "photos", (32, 32))


# ---- photographs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb_of_like_brightness(tmp_path, mode):
    image = photograph(16, 16)
    path = tmp_path / ("photograph.tif" if mode in ("CMYK", "I;16") else "photograph.png")
    if mode == "I;16":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        (image.quantize(16) if mode == "P" else image.convert(mode)).save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    found = np.asarray(open_image(path)).astype(float)
    assert found.shape == (16, 16, 3)
    # The palette's colours, and the dots of black and white, are near the photograph's on average only.
    assert abs(found - np.asarray(image)).mean() < (130 if mode == "1" else 12)
    assert found[8:].mean() > found[:8].mean() + 50


def test_a_turned_photograph_stands_upright_and_an_animation_is_its_first_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    photograph(16, 24).rotate(180).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.png")), np.asarray(photograph(16, 24)))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((4, 4)) == (255, 0, 0)


def test_a_cut_off_photograph_is_named(tmp_path):
    photograph(64, 64).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"image .*half.jpg cannot be read \(.*[Tt]runcated.*\); replace or remove it"):
        open_image(tmp_path / "half.jpg")


# ---- what the network sees ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "size", "expected"),
    [
        ((100, 200), (50, 50), (50, 100)),
        ((200, 100), (50, 50), (100, 50)),
        ((10, 10), (64, 32), (64, 64)),
        ((333, 1000), (512, 1024), (512, 1538)),
        ((3, 1000), (8, 8), (8, 2667)),
    ],
)
def test_the_smallest_size_that_covers(given, size, expected):
    assert cover(given, size) == expected


def test_the_middle_and_its_time_ids():
    image = photograph(40, 100)
    cut, time_ids = crop_to(image, (40, 32))
    assert time_ids.dtype == torch.float32
    assert time_ids.tolist() == [40, 100, 0, 34, 40, 32]
    assert np.array_equal(np.asarray(cut), np.asarray(image)[:, 34:66])
    pixels = to_pixels(cut)
    assert pixels.shape == (3, 40, 32)
    assert torch.equal(((pixels + 1) * 127.5).round().byte(), torch.from_numpy(np.array(cut)).permute(2, 0, 1))
    assert to_pixels(Image.new("RGB", (1, 1), "white")).unique().tolist() == [1.0]
    assert to_pixels(Image.new("RGB", (1, 1), "black")).unique().tolist() == [-1.0]


def test_a_smaller_scale_keeps_the_size_before_and_crops_in_the_scaled_photograph():
    image = photograph(120, 80)
    cut, time_ids = crop_to(image, (40, 40))
    assert time_ids.tolist() == [120, 80, 10, 0, 40, 40]
    expected = image.resize((40, 60), Image.Resampling.LANCZOS).crop((0, 10, 40, 50))
    assert np.array_equal(np.asarray(cut), np.asarray(expected))


def test_random_crops_reach_both_ends_and_their_time_ids_say_where():
    image = photograph(16, 19)
    places = set()
    for seed in range(40):
        torch.manual_seed(seed)
        cut, time_ids = crop_to(image, (16, 16), crop="random")
        top, left = time_ids[2:4].int().tolist()
        places.add((top, left))
        assert np.array_equal(np.asarray(cut), np.asarray(image)[:, left : left + 16])
    assert places == {(0, 0), (0, 1), (0, 2), (0, 3)}


def test_a_flip_comes_before_the_crop():
    image = photograph(16, 40)
    flipped = 0
    for seed in range(30):
        torch.manual_seed(seed)
        cut, time_ids = crop_to(image, (16, 16), crop="random", flip=True)
        left = int(time_ids[3])
        plain, mirrored = (np.asarray(one)[:, left : left + 16] for one in (image, ImageOps.mirror(image)))
        assert np.array_equal(np.asarray(cut), plain) or np.array_equal(np.asarray(cut), mirrored)
        flipped += np.array_equal(np.asarray(cut), mirrored)
    assert 5 < flipped < 25
    torch.manual_seed(0)
    state = torch.get_rng_state()
    crop_to(image, (16, 16))
    assert torch.equal(torch.get_rng_state(), state)  # what is not random draws nothing


def test_resolutions():
    assert sides(64) == (64, 64)
    assert sides([64, 128]) == (64, 128)
    for given in (100, [64, 65], 4, 0, -8, [64], [8, 8, 8]):
        with pytest.raises(ConfigurationError, match=r"one side or \[height, width\] in pixels, multiples of 8; given"):
            sides(given)
