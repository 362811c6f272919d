"""A DreamBooth run that goes on from a checkpoint is the run that never stopped; images change nothing."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.tasks.dreambooth.fits import (
    Seen,
    assert_same,
    base_fixture,
    cache_fixture,
    data,
    fit,
    module,
    photos_fixture,
    trained,
)
from tests.tasks.dreambooth.sdxl import SHALLOW

base = base_fixture(unet=SHALLOW)
photos = photos_fixture(count=4)
cache = cache_fixture()


class Dies(Callback):
    def __init__(self, epoch, batch):
        self.at = (epoch, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            raise RuntimeError("killed")


def resumable(folder, base, photos, cache, *, keep=None, ckpt=None, seed=0, more=(), images=True, **options):
    """Two epochs of four batches."""
    rows = data(photos, cache, validation_prompts=["a {}"] if images else None)
    network, seen = module(base, noise_offset=0.1, sampling_steps=1), Seen()
    callbacks = [seen, *more, ModelCheckpoint(folder, save_last=True, **(keep or {}))]
    options = {"max_epochs": 2, "enable_checkpointing": True, **options}
    fit(folder, network, rows, seed=seed, ckpt=ckpt, callbacks=callbacks, **options)
    return trained(network), seen.losses


@pytest.fixture(scope="module")
def whole(base, photos, cache, tmp_path_factory):
    """A run with images after every second batch, that nothing disturbed."""
    return resumable(tmp_path_factory.mktemp("whole"), base, photos, cache, val_check_interval=2)


def test_images_change_nothing_of_the_training(base, photos, cache, tmp_path, whole):
    adapters, losses = resumable(tmp_path, base, photos, cache, images=False)
    assert losses == whole[1]
    assert len(losses) == 8
    assert_same(adapters, whole[0])


@pytest.mark.parametrize(("images", "kept"), [(True, True), (False, False)])
def test_resumed_within_an_epoch_it_is_the_run_that_never_stopped(base, photos, cache, tmp_path, whole, images, kept):
    """Uncached the same, for one epoch: the VAE's answer depends on nothing but the image."""
    folder, options = cache if kept else None, {"keep": {"every_n_train_steps": 3}, "images": images}
    options |= {"val_check_interval": 2} if images else {"max_epochs": 1}
    expected = whole if kept else resumable(tmp_path / "whole", base, photos, None, images=False, max_epochs=1)
    resumable(tmp_path / "r", base, photos, folder, max_steps=3, **options)
    last = str(tmp_path / "r" / "last.ckpt")
    adapters, losses = resumable(tmp_path / "r", base, photos, folder, ckpt=last, seed=9, **options)
    assert losses == {k: v for k, v in expected[1].items() if k >= 3}
    assert_same(adapters, expected[0])


def test_resumed_within_an_accumulation_window(base, photos, cache, tmp_path):
    options = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    expected, losses = resumable(tmp_path / "whole", base, photos, cache, **options)
    with pytest.raises(RuntimeError, match="killed"):
        resumable(tmp_path / "r", base, photos, cache, more=[Dies(0, 3)], **options)
    last = tmp_path / "r" / "last.ckpt"
    progress = torch.load(last, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["current"]["processed"] == 3
    adapters, later = resumable(tmp_path / "r", base, photos, cache, ckpt=str(last), seed=9, **options)
    assert later == {k: v for k, v in losses.items() if k >= 3}
    assert_same(adapters, expected)
