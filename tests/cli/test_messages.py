"""One line from the parser's nested messages."""

import textwrap

import pytest

from pera_lightning.cli.messages import explain

# What jsonargparse (4.53) and the classes that it builds really say; long lists are cut.
CASES = {
    "a literal": (
        """
        Parser key "adapter.method":
          Problem with given class_path 'pera_lightning.adapters.AuroRA':
            Parser key "activation":
              Expected a typing.Literal['tanh', 'relu']. Got value: tanhh
        """,
        "adapter.method.activation: one of 'tanh', 'relu' is needed; given tanhh; closest: tanh",
    ),
    "a union": (
        """
        Parser key "trainer.max_epochs":
          Does not validate against any of the Union subtypes
          Subtypes: [<class 'int'>, <class 'NoneType'>]
          Errors:
            - Expected a <class 'int'>
            - Expected a <class 'NoneType'>
          Given value type: <class 'str'>
          Given value: three
        """,
        "trainer.max_epochs: int is needed; given three",
    ),
    "a nested union": (
        """
        Parser key "data":
          Does not validate against any of the Union subtypes
          Errors:
            - Problem with given class_path 'pera_lightning.ImageDataModule':
                Parser key "classes":
                  Does not validate against any of the Union subtypes
                  Errors:
                    - Expected a <class 'list'>
                    - Expected a <class 'NoneType'>
                  Given value type: <class 'str'>
                  Given value: five
            - Expected a <class 'NoneType'>
          Given value type: <class 'jsonargparse._util.NestedArg'>
          Given value: NestedArg(key='classes', val='five')
        """,
        "data.classes: list is needed; given five",
    ),
    "a constructor that raised": (
        """
        Does not validate against any of the Union subtypes
        Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
        Errors:
          - lr=-1.0: a number above 0 is needed
          - Expected a <class 'NoneType'>
        Given value type: <class 'jsonargparse._namespace.Namespace'>
        Given value: Namespace(lr=-1.0)
        """,
        "lr=-1.0: a number above 0 is needed",
    ),
    "a class of another kind": (
        """
        Parser key "adapter.method":

          - Expected a path but torch.nn.Linear either not accessible or invalid
          - Import path torch.nn.Linear does not correspond to a subclass of Method
        """,
        "adapter.method: Import path torch.nn.Linear does not correspond to a subclass of Method",
    ),
    "a class that is not known": (
        'Parser key "model":\n  - Expected a dot import path string: ImageModule',
        "model: class 'ImageModule' is not known; there are ImageClassificationModule, or give a dotted path; "
        "closest: ImageClassificationModule",
    ),
    "a class of a key without a list": (
        'Parser key "trainer.callbacks":\n  - Expected a dot import path string: EarlyStoping',
        "trainer.callbacks: class 'EarlyStoping' is not known; give a dotted path",
    ),
    "a module that is not installed": (
        """
        Parser key "adapter.method":
          - Expected a path but no.such.Method either not accessible or invalid
          - Problem with given class_path 'no.such.Method':
            No module named 'no'
        """,
        "adapter.method: No module named 'no'",
    ),
    "an argument left out": (
        """
        Parser key "trainer.callbacks":
          Errors:
            - Problem with given class_path 'lightning.pytorch.callbacks.EarlyStopping':
                the following arguments are required: monitor
            - Not a valid subclass of Callback
              Subclass types expect one of:
              - a class path (str)
            - Expected a <class 'NoneType'>
        """,
        "trainer.callbacks: EarlyStopping: the following arguments are required: monitor",
    ),
    "an option that a class does not take": (
        """
        Parser key "adapter.method":
          Problem with given class_path 'pera_lightning.adapters.HiLoRA':
            Option 'hira_rnak' is not accepted
        """,
        "adapter.method: HiLoRA has no option 'hira_rnak'; closest: hira_rank, lora_rank; it has hira_rank, lora_rank",
    ),
    "an option that is not known": (
        "unrecognized arguments: --trainer.max_epoch 3",
        "unknown option --trainer.max_epoch; closest: --trainer.max_epochs",
    ),
    "an option that a model does not take": (
        """
        Parser key "model":
          Does not validate against any of the Union subtypes
          Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
          Errors:
            - Problem with given class_path 'pera_lightning.ImageClassificationModule':
                Option 'lrr' is not accepted
            - Expected a <class 'NoneType'>
          Given value type: <class 'jsonargparse._util.NestedArg'>
          Given value: NestedArg(key='lrr', val='1')
        """,
        "model: ImageClassificationModule has no option 'lrr'; closest: lr, head_lr; it has model_name, ",
    ),
    "an option that another method takes": (
        """
        Parser key "adapter.method":
          Problem with given class_path 'pera_lightning.adapters.HiRA':
            Option 'alpha' is not accepted
        """,
        "adapter.method: HiRA has no option 'alpha'; closest: scale; it has rank, scale, ",
    ),
    "a class of a key that may be left out": (
        """
        Parser key "model":

          - Expected a path but ImageClassifier either not accessible or invalid
          - Does not validate against any of the Union subtypes
          Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
          Errors:
            - Expected a dot import path string: ImageClassifier
            - Expected a <class 'NoneType'>
          Given value type: <class 'str'>
          Given value: ImageClassifier
        """,
        "model: class 'ImageClassifier' is not known; there are ImageClassificationModule, or give a dotted path; "
        "closest: ImageClassificationModule",
    ),
    "a class of another kind for a key that may be left out": (
        """
        Parser key "model":

          - Expected a path but torch.nn.Linear either not accessible or invalid
          - Does not validate against any of the Union subtypes
          Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
          Errors:
            - Import path does not correspond to a subclass of LightningModule
            - Expected a <class 'NoneType'>
          Given value type: <class 'str'>
          Given value: torch.nn.Linear
        """,
        "model: Import path does not correspond to a subclass of LightningModule",
    ),
    "a literal of a model": (
        """
        Parser key "model":
          Does not validate against any of the Union subtypes
          Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
          Errors:
            - Problem with given class_path 'pera_lightning.ImageClassificationModule':
                Parser key "lr_schedule":
                  Expected a typing.Literal['linear', 'cosine', 'constant']. Got value: linea
            - Expected a <class 'NoneType'>
          Given value type: <class 'jsonargparse._util.NestedArg'>
          Given value: NestedArg(key='lr_schedule', val='linea')
        """,
        "model.lr_schedule: one of 'linear', 'cosine', 'constant' is needed; given linea; closest: linear",
    ),
    "several literals": (
        """
        Parser key "trainer.precision":
          Does not validate against any of the Union subtypes
          Subtypes: [typing.Literal[64, 32, 16], typing.Literal['16-true', 'bf16-true'], <class 'NoneType'>]
          Errors:
            - Expected a <class 'int'>
            - Expected a typing.Literal['16-true', '16-mixed', 'bf16-true', 'bf16-mixed', '32-true', '64-true']
            - Expected a typing.Literal['64', '32', '16', 'bf16']
            - Expected a <class 'NoneType'>
          Given value type: <class 'str'>
          Given value: bf17
        """,
        "trainer.precision: int or one of '16-true', '16-mixed', 'bf16-true', 'bf16-mixed', '32-true', '64-true' or "
        "one of '64', '32', '16', 'bf16' is needed; given bf17; closest: bf16, bf16-true, bf16-mixed",
    ),
    "a data module that raised": (
        """
        Does not validate against any of the Union subtypes
        Subtypes: [<class 'lightning.pytorch.core.datamodule.LightningDataModule'>, <class 'NoneType'>]
        Errors:
          - unknown transform 'fourier'; there are fourierft, center, timm, none; closest: fourierft
          - Expected a <class 'NoneType'>
        Given value type: <class 'jsonargparse._namespace.Namespace'>
        Given value: Namespace(class_path='pera_lightning.ImageDataModule', init_args=Namespace(dataset='digits'))
        """,
        "unknown transform 'fourier'; there are fourierft, center, timm, none; closest: fourierft",
    ),
    "a class in a list": (
        """
        Parser key "trainer.callbacks":

          - Expected a path but [{"class_path": "EarlyStoping"}] either not accessible or invalid
          - Does not validate against any of the Union subtypes
          Subtypes: [list[lightning.pytorch.callbacks.callback.Callback], <class 'NoneType'>]
          Errors:
            - Expected a dot import path string: EarlyStoping
            - Not a valid subclass of Callback
              Subclass types expect one of:
              - a class path (str)
              - a dict with class_path entry
              - a dict without class_path but with init_args entry (class path given previously)
              - a dict with parameters accepted by the base class (implicit class_path)
            - Expected a <class 'NoneType'>
          Given value type: <class 'list'>
          Given value: [{'class_path': 'EarlyStoping'}]
        """,
        "trainer.callbacks: class 'EarlyStoping' is not known; give a dotted path",
    ),
    "no value": (
        "argument --adapter.method: expected one argument",
        "argument --adapter.method: expected one argument",
    ),
    "a word too many": ("unrecognized arguments: extra", "unknown option extra"),
    "what a class says about its values": (
        "rank=0: a positive integer is needed",
        "rank=0: a positive integer is needed",
    ),
    "anything else": ("first line\n   second line", "first line second line"),
}


@pytest.mark.parametrize(("message", "expected"), CASES.values(), ids=CASES)
def test_one_line(message, expected):
    classes = {"model": ["ImageClassificationModule"]}
    line = explain(textwrap.dedent(message).strip(), ["--trainer.max_epochs", "--data"], classes)
    assert line.startswith(expected)
    assert "\n" not in line


def test_options_that_are_handed_on_are_listed_too():
    from pera_lightning.cli.messages import _parameters

    names = _parameters("pera_lightning", "CommonsenseDataModule")
    assert {"folder", "train", "protocol", "batch_size", "max_length"} <= set(names)
    assert not {"self", "options", "kwargs"} & set(names)
    assert names.count("protocol") == 1
