"""Merged weights for timm: what `create_model` gives back, and how it says images are to be seen."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from pera_lightning import inject
from pera_lightning.adapters import PERA, AuroRA, HiRA
from pera_lightning.errors import ConfigurationError
from pera_lightning.export.timm import as_data_config, export_timm
from pera_lightning.tasks.image_classification import transforms
from tests.tasks.causal_lm.language_helpers import randomise
from tests.tasks.image_classification import vision_helpers as vision

NAMES = ["ash", "beech", "cedar", "date", "elm"]


def adapted(folder, method=None, classes=5, **options):
    network = timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
    network.reset_classifier(classes)
    inject(network, method or PERA(rank=3), ["attn.qkv[q,v]"], ["head"], seed=0)
    randomise(network)
    return network.eval()


def loaded(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@torch.no_grad()
def close(one, other, size=vision.SIZE):
    images = vision.Images(6, size=size).x
    return torch.allclose(one(images), other(images), atol=1e-5)


@pytest.mark.parametrize("method", [PERA(rank=3), HiRA(rank=3)], ids=["PERA", "HiRA"])
def test_what_is_loaded_predicts_as_what_was_adapted(vit, tmp_path, method):
    network = adapted(vit, method)
    images = vision.Images(6).x
    with torch.no_grad():
        before = network(images)
        report = export_timm(network, tmp_path / "out", class_names=NAMES)
        assert torch.allclose(loaded(tmp_path / "out")(images), before, atol=1e-5)
        plain = timm.create_model(f"local-dir:{vit}", pretrained=True, num_classes=5)
        plain.head.load_state_dict(network.head.state_dict())
        assert not torch.allclose(plain.eval()(images), before, atol=1e-3)
    assert report.merge.layers == 2
    assert not report.notes
    for file in (tmp_path / "out").iterdir():
        assert b"pera" not in file.read_bytes().lower(), file.name
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_another_image_size_than_the_base_s(vit, tmp_path):
    network = adapted(vit, img_size=16)
    export_timm(network, tmp_path / "out", data_config={"input_size": (3, 16, 16)})
    assert close(loaded(tmp_path / "out"), network, size=16)
    assert resolve_model_data_config(loaded(tmp_path / "out"))["input_size"] == (3, 16, 16)


def test_half_of_the_base_s_precision_and_a_head_in_float32(vit, tmp_path):
    network = timm.create_model(f"local-dir:{vit}", pretrained=True).bfloat16()
    inject(network, PERA(rank=3), ["attn.qkv[q,v]"], ["head"], seed=0)
    network.head.float()
    head = network.head.weight.detach().clone()
    export_timm(network, tmp_path / "out")
    assert torch.equal(loaded(tmp_path / "out").head.weight, head)


def test_names_of_classes(vit, tmp_path):
    export_timm(adapted(vit), tmp_path / "named", class_names=NAMES)
    assert loaded(tmp_path / "named").pretrained_cfg["label_names"] == NAMES
    # The base has names of its own for as many classes, which are others.
    report = export_timm(adapted(tmp_path / "named"), tmp_path / "out")
    assert not loaded(tmp_path / "out").pretrained_cfg.get("label_names")
    assert loaded(tmp_path / "out").pretrained_cfg["tag"] == "merged"
    assert "names of the classes are not known" in str(report)
    with pytest.raises(ConfigurationError, match="5 class names for a head of 4 classes"):
        export_timm(adapted(vit, classes=4), tmp_path / "wrong", class_names=NAMES)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("name", list(transforms.TRANSFORMS))
def test_the_folder_tells_how_evaluation_saw_the_images(vit, tmp_path, name):
    network = adapted(vit)
    given = {"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.4)}
    given |= {} if name in ("none", "fourierft") else {"crop_pct": 0.8}
    base = {**resolve_model_data_config(network), "crop_mode": "border"}  # the base's own must not stay
    network.pretrained_cfg["crop_mode"] = "border"
    seen = transforms.resolve(name, given, base)
    export_timm(network, tmp_path / "out", data_config=as_data_config(vars(seen)))
    theirs = create_transform(**resolve_model_data_config(loaded(tmp_path / "out")), is_training=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (23, 31, 3), dtype=np.uint8))
    ours = transforms.build(name, seen, training=False)(image)
    assert ours.shape == (3, vision.SIZE, vision.SIZE)
    assert torch.allclose(theirs(image), ours, atol=1e-5)


def test_a_network_that_timm_would_build_otherwise_is_found_out(vit, tmp_path):
    network = adapted(vit)
    network.blocks.append(torch.nn.Linear(16, 16))
    with pytest.raises(ConfigurationError, match=r"differs in blocks\.2\.weight, blocks\.2\.bias: it was changed"):
        export_timm(network, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_old_timm_is_told(vit, tmp_path, monkeypatch):
    network = adapted(vit)
    monkeypatch.delattr(timm.models, "get_model_args")
    with pytest.raises(ConfigurationError, match=r"merged weights need timm 1\.0\.31 or newer"):
        export_timm(network, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_static_aurora(vit, tmp_path):
    network = adapted(vit, AuroRA(rank=3))
    report = export_timm(network, tmp_path / "out", mode="static", measure_on=[vision.Images(6).x])
    assert report.merge.merge_error.outputs > 0
    assert close(loaded(tmp_path / "out"), network)
