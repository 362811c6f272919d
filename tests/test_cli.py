"""The command line in process: what works, what wins, and that wrong input is one line with exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from run_helpers import ROOT, quick_words, run_pera

from pera_lightning import __version__
from pera_lightning.adapters import registry

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def error_line(result):
    """The one line of an error; nothing but notices of other packages stands before it."""
    assert result.code == 2
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "usage:" not in result.err
    return lines[-1]


def options(*words, code=0):
    """The config that fit would run with, from ``--print_config``."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run_pera("fit", "--config", QUICKSTART, *words, "--print_config") == code
    return yaml.safe_load(printed.getvalue())


# ---- before anything is imported ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], ["fitt"], ["fit", "--config", "no.yaml"]])
def test_the_quick_answers_import_nothing_heavy(words):
    code = (
        "import sys\nfrom pera_lightning.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "print('heavy:', sorted({'torch', 'lightning', 'timm', 'jsonargparse', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.slow
def test_importing_the_commands_imports_no_other_task():
    """timm and diffusers are imported when a network is built, not to parse a command line."""
    code = (
        "import sys\nimport pera_lightning.commands.lightning_cli\n"
        "print(sorted({'timm', 'diffusers', 'peft', 'datasets', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command(pera):
    result = pera("--help")
    assert result.code == 0
    for command in ("fit", "validate", "test", "predict", "params"):
        assert f"  {command} " in result.out


def test_no_command_is_an_error_with_the_help(pera):
    result = pera()
    assert (result.code, result.out) == (2, pera("--help").out)


def test_version(pera):
    assert pera("--version").out.strip() == __version__


def test_help_of_a_command_lists_its_options(pera):
    result = pera("fit", "--help")
    assert result.code == 0
    for option in ("--adapter.targets", "--adapter.method", "--trainer.max_epochs", "--ckpt_path"):
        assert option in result.out
    assert "--optimizer" not in result.out


# ---- configs --------------------------------------------------------------------------------------------------------


def test_a_config_of_the_package_is_found_from_anywhere(pera, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("configs/quickstart.yaml", "quickstart.yaml"):
        assert pera("params", "--config", name).code == 0
        assert pera("params", f"--config={name}").code == 0
    assert pera("params", "-c", "quickstart.yaml").code == 0


def test_an_own_config_comes_before_the_package_s(pera, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    changed = yaml.safe_load(Path(QUICKSTART).read_text())
    changed["adapter"]["method"]["init_args"]["rank"] = 3
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(changed))
    monkeypatch.chdir(tmp_path)
    assert "AuroRA(rank=3," in pera("params", "--config", "configs/quickstart.yaml").out


def test_later_configs_win(pera, tmp_path):
    (tmp_path / "more.yaml").write_text("adapter:\n  method: {class_path: PERA, init_args: {rank: 5}}\n")
    assert "PERA(rank=5," in pera("params", "--config", QUICKSTART, "--config", tmp_path / "more.yaml").out


# ---- one flag changes the method ------------------------------------------------------------------------------------


def test_another_method_keeps_what_it_shares():
    method = options("--adapter.method", "PERA", "--adapter.method.rank", "3")["adapter"]["method"]
    assert method["class_path"] == "pera_lightning.adapters.PERA"
    assert method["init_args"]["rank"] == 3
    assert method["init_args"]["alpha"] == 16
    assert "activation" not in method["init_args"]
    method = options("--adapter.method", "LoRA")["adapter"]["method"]
    assert method["init_args"]["rank"] == 8


@pytest.mark.parametrize("name", list(registry.registered_methods()))
def test_params_works_with_every_method(pera, name):
    result = pera("params", "--config", QUICKSTART, "--adapter.method", name)
    assert result.code == 0, result.err
    assert f"Injected {name}(" in result.out


OTHER_PACKAGE = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F
from pera_lightning.adapters import LinearAdapter, LinearMethod, register_method


class DiagonalLayer(LinearAdapter):
    def __init__(self, *, in_features, out_features, gain):
        super().__init__(in_features=in_features, out_features=out_features, scale=gain, dropout=0.0)
        self.d = nn.Parameter(torch.zeros(out_features, 1))

    def reset_parameters(self, generator=None):
        nn.init.zeros_(self.d)

    def delta_output(self, x):
        return self.scale * x.sum(-1, keepdim=True) * self.d.T.to(x.dtype)

    def delta_weight(self, weight):
        return self.scale * self.d.expand(-1, self.in_features)


{decorator}
@dataclass(frozen=True, kw_only=True)
class Diagonal(LinearMethod):
    gain: float = 1.0

    def build(self, context):
        return DiagonalLayer(in_features=context.in_features, out_features=context.out_features, gain=self.gain)
"""


@pytest.mark.parametrize("decorator", ["", "@register_method"], ids=["plain", "registered"])
def test_a_method_of_another_package(quick, tmp_path, monkeypatch, decorator):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    name = f"other_package_{len(decorator)}"
    (tmp_path / f"{name}.py").write_text(OTHER_PACKAGE.format(decorator=decorator))
    monkeypatch.syspath_prepend(tmp_path)
    method = ["--adapter.method", f"{name}.Diagonal", "--adapter.method.gain", "0.5"]
    result = quick(*method)
    assert result.code == 0, result.err
    assert "Injected Diagonal(gain=0.5)" in result.out
    checkpoint = tmp_path / "quickstart" / "checkpoints" / "best.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state["model.blocks.0.attn.qkv.adapters.q.d"].abs().max() > 0
    assert quick(*method, "--ckpt_path", checkpoint, command="test").code == 0
    results = json.loads((tmp_path / "quickstart" / "results.json").read_text())
    assert results["method"] == {"class_path": f"{name}.Diagonal", "init_args": {"gain": 0.5}}


# ---- fit, test, predict, again --------------------------------------------------------------------------------------


def test_what_a_fit_leaves(fitted):
    names = {p.relative_to(fitted.run).as_posix() for p in fitted.run.rglob("*") if p.is_file()}
    events = {name for name in names if name.startswith("events.out")}
    assert names - events == {
        "config.yaml",
        "hparams.yaml",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "adapter/adapter.safetensors",
        "adapter/adapter_config.json",
        "splits/digits.json",
    }
    assert len(events) == 1
    assert fitted.checkpoint.stat().st_size < 500_000  # the base alone has 850 kB


def test_fit_says_what_was_injected_and_where_things_are(quick, tmp_path):
    result = quick()
    run = tmp_path / "quickstart"
    assert "Injected AuroRA(rank=8, alpha=16.0" in result.out
    assert "trainable 11,669 (adapters 11,264, other 405) of 222,629: 5.2415 %" in result.out
    assert f"Adapter of the best checkpoint: {run / 'adapter'}" in result.out
    assert f"Logs and checkpoints: {run}" in result.out


def test_the_same_commands_twice_in_one_folder(quick, tmp_path):
    run = tmp_path / "quickstart"
    kept = []
    for _ in range(2):
        assert quick().code == 0
        assert quick("--ckpt_path", run / "checkpoints" / "best.ckpt", command="test").code == 0
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        kept.append((state, json.loads((run / "results.json").read_text())["metrics"]))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    for name, value in kept[0][0].items():
        assert torch.equal(value, kept[1][0][name]), name
    assert kept[0][1] == kept[1][1]


def test_the_seed_changes_the_run(quick, fitted, tmp_path):
    assert quick("--seed_everything", 1).code == 0
    one = torch.load(fitted.checkpoint, weights_only=True)["state_dict"]
    other = torch.load(tmp_path / "quickstart" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    name = "model.blocks.0.attn.qkv.adapters.q.A"
    assert not torch.equal(one[name], other[name])


def test_test_then_predict(quick, fitted, tmp_path):
    """The folder of the run is the command line's, the weights are the checkpoint's."""
    result = quick("--ckpt_path", fitted.checkpoint, command="test")
    assert result.code == 0, result.err
    for metric in ("test/accuracy", "test/loss", "test_static/accuracy", "test_static/loss"):
        assert metric in result.out
    results = json.loads((tmp_path / "quickstart" / "results.json").read_text())
    assert results["n"] == 179
    assert results["seed"] == 0
    result = quick("--ckpt_path", fitted.checkpoint, command="predict")
    table = tmp_path / "quickstart" / "predictions" / "predictions.csv"
    assert f"Predictions of 179 images: {table}" in result.out
    assert len(table.read_text().splitlines()) == 180


def test_validate_with_a_checkpoint(quick, fitted):
    result = quick("--ckpt_path", fitted.checkpoint, command="validate")
    assert result.code == 0
    assert "val/accuracy" in result.out


def test_fit_goes_on_from_a_checkpoint(quick, fitted, tmp_path):
    assert quick("--ckpt_path", fitted.checkpoint, "--trainer.max_epochs", 2).code == 0
    last = torch.load(tmp_path / "quickstart" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4


def test_print_config_can_be_fed_back(pera, tmp_path):
    words = [*quick_words(tmp_path)[1:], "--adapter.method", "PERA", "--adapter.method.rank", "8"]
    first = pera("fit", *words, "--print_config")
    assert first.code == 0
    (tmp_path / "all.yaml").write_text(first.out)
    assert pera("fit", "--config", tmp_path / "all.yaml", "--print_config").out == first.out
    assert pera("fit", "--config", tmp_path / "all.yaml").code == 0
    # So can what the run has saved.
    saved = tmp_path / "quickstart" / "config.yaml"
    again = pera("fit", "--config", saved, "--print_config")
    assert yaml.safe_load(again.out) == yaml.safe_load(first.out)


# ---- what is given on the command line wins -------------------------------------------------------------------------


def test_the_command_line_wins_over_the_checkpoint(quick, fitted, tmp_path):
    """Lightning would put the checkpoint's hyperparameters over what is given here."""
    given = {"adapter.method.inference_mode": "static", "data.eval_batch_size": 7, "model.lr": 0.5}
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    result = quick("--ckpt_path", fitted.checkpoint, *words, command="test")
    assert result.code == 0, result.err
    assert "test_static" not in result.out  # static is what is set
    results = json.loads((tmp_path / "quickstart" / "results.json").read_text())
    assert results["method"]["init_args"]["inference_mode"] == "static"
    saved = yaml.safe_load((tmp_path / "quickstart" / "config.yaml").read_text())
    assert saved["data"]["init_args"]["eval_batch_size"] == 7
    assert saved["model"]["init_args"]["lr"] == 0.5


def test_a_learning_rate_given_at_resume_is_in_the_new_checkpoint(quick, fitted, tmp_path):
    words = ["--ckpt_path", fitted.checkpoint, "--trainer.max_epochs", 2, "--model.label_smoothing", 0.3]
    assert quick(*words).code == 0
    last = torch.load(tmp_path / "quickstart" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["hyper_parameters"]["label_smoothing"] == 0.3
    assert last["hyper_parameters"]["num_classes"] == 5


# ---- the trainer's callbacks ----------------------------------------------------------------------------------------


def configured(*words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pera"])  # Lightning warns where both are given
    from pera_lightning.commands.lightning_cli import PeraCLI

    return PeraCLI(args=["--config", QUICKSTART, *words], run=False, save_config_callback=None)


def test_the_adapter_comes_before_the_config_s_callbacks(monkeypatch):
    from pera_lightning import AdapterInjection

    cli = configured(monkeypatch=monkeypatch)
    assert isinstance(cli.trainer.callbacks[0], AdapterInjection)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert names.count("AdapterInjection") == 1
    assert {"ModelCheckpoint", "LearningRateMonitor"} <= set(names)


@pytest.mark.parametrize("callbacks", ["null", '{"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging"}'])
def test_the_adapter_comes_first_without_a_list_too(callbacks, monkeypatch):
    cli = configured("--trainer.callbacks", callbacks, monkeypatch=monkeypatch)
    assert type(cli.trainer.callbacks[0]).__name__ == "AdapterInjection"
    assert ("EMAWeightAveraging" in [type(c).__name__ for c in cli.trainer.callbacks]) == (callbacks != "null")


def test_a_callback_that_copies_the_model_copies_the_adapters(quick, tmp_path):
    """Weight averaging copies the module at its setup: after the injection, or it would average the base."""
    callback = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
    result = quick("--trainer.callbacks", json.dumps([callback]))
    assert result.code == 0, result.err


# ---- params ---------------------------------------------------------------------------------------------------------


def test_params_reads_neither_weights_nor_data(pera, monkeypatch):
    import datasets
    import timm

    def refuse(*args, **kwargs):
        raise AssertionError("params asked for data")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    create, asked = timm.create_model, []

    def spy(name, pretrained=False, **keywords):
        asked.append(pretrained)
        return create(name, pretrained=pretrained, **keywords)

    monkeypatch.setattr(timm, "create_model", spy)
    result = pera("params", "--config", str(ROOT / "configs" / "vit_dtd_aurora.yaml"))
    assert result.code == 0, result.err
    assert asked == [False]
    assert "blocks.*.attn.qkv  12 x  2304 x 768  rows q, v" in result.out
    # 47 classes, from the catalogue: a head of 47 * 769.
    assert "trainable 110,351 (adapters 74,208, other 36,143) of 85,909,007" in result.out


def test_params_takes_the_number_of_classes_that_is_given(pera):
    result = pera("params", "--config", QUICKSTART, "--model.num_classes", 3)
    assert "other 243)" in result.out  # 3 * 81


def test_params_leaves_no_file(pera, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pera("params", "--config", QUICKSTART).code == 0
    assert list(tmp_path.iterdir()) == []


# ---- wrong input: found while the command line is read --------------------------------------------------------------

PARSED = {
    "rank that is no number": (["--adapter.method.rank", "two"], "adapter.method.rank: int is needed; given two"),
    "rank 0": (["--adapter.method.rank", "0"], "rank=0: a positive integer is needed"),
    "rank negative": (["--adapter.method.rank", "-3"], "rank=-3: a positive integer is needed"),
    "alpha 0": (["--adapter.method.alpha", "0"], "alpha=0.0: a number above 0 is needed"),
    "alpha nan": (["--adapter.method.alpha", ".nan"], "alpha=nan: a number above 0 is needed"),
    "dropout 1": (["--adapter.method.dropout", "1"], "dropout=1.0: a probability in [0, 1) is needed"),
    "dropout negative": (["--adapter.method.dropout", "-0.1"], "dropout=-0.1: a probability in [0, 1) is needed"),
    "unknown method": (
        ["--adapter.method", "AuroRa"],
        "adapter.method: class 'AuroRa' is not known; there are AuroRA, LinearProbe, FullFineTuning, HiRA, HiLoRA, "
        "LoRA, PERA, or give a dotted path; closest: AuroRA",
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
        (["fitt"], "unknown command 'fitt'; there are fit, validate, test, predict, params; closest: fit"),
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
    "unknown row block": (
        ["--adapter.targets", '["attn.qkv[q,w]"]'],
        "blocks.0.attn.qkv has no row block 'w', it has q, k, v",
    ),
    "a target that is no linear layer": (
        ["--adapter.targets", '["norm1"]'],
        "target 'norm1' names blocks.0.norm1: LayerNorm is no linear layer",
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
        "trained parameters are in low precision, where small updates vanish",
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
    "nan": (["--model.lr", "1e30"], "the training loss is nan at optimizer step 1, epoch 0, batch 1"),
}


@pytest.mark.parametrize(("words", "expected"), BUILT.values(), ids=BUILT)
def test_what_does_not_fit_is_one_line(quick, words, expected):
    assert expected in error_line(quick(*words))


def test_probe_without_a_head_is_one_line(quick):
    line = error_line(quick("--adapter.method", "LinearProbe", "--adapter.trainable", "[]"))
    assert "LinearProbe trains the modules named in trainable" in line


UNFITTING = {
    "another method": (["--adapter.method", "PERA"], ["best.ckpt is of AuroRA(rank=8", "the model has PERA(rank=8"]),
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
