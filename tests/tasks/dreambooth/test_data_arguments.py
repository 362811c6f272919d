"""Arguments of the DreamBooth data module: what is refused in one line, and what the command line takes."""

import pytest

from pera_lightning.errors import ConfigurationError, UnknownNameError
from pera_lightning.tasks.dreambooth.data import DreamBoothDataModule
from tests.tasks.dreambooth.data_helpers import PROMPT

CLASS = {"class_prompt": "a photo of dog"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"resolution": 100}, ConfigurationError, "multiples of 8; given .100, 100."),
        ({"crop": "centre"}, UnknownNameError, "crop='centre' does not exist; one of center, random; closest: center"),
        ({"batch_size": 0}, ConfigurationError, "batch_size=0: an integer of at least 1"),
        ({"repeats": 0}, ConfigurationError, "repeats=0: an integer of at least 1"),
        ({"num_workers": -1}, ConfigurationError, "num_workers=-1: an integer of at least 0"),
        ({"num_class_images": -1}, ConfigurationError, "num_class_images=-1: an integer of at least 0"),
        ({"instance_prompt": " "}, ConfigurationError, "instance_prompt is empty"),
        ({"identifier": ""}, ConfigurationError, "identifier is empty"),
        ({"class_folder": "c"}, ConfigurationError, "need class_folder and class_prompt; given class_folder=c"),
        ({"class_prompt": "a dog"}, ConfigurationError, "need class_folder and class_prompt; .* class_prompt=a dog"),
        ({"num_class_images": 5}, ConfigurationError, "need class_folder and class_prompt; .* num_class_images=5"),
        ({"class_folder": "photos/../photos", **CLASS}, ConfigurationError, "lie in one another"),
        ({"class_folder": "photos/class", **CLASS}, ConfigurationError, "lie in one another"),
        ({"class_folder": ".", **CLASS}, ConfigurationError, "lie in one another"),
        ({"instance_folder": ""}, ConfigurationError, "instance_folder is empty"),
        ({"resolution": "64"}, ConfigurationError, "one side or"),
        ({"validation_prompts": "a dog"}, ConfigurationError, "validation_prompts takes a list of prompts"),
        ({"seeds": [1, 1]}, ConfigurationError, "seeds takes numbers .* each once; given"),
        ({"seeds": []}, ConfigurationError, "seeds takes numbers .* given"),
        ({"validation_seeds": [-1]}, ConfigurationError, "validation_seeds takes numbers .* given \\[-1\\]"),
        ({"prompts": []}, ConfigurationError, "prompts takes a list of prompts"),
        ({"validation_prompts": ["{}", ""]}, ConfigurationError, "none of them empty"),
        ({"prompts": ["a {0} at sea"]}, ConfigurationError, r"at sea' has braces that are not \{\}; write \{\} alone"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        DreamBoothDataModule(**{"instance_folder": "photos", "instance_prompt": PROMPT, **arguments})


def test_nothing_is_there_before_setup(photos):
    data = DreamBoothDataModule(str(photos), PROMPT)
    for ask in (data.train_dataloader, data.val_dataloader, data.test_dataloader, data.reference_images):
        with pytest.raises(ConfigurationError, match=r"after setup\(\); call it first"):
            ask()
    assert data.protocol()["class_images"] == 0


def test_the_command_line_takes_its_values():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DreamBoothDataModule, "data")
    base = ["--data.instance_folder=photos", f"--data.instance_prompt={PROMPT}"]
    words = ["--data.resolution=[64, 32]", "--data.seeds=[3, 4]", '--data.prompts=["{} one"]', "--data.crop=center"]
    data = DreamBoothDataModule(**parser.parse_args([*base, *words]).data)
    assert (data.size, data.seeds, data.validation_seeds, data.prompts) == ((64, 32), [3, 4], [0], ["{} one"])
    assert DreamBoothDataModule(**parser.parse_args(base).data).size == (1024, 1024)
