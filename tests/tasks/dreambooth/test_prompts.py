"""Prompts of a subject: what it is called, lists, the images made of them, and notes where it is not named."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from pera_lightning.errors import DataError
from pera_lightning.tasks.dreambooth import subject_prompts
from pera_lightning.tasks.dreambooth.prompts import generation_examples, subject_of
from tests.tasks.dreambooth.data_helpers import data_module, fill

CLASS = {"class_prompt": "a photo of dog"}


@pytest.mark.parametrize(
    ("prompt", "given", "subject"),
    [
        ("a photo of sks dog", {}, ("sks", "dog")),
        ("a photo of a sks stuffed animal, on grass", {}, ("sks", "stuffed animal")),
        ("A close-up photo of the sks dog in the park", {}, ("sks", "dog")),
        ("sks dog", {}, ("sks", "dog")),
        ("a photo of sks", {}, ("sks", "")),
        ("a photo of tall ohwx man", {"class_prompt": "a photo of man"}, ("tall ohwx", "man")),
        ("a photo of ohwx tall man", {"class_prompt": "a picture of a tall man"}, ("ohwx", "tall man")),
        ("photo of my lovely Sks dog", {"identifier": "sks"}, ("sks", "dog")),
        ("a photo of a dog", {"identifier": "sks"}, ("sks", "dog")),
        ("a house in the style of <new>", {"identifier": "<new>"}, ("<new>", "")),
    ],
)
def test_the_subject_of_a_prompt(prompt, given, subject):
    found = subject_of(prompt, **given)
    assert (found.identifier, found.class_words) == subject


def test_images_to_be_made(photos):
    data = data_module(
        photos,
        None,
        validation_prompts=["a photo of {} on the moon", "{} by the sea"],
        validation_seeds=[5],
        prompts=["{} / in:\tRome?", "{} / in:\tRome?", "ein Gemälde von {}, " + "sehr " * 50],
        seeds=[0, 2**40],
    )
    assert list(data.val_dataloader()) == [
        {"prompt": ["a photo of sks dog on the moon"], "seed": torch.tensor([5]), "name": [PROMPT_NAMES[0]]},
        {"prompt": ["sks dog by the sea"], "seed": torch.tensor([5]), "name": [PROMPT_NAMES[1]]},
    ]
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        rows = [(b["prompt"][0], int(b["seed"]), b["name"][0]) for b in loader]
        assert [(prompt[:9], seed) for prompt, seed, _ in rows] == [
            (start, seed) for start in ("sks dog /", "sks dog /", "ein Gemäl") for seed in (0, 2**40)
        ]
        stems = [name for _, _, name in rows]
        assert len(set(stems)) == 6
        assert stems[1] == f"00-sks-dog-in-rome-seed{2**40}"
        assert all(len(f"{name}.png".encode()) < 255 and not set(name) & set("/\\:?*\t ") for name in stems)


PROMPT_NAMES = ["00-a-photo-of-sks-dog-on-the-moon-seed5", "01-sks-dog-by-the-sea-seed5"]


def test_each_image_is_made_by_one_process(photos):
    data = data_module(photos, "test", prompts=["{} one", "{} two", "{} three"], seeds=[0])
    made = []
    for rank in (0, 1):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        made.append([(int(b["seed"]), b["prompt"][0]) for b in data.test_dataloader()])
    assert made == [[(0, "sks dog one"), (0, "sks dog three")], [(0, "sks dog two"), (-1, "sks dog three")]]


def test_lists_of_prompts(photos, tmp_path):
    def prompts(**arguments):
        data = data_module(photos, "predict", seeds=[0], **arguments)
        return [batch["prompt"][0] for batch in data.predict_dataloader()]

    ours = prompts()
    assert ours == [one.replace("{}", "sks dog") for one in subject_prompts.PROMPTS]
    (tmp_path / "mine.txt").write_text("# mine\n{} on a hill\n")
    assert prompts(prompts=str(tmp_path / "mine.txt")) == ["sks dog on a hill"]
    with pytest.raises(DataError, match=r"none\.txt is not a file: give prompts as a list, or a file with one"):
        prompts(prompts=str(tmp_path / "none.txt"))
    assert prompts(prompts=["{}, {}"]) == ["sks dog, sks dog"]
    assert len({row["name"] for row in generation_examples(["x"] * 120, [0, 1])}) == 240


def test_prompts_alone_need_no_photographs(tmp_path):
    data = data_module(tmp_path / "none", "predict")
    assert len(data.predict_dataloader()) == 4 * len(subject_prompts.PROMPTS)
    assert data.protocol()["sha256"] == {}
    for stage in ("fit", "test"):
        with pytest.raises(DataError, match="does not exist"):
            data_module(tmp_path / "none", stage)


def test_prompts_without_the_identifier_are_noted_once_and_counted(photos):
    for number, text in enumerate(["SKS dog asleep", "a sksy dog", "a dog"]):
        (photos / f"0{number}.txt").write_text(text)
    with pytest.warns(UserWarning, match="identifier") as notes:
        data_module(photos, None, validation_prompts=["{} on a hill", "a dog on a hill"], prompts=["an SKS cat"])
    messages = [str(note.message) for note in notes if "identifier" in str(note.message)]
    assert len(messages) == 2
    assert messages[0].startswith(f"2 of 3 captions of {photos} lack the identifier 'sks', such as 'a sksy dog'")
    assert messages[1].startswith("1 of 2 validation prompts lack the identifier 'sks', such as 'a dog on a hill'")


def test_an_instance_prompt_without_the_identifier_is_noted(photos):
    with pytest.warns(UserWarning, match="3 of 3 captions of .* lack the identifier 'sks', such as 'a photo of a dog'"):
        data_module(photos, instance_prompt="a photo of a dog", identifier="sks")
    folder = fill(photos.parent / "class", 1)
    with pytest.warns(UserWarning, match="class_prompt 'a photo of dog' has the identifier 'dog' too"):
        data_module(photos, instance_prompt="a photo of dog", class_folder=str(folder), **CLASS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data_module(photos, None)
