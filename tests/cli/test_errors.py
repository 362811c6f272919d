"""The command line in process: wrong input is one line with exit code 2."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
    "rank that is no number": (["--adapter.method.rank", "two"], "adapter.method.rank: int is needed; given two"),
    "rank 0": (["--adapter.method.rank", "0"], "rank=0: a positive integer is needed"),
    "rank negative": (["--adapter.method.rank", "-3"], "rank=-3: a positive integer is needed"),
    "alpha 0": (["--adapter.method.alpha", "0"], "alpha=0.0: a number above 0 is needed"),
    "alpha nan": (["--adapter.method.alpha", ".nan"], "alpha=nan: a number above 0 is needed"),
    "dropout 1": (["--adapter.method.dropout", "1"], "dropout=1.0: a number in [0, 1) is needed"),
    "dropout negative": (["--adapter.method.dropout", "-0.1"], "dropout=-0.1: a number in [0, 1) is needed"),
    "unknown method": (
        ["--adapter.method", "AuroRa"],
        "adapter.method: class 'AuroRa' is not known; there are LoRA, AuroRA, LinearProbe, FullFineTuning, HiRA, "
        "HiLoRA, MoSLoRA, PERA, or give a dotted path; closest: AuroRA",
    ),
    "a method that cannot be imported": (["--adapter.method", "no.such.Method"], "adapter.method: No module named"),
    "a method that is none": (["--adapter.method", "torch.nn.Linear"], "not correspond to a subclass of Method"),
    "unknown activation": (
        ["--adapter.method.activation", "tanhh"],
        "adapter.method.activation: one of 'tanh', 'leaky_relu', 'sigmoid', 'relu' is needed; given tanhh; closest:",
    ),
    "unknown reference": (
        ["--adapter.method", "HiRA", "--adapter.method.reference", "weights"],
        "adapter.method.reference: one of 'weight', 'random', 'svd', 'smooth' is needed; given weights; closest:",
    ),
    "unknown init": (
        ["--adapter.method", "LoRA", "--adapter.method.init", "pisa"],
        "adapter.method.init: one of 'default', 'gaussian', 'pissa', 'milora' is needed; given pisa; closest: pissa",
    ),
    "unknown key of a method": (
        ["--adapter.method.rnak", "3"],
        "adapter.method: AuroRA has no option 'rnak'; closest: rank",
    ),
    "a key of another method": (
        ["--adapter.method", "HiRA", "--adapter.method.alpha", "3"],
        "adapter.method: HiRA has no option 'alpha'",
    ),
    "unknown key of the model": (["--model.lrr", "1"], "ImageClassificationModule has no option 'lrr'; closest: lr"),
    "unknown key of the data": (["--data.batch_sice", "3"], "has no option 'batch_sice'; closest: batch_size"),
    "unknown model": (["--model", "ImageClassifier"], "closest: ImageClassificationModule"),
    "unknown data module": (["--data", "ImageData"], "closest: ImageDataModule"),
    "a model that is none": (["--model", "torch.nn.Linear"], "model: Import path does not correspond to a subclass of"),
    "unknown option": (
        ["--trainer.max_epoch", "3"],
        "unknown option --trainer.max_epoch; closest: --trainer.max_epochs",
    ),
    "abbreviated option": (["--trainer.max_ep", "3"], "unknown option --trainer.max_ep"),
    "abbreviated group": (["--adapt.seed", "3"], "unknown option --adapt.seed; closest: --adapter.seed"),
    "no optimizer group": (["--optimizer", "Adam"], "unknown option --optimizer"),
    "a word too many": (["extra"], "extra"),
    "int": (["--trainer.max_epochs", "three"], "trainer.max_epochs: int is needed; given three"),
    "not a whole number": (["--trainer.max_epochs", "2.5"], "trainer.max_epochs: int is needed; given 2.5"),
    "list": (["--data.classes", "five"], "data.classes: list is needed; given five"),
    "unknown precision": (["--trainer.precision", "bf17"], "closest: bf16"),
    "unknown schedule": (
        ["--model.lr_schedule", "linea"],
        "model.lr_schedule: one of 'linear', 'cosine', 'constant' is needed; given linea; closest: linear",
    ),
    "unknown dtype": (["--model.base_dtype", "int8"], "model.base_dtype: one of 'float32', 'bfloat16', 'float16'"),
    "unknown on_unused": (["--adapter.on_unused", "never"], "adapter.on_unused: one of 'raise', 'warn' is needed"),
    "learning rate negative": (["--model.lr", "-1"], "error: lr=-1.0: a number above 0 is needed"),
    "batch of none": (["--data.batch_size", "0"], "error: batch_size must be at least 1; given 0"),
    "unknown transform": (["--data.transform", "fourier"], "fourierft"),
    "unknown callback": (['--trainer.callbacks=[{"class_path": "EarlyStoping"}]'], "class 'EarlyStoping' is not known"),
    "callback without its argument": (
        ['--trainer.callbacks=[{"class_path": "EarlyStopping"}]'],
        "trainer.callbacks: EarlyStopping: the following arguments are required: monitor",
    ),
    "unknown accelerator": (["--trainer.accelerator", "cpuu"], "invalid accelerator name"),
    "no value": (["--adapter.method.rank"], "expected one argument"),
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
        (["fit", "--config=nothing/like/it.yml"], "config 'nothing/like/it.yml' does not exist"),
        (["fit"], "required: "),
        (["params"], "required: "),
        (["fit", "--config"], "expected one argument"),
        (["test", "--config", QUICKSTART, "--ckpt", "x"], "unknown option --ckpt; closest: --ckpt_path"),
        (["params", "--config", QUICKSTART, "--ckpt_path", "x"], "unknown option --ckpt_path"),
        (["params", "--config", QUICKSTART, "--adapter.method.rank", "0"], "rank=0: a positive integer is needed"),
        (["params", "--config", QUICKSTART, "--adapter.targets", '["qkw"]'], "'qkw' matches none of"),
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
    (tmp_path / "typo.yaml").write_text(text.replace("targets:", "target:"))
    assert "target" in error_line(pera("fit", "--config", tmp_path / "typo.yaml"))


# ---- wrong input: found when the network or the data is there -------------------------------------------------------


def pictures(folder, count=6):
    folder.mkdir(parents=True)
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def no_data(folder):
    return folder / "photos"


def empty_data(folder):
    (folder / "photos").mkdir()
    return folder / "photos"


def one_class(folder):
    return pictures(folder / "photos" / "cat").parent


def empty_class(folder):
    (one_class(folder) / "dog").mkdir()
    return folder / "photos"


def broken_header(folder):
    pictures(one_class(folder) / "dog")
    (folder / "photos" / "dog" / "3.png").write_bytes(b"this is no picture")
    return folder / "photos"


def cut_short(folder):
    root = one_class(folder)
    for path in pictures(root / "dog").iterdir():
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            path.with_suffix(".jpg")
        )
        path.unlink()
        data = path.with_suffix(".jpg").read_bytes()
        path.with_suffix(".jpg").write_bytes(data[: len(data) // 3])
    return root


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (no_data, "photos does not exist: no 'photos' in"),
        (empty_data, "must hold a folder of images for each of at least two classes; it holds none"),
        (one_class, "must hold a folder of images for each of at least two classes; it holds only cat/"),
        (empty_class, "dog has no images"),
        (broken_header, "1 broken image(s) under"),
        (broken_header, "dog/3.png"),
        (cut_short, ".jpg of"),
    ],
)
def test_wrong_folders_are_one_line(quick, tmp_path, make, expected):
    folder = make(tmp_path)
    assert expected in error_line(quick("--data.dataset", folder, "--data.classes", "null", folder=tmp_path / "runs"))


BUILT = {
    "no target matched": (["--adapter.targets", '["attn.qkw"]'], "targets: 'attn.qkw' matches none of the"),
    "unknown slice": (
        ["--adapter.targets", '["attn.qkv[q,w]"]'],
        "blocks.0.attn.qkv has no slice 'w', it has q, k, v",
    ),
    "a target that is not a linear layer": (
        ["--adapter.targets", '["norm1"]'],
        "target 'norm1' names blocks.0.norm1: LayerNorm is not a linear layer",
    ),
    "no target": (["--adapter.targets", "[]"], "AuroRA adapts linear layers: name them in targets"),
    "unknown head": (["--adapter.trainable", '["heed"]'], "trainable: 'heed' matches none of the"),
    "a target inside the head": (["--adapter.targets", '["head"]'], "head is a target and part of 'head'"),
    "rank larger than the layer": (
        ["--adapter.method.rank", "81"],
        "rank=81 is larger than blocks.0.attn.qkv[q] (80 x 80) allows: at most 80",
    ),
    "bf16-true": (["--trainer.precision", "bf16-true"], "precision=bf16-true casts the adapters too"),
    "16-true": (["--trainer.precision", "16-true"], "precision=16-true casts the adapters too"),
    "a base trained in low precision": (
        ["--adapter.method", "FullFineTuning", "--model.base_dtype", "bfloat16"],
        "trained parameters are in low precision, in which small updates vanish",
    ),
    "unknown data set": (["--data.dataset", "dtdd"], "unknown data set 'dtdd'; there are"),
    "one class left": (["--data.classes", "[5]"], "classifying needs at least two classes; chosen: 5"),
    "unknown class": (["--data.classes", "[5, 11]"], "no class 11; there are 0, 1"),
    "unknown asset": (["--model.model_name", "asset:vit"], "model_name='asset:vit': no such asset; there are: vit_dig"),
    "unknown network": (["--model.model_name", "vit_base_patch16_223"], "closest: vit_base_patch16_224"),
    "unknown weights": (
        ["--model.model_name", "vit_base_patch16_224.orig_in22k"],
        "vit_base_patch16_224 has the weights",
    ),
    "no checkpoint": (["--ckpt_path", "nothing.ckpt"], "checkpoint nothing.ckpt does not exist"),
    "unknown strategy": (
        ["--trainer.strategy", "fspd2"],
        "strategy='fspd2' does not exist; give auto, ddp or fsdp2; cl",
    ),
    "nan": (["--model.lr", "1e30"], "the training loss is nan at optimizer step 1, epoch 0, batch 1"),
}


@pytest.mark.parametrize(("words", "expected"), BUILT.values(), ids=BUILT)
def test_what_does_not_fit_is_one_line(quick, words, expected):
    assert expected in error_line(quick(*words))


def test_a_checkpoint_that_is_not_there_names_those_of_the_run(quick, tmp_path):
    assert quick().code == 0
    line = error_line(quick("--ckpt_path", "runs/other/best.ckpt", command="test"))
    folder = tmp_path / "quickstart" / "checkpoints"
    assert line.endswith(f"runs/other/best.ckpt does not exist; this run has {folder}/best.ckpt, {folder}/last.ckpt")


def test_last_without_a_last_checkpoint_says_where_it_looked(quick, tmp_path):
    with pytest.warns(UserWarning, match=r"quickstart/checkpoints has no last\.ckpt; the fit starts"):
        assert quick("--ckpt_path", "last").code == 0


def test_probe_without_a_head_is_one_line(quick):
    line = error_line(quick("--adapter.method", "LinearProbe", "--adapter.trainable", "[]"))
    assert "LinearProbe trains the modules named in trainable" in line


UNFITTING = {
    "another method": (["--adapter.method", "PERA"], ["best.ckpt is of AuroRA, the model has PERA"]),
    "another rank": (["--adapter.method.rank", "4"], ["is of AuroRA(rank=8", "the model has AuroRA(rank=4"]),
    "other rows": (["--adapter.targets", '["attn.qkv[q]"]'], ["adapts 4 layers by ['attn.qkv[q,v]'], the model 4 by"]),
    "other targets": (["--adapter.targets", '["attn.proj"]'], ["they differ at blocks.0.attn.qkv"]),
    "another head": (["--adapter.trainable", '["fc_norm", "head"]'], ["best.ckpt"]),
    "another base": (["--model.pretrained", "false"], ["was trained on another base: 4 of 4 frozen weights differ"]),
    "other classes": (
        ["--data.classes", "[5, 6, 7]"],
        ["model.head.weight is (5, 80), the model's is (3, 80); does the data have another number of classes?"],
    ),
}


@pytest.mark.parametrize(("words", "expected"), UNFITTING.values(), ids=UNFITTING)
def test_a_checkpoint_that_does_not_fit_is_one_line(quick, fitted, words, expected):
    line = error_line(quick("--ckpt_path", fitted.checkpoint, *words, command="test"))
    assert all(part in line for part in expected), line


def test_a_checkpoint_that_does_not_fit_is_not_trained_on(quick, fitted):
    assert "is of AuroRA(rank=8" in error_line(quick("--ckpt_path", fitted.checkpoint, "--adapter.method.rank", 4))


def test_a_damaged_checkpoint_is_one_line(quick, fitted, tmp_path):
    (tmp_path / "cut.ckpt").write_bytes(fitted.checkpoint.read_bytes()[:5000])
    line = error_line(quick("--ckpt_path", tmp_path / "cut.ckpt", command="test"))
    assert "cut.ckpt is damaged or no checkpoint" in line


def test_a_checkpoint_without_adapters_is_one_line(quick, tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "plain.ckpt")
    line = error_line(quick("--ckpt_path", tmp_path / "plain.ckpt", command="test"))
    assert "plain.ckpt holds no adapters" in line
