"""Two processes train as one does with the doubled batch: gradients, clipping, accumulation and the adapters after."""

import pytest
from torch.utils.data import DataLoader, DistributedSampler

from pera_lightning.adapters import PERA, AuroRA, HiRA, LoRA
from tests.training.distributed.ddp_helpers import Randomise, Steps, assert_close, assert_equal, kept, make, seeded

# Every method trains alike under every strategy in test_strategies.py; here are two for each kind of batch.
ON_IMAGES, ON_TEXT = [LoRA(rank=2), AuroRA(rank=2)], [PERA(rank=2), HiRA(rank=2)]


def image_fit(folder, vit, world, method, **options):
    """Twelve images, four to a step."""
    from lightning.pytorch import LightningDataModule

    from tests.tasks.image_classification.vision_helpers import Images, module

    class Dealt(LightningDataModule):
        num_classes = 3

        def train_dataloader(self):
            images, rank = Images(12 * options.get("accumulate_grad_batches", 1)), self.trainer.global_rank
            sampler = DistributedSampler(images, num_replicas=world, rank=rank, seed=5)
            return DataLoader(images, batch_size=4 // world, sampler=sampler)

    trainer = make(folder, world, method, callbacks=[Randomise(), Steps(folder)], **options)
    trainer.fit(module(vit, weight_decay=0.01), datamodule=Dealt())


def language_fit(folder, llama, world, method, sets, **options):
    """Twelve rows of very different label counts, three steps."""
    from tests.tasks.causal_lm.evaluator_helpers import data
    from tests.tasks.causal_lm.language_helpers import QV, module

    rows = data(sets, "llm_adapters", batch_size=4 // world, validation_size=2)
    trainer = make(folder, world, method, QV, (), callbacks=[Randomise(), Steps(folder)], **options)
    trainer.fit(module(llama, weight_decay=0.01), datamodule=rows)


def compare(tmp_path, fit):
    """Runs with one and with two processes; what the single one had, and rank 0."""
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        seeded()
        fit(folder, world)
    (one,) = kept(tmp_path / "1")
    ranks = kept(tmp_path / "2", 2)
    assert len(one.gradients) == len(ranks[0].gradients) == 3
    assert ranks[0].searches == [False]  # all that is trained has a gradient: DDP need not look for what has none
    assert_equal(ranks[0].start[0], ranks[1].start[0])
    assert_equal(ranks[0].gradients[0], ranks[1].gradients[0])
    assert_equal(ranks[0].end[0], ranks[1].end[0])
    for name in ("gradients", "clipped", "end"):
        assert_close(getattr(one, name)[0], getattr(ranks[0], name)[0])
    return one, ranks[0]


@pytest.mark.parametrize("method", ON_IMAGES, ids=lambda method: type(method).__name__)
def test_images(vit, tmp_path, method):
    compare(tmp_path, lambda folder, world: image_fit(folder, vit, world, method))


@pytest.mark.parametrize("method", ON_TEXT, ids=lambda method: type(method).__name__)
def test_language(llama, sets, tmp_path, method):
    one, two = compare(tmp_path, lambda folder, world: language_fit(folder, llama, world, method, sets))
    measures = ("val/loss", "val/perplexity", "val/token_accuracy")
    assert {k: one.logged[0][k] for k in measures} == pytest.approx({k: two.logged[0][k] for k in measures}, rel=1e-5)


OPTIONS = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}


def test_images_with_accumulation_and_clipping(vit, tmp_path):
    one, _ = compare(tmp_path, lambda folder, world: image_fit(folder, vit, world, PERA(rank=2), **OPTIONS))
    assert_clipped(one)


def test_language_with_accumulation_and_clipping(llama, sets, tmp_path):
    def fit(folder, world):
        language_fit(folder, llama, world, PERA(rank=2), sets, max_epochs=2, max_steps=3, **OPTIONS)

    assert_clipped(compare(tmp_path, fit)[0])


def assert_clipped(run):
    before, after = (sum(g.square().sum() for g in part[0].values()) ** 0.5 for part in (run.gradients, run.clipped))
    assert before > 0.1
    assert after == pytest.approx(0.05, rel=1e-3)
