"""The command line in process: wrong input is one line with exit code 2, on each path that an error can take.

What the line says is in test_messages.py for the parser's errors, and with the code that raises it for all others.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pera_lightning.cli.lightning_cli import check_strategy
from pera_lightning.errors import UnknownNameError
from tests.run_helpers import QUICKSTART


def error_line(result):
    """The one line of an error; nothing but notices of other packages stands before it."""
    assert result.code == 2
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "usage:" not in result.err
    return lines[-1]


# ---- wrong input: found while the command line is read --------------------------------------------------------------

PARSED = {
    "rank that is a word": (["--adapter.method.rank", "two"], "adapter.method.rank: int is needed; given two"),
    "rank 0": (["--adapter.method.rank", "0"], "rank=0: a positive integer is needed"),
    "unknown model": (["--model", "ImageClassifier"], "closest: ImageClassificationModule"),
    "abbreviated option": (["--trainer.max_ep", "3"], "unknown option --trainer.max_ep"),
    "unknown accelerator": (["--trainer.accelerator", "cpuu"], "invalid accelerator name"),
}


@pytest.mark.parametrize(("words", "expected"), PARSED.values(), ids=PARSED)
def test_wrong_input_is_one_line(quick, words, expected, tmp_path):
    line = error_line(quick(*words))
    assert expected in line
    assert len(line) < 500
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["fitt"],
            "unknown command 'fitt'; there are fit, validate, test, predict, params, merge, export, methods, sweep, "
            "grid; ",
        ),
        (
            ["fit", "--config", "configs/quikstart.yaml"],
            "config 'configs/quikstart.yaml' does not exist; closest: conf",
        ),
        (["fit"], "required: "),
        (["params", "--config", QUICKSTART, "--ckpt_path", "x"], "unknown option --ckpt_path"),
        (["params", "--config", QUICKSTART, "--adapter.method.rank", "0"], "rank=0: a positive integer is needed"),
    ],
)
def test_wrong_commands_are_one_line(pera, words, expected):
    assert expected in error_line(pera(*words))


def test_a_config_that_is_no_yaml_is_one_line(pera, tmp_path):
    (tmp_path / "bad.yaml").write_text("adapter: [1\ntrainer: 2")
    assert "parsing" in error_line(pera("fit", "--config", tmp_path / "bad.yaml"))


def test_a_config_with_an_unknown_key_names_it(pera, tmp_path):
    text = Path(QUICKSTART).read_text()
    (tmp_path / "typo.yaml").write_text(text.replace("max_epochs:", "max_epoch:"))
    assert "max_epoch" in error_line(pera("fit", "--config", tmp_path / "typo.yaml"))


# ---- wrong input: found when the network or the data is there -------------------------------------------------------


def pictures(folder, count=6):
    folder.mkdir(parents=True)
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def test_a_broken_image_is_one_line(quick, tmp_path):
    pictures(tmp_path / "photos" / "cat")
    (pictures(tmp_path / "photos" / "dog") / "3.png").write_bytes(b"not an image")
    line = error_line(quick("--data.dataset", tmp_path / "photos", "--data.classes", "null", folder=tmp_path / "runs"))
    assert "1 broken image(s) under" in line
    assert "dog/3.png" in line


BUILT = {
    "no target matched": (["--adapter.targets", '["attn.qkw"]'], "targets: 'attn.qkw' matches none of the"),
    "bf16-true": (["--trainer.precision", "bf16-true"], "precision=bf16-true casts the adapters too"),
    "a base trained in low precision": (
        ["--adapter.method", "FullFineTuning", "--model.base_dtype", "bfloat16"],
        "trained parameters are in low precision, in which small updates vanish",
    ),
}


@pytest.mark.parametrize(("words", "expected"), BUILT.values(), ids=BUILT)
def test_what_does_not_fit_is_one_line(quick, words, expected):
    assert expected in error_line(quick(*words))


def test_an_unknown_strategy_is_named():
    with pytest.raises(UnknownNameError, match="strategy='fspd2' does not exist; give auto, ddp or fsdp2; closest: "):
        check_strategy("fspd2")


def test_a_checkpoint_that_is_not_there_names_those_of_the_run(quick, fitted):
    line = error_line(quick("--ckpt_path", "runs/other/best.ckpt", command="test", folder=fitted.folder))
    folder = fitted.run / "checkpoints"
    assert line.endswith(f"runs/other/best.ckpt does not exist; this run has {folder}/best.ckpt, {folder}/last.ckpt")


def test_last_without_a_last_checkpoint_says_where_it_looked(quick, tmp_path):
    with pytest.warns(UserWarning, match=r"quickstart/checkpoints has no last\.ckpt; the fit starts"):
        assert quick("--ckpt_path", "last").code == 0


def test_a_checkpoint_of_other_classes_is_one_line(quick, fitted):
    line = error_line(quick("--ckpt_path", fitted.checkpoint, "--data.classes", "[5, 6, 7]", command="test"))
    assert "was trained on other classes: the data lack '8', '9'; give data of all" in line


def test_a_checkpoint_that_does_not_fit_is_not_trained_on(quick, fitted):
    assert "is of AuroRA(rank=8" in error_line(quick("--ckpt_path", fitted.checkpoint, "--adapter.method.rank", 4))
