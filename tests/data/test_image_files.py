"""Image files: of which formats they are opened, what becomes of deep and transparent pixels, and turned sizes."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from pera_lightning.data.image_files import SUFFIXES, check_headers, image_files, open_lazily, size_of, to_rgb
from pera_lightning.errors import DataError
from pera_lightning.files import read_text


def opened(path):
    with open_lazily(path) as image:
        return to_rgb(image)


def test_only_the_formats_that_are_read_are_opened_whatever_a_file_is_called(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho ran > {tmp_path}/ran\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\n")
    with pytest.raises(OSError, match="cannot identify"):
        opened(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png", format="ICO")
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png", format="JPEG")  # another that is read
    with pytest.raises(DataError, match=r"2 broken image\(s\) under .*: a.png, b.png; .* must be JPEG, PNG"):
        check_headers(tmp_path, ["a.png", "b.png", "c.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)  # not broken, and told by its reason
    with pytest.raises(DataError, match=r"1 broken image\(s\) .* \(the first: .* decompression bomb"):
        check_headers(tmp_path, ["c.png"])
    monkeypatch.undo()
    assert not (tmp_path / "ran").exists()
    for suffix in SUFFIXES:  # each that is found can be opened
        Image.new("L" if suffix == ".pgm" else "RGB", (4, 4)).save(tmp_path / f"d{suffix}")
        assert opened(tmp_path / f"d{suffix}").size == (4, 4)


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"broken image.*a.png"):
        check_headers(tmp_path, image_files(tmp_path))
    with pytest.raises(OSError, match="a regular file is needed"):
        open_lazily(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a.png cannot be read: it is a pipe"):
        read_text(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "tif", "big-endian.tif", "pgm"])
def test_grey_of_16_bits_is_scaled(tmp_path, suffix):
    grey = Image.fromarray(np.array([[0, 0x100, 0x8000, 0xFFFF]], dtype=np.uint16))
    path = tmp_path / f"a.{suffix}"
    if suffix == "big-endian.tif":
        grey = Image.frombytes("I;16B", (4, 1), np.asarray(grey).astype(">u2").tobytes())
    grey.save(path)
    assert np.asarray(opened(path))[0].tolist() == [[v, v, v] for v in (0, 1, 128, 255)]


def test_grey_without_a_known_range_is_refused(tmp_path):
    for name, dtype in (("a", np.int32), ("b", np.float32)):
        Image.fromarray(np.ones((2, 2), dtype)).save(tmp_path / f"{name}.tif")
        with pytest.raises(ValueError, match="has no known range of values"):
            opened(tmp_path / f"{name}.tif")


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("P", "gif"), ("RGB", "png"), ("RGBA", "webp")]
)
def test_transparency_becomes_white(tmp_path, mode, suffix):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (0, 0, 0, 255)  # black: the left half invisible, the right one not
    image, options = Image.fromarray(pixels), {}
    if mode == "RGB":
        image, options = Image.new("RGB", (8, 8), (9, 9, 9)), {"transparency": (9, 9, 9)}
        image.paste((0, 0, 0), (4, 0, 8, 8))
    elif mode == "P":
        image, options = image.convert("RGB").quantize(2), {"transparency": 1}
        image.putdata([1, 1, 1, 1, 0, 0, 0, 0] * 8)
    else:
        image = image.convert(mode)
    image.save(tmp_path / f"a.{suffix}", **options, **({"lossless": True} if suffix == "webp" else {}))
    assert np.asarray(opened(tmp_path / f"a.{suffix}"))[0].tolist() == [[255] * 3] * 4 + [[0] * 3] * 4


def test_transparency_is_said_once_with_its_count(tmp_path):
    for name, mode in (("a", "RGBA"), ("b", "RGB"), ("c", "LA")):
        Image.new(mode, (4, 4)).save(tmp_path / f"{name}.png")
    with pytest.warns(UserWarning, match=r"2 of 3 images under .* have an alpha channel.*\(a.png, c.png\)") as notes:
        check_headers(tmp_path, image_files(tmp_path))
    assert len(notes) == 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_size_of_a_turned_image_is_that_which_is_decoded(tmp_path, suffix):
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.new("RGB", (40, 20)).save(path, exif=exif)
        with open_lazily(path) as image:
            height, width = size_of(image)
        assert (width, height) == opened(path).size == ((20, 40) if orientation >= 5 else (40, 20))


def test_the_order_of_files_does_not_depend_on_the_form_of_their_names(tmp_path):
    orders = []
    for form in ("NFC", "NFD"):
        names = [unicodedata.normalize(form, name) for name in ("e.png", "é.png", "f.png", "ê.png")]
        for name in names:
            (tmp_path / form).mkdir(exist_ok=True)
            (tmp_path / form / name).write_bytes(b"")
        orders.append([unicodedata.normalize("NFC", name) for name in image_files(tmp_path / form)])
    assert orders[0] == orders[1]
