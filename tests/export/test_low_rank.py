"""Updates as LoRAs of whole projections, cut by SVD and made even."""

import pytest
import torch
from torch import nn

from pera_lightning import inject
from pera_lightning.adapters import PERA, AuroRA, HiRA, LinearAdapter, LoRA
from pera_lightning.adapters.base import LowRankUpdate
from pera_lightning.errors import NotMergeableError
from pera_lightning.export.low_rank import cut_matrix, cut_update, full_update, low_rank_updates, padded


def update(rank, scale=1.0, out=7, features=5, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    constant = torch.randn(out, generator=g) if bias else None
    return LowRankUpdate(torch.randn(rank, features, generator=g), torch.randn(out, rank, generator=g), scale, constant)


def fused(method, blocks):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("qkv", nn.Linear(5, 9))
    inject(model, method, [f"qkv[{blocks}]"], fused={"qkv": {"q": 4, "k": 2, "v": 3}})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p))
    return model


def test_row_blocks_become_one_update():
    layer = fused(PERA(rank=2, alpha=3.0), "v,q").qkv
    whole = full_update(layer)
    assert whole.rank == 10
    expected = torch.zeros(9, 5)
    for name, rows in layer.slices.items():
        expected[rows] = layer.adapters[name].delta_weight(layer.weight[rows])
    assert torch.allclose(whole.delta_weight(), expected, atol=1e-6)
    assert not whole.B[4:6].any()  # k has no adapter: exactly zero


def test_blocks_of_different_scales_and_constants():
    class Fixed(LinearAdapter):
        def __init__(self, given):
            super().__init__(in_features=5, out_features=len(given.B))
            self.given = given

        def low_rank_update(self):
            return self.given

    layer = fused(LoRA(rank=2), "q,v").qkv
    q, v = update(2, scale=0.5, out=4, bias=True), update(3, scale=2.0, out=3, seed=1)
    layer.adapters = nn.ModuleDict({"q": Fixed(q), "v": Fixed(v)})
    whole = full_update(layer)
    expected = torch.cat([q.delta_weight(), torch.zeros(2, 5), v.delta_weight()])
    assert torch.allclose(whole.delta_weight(), expected, atol=1e-6)
    assert torch.equal(whole.bias, torch.cat([q.bias, torch.zeros(5)]))


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("size", [4, 6, 20])
def test_the_cut_is_the_best_there_is(rank, size):
    """Against the singular values of the whole matrix; also where the update's rank is larger than the matrix."""
    given = update(size, scale=0.7, bias=True)
    matrix = given.delta_weight()
    sigma = torch.linalg.svdvals(matrix.double())
    best = float(sigma[rank:].norm() / sigma.norm())
    for found, error in (cut_update(given, rank), cut_matrix(matrix, rank)):
        assert found.rank == rank
        assert error == pytest.approx(best, rel=1e-4, abs=1e-6)
        true = float((found.delta_weight() - matrix).norm() / matrix.norm())
        assert true == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert found.A.dtype == torch.float32
    assert torch.equal(cut_update(given, rank)[0].bias, given.bias)


def test_an_update_that_is_zero():
    model = nn.Sequential(nn.Linear(6, 6))
    inject(model, HiRA(rank=2), ["0"])
    assert low_rank_updates(model, rank=1)[1] == {"0": 0.0}


def test_made_even():
    updates = {"a": update(2, scale=0.5, bias=True), "b": update(4, scale=3.0, seed=1)}
    even = padded(updates)
    assert {(u.rank, u.scale) for u in even.values()} == {(4, 1.0)}
    for path, u in updates.items():
        assert torch.allclose(even[path].delta_weight(), u.delta_weight(), atol=1e-5)
    assert torch.equal(even["a"].bias, updates["a"].bias)
    same = padded({"a": update(2, scale=0.5), "b": update(3, scale=0.5, seed=1)})
    assert {(u.rank, u.scale) for u in same.values()} == {(3, 0.5)}  # one scale stays exactly
    assert torch.equal(same["a"].A[:2], update(2).A)


def test_the_worst_layers_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    inject(model, LoRA(rank=3), ["*"])
    with torch.no_grad():
        for k, layer in enumerate(model):
            layer.adapters["all"].B.normal_()
            layer.adapters["all"].A[1:] *= 0.02 * k
    with pytest.raises(NotMergeableError, match=r"rank 1, 3 of 5 layers lose more than max_error=0.02: 3 .*, 4 .*, 2 "):
        low_rank_updates(model, rank=1, max_error=0.02)
    assert low_rank_updates(model, rank=1, max_error=1.0)[1]["0"] < 1e-6


def test_what_has_no_matrix_says_its_own_reason():
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, AuroRA(rank=2), ["0"])
    with pytest.raises(NotMergeableError, match=r"^0: AuroRA in dynamic mode is not a linear map"):
        low_rank_updates(model, rank=2)
