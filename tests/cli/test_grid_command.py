"""`grid`: several runs' images side by side, at prompts and seeds that all of them have."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pera_lightning.cli.commands import grid as command
from pera_lightning.tasks.dreambooth.image_folder import (
    GeneratedImage,
    GeneratedImages,
    read_images,
    save_image,
    write_images,
)
from tests.run_helpers import ROOT

JUNGLE, RUG = "a sks dog in the jungle", "a sks dog on a purple rug"
METHODS = {"lora": "LoRA", "pera": "PERA", "pera2": "PERA", "aurora": "AuroRA"}


def colour(run, prompt, seed):
    """A colour that no other image has."""
    return (len(prompt) * 5, 40 * seed, sum(run.encode()) % 250)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Makes a run in the working folder: ``runs(name, prompts, seeds, **sampling)``."""
    monkeypatch.chdir(tmp_path)

    def make(name, prompts=(JUNGLE, RUG), seeds=(0, 1), method=None, model="sdxl", trained=9, **sampling):
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        folder = tmp_path / name / "images"
        for number, pair in enumerate(pairs):
            save_image(Image.new("RGB", (64, 64), colour(name, *pair)), folder / f"{number}.png")
        known = method or METHODS.get(name.partition("/")[0])
        adapter = None if known is None else {"class_path": f"pera_lightning.adapters.x.{known}", "init_args": {}}
        images = tuple(GeneratedImage(f"{number}.png", *pair) for number, pair in enumerate(pairs))
        write_images(folder, GeneratedImages(model, adapter, trained, {"steps": 30, **sampling}, images))
        return folder

    return make


@pytest.fixture
def drawn(monkeypatch):
    """What the grid was asked to draw: colours of rows and columns, row labels, column labels."""
    seen = []

    def record(images, row_labels, column_labels):
        seen[:] = [[[image.getpixel((5, 5)) for image in row] for row in images], row_labels, column_labels]
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(command, "labelled_grid", record)
    return seen


def test_columns_are_runs_and_rows_the_prompts_and_seeds_of_all(pera, runs, drawn):
    runs("lora"), runs("aurora", prompts=(RUG, "more", JUNGLE), seeds=(2, 1, 0))
    result = pera("grid", "--runs", "lora", "aurora", "--output", "new/folder/grid.png")
    assert (result.code, result.err) == (0, "")
    assert "Wrote new/folder/grid.png" in result.out
    assert "4 prompts and seeds x 2 runs (LoRA, AuroRA)" in result.out
    assert "left out, as not all runs have their prompt and seed: 5 of aurora's 9" in result.out
    pairs = [(JUNGLE, 0), (JUNGLE, 1), (RUG, 0), (RUG, 1)]
    assert drawn[0] == [[colour(run, *pair) for run in ("lora", "aurora")] for pair in pairs]
    assert drawn[1:] == [[f"{prompt}\nseed {seed}" for prompt, seed in pairs], ["LoRA", "AuroRA"]]


def test_the_file_is_a_png_with_the_images(pera, runs):
    runs("lora"), runs("pera")
    assert pera("grid", "--runs", "lora", "pera", "--output", "grid.png").code == 0
    with Image.open("grid.png") as image:
        found = {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3)[::7].tolist()}
    assert {
        colour(run, prompt, seed) for run in ("lora", "pera") for prompt in (JUNGLE, RUG) for seed in (0, 1)
    } <= found


def test_prompts_and_seeds_are_chosen_in_their_order(pera, runs, drawn):
    runs("lora", seeds=(0, 1, 2)), runs("pera", seeds=(0, 1, 2))
    words = ("grid", "--runs", "lora", "pera", "--output", "grid.png", "--prompts", RUG, JUNGLE, "--seeds")
    for k, seeds in enumerate((("2", "0"), ("2,0",))):
        assert pera(*words, *seeds, *["--overwrite"][:k]).code == 0
        assert [label.partition("\nseed ")[::2] for label in drawn[1]] == [
            (RUG, "2"),
            (RUG, "0"),
            (JUNGLE, "2"),
            (JUNGLE, "0"),
        ]


def test_labels_tell_runs_of_one_method_apart(pera, runs, drawn):
    for name in ("lora/version_0", "pera/version_0", "pera2/version_0", "base"):
        runs(name)
    words = ("grid", "--runs", "lora/version_0", "pera/version_0", "pera2/version_0", "base", "--output", "grid.png")
    assert pera(*words).code == 0
    assert drawn[2] == ["LoRA", "PERA\npera/version_0", "PERA\npera2/version_0", "no adapter"]
    assert pera(*words, "--overwrite", "--labels", "A", "B b", "C", "D").code == 0
    assert drawn[2] == ["A", "B b", "C", "D"]


def test_a_run_may_be_named_by_its_folder_of_images(pera, runs, drawn):
    runs("pera"), runs("pera2")
    assert pera("grid", "--runs", "pera/images/", "pera2", "--output", "grid.png").code == 0
    assert drawn[2] == ["PERA\npera", "PERA\npera2"]


def test_other_settings_are_noted_by_name(pera, runs):
    (
        runs("lora", guidance_scale=7.5, trained=20),
        runs("pera", steps=50),
        runs("aurora", model="other", guidance_scale=7.5),
    )
    out = pera("grid", "--runs", "lora", "pera", "aurora", "--output", "grid.png").out
    assert "note: the runs differ in optimizer steps: lora 20, pera 9, aurora 9\n" in out
    assert "note: the runs differ in steps: lora 30, pera 50, aurora 30\n" in out
    assert "note: the runs differ in guidance_scale: lora 7.5, pera None, aurora 7.5\n" in out
    assert "note: the runs differ in model_name: lora sdxl, pera sdxl, aurora other\n" in out
    assert "note" not in pera("grid", "--runs", "lora", "--output", "one.png").out


def test_an_output_that_exists_is_kept_without_overwrite(pera, runs):
    runs("lora")
    Path("grid.png").write_text("mine")
    words = ("grid", "--runs", "lora", "--output", "grid.png")
    result = pera(*words)
    assert (result.code, result.err) == (2, "error: grid.png exists: give another --output, or --overwrite\n")
    assert Path("grid.png").read_text() == "mine"
    assert pera(*words, "--overwrite").code == 0
    Image.open("grid.png").load()


def broken(folder):
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])


WRONG = {
    "no such run": (["--runs", "lora", "lorra"], "run lorra does not exist; closest: lora"),
    "no images": (
        ["--runs", "lora", "fitted"],
        "fitted has no images/images.json, which predict writes at its end: run `python cli.py predict --config",
    ),
    "no list": (["--runs", "lora", "cut"], "run cut has no images/images.json, which predict writes at its end"),
    "nothing in common": (
        ["--runs", "lora", "cat"],
        f"no prompt and seed in common: lora has '{JUNGLE}', '{RUG}' with seeds 0, 1; cat has 'a cat' with seeds 7;",
    ),
    "a broken image": (["--runs", "lora", "broken"], "broken/images/1.png cannot be read ("),
    "a missing image": (["--runs", "lora", "gone"], "gone/images/0.png is listed in images.json, but is not there"),
    "labels": (["--runs", "lora", "pera", "--labels", "A"], "--labels has 1 and --runs 2: give a label for each run"),
    "prompt": (
        ["--runs", "lora", "--prompts", "a sks dog in a jungle"],
        f"not in all runs; they have {JUNGLE}, {RUG}; closest: {JUNGLE}, {RUG}",
    ),
    "prompt of one run": (
        ["--runs", "lora", "cats", "--prompts", "a cat"],
        f"--prompts a cat: not in all runs; they have {JUNGLE}",
    ),
    "seed": (["--runs", "lora", "cats", "--seeds", "0", "7"], "--seeds 7: not in all runs; they have 0, 1"),
    "no seed": (["--runs", "lora", "--seeds", "x"], "--seeds x: not in all runs; they have 0, 1"),
    "twice": (["--runs", "lora", "./lora/"], "--runs lora ./lora/: one is given twice"),
    "no runs": ([], "the following arguments are required: --runs; see grid --help"),
    "an empty run": (["--runs", ""], "has no images/images.json"),
    "an unknown option": (["--runs", "lora", "--seed", "0"], "unrecognized arguments: --seed 0; see grid --help"),
    "a word too many": (["--overwrite", "lora", "--runs", "lora"], "unrecognized arguments: lora"),
    "no value": (["--runs", "lora", "--labels"], "argument --labels: expected at least one argument"),
    "no output": (["--runs", "lora", "--output", ""], "a grid is a PNG"),
    "another kind of file": (["--runs", "lora", "--output", "x.jpg"], "--output x.jpg: a grid is a PNG"),
    "a folder": (["--runs", "lora", "--output", "folder.png"], "folder.png exists: give another --output"),
    "below a file": (["--runs", "lora", "--output", "file/x.png"], "file/x.png cannot be written ("),
    "among the images": (
        ["--runs", "lora", "--output", "lora/images/0.png", "--overwrite"],
        "lies among a run's images",
    ),
}


@pytest.mark.parametrize(("words", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_writes_nothing(pera, runs, tmp_path, words, expected):
    for name in ("lora", "pera"):
        runs(name)
    runs("cat", prompts=("a cat",), seeds=(7,)), runs("cats", prompts=("a cat", JUNGLE), seeds=(0, 1, 7))
    broken(runs("broken"))
    (runs("gone") / "0.png").unlink()
    (runs("cut") / "images.json").unlink()
    for name in ("fitted/checkpoints", "folder.png"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("fitted/config.yaml", "fitted/checkpoints/last.ckpt", "file"):
        (tmp_path / name).touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = pera("grid", *(() if "--output" in words else ("--output", "grid.png")), *words)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert expected in result.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_more_images_than_a_grid_holds_are_refused_before_they_are_read(pera, runs, monkeypatch):
    folder = runs("lora")
    known = read_images(folder)
    images = tuple(GeneratedImage("0.png", JUNGLE, seed) for seed in range(201))
    write_images(folder, GeneratedImages(known.model_name, None, 1, known.sampling, images))
    monkeypatch.setattr(command, "read_image", None)
    result = pera("grid", "--runs", "lora", "--output", "grid.png")
    assert result.code == 2
    assert "a grid of 201 x 1 images cannot be drawn" in result.err


def test_wrong_input_is_refused_without_loading_torch(runs):
    runs("lora")
    code = (
        "import sys; from pera_lightning.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('loaded', *{'torch', 'lightning', 'diffusers', 'matplotlib', 'yaml'} & set(sys.modules))"
    )
    words = ["grid", "--runs", "lora", "--output", "grid.png", "--seeds", "7"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "--seeds 7: not in all runs" in done.stderr
    assert done.stdout.splitlines()[-1] == "loaded"


def test_help_names_every_option(pera):
    result = pera("grid", "--help")
    assert result.code == 0
    assert all(f"--{name}" in result.out for name in ("runs", "output", "overwrite", "labels", "prompts", "seeds"))
