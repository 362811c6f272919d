"""The image module: loss, metrics over the whole set, what test and predict leave, checkpoints, subclasses."""

import csv
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from pera_lightning import load_adapted
from pera_lightning.adapters import PERA, AuroRA, LinearProbe, LoRA
from pera_lightning.adapters.aurora import static_inference
from pera_lightning.errors import CheckpointError, ConfigurationError
from pera_lightning.tasks.image_classification.module import ImageClassificationModule
from tests.tasks.image_classification.vision_helpers import (
    CLASSES,
    ForeignData,
    Images,
    Rates,
    fit,
    loader,
    make_trainer,
    module,
    save_tiny_vit,
)

# ---- loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing_is_of_the_training_loss(vit, tmp_path, smoothing):
    network = module(vit, label_smoothing=smoothing, lr=1e-12)
    trainer = fit(tmp_path, network, loader(4), val=loader(4))
    network.eval()
    data = Images(4)
    logits = network(data.x)
    logged = trainer.logged_metrics
    expected = F.cross_entropy(logits, data.y, label_smoothing=smoothing).item()
    assert logged["train/loss"].item() == pytest.approx(expected, rel=1e-5)
    assert logged["val/loss"].item() == pytest.approx(F.cross_entropy(logits, data.y).item(), rel=1e-5)


# ---- metrics --------------------------------------------------------------------------------------------------------


def randomise(network):
    """B is zero at first; random ones make dynamic and static AuroRA differ."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)


def run_test(folder, vit, method, *, classes, count=23, batch_size=8, logger=None):
    """A module with random adapters, tested; count is not a multiple of batch_size."""
    network = module(vit, num_classes=classes)
    trainer = make_trainer(folder, method, logger=logger or CSVLogger(folder, name="", version=""))
    trainer.fit(network, loader(4, classes=classes))
    randomise(network)
    data = Images(count, classes)
    (scores,) = trainer.test(network, DataLoader(data, batch_size=batch_size), verbose=False)
    network.eval()
    return network, data, scores, json.loads((folder / "results.json").read_text())


@torch.no_grad()
def plain(network, data):
    """Loss, top-1 and top-5 by counting."""
    logits = network(data.x).double()
    top = logits.argsort(-1, descending=True)
    hits = top == data.y[:, None]
    return {
        "loss": F.cross_entropy(logits, data.y).item(),
        "accuracy": hits[:, 0].double().mean().item(),
        "accuracy_top5": hits[:, :5].any(1).double().mean().item(),
    }, top[:, 0]


@pytest.mark.parametrize("classes", [5, 6, 9])
def test_metrics_are_of_the_whole_set(vit, tmp_path, classes):
    """23 images in batches of 8, 8 and 7: means over batches would be wrong."""
    network, data, scores, results = run_test(tmp_path, vit, LoRA(rank=2), classes=classes)
    expected, predicted = plain(network, data)
    if classes < 6:
        del expected["accuracy_top5"]
    assert scores == pytest.approx({f"test/{k}": v for k, v in expected.items()}, rel=1e-5)
    assert results["metrics"] == pytest.approx(scores)
    for k in range(classes):
        own = data.y == k
        share = (predicted[own] == k).double().mean().item() if own.any() else 0.0
        assert results["accuracy_per_class"]["test"][str(k)] == pytest.approx(share)
    assert results["n"] == 23


def test_validation_metrics_are_of_the_whole_set(vit, tmp_path):
    network = module(vit, num_classes=6)
    trainer = fit(tmp_path, network, loader(4, classes=6))
    randomise(network)
    data = Images(11, 6)
    for _ in range(2):  # nothing is left of the first time
        (scores,) = trainer.validate(network, DataLoader(data, batch_size=4), verbose=False)
        network.eval()
        expected, _ = plain(network, data)
        assert scores == pytest.approx({f"val/{k}": v for k, v in expected.items()}, rel=1e-5)


class Padded(Images):
    """Every third image, and the last four, without a label."""

    def __init__(self, count, classes):
        super().__init__(count, classes)
        self.y[::3] = self.y[-4:] = -100


def test_images_without_a_label_are_measured_nowhere(vit, tmp_path):
    """Batches of four: the last has no label at all, and the loss of such a batch is no number."""
    network = module(vit, num_classes=6)
    trainer = make_trainer(tmp_path, AuroRA(rank=2), logger=CSVLogger(tmp_path, name="", version=""))
    trainer.fit(network, loader(4, classes=6))
    randomise(network)
    data = Padded(16, 6)
    (tested,) = trainer.test(network, DataLoader(data, batch_size=4), verbose=False)
    (validated,) = trainer.validate(network, DataLoader(data, batch_size=4), verbose=False)
    network.eval()
    known = data.y != -100
    data.x, data.y = data.x[known], data.y[known]
    assert len(data) == 8
    expected, _ = plain(network, data)
    assert {k: tested[f"test/{k}"] for k in expected} == pytest.approx(expected, rel=1e-5)
    assert validated == pytest.approx({f"val/{k}": v for k, v in expected.items()}, rel=1e-5)
    assert json.loads((tmp_path / "results.json").read_text())["n"] == 8


def test_aurora_has_two_rows(vit, tmp_path):
    network, data, scores, results = run_test(tmp_path, vit, AuroRA(rank=2), classes=6)
    dynamic, _ = plain(network, data)
    with static_inference(network):
        static, _ = plain(network, data)
    assert abs(dynamic["loss"] - static["loss"]) > 1e-3
    expected = {f"test/{k}": v for k, v in dynamic.items()} | {f"test_static/{k}": v for k, v in static.items()}
    assert scores == pytest.approx(expected, rel=1e-5)
    assert results["inference"]["test"] == "dynamic, the paper's AuroRA-D"
    assert results["inference"]["test_static"] == "static, the paper's row AuroRA"
    assert set(results["accuracy_per_class"]) == {"test", "test_static"}


@pytest.mark.parametrize("method", [PERA(rank=2), LinearProbe(), AuroRA(inference_mode="static")], ids=str)
def test_others_have_one_row(vit, tmp_path, method):
    network, data, scores, results = run_test(tmp_path, vit, method, classes=3)
    expected, _ = plain(network, data)
    assert scores == pytest.approx({"test/loss": expected["loss"], "test/accuracy": expected["accuracy"]}, rel=1e-5)
    assert set(results["inference"]) == set(results["accuracy_per_class"]) == {"test"}


def test_testing_twice_starts_from_nothing(vit, tmp_path):
    network = module(vit)
    trainer = make_trainer(tmp_path, AuroRA(), logger=CSVLogger(tmp_path, name="", version=""))
    kept = []
    for _ in range(2):
        trainer.test(network, loader(7), verbose=False)
        kept.append(json.loads((tmp_path / "results.json").read_text()))
    assert kept[0]["n"] == kept[1]["n"] == 7
    assert kept[0]["metrics"] == kept[1]["metrics"]


def test_confusion_matrices_are_in_the_event_file(vit, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    run_test(tmp_path, vit, AuroRA(rank=2), classes=3, logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["images"]) == {"test/confusion", "test_static/confusion"}
    image = events.Images("test/confusion")[0]
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert min(image.width, image.height) > 200
    expected = {"test/accuracy", "test_static/accuracy", "test_class/0", "test_static_class/2"}
    assert expected <= set(events.Tags()["scalars"])


def test_results_say_what_was_measured(vit, tmp_path):
    _, _, scores, results = run_test(tmp_path, vit, PERA(rank=2), classes=3)
    assert results["method"] == PERA(rank=2).spec()
    assert (results["targets"], results["trainable"]) == (["attn.qkv[q,v]"], ["head"])
    assert results["trainable_parameters"] == 4 * (2 * 32 + 3) + 3 * 17
    assert results["protocol"]["task"] == "image_classification"
    assert results["protocol"]["model_name"] == str(vit)
    assert results["protocol"]["checkpoint"] is None
    assert 0 < results["seconds"] < 60
    assert results["peak_memory_bytes"]["host"] > 0
    assert results["versions"]["torch"] == torch.__version__ or results["versions"]["torch"] in torch.__version__
    assert results["metrics"] == pytest.approx(scores)


def test_class_names_come_from_the_data_module(vit, tmp_path):
    network = module(vit)
    trainer = make_trainer(tmp_path, logger=CSVLogger(tmp_path, name="", version=""))
    trainer.test(network, datamodule=ForeignData(), verbose=False)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["accuracy_per_class"]["test"]) == ["class a", "class b", "class c"]


def test_a_fast_dev_run_writes_nothing(vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = module(vit)
    trainer = make_trainer(tmp_path, fast_dev_run=True)
    (scores,) = trainer.test(network, loader(), verbose=False)
    trainer.predict(network, loader())
    assert "test/accuracy" in scores
    assert list(tmp_path.rglob("*")) == []


# ---- predictions ----------------------------------------------------------------------------------------------------


def rows_of(folder):
    with (folder / "predictions" / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_are_written(vit, tmp_path, capsys):
    network, data = module(vit), ForeignData()
    trainer = make_trainer(tmp_path, logger=CSVLogger(tmp_path, name="", version=""))
    for _ in range(2):  # the second time replaces the first
        batches = trainer.predict(network, datamodule=data)
    images = Images(11)
    network.eval()
    with torch.no_grad():
        probability, label = network(images.x).softmax(-1).max(-1)
    rows = rows_of(tmp_path)
    assert [row["id"] for row in rows] == [f"{k}.png" for k in range(11)]
    assert [row["label"] for row in rows] == [data.class_names[k] for k in label]
    assert [float(row["probability"]) for row in rows] == pytest.approx(probability.tolist(), abs=2e-6)
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), label)
    assert f"Predictions of 11 examples: {tmp_path / 'predictions' / 'predictions.csv'}" in capsys.readouterr().out


def test_predictions_of_a_plain_loader_have_numbers(vit, tmp_path):
    trainer = make_trainer(tmp_path)  # no logger: under the root folder
    trainer.predict(module(vit), loader(6, batch_size=4))
    rows = rows_of(tmp_path)
    assert [row["id"] for row in rows] == ["0_0", "0_1", "0_2", "0_3", "1_0", "1_1"]
    assert {row["label"] for row in rows} <= {"0", "1", "2"}


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def saved(folder, vit, method=None, **options):
    network = module(vit, num_classes=None, **options)
    trainer = fit(folder, network, ForeignData(4), method=method or AuroRA(rank=2))
    randomise(network)
    trainer.save_checkpoint(folder / "some.ckpt")
    network.eval()
    return network, folder / "some.ckpt"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["load_from_checkpoint", "load_adapted"])
def test_a_checkpoint_reloads_without_data(vit, tmp_path, how, dtype):
    network, path = saved(tmp_path, vit, base_dtype=dtype)
    if how == "load_adapted":
        again = load_adapted(ImageClassificationModule, path)
    else:
        again = ImageClassificationModule.load_from_checkpoint(path).eval()
    assert again.hparams["num_classes"] == 4
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(network(x), again(x))
    assert path.stat().st_size < 100_000


def test_a_checkpoint_of_another_base_does_not_reload(vit, tmp_path):
    _, path = saved(tmp_path, vit)
    save_tiny_vit(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"trained on another base: .* frozen tensors differ"):
        ImageClassificationModule.load_from_checkpoint(path, model_name=str(tmp_path / "other"))


def test_a_checkpoint_of_other_classes_does_not_reload(vit, tmp_path):
    _, path = saved(tmp_path, vit)
    with pytest.raises(CheckpointError, match=r"model.head.weight is \(4, 16\), the model's is \(5, 16\)"):
        ImageClassificationModule.load_from_checkpoint(path, num_classes=5)


# ---- under somebody else's LightningCLI -----------------------------------------------------------------------------


class TheirModule(ImageClassificationModule):
    """Another project's subclass, with an argument and a metric of its own."""

    def __init__(self, model_name: str, note: str = "", num_classes: int | None = None, lr: float = 0.01) -> None:
        super().__init__(model_name=model_name, num_classes=num_classes, lr=lr)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("note/length", float(len(self.hparams["note"])))
        return loss


def test_subclassed_under_a_plain_lightning_cli(vit, tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr("sys.argv", ["theirs"])
    method = {"class_path": "pera_lightning.adapters.PERA", "init_args": {"rank": 2}}
    adapter = {"method": method, "targets": ["attn.qkv[q,v]"], "trainable": ["head"]}
    config = {
        "model": {"model_name": str(vit), "note": "hello"},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path),
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(tmp_path), "name": "", "version": ""},
            },
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "pera_lightning.AdapterInjection", "init_args": adapter}],
        },
    }
    (tmp_path / "theirs.yaml").write_text(json.dumps(config))
    words = ["--config", str(tmp_path / "theirs.yaml")]
    cli = LightningCLI(TheirModule, ForeignData, args=["fit", *words], save_config_callback=None)
    assert cli.model.hparams["note"] == "hello"
    assert cli.trainer.logged_metrics["note/length"] == 5
    assert cli.model.model.head.out_features == CLASSES
    (path,) = tmp_path.rglob("*.ckpt")
    assert path.stat().st_size < 100_000
    LightningCLI(TheirModule, ForeignData, args=["test", *words, "--ckpt_path", str(path)], save_config_callback=None)
    (results,) = tmp_path.glob("results-epoch=0-*.json")  # by the checkpoint's name, which is ModelCheckpoint's own
    assert json.loads(results.read_text())["method"]["class_path"].endswith("PERA")


class Twice(ImageClassificationModule):
    """Another project's subclass, which names its own argument, sets one option itself and takes the rest."""

    def __init__(self, rate: float = 0.01, **shared: Any) -> None:
        super().__init__(lr=2 * rate, **shared)


def test_what_a_subclass_hands_on_acts_and_what_it_takes_is_saved(vit, tmp_path):
    class Fixed(ImageClassificationModule):
        def __init__(self, folder: str, rate: float) -> None:
            super().__init__(model_name=folder, lr=2 * rate, head_lr=rate, lr_schedule="constant", num_classes=CLASSES)

    network, rates = Fixed(str(vit), 0.01), Rates()
    trainer = fit(tmp_path, network, callbacks=[rates])
    assert rates.seen[0] == {"adapter": 0.02, "head": 0.01, "head_no_decay": 0.01}
    trainer.save_checkpoint(tmp_path / "fixed.ckpt")
    again = Fixed.load_from_checkpoint(tmp_path / "fixed.ckpt")
    assert (again.hparams["lr"], again.hparams["head_lr"], again.hparams["rate"]) == (0.02, 0.01, 0.01)


def test_the_command_line_knows_what_a_subclass_takes(vit, tmp_path):
    from lightning.pytorch.cli import LightningCLI

    model = {"class_path": f"{__name__}.Twice", "init_args": {"model_name": str(vit), "rate": 0.03, "head_lr": 0.5}}
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "barebones": False}
    config = {"model": model, "trainer": {**quiet, "default_root_dir": str(tmp_path)}}
    options = {"subclass_mode_model": True, "run": False, "save_config_callback": None}
    cli = LightningCLI(ImageClassificationModule, ForeignData, args=config, **options)
    hparams = cli.model.hparams
    assert (hparams["rate"], hparams["lr"], hparams["head_lr"], hparams["weight_decay"]) == (0.03, 0.06, 0.5, 0.0)
    assert hparams["_class_path"] == f"{__name__}.Twice"
    cli.trainer.fit_loop.max_epochs = 0
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.trainer.save_checkpoint(tmp_path / "twice.ckpt")
    saved = torch.load(tmp_path / "twice.ckpt", weights_only=False)["hyper_parameters"]
    assert "lr" not in saved  # Twice sets it by itself
    assert saved["num_classes"] == CLASSES
    again = ImageClassificationModule.load_from_checkpoint(tmp_path / "twice.ckpt")
    assert type(again) is Twice
    assert again.hparams["lr"] == 0.06


def test_one_name_has_one_value():
    class Doubled(ImageClassificationModule):
        def __init__(self, lr: float, **shared: Any) -> None:
            super().__init__(lr=2 * lr, **shared)

    expected = r"Doubled was given lr=0.01 and hands on lr=0.02: hparams hold one value a name, so rename its own arg"
    with pytest.raises(ConfigurationError, match=expected):
        Doubled(0.01)


def test_a_module_within_another_has_its_own_values(vit):
    class Holder(LightningModule):
        def __init__(self, lr: float) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.held = module(vit, lr=3 * lr)

    holder = Holder(0.01)
    assert (holder.hparams["lr"], holder.held.hparams["lr"]) == (0.01, 0.03)
