"""Images that a DreamBooth run makes: of validation, test and prediction, and what measuring them gives."""

import json
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch.utils.data import DataLoader

from pera_lightning.adapters import PERA, AuroRA
from pera_lightning.tasks.dreambooth.image_folder import GeneratedImage, GeneratedImages, read_images
from pera_lightning.tasks.dreambooth.image_stages import StageImages
from pera_lightning.tasks.dreambooth.similarity import Similarity
from tests.tasks.dreambooth import fits as fits
from tests.tasks.dreambooth.fits import base_fixture, data, fit, make_trainer, module, photos_fixture
from tests.tasks.dreambooth.sdxl import SHALLOW
from tests.tasks.dreambooth.test_similarity import save_clip, save_dino

PROMPTS = ["a photo of {}", "{} on a beach"]
NAMES = [f"{stem}-seed{seed}" for stem in ("00-a-photo-of-sks-dog", "01-sks-dog-on-a-beach") for seed in (0, 3)]
SAMPLING = {"height": 32, "width": 32, "steps": 2, "guidance_scale": 2.0, "prediction_type": "epsilon"}


base = base_fixture(unet=SHALLOW)
photos = photos_fixture()


@pytest.fixture(scope="module")
def measures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measures")
    return {"dino": save_dino(folder / "dino"), "clip": save_clip(folder / "clip")}


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def state(network):
    """All that images must leave as it was."""
    numbers = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    parameters = {n: (p.dtype, p.requires_grad, p.device) for n, p in network.named_parameters()}
    modes = {n: m.training for n, m in network.named_modules()}
    values = {n: p.detach().clone() for n, p in network.named_parameters()}
    return (numbers, parameters, modes), values


class Watches(Callback):
    """What a validation changed, and the modes of the training's steps."""

    def __init__(self):
        self.changed, self.modes = [], []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.before = state(pl_module)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.compare(state(pl_module), 0)

    def on_validation_end(self, trainer, pl_module):
        self.compare(state(pl_module), 1)  # the callback has put back what Lightning's loader drew

    def compare(self, after, first):
        pairs = zip(self.before[0][first:], after[0][first:], strict=True)
        self.changed += [one != other for one, other in pairs]
        self.changed += [not torch.equal(value, after[1][name]) for name, value in self.before[1].items()]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.modes.append({m.training for m in pl_module.model.modules()})


@pytest.fixture(scope="module")
def validated(base, photos, tmp_path_factory):
    """A fit of three steps in bfloat16, with images after the first step and at the end."""
    folder, watches = tmp_path_factory.mktemp("validated"), Watches()
    rows = data(photos, folder / "cache", validation_prompts=PROMPTS, validation_seeds=[3, 0])
    logger = TensorBoardLogger(folder, "run", "")
    options = {"val_check_interval": 1, "precision": "bf16-mixed", "logger": logger}
    fit(folder, module(base, base_dtype="bfloat16"), rows, callbacks=[watches], **options)
    return folder / "run", watches


def test_validation_writes_each_image_and_their_grid(validated):
    folder, _ = validated
    steps = sorted(path.name for path in (folder / "validation").iterdir())
    assert steps == ["step_000001", "step_000002", "step_000003"]
    made = {}
    for step in steps:
        written = folder / "validation" / step
        names = {path.name for path in written.iterdir()}
        assert names == {*(f"{name}.png" for name in NAMES), "grid.png", "images.json"}
        assert read_images(written).step == int(step.removeprefix("step_"))
        files = {path.name: pixels(path) for path in written.glob("*.png")}
        assert all(files[f"{name}.png"].shape == (fits.SIDE, fits.SIDE, 3) for name in NAMES)
        made[step] = files
    first, last = (made[step][f"{NAMES[0]}.png"].astype(int) for step in (steps[0], steps[-1]))
    assert (first != last).any()  # of the same prompt and seed
    assert (first != made[steps[0]][f"{NAMES[1]}.png"]).any()


def test_the_grid_is_labelled_by_step_prompts_and_seeds(base, photos, tmp_path, monkeypatch):
    from pera_lightning.tasks.dreambooth import image_stages

    drawn = []
    original = image_stages.labelled_grid
    monkeypatch.setattr(image_stages, "labelled_grid", lambda *given: drawn.append(given) or original(*given))
    rows = data(photos, validation_prompts=PROMPTS, validation_seeds=[3, 0])
    fit(tmp_path, module(base), rows)
    ((images, prompts, seeds, title),) = drawn
    assert (prompts, seeds, title) == (["a photo of sks dog", "sks dog on a beach"], ["seed 0", "seed 3"], "step 3")
    folder = tmp_path / "validation" / "step_000003"
    assert (np.asarray(images[0][1]) == pixels(folder / f"{NAMES[1]}.png")).all()
    assert (np.asarray(images[1][0]) == pixels(folder / f"{NAMES[2]}.png")).all()


def test_tensorboard_has_the_grid_of_every_validation(validated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = validated
    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["images"] == ["val/images"]
    images = events.Images("val/images")
    assert [image.step for image in images] == [1, 2, 3]
    grid = pixels(folder / "validation" / "step_000003" / "grid.png")
    assert (images[-1].height, images[-1].width) == grid.shape[:2]


def test_images_change_neither_types_nor_modes_nor_random_numbers(validated):
    _, watches = validated
    assert watches.changed
    assert not any(watches.changed)
    assert watches.modes == [{True}] * 3


def test_no_images_where_none_are_asked_for(base, photos, tmp_path):
    fit(tmp_path, module(base), data(photos))
    assert not (tmp_path / "validation").exists()


def evaluated(folder, stage, network, rows, method=None):
    seed_everything(0, verbose=False)
    trainer = make_trainer(folder, method, [fits.Randomise()])
    given = {"verbose": False} if stage != "predict" else {}
    return getattr(trainer, stage)(network, datamodule=rows, **given), trainer


def test_a_network_is_validated_without_training(base, photos, tmp_path):
    evaluated(tmp_path, "validate", module(base), data(photos, validation_prompts=["a {}"]))
    names = sorted(path.name for path in (tmp_path / "validation" / "step_000000").iterdir())
    assert names == ["00-a-sks-dog-seed0.png", "grid.png", "images.json"]


# --- test ---


@pytest.fixture(scope="module")
def tested(base, photos, measures, tmp_path_factory):
    """A dynamic AuroRA, which is tested twice."""
    folder = tmp_path_factory.mktemp("tested")
    network = module(base, **measures)
    returned, _ = evaluated(folder, "test", network, data(photos), AuroRA(rank=2))
    return folder, returned[0], json.loads((folder / "results.json").read_text())


def test_results_say_what_was_measured(tested, base, measures):
    _, returned, results = tested
    names = {f"{stage}/{name}" for stage in ("test", "test_static") for name in ("dino", "clip_i", "clip_t")}
    assert set(results["metrics"]) == names
    assert returned == pytest.approx(results["metrics"], abs=1e-6)
    assert all(-1 <= value <= 1 for value in results["metrics"].values())
    assert results["n"] == 4
    assert results["inference"] == {
        "test": "dynamic, the paper's AuroRA-D",
        "test_static": "static, the paper's row AuroRA",
    }
    protocol = results["protocol"]
    assert (protocol["task"], protocol["model_name"], protocol["dino"]) == ("dreambooth", base, measures["dino"])
    assert protocol["sampling"] == SAMPLING
    assert protocol["data"]["identifier"] == "sks"
    assert len(protocol["data"]["sha256"]) == 3


def test_metrics_are_those_of_the_images_that_were_written(tested, photos, measures):
    folder, _, results = tested
    rows = data(photos)
    rows.setup("test")
    similarity = Similarity(**measures)
    for stage, name in {"test": "test_images", "test_static": "test_images_static"}.items():
        made = read_images(folder / name)
        assert [(one.prompt, one.seed) for one in made.images] == [
            (prompt, seed) for prompt in ("a photo of sks dog", "a dog") for seed in (0, 1)
        ]
        assert (folder / name / "grid.png").is_file()
        images = [Image.open(folder / name / one.file) for one in made.images]
        scores = similarity.scores(images, [one.prompt for one in made.images], rows.reference_images())
        for metric in ("dino", "clip_i", "clip_t"):
            assert results["metrics"][f"{stage}/{metric}"] == pytest.approx(scores[metric], abs=1e-5)
        each = results["images"][stage]
        assert each == {
            one.file: pytest.approx(score, abs=1e-5) for one, score in zip(made.images, scores["images"], strict=True)
        }


def test_dynamic_and_static_images_differ(tested):
    folder = tested[0]
    files = [path.name for path in (folder / "test_images").glob("0*.png")]
    assert len(files) == 4
    assert any((pixels(folder / "test_images" / f) != pixels(folder / "test_images_static" / f)).any() for f in files)


@pytest.mark.parametrize("left", [[], ["clip"]])
def test_measures_that_are_left_out(base, photos, measures, tmp_path, left):
    chosen = {name: measures[name] if name in left else None for name in ("dino", "clip")}
    evaluated(tmp_path, "test", module(base, **chosen), data(photos, seeds=[0]))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["metrics"]) == ({"test/clip_i", "test/clip_t"} if left else set())
    assert results["n"] == 2
    assert not (tmp_path / "test_images_static").exists()


# --- prediction ---


def test_predict_lists_its_images_and_draws_them(base, photos, tmp_path, capsys):
    network = module(base)
    returned, _ = evaluated(tmp_path, "predict", network, data(photos), PERA(rank=2))
    made = read_images(tmp_path / "images")
    assert [(one.prompt, one.seed) for one in made.images] == [
        (prompt, seed) for prompt in ("a photo of sks dog", "a dog") for seed in (0, 1)
    ]
    assert [one for batch in returned for one in batch] == [
        {"file": one.file, "prompt": one.prompt, "seed": one.seed} for one in made.images
    ]
    assert (made.model_name, made.step) == (base, 0)
    assert made.adapter["class_path"].endswith("PERA")
    assert made.sampling == SAMPLING
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        *(one.file for one in made.images),
        "images.json",
        "grid.png",
    }
    assert f"4 images and their grid: {tmp_path / 'images'}" in capsys.readouterr().out
    # A second one of fewer seeds leaves nothing of the first.
    evaluated(tmp_path, "predict", module(base), data(photos, seeds=[5]), PERA(rank=2))
    names = {path.name for path in (tmp_path / "images").iterdir()}
    assert names == {
        *(f"{stem}-seed5.png" for stem in ("00-a-photo-of-sks-dog", "01-a-dog")),
        "images.json",
        "grid.png",
    }


@pytest.mark.parametrize(
    ("batches", "computed"),
    [([[-1], [-1], [-1]], 1), ([[7], [-1]], 1), ([[-1], [7], [-1]], 2), ([[-1, 7], [7, -1]], 3)],
)
def test_what_fills_up_is_computed_once_at_most_and_never_kept(base, tmp_path, batches, computed):
    """A process that has nothing else: the adapted layers have to run where they are watched."""
    rows = [
        {"prompt": ["a dog"] * len(seeds), "seed": torch.tensor(seeds), "name": [f"seed{seed}" for seed in seeds]}
        for seeds in batches
    ]
    network, calls = module(base), []

    class Counts(Callback):
        def on_predict_start(self, trainer, pl_module):
            pl_module.model.unet.register_forward_hook(lambda *_: calls.append(1))

    trainer = make_trainer(tmp_path, callbacks=[Counts()])
    returned = trainer.predict(network, DataLoader(rows, batch_size=None))
    assert len(calls) == 2 * computed  # steps of sampling
    # Another trainer watches anew.
    again = make_trainer(tmp_path / "again")
    again.predict(network, DataLoader(rows, batch_size=None), return_predictions=False)
    assert len(calls) == 4 * computed
    wanted = [[seed for seed in seeds if seed != -1] for seeds in batches]
    assert [[one["seed"] for one in made] for made in returned] == wanted
    kept = {f"seed{seed}.png" for seeds in wanted for seed in seeds}
    assert {path.name for path in tmp_path.glob("images/seed*")} == kept
    assert (tmp_path / "images" / "images.json").is_file() is bool(kept)


def test_an_image_is_that_of_validation_test_and_predict(base, photos, tmp_path):
    """The same prompt, seed and adapters."""
    rows = {"validation_prompts": ["a photo of {}"], "prompts": ["a photo of {}"], "seeds": [0]}
    found = []
    for stage, where in {"validate": "validation/step_000000", "test": "test_images", "predict": "images"}.items():
        evaluated(tmp_path, stage, module(base), data(photos, **rows))
        found.append(pixels(tmp_path / where / "00-a-photo-of-sks-dog-seed0.png"))
    assert all((one == found[0]).all() for one in found)


def test_more_images_than_a_grid_holds_have_none(tmp_path):
    for count in (3, 41):
        stage = StageImages(tmp_path / str(count), writes=True)
        made = [stage.add(f"{seed}", "a dog", seed, Image.new("RGB", (8, 8))) for seed in range(count)]
        stage.finish(GeneratedImages("m", None, 0, {}, tuple(made)))
        assert (stage.grid is None) is (count == 41)
        assert (tmp_path / str(count) / "grid.png").is_file() is (count == 3)
        assert read_images(tmp_path / str(count)).images[0] == GeneratedImage("0.png", "a dog", 0)


def test_a_fast_dev_run_writes_nothing(base, photos, tmp_path):
    rows = data(photos, validation_prompts=["a {}"])
    for stage in ("validate", "test", "predict"):
        trainer = make_trainer(tmp_path / stage, fast_dev_run=True)
        getattr(trainer, stage)(module(base), datamodule=rows)
    assert not list(tmp_path.rglob("*.png"))
    assert not list(tmp_path.rglob("*.json"))
