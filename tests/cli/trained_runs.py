"""Folders of runs as fit leaves them, with random adapters and without training: config, checkpoint, adapter folder."""

import json
import subprocess
import sys
from types import SimpleNamespace

import lightning
import torch
import yaml

from pera_lightning import AdapterInjection, save_adapter
from pera_lightning.adapters import PERA, AuroRA
from pera_lightning.tasks.causal_lm.commonsense import CommonsenseDataModule
from pera_lightning.tasks.causal_lm.module import CausalLMModule
from pera_lightning.tasks.image_classification.data import ImageDataModule
from pera_lightning.tasks.image_classification.module import ImageClassificationModule
from pera_lightning.training.checkpoint_io import trim
from tests.tasks.causal_lm import language_helpers as text
from tests.tasks.image_classification import vision_helpers as vision

# Nothing of this package can be imported there.
ALONE = "import sys\nsys.modules['pera_lightning'] = None\n"


def make_run(folder, module, data, adapter, std=0.3, seed=3):
    """Writes a run's folder.

    Args:
        folder: of the run, made.
        module: a module of this package, given as (class, arguments).
        data: a data module, given in the same way.
        adapter: the callback.
        std: of the trained parameters, which are random.
        seed: likewise.
    """
    built = module[0](**module[1])
    built.adapter_injection = adapter.injector()
    built.configure_model()
    text.randomise(built, std, seed)
    config = {
        name: {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": arguments}
        for name, (cls, arguments) in {"model": module, "data": data}.items()
    }
    config["adapter"] = {"method": adapter.method.spec(), "targets": adapter.targets, "trainable": adapter.trainable}
    # As in what LightningCLI writes, and without a number of classes, which fit takes from the data.
    config |= {"seed_everything": 0, "ckpt_path": None, "weights_only": None}
    if "num_classes" in module[1]:
        config["model"]["init_args"] = {**module[1], "num_classes": None}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    steps = {"global_step": 2, "epoch": 0, "pytorch-lightning_version": lightning.__version__}
    torch.save(trim({"state_dict": built.state_dict(), **steps}, built), folder / "checkpoints" / "best.ckpt")
    save_adapter(built, folder / "adapter")
    return SimpleNamespace(
        run=folder,
        module=built.eval(),
        network=built.model,
        adapter=folder / "adapter",
        checkpoint=folder / "checkpoints" / "best.ckpt",
    )


def language_run(folder, base, sets, method=None, *, trainable=(), targets=text.QV, **options):
    """A run of a tiny language model on tiny commonsense sets."""
    module = CausalLMModule, {"model_name": str(base), "base_dtype": "float32", **options}
    sizes = {"validation_size": 3, "batch_size": 4, "eval_batch_size": 3}
    data = {"folder": str(sets), "train": "ARC-Easy", "test": ["ARC-Easy"], "protocol": "score", **sizes}
    data = CommonsenseDataModule, {**data, "cache_dir": str(folder.parent / "cache")}
    return make_run(folder, module, data, AdapterInjection(method or PERA(rank=3), list(targets), list(trainable)))


def image_run(folder, base, method=None, *, data=None, **options):
    """A run of a tiny ViT on the digits 5 to 9."""
    module = ImageClassificationModule, {"model_name": str(base), "num_classes": 5, **options}
    usual = {"dataset": "digits", "classes": [5, 6, 7, 8, 9], "transform": "none", "batch_size": 32}
    data = ImageDataModule, {**usual, **(data or {})}
    adapter = AdapterInjection(method or AuroRA(rank=3), ["attn.qkv[q,v]"], ["head"])
    return make_run(folder, module, data, adapter)


def token_ids(rows=3, length=12, seed=1):
    return torch.randint(4, text.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def images(count=7, size=vision.SIZE):
    return vision.Images(count, size=size).x


def run_alone(code, *words):
    """Runs Python code where this package cannot be imported; returns what it prints, read as JSON."""
    command = [sys.executable, "-c", ALONE + code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def small_sets(folder):
    return text.write_sets(folder, {"ARC-Easy": 4})


def exporter(pera, folder):
    """``export(path, format, *options, code=0)`` writes to `folder`."""

    def export(path, kind, *options, code=0):
        result = pera("export", "--ckpt_path", path, "--format", kind, "--output", folder, *options)
        assert result.code == code, result.err
        return result

    return export


def refused(result):
    """The one line; nothing of a traceback."""
    assert result.code == 2
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert len(lines[-1]) < 600
    return lines[-1]
