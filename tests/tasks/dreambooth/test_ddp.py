"""DreamBooth on two processes: the images, class images and cached batches of one; FSDP2 as DDP."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from safetensors.torch import load_file

from pera_lightning.adapters import AuroRA
from pera_lightning.cli.main import main
from pera_lightning.tasks.dreambooth.module import DreamBoothModule
from tests.tasks.dreambooth.config_words import words
from tests.tasks.dreambooth.fits import CLASS, Randomise, base_fixture, data, fit, make_trainer, module, photos_fixture
from tests.tasks.dreambooth.sdxl import SHALLOW
from tests.tasks.dreambooth.test_similarity import save_clip
from tests.training.distributed.forked import run_forked

TWO = {"devices": 2, "strategy": "ddp_fork"}

pytestmark = pytest.mark.filterwarnings("error:.*it is recommended to use .self.log.*sync_dist.*")


base = base_fixture(unet=SHALLOW)
photos = photos_fixture()


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*.png")}


def test_images_and_measures_are_those_of_one_process(base, photos, tmp_path):
    """Three images, so that one process has one to fill up."""
    clip = save_clip(tmp_path / "clip")
    found = []
    for name, options in {"one": {}, "two": TWO}.items():
        rows = {
            "validation_prompts": ["a {}"],
            "validation_seeds": [0, 1, 2],
            "seeds": [0],
            "prompts": ["a {}", "x", "y"],
        }
        for stage in ("validate", "test", "predict"):
            trainer = make_trainer(tmp_path / name, AuroRA(rank=2), [Randomise()], **options)
            more = {"return_predictions": False} if stage == "predict" else {"verbose": False}
            getattr(trainer, stage)(module(base, clip=clip), datamodule=data(photos, **rows), **more)
        results = json.loads((tmp_path / name / "results.json").read_text())
        listed = (tmp_path / name / "images" / "images.json").read_text()
        found.append((contents(tmp_path / name), listed, results["metrics"], results["n"], results["images"]))
    one, two = found
    assert len(one[0]) == 4 * (3 + 1)  # validation, both tests, and predict, with a grid each
    assert one[:2] == two[:2]
    assert two[2] == pytest.approx(one[2], abs=1e-6)
    assert set(one[2]) == {f"{stage}/{metric}" for stage in ("test", "test_static") for metric in ("clip_i", "clip_t")}
    assert one[3] == two[3] == 3
    assert list(one[4]["test"]) == list(two[4]["test"])


class Losses(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        names = [Path(one).name for one in batch["ids"]]
        held = pl_module.encoders.held()
        file = self.folder / f"batches{trainer.global_rank}.txt"
        with file.open("a") as text:
            print(json.dumps([names, held, "latent_mean" in batch]), file=text)


def test_class_images_and_the_cache_are_shared_out(base, photos, tmp_path):
    found = {}
    for name, options in {"one": {}, "two": TWO}.items():
        prior = {"class_folder": str(tmp_path / name / "class"), "class_prompt": CLASS, "num_class_images": 3}
        rows = data(photos, tmp_path / name / "cache", repeats=2, **prior)
        (tmp_path / name).mkdir()
        fit(tmp_path / name, module(base), rows, callbacks=[Losses(tmp_path / name)], **options)
        found[name] = contents(tmp_path / name)
    assert len(found["one"]) == 3
    assert found["one"] == found["two"]
    ranks = []
    for rank in range(2):
        lines = (tmp_path / "two" / f"batches{rank}.txt").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row[1:] for row in rows] == [[0, True]] * 3
        ranks.append([row[0] for row in rows])
    drawn = sorted(names[0] for own in ranks for names in own)
    assert drawn == sorted(["00.png", "01.png", "02.png"] * 2)


@pytest.mark.slow
def test_fsdp2_trains_and_draws_as_ddp(base, photos, tmp_path, monkeypatch):
    """Text encoders adapted too, and nothing cached: prompts and images come out of sharded networks."""
    # Adam's own eps makes a step of about lr of any gradient, also of one that is rounding, which is the processor's.
    monkeypatch.setattr(DreamBoothModule, "make_optimizer", lambda self, groups: torch.optim.AdamW(groups, eps=1e-4))
    targets = "[to_q, to_k, to_v, to_out.0, q_proj, k_proj, v_proj, out_proj]"
    more = {"model__adapt_text_encoders": "true", "data__cache": "false", "adapter__targets": targets}
    prior = {"data__class_prompt": CLASS, "data__num_class_images": 3, "trainer__devices": 2, "data__repeats": 8}
    one, other = tmp_path / "ddp", tmp_path / "fsdp2"
    runs = []
    for folder in (one, other):
        more |= {**prior, "data__class_folder": folder / "class", "trainer__strategy": folder.name}
        runs.append(words("fit", base, photos, folder, **more))
    run_forked(lambda: [main(one) for one in runs], 2, tmp_path, 200)
    plain, sharded = (load_file(folder / "pera" / "adapter" / "adapter.safetensors") for folder in (one, other))
    assert plain.keys() == sharded.keys()
    assert max(value.abs().max() for name, value in plain.items() if name.endswith(".B")) > 0.01  # which were zero
    for name, value in plain.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-3, atol=1e-4, msg=name)
    files = [path.relative_to(one) for path in one.rglob("*.png")]
    assert len(files) == 3 + 2 + 1  # of the class, and at validation two images and a grid
    for file in files:
        drawn = [np.asarray(Image.open(folder / file)).astype(int) for folder in (one, other)]
        assert abs(drawn[0] - drawn[1]).max() <= 2, file
