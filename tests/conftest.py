"""What every test relies on: one thread, no network, no settings left over; and the command line in process."""

import logging
import os
import signal
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; fork after several threads were used hangs
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

from types import SimpleNamespace

import pytest
import torch

from tests.run_helpers import quick_words, run_pera

torch.set_num_threads(1)
# torch counts the devices at a process's first backward. After DTensor or fake tensors were used it finds one more, and
# then refuses every backward in processes that are forked from here.
torch.ones(1, requires_grad=True).sum().backward()


def pytest_collection_modifyitems(items):
    """Puts the slow tests first: begun last, they would leave the other workers idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def no_leftovers():
    """Undoes what Lightning leaves: the seed in the environment, a log handler on the stderr of an earlier test."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:  # not pytest's own, whose stream it reads
                handler.stream = sys.stderr
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture
def interruptible():
    """SIGINT acts, here and in child processes: a shell that runs tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pera(capsys):
    """Runs the command line: ``pera(*words)`` has `code`, `out` and `err`."""

    def run(*words):
        capsys.readouterr()
        code = run_pera(*words)
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def quick(pera, tmp_path):
    """Runs two steps of the quickstart with more options: ``quick(*options, command="fit")``."""

    def run(*options, command="fit", folder=None, **keywords):
        return pera(*quick_words(folder or tmp_path, command, **keywords), *options)

    return run


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    """A folder with a run of two steps of the quickstart, and its checkpoint."""
    folder = tmp_path_factory.mktemp("fitted")
    assert run_pera(*quick_words(folder)) == 0
    run = folder / "quickstart"
    return SimpleNamespace(folder=folder, run=run, checkpoint=run / "checkpoints" / "best.ckpt")


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """A timm folder with a very small ViT."""
    from tests.tasks.image_classification.vision_helpers import save_tiny_vit

    folder = tmp_path_factory.mktemp("timm") / "tiny_vit"
    save_tiny_vit(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A folder with a very small Llama and its tokenizer."""
    from tests.tasks.causal_lm.language_helpers import save_tiny

    return save_tiny(tmp_path_factory.mktemp("transformers") / "tiny_llama")


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """A folder of small commonsense sets, `COUNTS` test rows each; for tests in the folder of the helpers."""
    from tests.tasks.causal_lm.evaluator_helpers import COUNTS
    from tests.tasks.causal_lm.language_helpers import write_sets

    return write_sets(tmp_path_factory.mktemp("commonsense"), COUNTS)


@pytest.fixture
def asked(monkeypatch):
    """What a language model is asked from here on."""
    from tests.tasks.causal_lm.evaluator_helpers import Asked

    return Asked(monkeypatch)
