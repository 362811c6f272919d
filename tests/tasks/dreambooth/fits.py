"""Short DreamBooth fits: a tiny random pipeline, a few random photographs, batches, and what is noted of a fit."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from pera_lightning import AdapterInjection
from pera_lightning.adapters import PERA
from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.dreambooth.data import DreamBoothDataModule
from pera_lightning.tasks.dreambooth.encoders import Encoders
from pera_lightning.tasks.dreambooth.module import DreamBoothModule
from tests.tasks.dreambooth.data_helpers import PROMPT, fill
from tests.tasks.dreambooth.sdxl import PROJECTION, WIDTHS, save_tiny

UNET = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
SIDE = 32  # pixels; 4 latents
CLASS = "a photo of dog"
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


def subject(folder, count=3):
    """Photographs wider than high, and captions of two words less for the last."""
    fill(Path(folder), count, size=(40, 48))
    (Path(folder) / f"{count - 1:02d}.txt").write_text("sks dog, a photo")
    return folder


def base_fixture(**changes):
    """A fixture of a module's own: the folder of a tiny pipeline, see `save_tiny`."""

    def base(tmp_path_factory):
        return str(save_tiny(tmp_path_factory.mktemp("sdxl"), **changes))

    return pytest.fixture(scope="module")(base)


def photos_fixture(count=3):
    """Likewise: the folder of a `subject`."""

    def photos(tmp_path_factory):
        return subject(tmp_path_factory.mktemp("subject"), count)

    return pytest.fixture(scope="module")(photos)


def cache_fixture():
    """Likewise: a folder for the cache."""

    def cache(tmp_path_factory):
        return tmp_path_factory.mktemp("cache")

    return pytest.fixture(scope="module")(cache)


def module(name, **options):
    usual = {"lr": 0.01, "base_dtype": "float32", "sampling_steps": 2, "guidance_scale": 2.0}
    return DreamBoothModule(**{"model_name": str(name), "dino": None, "clip": None, **usual, **options})


def data(folder, cache_dir=None, **options):
    """Uncached where no folder for the cache is given."""
    usual = {"instance_prompt": PROMPT, "resolution": SIDE, "cache": cache_dir is not None, "seeds": [0, 1]}
    usual["cache_dir"] = None if cache_dir is None else str(cache_dir)
    usual["prompts"] = ["a photo of {}", "a dog"]
    return DreamBoothDataModule(str(folder), **{**usual, **options})


def priors(folder, count=4):
    """The options of a data module with class images of one's own."""
    fill(Path(folder), count, size=(48, 40), first=50)
    return {"class_folder": str(folder), "class_prompt": CLASS}


def make_trainer(folder, method=None, callbacks=(), targets=UNET, **options):
    usual = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "default_root_dir": folder}
    first = AdapterInjection(method or PERA(rank=2), list(targets))
    options = {"devices": 1, **QUIET, **usual, **options}
    return Trainer(accelerator="cpu", callbacks=[first, *callbacks], **options)


class Randomise(Callback):
    """Random trained parameters at the start: where B is zero, most gradients are, and mistakes would not show."""

    def on_train_start(self, trainer, pl_module):
        if trainer.ckpt_path is None:
            randomise(pl_module)

    def on_validation_start(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            randomise(pl_module)

    def on_test_start(self, trainer, pl_module):
        randomise(pl_module)

    on_predict_start = on_test_start


def randomise(network, std=0.2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(network.named_parameters()):
        if parameter.requires_grad:
            parameter.data = std * torch.randn(parameter.shape, generator=generator)


def injected(name, method=None, targets=UNET, std=0.2, **options):
    """A module with its network, adapters random."""
    built = module(name, **options)
    built.adapter_injection = AdapterInjection(method or PERA(rank=2), list(targets)).injector()
    built.configure_model()
    built.train()
    if std:
        randomise(built, std)
    return built


def cached_batch(rows=4, prior=2, seed=0, side=4):
    """As the data module gives it, of random numbers; the last rows are of the class."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(rows, *shape, generator=generator)

    return {
        "latent_mean": draw(4, side, side),
        "latent_std": draw(4, side, side).abs() / 4,
        "prompt_embeds": draw(77, sum(WIDTHS)),
        "pooled_prompt_embeds": draw(PROJECTION),
        "time_ids": torch.tensor([[40.0, 48.0, 0.0, 3.0, 32.0, 32.0]]).expand(rows, -1),
        "is_prior": torch.arange(rows) >= rows - prior,
        "ids": [f"{k}.png" for k in range(rows)],
    }


def part(batch, rows):
    return {k: [v[r] for r in rows] if isinstance(v, list) else v[torch.tensor(rows)] for k, v in batch.items()}


def seeded_loss(network, batch, seed=5):
    torch.manual_seed(seed)
    summed, count, _ = network._shared_step(batch)
    return summed / count


def gradients(network):
    return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


class Seen(Callback):
    """Losses by batch and gradients by optimizer step of a fit."""

    def __init__(self):
        self.losses, self.gradients = {}, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({n: value.clone() for n, value in gradients(pl_module).items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.fit_loop.total_batch_idx] = float(outputs["loss"])


def fit(folder, network, rows, *, seed=0, ckpt=None, callbacks=(), random=True, **options):
    """Fits and returns the trainer."""
    seed_everything(seed, verbose=False)
    start = [Randomise()] if random else []
    trainer = make_trainer(folder, callbacks=[*start, *callbacks], **options)
    trainer.fit(network, datamodule=rows, ckpt_path=ckpt)
    return trainer


def trained(network):
    return {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}


def assert_same(one, other):
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert one
    for name in one:
        assert torch.equal(one[name], other[name]), name


def photograph_pixels(path, side=SIDE):
    """What the network sees of a photograph."""
    from pera_lightning.tasks.dreambooth.preprocessing import crop_to, open_image, to_pixels

    return to_pixels(crop_to(open_image(path), (side, side))[0])


# --- beside fits ---


def encoders(folder, **options):
    """The VAE and text encoders of a pipeline, in float32 where nothing else is said."""
    return Encoders(str(folder), **{"dtype": torch.float32, **options})


def pipeline(folder, kind=StableDiffusionXLPipeline):
    """Diffusers' own."""
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def refused(match, call, *words, **options):
    """In one line of words."""
    with pytest.raises(ConfigurationError, match=match) as error:
        call(*words, **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 450
