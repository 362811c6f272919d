"""The image module's networks: their names, weights, input size and number of classes."""

import shutil
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models._hub import save_for_hf
from torch import nn

from pera_lightning import inject
from pera_lightning.adapters import LoRA
from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.image_classification.module import ImageClassificationModule
from pera_lightning.tasks.image_classification.networks import timm_name
from tests.tasks.image_classification.vision_helpers import CLASSES, ForeignData, fit, loader, module

# ---- names ----------------------------------------------------------------------------------------------------------


def test_names_that_timm_takes(vit, monkeypatch):
    assert timm_name("vit_base_patch16_224.orig_in21k") == "vit_base_patch16_224.orig_in21k"
    assert timm_name("vit_base_patch16_224") == "vit_base_patch16_224"
    assert timm_name("hf-hub:org/name") == "hf-hub:org/name"
    assert timm_name(str(vit)) == timm_name(f"local-dir:{vit}") == f"local-dir:{vit}"
    folder = timm_name("asset:vit_digits")
    assert folder.startswith("local-dir:/")
    assert folder.endswith("assets/vit_digits")
    monkeypatch.chdir(vit.parent)
    assert timm_name(vit.name) == f"local-dir:{vit}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("asset:vit", "model_name='asset:vit': no such asset; there are: vit_digits"),
        ("vit_base_patch16_223", "not a model of timm, a folder or an hf-hub: id; closest: vit_base_patch16_224"),
        ("vit_base_patch16_224.orig", "vit_base_patch16_224 has the weights .*orig_in21k"),
        ("local-dir:nothing", "nothing has no config.json, as timm's folders have"),
        ("", "has no config.json"),
    ],
)
def test_names_that_do_not_exist(name, expected):
    with pytest.raises(ConfigurationError, match=expected):
        timm_name(name)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(ConfigurationError, match=r"has no config\.json, as timm's folders have"):
        timm_name(str(tmp_path))


@pytest.mark.parametrize("name", ["hf-hub:org/name", "vit_base_patch16_224.orig_in21k"])
def test_the_name_and_whether_pretrained_reach_timm(vit, monkeypatch, name):
    create, asked = timm.create_model, []

    def spy(name, pretrained=False, **options):
        asked.append((name, pretrained, options))
        return create(f"local-dir:{vit}", pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", spy)
    module(name).configure_model()
    module(name, pretrained=False, image_size=12).configure_model()
    assert asked == [(name, True, {}), (name, False, {"img_size": 12})]


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    def fail(*args, **options):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        ConfigurationError, match="'hf-hub:org/name' cannot be loaded: no route to the hub; give a timm"
    ):
        module("hf-hub:org/name").configure_model()


def test_pickled_weights_of_a_folder_are_refused_before_timm_sees_them(vit, tmp_path, monkeypatch):
    folder = shutil.copytree(vit, tmp_path / "vit")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    module(folder).configure_model()  # timm takes the safetensors
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(timm, "create_model", None)
    with pytest.raises(ConfigurationError, match=r"pytorch_model.bin is pickled and may run code; save its weights as"):
        module(folder).configure_model()


@pytest.mark.parametrize("content", ["null", "{", "{}", '{"architecture": 5}', '{"architecture": "no_such_model"}'])
def test_a_damaged_config_of_a_folder_is_one_line(vit, tmp_path, content):
    folder = shutil.copytree(vit, tmp_path / "vit")
    (folder / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match="cannot be loaded: ") as error:
        module(folder).configure_model()
    assert "\n" not in str(error.value)


# ---- the network ----------------------------------------------------------------------------------------------------


def test_the_base_has_the_folder_s_weights_and_the_head_never_has(vit):
    """The folder's head has as many classes as asked for, and is for another task all the same."""
    saved = load_file(vit / "model.safetensors")
    network = module(vit)
    network.configure_model()
    state = network.model.state_dict()
    assert state.keys() == saved.keys()
    for name, value in state.items():
        same = torch.equal(value, saved[name])
        assert same == (not name.startswith("head.")), name


def test_not_pretrained_is_random(vit):
    saved = load_file(vit / "model.safetensors")
    network = module(vit, pretrained=False)
    network.configure_model()
    assert not torch.equal(network.model.blocks[0].attn.qkv.weight, saved["blocks.0.attn.qkv.weight"])


def test_image_size_resizes_network_and_data_config(vit):
    plain, larger = module(vit), module(vit, image_size=12)
    assert plain.data_config["input_size"] == (3, 8, 8)
    assert larger.data_config["input_size"] == (3, 12, 12)
    larger.configure_model()
    assert larger.model.pos_embed.shape[1] == 1 + 9
    assert larger(torch.randn(2, 3, 12, 12)).shape == (2, CLASSES)


def test_data_config_is_the_network_s_own(vit):
    config = module(vit).data_config
    assert (*config["mean"], *config["std"]) == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    assert (config["interpolation"], config["crop_pct"]) == ("nearest", 0.75)


def test_image_size_of_a_network_without_one():
    with pytest.raises(ConfigurationError, match="image_size=64: resnet18 takes any size, leave it out"):
        module("resnet18", pretrained=False, image_size=64).configure_model()


def test_classes_come_from_the_data_module(vit, tmp_path):
    network = module(vit, num_classes=None)
    fit(tmp_path, network, ForeignData(7))
    assert network.model.head.out_features == 7
    assert network.hparams["num_classes"] == 7


def test_given_classes_need_no_data_module(vit, tmp_path):
    network = module(vit, num_classes=4)
    fit(tmp_path, network, loader(classes=4))
    assert network.model.head.out_features == 4


def test_without_either_it_says_so(vit, tmp_path):
    with pytest.raises(ConfigurationError, match="num_classes is not given, and no data module with num_classes"):
        fit(tmp_path, module(vit, num_classes=None))
    with pytest.raises(ConfigurationError, match="num_classes is not given"):
        module(vit, num_classes=None).configure_model()


def test_both_heads_of_a_distilled_network_are_trained_or_refused(tmp_path):
    """The second head takes part in the logits: it would be random, and other numbers in the next process."""
    shape = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 3}
    save_for_hf(
        timm.create_model("deit_tiny_distilled_patch16_224", **shape),
        tmp_path,
        model_args=shape,
        safe_serialization=True,
    )
    network = ImageClassificationModule(str(tmp_path), num_classes=4)
    network.adapter_injection = partial(inject, method=LoRA(rank=1), targets=["qkv"], trainable=["head"])
    with pytest.raises(
        ConfigurationError, match=r"head_dist of .* new and random .* give trainable=\[head, head_dist\]"
    ):
        network.configure_model()
    network.adapter_injection.keywords["trainable"].append("head_dist")
    network.configure_model()


def test_a_head_that_takes_the_place_in_memory_of_the_old_one_is_new(vit, monkeypatch):
    """What is new was once told by ids, and a freed tensor's id comes again."""
    network = timm.create_model(f"local-dir:{vit}", pretrained=False)

    def reset(classes):
        del network.head
        network.head = nn.Linear(network.embed_dim, classes)

    monkeypatch.setattr(network, "reset_classifier", reset)
    monkeypatch.setattr("pera_lightning.tasks.image_classification.module.create", lambda *args, **options: network)
    for _ in range(50):
        ours = module(vit)
        ours.adapter_injection = partial(inject, method=LoRA(rank=1), targets=["qkv"])
        ours.build_network()
        assert ours._new == {"head.weight", "head.bias"}
