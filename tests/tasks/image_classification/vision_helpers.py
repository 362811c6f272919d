"""A timm folder with a very small ViT, random images, and short runs."""

import timm
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from timm.models import save_for_hf
from torch.utils.data import DataLoader, Dataset

from pera_lightning import AdapterInjection
from pera_lightning.adapters import LoRA
from pera_lightning.tasks.image_classification.module import ImageClassificationModule

SIZE, CLASSES = 8, 3


def save_tiny_vit(folder, seed=0):
    """8×8 pixels in patches of 4, width 16, 2 blocks, a head of 3 classes."""
    torch.manual_seed(seed)
    shape = {"img_size": SIZE, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    network = timm.create_model("vit_tiny_patch16_224", **shape)
    torch.nn.init.normal_(network.head.bias)
    data = {"input_size": (3, SIZE, SIZE), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "nearest"}
    config = {"pretrained_cfg": {"tag": "random"}}
    save_for_hf(network, folder, model_config=config, safe_serialization=True, data_config={**data, "crop_pct": 0.75})
    return network


class Images(Dataset):
    def __init__(self, count, classes=CLASSES, seed=0, size=SIZE, ids=False):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 3, size, size, generator=generator)
        self.y = torch.randint(0, classes, (count,), generator=generator)
        self.ids = ids

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return (self.x[k], self.y[k], f"{k}.png") if self.ids else (self.x[k], self.y[k])


class ForeignData(LightningDataModule):
    """Somebody else's data module, which says how many classes it has and what they are called."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.num_classes = classes
        self.class_names = [f"class {chr(97 + k)}" for k in range(classes)]

    def _loader(self, **options):
        return DataLoader(Images(11, self.num_classes, **options), batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = _loader

    def predict_dataloader(self):
        return self._loader(ids=True)


def loader(count=12, batch_size=4, **options):
    return DataLoader(Images(count, **options), batch_size=batch_size)


def module(folder, **options):
    return ImageClassificationModule(**{"model_name": str(folder), "num_classes": CLASSES, "lr": 0.01, **options})


def make_trainer(folder, method=None, callbacks=(), **options):
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "default_root_dir": folder}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    first = AdapterInjection(method or LoRA(rank=2), ["attn.qkv[q,v]"], ["head"])
    return Trainer(accelerator="cpu", devices=1, callbacks=[first, *callbacks], **{**defaults, **quiet, **options})


def fit(folder, network, data=None, *, seed=0, val=None, **options):
    """Fits and returns the trainer; data is a loader, a data module, or three batches of four."""
    seed_everything(seed, verbose=False)
    trainer = make_trainer(folder, **options)
    if isinstance(data, LightningDataModule):
        trainer.fit(network, datamodule=data)
    else:
        trainer.fit(network, loader() if data is None else data, val)
    return trainer


class Rates(Callback):
    """Learning rates of every group before each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})
