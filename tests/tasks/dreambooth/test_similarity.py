"""DINO and CLIP similarities against plain loops over one image at a time, with tiny random networks."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.dreambooth import similarity as image_similarity
from pera_lightning.tasks.dreambooth.similarity import Similarity
from tests.tasks.dreambooth.sdxl import LENGTH, save_tokenizer, vocabulary

# Large weights: a freshly initialised network is nearly indifferent, and mistakes would not show.
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SHAPE, "image_size": 32, "patch_size": 8}
NORMAL = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]}
KINDS = ("vit", "dinov2", "dinov2_with_registers")
PROMPTS = ["a photo of sks dog", "do", "a cat and a dog", "a photo of sks dog"]


def save_dino(folder, kind="vit", seed=0):
    import transformers as t

    torch.manual_seed(seed)
    if kind == "vit":
        network = t.ViTModel(t.ViTConfig(**VISION, initializer_range=0.5), add_pooling_layer=False)
        processor = t.ViTImageProcessor(size={"height": 32, "width": 32}, **NORMAL)
    else:
        Config, Model = {
            "dinov2": (t.Dinov2Config, t.Dinov2Model),
            "dinov2_with_registers": (t.Dinov2WithRegistersConfig, t.Dinov2WithRegistersModel),
        }[kind]
        network = Model(Config(**VISION, mlp_ratio=2, initializer_range=0.5))
        processor = t.BitImageProcessor(
            size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, do_center_crop=True, **NORMAL
        )
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def save_clip(folder, seed=0):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    size = len(vocabulary())
    text = {**SHAPE, "hidden_size": 24, "vocab_size": size, "max_position_embeddings": LENGTH, "projection_dim": 12}
    text |= {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1, "initializer_factor": 5.0}
    vision = {**VISION, "projection_dim": 12, "initializer_factor": 5.0}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    save_tokenizer(folder, "<|endoftext|>")
    return str(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders by kind of network."""
    folder = tmp_path_factory.mktemp("similarity")
    return {**{kind: save_dino(folder / kind, kind) for kind in KINDS}, "clip": save_clip(folder / "clip")}


def photograph(seed, size=(32, 32)):
    """Coarse random blocks: they survive every resampling."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


IMAGES = [photograph(1), photograph(2, (48, 32)), photograph(3, (40, 64)), photograph(4, (100, 90))]
REFERENCES = [photograph(5), photograph(6, (64, 48)), photograph(7, (33, 77))]


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def plain_dino(folder, image):
    from transformers import AutoImageProcessor, Dinov2Model, Dinov2WithRegistersModel, ViTModel

    Model = {"vit": ViTModel, "dinov2": Dinov2Model}.get(folder.rpartition("/")[2], Dinov2WithRegistersModel)
    network = Model.from_pretrained(folder, dtype=torch.float64).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return network(pixels.double()).last_hidden_state[0, 0].tolist()


def plain_clip(folder, image=None, text=None):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    network = CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        if image is not None:
            pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
            return network.visual_projection(network.vision_model(pixels.double()).pooler_output)[0].tolist()
        ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
        ids = [*ids[: LENGTH - 1], ids[-1]] if len(ids) > LENGTH else ids
        return network.text_projection(network.text_model(torch.tensor([ids])).pooler_output)[0].tolist()


def column(scores, key):
    return [row[key] for row in scores["images"]]


@pytest.mark.parametrize("kind", KINDS)
def test_dino_is_the_plain_loop(saved, kind):
    scores = Similarity(saved[kind], None).scores(IMAGES, PROMPTS, REFERENCES)
    real = [plain_dino(saved[kind], image) for image in REFERENCES]
    expected = []
    for image in IMAGES:
        own = plain_dino(saved[kind], image)
        expected.append(sum(cosine(own, other) for other in real) / len(real))
    assert column(scores, "dino") == pytest.approx(expected, abs=1e-5)
    assert scores["dino"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert max(expected) - min(expected) > 0.01  # images differ
    assert set(scores) == {"dino", "images"}


def test_clip_is_the_plain_loop(saved):
    prompts = [*PROMPTS[:2], "a dog and " * 60, PROMPTS[3]]  # the third is longer than the model reads
    scores = Similarity(None, saved["clip"]).scores(IMAGES, prompts, REFERENCES)
    real = [plain_clip(saved["clip"], image) for image in REFERENCES]
    own = [plain_clip(saved["clip"], image) for image in IMAGES]
    expected = [sum(cosine(one, other) for other in real) / len(real) for one in own]
    assert column(scores, "clip_i") == pytest.approx(expected, abs=1e-5)
    assert scores["clip_i"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    of_text = [cosine(one, plain_clip(saved["clip"], text=text)) for one, text in zip(own, prompts, strict=True)]
    assert column(scores, "clip_t") == pytest.approx(of_text, abs=1e-5)
    assert scores["clip_t"] == pytest.approx(sum(of_text) / len(of_text), abs=1e-5)
    assert max(of_text) - min(of_text) > 0.01
    assert set(scores) == {"clip_i", "clip_t", "images"}


def test_images_are_processed_as_the_model_says(saved):
    """An image of the network's size is only scaled: (x / 255 - mean) / std, with the mean and deviation saved."""
    from transformers import ViTModel

    network = ViTModel.from_pretrained(saved["vit"]).eval()

    def embedded(image):
        numbers = np.asarray(image).reshape(-1, 3).tolist()
        pixels = [[(v / 255 - m) / s for v, m, s in zip(p, *NORMAL.values(), strict=True)] for p in numbers]
        with torch.no_grad():
            return network(torch.tensor(pixels).T.reshape(1, 3, 32, 32)).last_hidden_state[0, 0].tolist()

    scores = Similarity(saved["vit"], None).scores([photograph(1)], ["a"], [photograph(5)])
    assert scores["dino"] == pytest.approx(cosine(embedded(photograph(1)), embedded(photograph(5))), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_like_itself(saved, kind):
    similarity = Similarity(saved[kind], saved["clip"])
    scores = similarity.scores([photograph(3)], ["a dog"], [photograph(3)])
    assert scores["dino"] == pytest.approx(1, abs=1e-6)
    assert scores["clip_i"] == pytest.approx(1, abs=1e-6)
    other = similarity.scores([photograph(3)], ["a dog"], [photograph(4)])
    assert max(other["dino"], other["clip_i"]) < 0.999


def test_many_images_in_parts(saved, monkeypatch):
    """What a part holds changes nothing, and no part is larger than said."""
    similarity = Similarity(saved["vit"], saved["clip"])
    images = [photograph(seed, (32 + seed, 40)) for seed in range(11)]
    prompts = [f"dog {seed % 4}" for seed in range(11)]
    whole = similarity.scores(images, prompts, REFERENCES)
    monkeypatch.setattr(image_similarity, "BATCH", 3)
    sizes = seen(similarity, monkeypatch)
    parts = similarity.scores(images, prompts, [photograph(seed) for seed in range(20, 25)])
    assert max(sizes["dino"]) == max(sizes["clip_i"]) == 3
    assert sum(sizes["dino"]) == sum(sizes["clip_i"]) == 11 + 5
    assert column(parts, "clip_t") == pytest.approx(column(whole, "clip_t"), abs=1e-5)
    again = similarity.scores(images, prompts, REFERENCES)
    for key in ("dino", "clip_i", "clip_t"):
        assert column(again, key) == pytest.approx(column(whole, key), abs=1e-5)


def seen(similarity, monkeypatch):
    """How many images go through each network from here on, a number a forward."""
    sizes = {}
    for key, embed in similarity._images.items():
        network, own = embed, embed.of_pixels
        sizes[key] = []

        def counted(pixels, own=own, kept=sizes[key]):
            kept.append(len(pixels))
            return own(pixels)

        monkeypatch.setattr(network, "of_pixels", counted)
    return sizes


def test_grey_and_transparent_images(saved):
    similarity = Similarity(saved["vit"], saved["clip"])
    grey = photograph(1).convert("L")
    scores = similarity.scores([grey, photograph(2).convert("RGBA")], ["a", "b"], [grey.convert("RGB")])
    expected = similarity.scores([grey.convert("RGB"), photograph(2)], ["a", "b"], [grey])
    assert scores == expected


def test_networks_are_frozen_and_in_float32(saved, tmp_path):
    """As saved in bfloat16, under autocast, and beside gradients of others."""
    folder = shutil.copytree(saved["vit"], tmp_path / "vit")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    similarity = Similarity(str(folder), saved["clip"])
    plain = similarity.scores(IMAGES[:2], PROMPTS[:2], REFERENCES)
    with torch.autocast("cpu", torch.bfloat16):
        assert Similarity(str(folder), saved["clip"]).scores(IMAGES[:2], PROMPTS[:2], REFERENCES) == plain
    for embed in similarity._images.values():
        network = embed.network
        assert not network.training
        assert {(p.dtype, p.requires_grad) for p in network.parameters()} == {(torch.float32, False)}


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(*models):
    with pytest.raises(ConfigurationError) as error:
        Similarity(*models)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    return str(error.value)


def test_models_that_cannot_be_had(saved, tmp_path):
    assert "DINO model ./nowhere: there is no such folder" in refused("./nowhere", None)
    assert "CLIP model nobody/nothing cannot be loaded from the cache" in refused(None, "nobody/nothing")
    assert f"CLIP model in folder {tmp_path}" in refused(None, str(tmp_path))


def test_models_of_another_kind(saved):
    clip, vit = saved["clip"], saved["vit"]
    assert f"DINO model {clip} is of type 'clip'; give one of vit, dinov2" in refused(clip, None)
    assert f"CLIP model {vit} is of type 'vit'; give one of clip" in refused(None, vit)


@pytest.fixture
def without(saved, tmp_path):
    """Copies the folder of a network, but for some files: ``without(kind, *names)``."""

    def copied(kind, *names):
        ignore = shutil.ignore_patterns(*names)
        return shutil.copytree(saved[kind], tmp_path / f"{kind}{len([*tmp_path.iterdir()])}", ignore=ignore)

    return copied


def test_a_folder_without_some_file(without):
    folder = str(without("vit", "preprocessor_config.json"))
    assert f"folder {folder} of the DINO model has no image processor (pre" in refused(folder, None)
    assert "DINO model in folder" in refused(str(without("dinov2", "*.safetensors")), None)


def test_weights_that_are_missing_or_damaged(without):
    file = without("vit") / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "layernorm.weight"}, file, {"format": "pt"})
    words = "has no weights for 1 of its tensors, which would be random: layernorm.weight"
    assert words in refused(str(file.parent), None)
    file = without("clip") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "a file of its weights is damaged" in refused(None, str(file.parent))


def test_a_tokenizer_of_another_model(without):
    """With none of its files transformers makes one that knows no word; one with more words would crash the network."""
    size = len(vocabulary())
    folder = without("clip", "vocab.json", "merges.txt", "tokenizer*", "special*")
    words = f"has 2 tokens, and the model {size}; add the model's own (tokenizer.json"
    assert words in refused(None, str(folder))
    file = without("clip") / "vocab.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "zebra</w>": size}))
    assert f"has {size + 1} tokens, and the model {size}" in refused(None, str(file.parent))
