"""`methods`: every cell of the table is what the method does on a layer."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from pera_lightning import inject
from pera_lightning.adapters import PERA, LinearMethod, LoRA, registered_methods
from pera_lightning.adapters.adapted_layer import AdaptedLayer
from pera_lightning.cli.commands.methods import NONE, capabilities, example, table
from pera_lightning.errors import NotMergeableError
from pera_lightning.export.low_rank import low_rank_updates
from pera_lightning.merging.linearised import linearised
from pera_lightning.merging.merge import merge
from tests.run_helpers import ROOT

METHODS = registered_methods()


def layer(method):
    """A model of one adapted layer with random adapters, and its adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20))
    inject(model, method, ["0"], seed=0)
    for parameter in model[0].adapters.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval(), model[0].adapters["all"]


@pytest.fixture
def rows(pera):
    """Name of a method to the cells of its row."""
    result = pera("methods")
    assert result.code == 0
    head, *lines = result.out.split("\n\n")[0].splitlines()
    starts = [head.index(word) for word in ("method", "merge", "exact LoRA", "LoRA by SVD")]
    cut = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    return {name: cells for name, *cells in cut}


def test_all_registered_methods_are_there(rows):
    assert list(rows) == list(METHODS)
    for name, cls in METHODS.items():
        assert rows[name] == list(capabilities(cls))


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if issubclass(cls, LinearMethod)])
def test_each_cell_is_true(rows, name):
    merging, exact, svd = rows[name]
    method = example(METHODS[name])
    model, adapter = layer(method)
    how = None
    if merging == "exact":
        weight = model[0].weight.detach()
        x = torch.randn(5, 24)
        with torch.no_grad():
            expected = model(x)
            changed = nn.functional.linear(x, weight + adapter.delta_weight(weight), model[0].bias)
        assert torch.allclose(changed, expected, atol=1e-5)
    else:
        assert merging == "static or calibrated"
        with pytest.raises(NotMergeableError):
            merge(model)
        for how in ("static", "calibrated"):
            merge(layer(method)[0], mode=how, batches=[torch.randn(40, 24)])
    with linearised(model, how, [torch.randn(40, 24)] if how == "calibrated" else []):
        if exact == NONE:
            with pytest.raises(NotMergeableError):
                adapter.low_rank_update()
        else:
            assert adapter.low_rank_update().rank == int(exact.split()[0]) == method.export_rank
        assert svd == "any rank"
        assert low_rank_updates(model, 2, max_error=1.0)[0]["0"].rank == 2


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if not issubclass(cls, LinearMethod)])
def test_whole_model_methods_have_nothing_to_merge(rows, name):
    assert rows[name] == [NONE, NONE, NONE]
    model = nn.Sequential(nn.Linear(24, 20))
    inject(model, METHODS[name](), [], ["0"], seed=0)
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())
    assert name in table().split("\n\n")[1]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_words_for_ranks(rows, rank):
    """The formulas beside the numbers."""
    ranks = [
        (PERA(rank=rank), rank * (rank + 3) // 2),
        (PERA(rank=rank, terms="square"), 2 * rank),
        (PERA(rank=rank, terms="cross"), rank * (rank + 1) // 2),
        (PERA(rank=rank, terms="linear"), rank),
        (LoRA(rank=rank), rank),
        (LoRA(rank=rank, init="pissa"), 2 * rank),
        (LoRA(rank=rank, init="milora"), 2 * rank),
    ]
    for method, expected in ranks:
        assert method.export_rank == layer(method)[1].low_rank_update().rank == expected
    assert (rows["PERA"][1], rows["LoRA"][1]) == ("44 (r(r+3)/2 *)", "8 (r *)")
    notes = " ".join(table().split())
    assert "LoRA: 2r with init=pissa, milora. PERA: terms=square 2r, cross r(r+1)/2, linear r." in notes


def test_it_is_answered_without_lightning():
    code = (
        "import sys\nfrom pera_lightning.cli.main import main\nmain(['methods'])\n"
        "print('heavy:', sorted({'lightning', 'timm', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_it_takes_no_options(pera):
    result = pera("methods", "--rank", "4")
    assert result.code == 2
    assert result.err.splitlines()[-1] == "error: methods takes no options; given --rank 4"
    assert pera("methods", "--help").out == pera("methods").out
