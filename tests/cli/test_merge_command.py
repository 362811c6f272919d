"""`merge`: what it measures, on what, and what it writes."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from pera_lightning.adapters import PERA, AuroRA, LinearProbe
from pera_lightning.adapters.aurora import static_inference
from pera_lightning.cli.trained_run import attach
from pera_lightning.data.base import draw_batches
from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.tasks.image_classification.data import ImageDataModule
from tests.cli import trained_runs as runs
from tests.cli.trained_runs import refused

LINE = re.compile(r"outputs changed by (\S+) \(relative, on (\d+) batch\w*\); loss (\S+) before, (\S+) after")


def measured(result):
    """Relative change of the outputs, batches, loss before and after."""
    assert result.code == 0, result.err
    change, batches, *losses = LINE.search(result.out).groups()
    return float(change), int(batches), *map(float, losses)


def validation(run):
    """All validation images and labels of a run on digits."""
    data = ImageDataModule("digits", classes=[5, 6, 7, 8, 9], transform="none", batch_size=500)
    attach(run.module, data)
    data.setup("fit")
    return next(iter(data.val_dataloader()))


@torch.no_grad()
def test_it_tells_outputs_and_loss_before_and_after(pera, vit_run):
    images, labels = validation(vit_run)
    before = vit_run.module(images)
    with static_inference(vit_run.network):
        after = vit_run.module(images)
    # Fewer examples than are kept of a batch, so that all of them count.
    assert len(images) < 256
    change, batches, *losses = measured(
        pera("merge", "--ckpt_path", vit_run.checkpoint, "--mode", "static", "--data.eval_batch_size", "500")
    )
    assert batches == 1
    assert change == pytest.approx(float((after - before).norm() / before.norm()), rel=5e-3)
    expected = [float(F.cross_entropy(logits, labels)) for logits in (before, after)]
    assert losses == pytest.approx(expected, abs=1e-4)


def test_batches_are_counted_and_there_are_eight_by_default(pera, vit_run):
    words = ["merge", "--ckpt_path", vit_run.adapter, "--mode", "calibrated", "--data.eval_batch_size", "5"]
    static = ["merge", "--ckpt_path", vit_run.adapter, "--method", "static", "--data.eval_batch_size", "5"]
    default = measured(pera(*words))
    assert default[1] == 8
    assert measured(pera(*words, "--batches", "3"))[1] == 3
    assert default == measured(pera(*words, "--seed_everything", "5"))  # the same batches each time
    assert default[0] < measured(pera(*static))[0]


def test_batches_are_drawn_from_all_examples():
    rows = DataLoader(list(range(100)), batch_size=10)  # sorted, as folders of classes are
    batches = draw_batches(rows, 3)
    assert [len(batch) for batch in batches] == [10, 10, 10]
    values = torch.cat(batches).tolist()
    assert len(set(values)) == 30
    assert max(values) > 80
    assert min(values) < 20
    assert torch.equal(torch.cat(draw_batches(rows, 3)), torch.cat(batches))
    assert len(draw_batches(rows, 30)) == 10
    ready = [torch.zeros(1), torch.ones(1)]
    assert torch.equal(draw_batches(DataLoader(ready, batch_size=None), 1)[0], ready[0])
    with pytest.raises(DataError, match="no batch"):
        draw_batches(DataLoader([], batch_size=2), 3)
    with pytest.raises(ConfigurationError, match="the data gave a tuple"):
        draw_batches((), 3)


def test_an_exact_method_changes_nothing(pera, llama, small_sets, tmp_path):
    run = runs.language_run(tmp_path / "run", llama, small_sets, PERA(rank=3))
    change, batches, before, after = measured(pera("merge", "--ckpt_path", run.checkpoint))
    assert (batches, before) == (1, after)  # three validation examples are one batch
    assert change < 1e-5
    # The loss is that of validation.
    assert 0 < before < 20


def test_the_loss_of_a_language_model_is_that_of_its_answers(pera, llama, small_sets, tmp_path):
    run = runs.language_run(tmp_path / "run", llama, small_sets, AuroRA(rank=3))
    _, _, before, after = measured(pera("merge", "--ckpt_path", run.checkpoint, "--mode", "static"))
    assert before != after
    config = ["--config", run.run / "config.yaml", "--ckpt_path", run.checkpoint]
    options = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    result = pera("validate", *config, *options, "--trainer.default_root_dir", tmp_path)
    assert result.code == 0, result.err
    told = float(re.search(r"val/loss\W+([\d.]+)", result.out)[1])
    assert before == pytest.approx(told, abs=1e-3)


def test_with_an_output_it_writes_what_it_measured(pera, vit_run, tmp_path):
    words = ["merge", "--ckpt_path", vit_run.checkpoint, "--mode", "static", "--output", tmp_path / "out"]
    result = pera(*words)
    assert measured(result)[0] > 0
    assert f"timm.create_model('local-dir:{tmp_path / 'out'}', pretrained=True)" in result.out
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with static_inference(vit_run.network), torch.no_grad():
        assert torch.allclose(network(runs.images()), vit_run.module(runs.images()), atol=1e-5)
    again = pera(*words)
    assert again.code == 2
    assert "exists; give another --output, or --overwrite" in again.err
    assert pera(*words, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "AuroRA in dynamic mode is not a linear map"),
        (["--overwrite"], "--overwrite acts with --output only"),
        (["--batches", "0"], "batches=0: a positive integer is needed"),
        (["--mode", "statik"], "one of 'static', 'calibrated' is needed; given statik; closest: static"),
        (["--rank", "4"], "unknown option --rank"),
        (["--mode", "static", "--data.dataset", "./gone"], "the data cannot be had"),
    ],
)
def test_wrong_input_is_one_line(pera, vit_run, words, expected):
    result = pera("merge", "--ckpt_path", vit_run.checkpoint, *words)
    assert expected in refused(result)


def test_a_probe_has_nothing_to_merge(pera, vit, tmp_path):
    run = runs.image_run(tmp_path / "run", vit, LinearProbe())
    result = pera("merge", "--ckpt_path", run.checkpoint)
    assert "its method adapts no layers" in refused(result)
