"""Names of layers and heads, by peft's rules."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from pera_lightning.adapters.base import LowRankUpdate
from pera_lightning.export.peft_names import alpha_of, exact_patterns, heads, shortest_targets

BLOCKS = [f"h.{k}.{name}" for k in range(12) for name in ("attn", "attn.q", "attn.kq", "mlp", "mlp.q")]
CASES = [
    (["a.q_proj"], ["a", "a.q_proj", "a.xq_proj"], ["q_proj"]),  # whole components: not the end of xq_proj
    ([path for path in BLOCKS if path.endswith("attn.q")], BLOCKS, ["attn.q"]),
    ([path for path in BLOCKS if path.endswith(".q")], BLOCKS, ["q"]),
    (["h.1.attn.q", "h.11.attn.q"], BLOCKS, ["1.attn.q", "11.attn.q"]),
    (["h.1.attn.q"], [*BLOCKS, "g.1.attn.q"], ["h.1.attn.q"]),
    (["q"], ["q", "a", "a.q"], "q"),  # an expression for the whole path
    (["q", "b.q"], ["q", "a", "a.q", "b", "b.q"], r"b\.q|q"),
]


@pytest.mark.parametrize(("layers", "modules", "expected"), CASES)
def test_shortest_targets(layers, modules, expected):
    found = shortest_targets(layers, modules)
    assert found == expected
    config = LoraConfig(target_modules=found)
    assert [path for path in modules if check_target_module_exists(config, path)] == layers


def test_heads_are_ends_of_the_text():
    assert heads(["classifier"], ["pre_classifier", "classifier", "classifier.dense", "bert"]) == [
        "pre_classifier",
        "classifier",
    ]
    assert heads([], ["classifier"]) == []


def test_patterns_name_one_layer():
    assert exact_patterns({"h.1.q": 4, "h.2.q": 8, "h.3.q": 8}, 8) == {r"^h\.1\.q": 4}


@pytest.mark.parametrize(("scale", "rank", "alpha"), [(16 / 3, 3, 16), (0.5, 7, 3.5), (2.0, 8, 16), (1e-3, 1, 1e-3)])
def test_alpha(scale, rank, alpha):
    given = alpha_of(LowRankUpdate(torch.zeros(rank, 2), torch.zeros(2, rank), scale))
    assert given == pytest.approx(alpha)
    assert isinstance(given, int) == (alpha == int(alpha))
