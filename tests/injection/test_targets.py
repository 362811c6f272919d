"""The target language: what an expression names, and what the messages say where it names nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pera_lightning.errors import ConfigurationError, NoTargetMatched, UnsupportedTarget
from pera_lightning.injection.targets import match_modules, parse, resolve

FUSED = {"qkv": {"q": 8, "k": 8, "v": 8}}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.q_proj = nn.Linear(8, 8)
        self.proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(8, 3)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def paths(model: nn.Module, *targets: str, **options: object) -> list[str]:
    return [target.path for target in resolve(model, targets, **options)]


def blocks(*numbers: int, name: str) -> list[str]:
    return [f"blocks.{n}.{name}" for n in numbers]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("head", ["head"]),
        ("proj", blocks(*range(12), name="attn.proj")),  # whole components: not q_proj
        ("attn.proj", blocks(*range(12), name="attn.proj")),
        ("blocks.1.attn.proj", blocks(1, name="attn.proj")),  # not blocks 10 and 11
        ("1.attn.proj", blocks(1, name="attn.proj")),
        ("  head  ", ["head"]),
        ("blocks.*.attn.proj", blocks(*range(12), name="attn.proj")),
        ("blocks.?.attn.proj", blocks(*range(10), name="attn.proj")),
        ("blocks.1?.attn.proj", blocks(10, 11, name="attn.proj")),
        ("3.attn.*proj", [*blocks(3, name="attn.q_proj"), *blocks(3, name="attn.proj")]),
        ("blocks.3.**", [f"blocks.3.{n}" for n in ("attn.qkv", "attn.q_proj", "attn.proj", "mlp.0", "mlp.2")]),
        ("blocks.**.proj", blocks(*range(12), name="attn.proj")),
        (r"re:blocks\.[0-2]\.attn\.proj", blocks(0, 1, 2, name="attn.proj")),
        (r"re:.*\.(0|1)\.mlp\.2", blocks(0, 1, name="mlp.2")),
        (r"re: .*3\.attn\.proj", blocks(3, name="attn.proj")),
        (r"re:blocks\.3\..*", [f"blocks.3.{n}" for n in ("attn.qkv", "attn.q_proj", "attn.proj", "mlp.0", "mlp.2")]),
    ],
)
def test_which_layers(model: Model, target: str, expected: list[str]) -> None:
    assert paths(model, target) == expected


def test_a_regular_expression_matches_whole_paths(model: Model) -> None:
    with pytest.raises(NoTargetMatched):
        resolve(model, ["re:proj"])


def test_layers_come_in_the_models_order_and_once(model: Model) -> None:
    assert paths(model, "head", "blocks.5.attn.proj", "5.attn.proj", "blocks.4.attn.proj") == [
        "blocks.4.attn.proj",
        "blocks.5.attn.proj",
        "head",
    ]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("0.attn.qkv[q,v]", {"q": slice(0, 8), "v": slice(16, 24)}),
        ("0.attn.qkv[v, q]", {"q": slice(0, 8), "v": slice(16, 24)}),
        ("0.attn.qkv [k]", {"k": slice(8, 16)}),
        (r"re:blocks\.[0]\.attn\.qkv [k]", {"k": slice(8, 16)}),
        ("0.attn.qk?[q]", {"q": slice(0, 8)}),
        ("0.attn.qkv", {"all": slice(0, 24)}),
    ],
)
def test_slices(model: Model, target: str, expected: dict[str, slice]) -> None:
    fused = FUSED if "[q" in target or "[k" in target or "[v" in target else None
    (found,) = resolve(model, [target], fused)
    assert found.slices == expected


def test_a_class_of_characters_is_not_a_slice(model: Model) -> None:
    parsed = parse(r"re:.*\.attn\.[qk]_pro[j]")
    assert parsed.slices == ()
    assert len(resolve(model, [parsed.text])) == 12


def test_slices_of_one_layer_from_two_expressions(model: Model) -> None:
    (found,) = resolve(model, ["0.attn.qkv[v]", "blocks.0.attn.qkv[q]"], FUSED)
    assert list(found.slices) == ["q", "v"]


def test_slices_of_unequal_size(model: Model) -> None:
    (found,) = resolve(model, ["0.attn.qkv[k,v]"], {"attn.qkv": {"q": 16, "k": 4, "v": 4}})
    assert found.slices == {"k": slice(16, 20), "v": slice(20, 24)}


@pytest.mark.parametrize(
    ("targets", "fused", "error", "message"),
    [
        (["q_porj"], None, NoTargetMatched, r"'q_porj' matches none of the 61 linear layers; closest: q_proj"),
        (["blocks.*.attn.qvk"], None, NoTargetMatched, r"none of the 61 linear layers; closest: qkv"),
        (["zzzzzz"], None, NoTargetMatched, r"there are: qkv, q_proj, proj, head"),
        (["re:.*q_porj"], None, NoTargetMatched, r"closest: q_proj"),
        (["blocks.*.proj"], None, NoTargetMatched, r"'blocks.\*.proj' matches none"),  # * is one component
        (["q_proj", "nothing_like"], None, NoTargetMatched, r"'nothing_like' matches none"),
        (["re:(("], None, ConfigurationError, r"'re:\(\(': not a regular expression"),
        ([""], None, ConfigurationError, r"target '': a module name"),
        ([3], None, ConfigurationError, r"target 3: a module name"),
        (["qkv[]"], FUSED, ConfigurationError, r"written as name\[slice,slice\]"),
        (["qkv[q,,v]"], FUSED, ConfigurationError, r"written as name\[slice,slice\]"),
        (["[q]"], FUSED, ConfigurationError, r"written as name\[slice,slice\]"),
        (["qkv[all]"], FUSED, ConfigurationError, r"for the entire layer write 'qkv' without brackets"),
        (["qkv[q,w]"], FUSED, NoTargetMatched, r"'qkv\[q,w\]': blocks.0.attn.qkv has no slice 'w', it has q, k, v"),
        (["qkv[q]"], None, NoTargetMatched, r"the layout of blocks.0.attn.qkv \(Attention\) is not known; give fused="),
        (["qkv[q]", "qkv"], FUSED, ConfigurationError, r"in full and by slices: 'qkv\[q\]' and 'qkv'; keep one"),
        (["qkv", "0.attn.qkv[q]"], FUSED, ConfigurationError, r"in full and by slices"),
        (["qkv[q]"], {"qkv": {"q": 8, "k": 8}}, ConfigurationError, r"add up to 16, it has 24"),
        (["proj"], FUSED, NoTargetMatched, r"fused names 'qkv', which is not targeted"),
        (["qkv[keys]"], {"qkv": {"keys": 24}}, ConfigurationError, r"'keys' of blocks.0.attn.qkv: this name cannot"),
        (["norm"], None, UnsupportedTarget, r"LayerNorm is not a linear layer"),
        (["0.mlp"], None, UnsupportedTarget, r"Sequential is not a linear layer.*linear layers inside it: 0, 2"),
        (["blocks.*.attn"], None, UnsupportedTarget, r"names blocks.0.attn: Attention is not a linear.*inside it: qkv"),
        (["*.norm"], None, UnsupportedTarget, r"LayerNorm is not a linear layer"),
    ],
)
def test_messages(model: Model, targets: list[str], fused: dict | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        resolve(model, targets, fused)
    assert "\n" not in str(caught.value)


def test_a_name_must_not_mix_linear_and_other_layers() -> None:
    model = nn.ModuleDict({"one": nn.ModuleDict({"x": nn.Linear(2, 2)}), "two": nn.ModuleDict({"x": nn.ReLU()})})
    with pytest.raises(UnsupportedTarget, match=r"two.x: ReLU"):
        resolve(model, ["x"])
    assert paths(model, "*.x") == ["one.x"]


class Int8Linear(nn.Linear):
    pass


def test_subclasses_of_linear_are_refused_by_name() -> None:
    model = nn.ModuleDict({"a": Int8Linear(4, 4), "b": nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)})
    with pytest.raises(UnsupportedTarget, match=r"Int8Linear is a subclass of nn\.Linear"):
        resolve(model, ["a"])
    with pytest.raises(UnsupportedTarget, match=r"NonDynamicallyQuantizableLinear is a subclass of nn\.Linear"):
        resolve(model, ["b"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_plain_linear_layers_with_quantised_weights(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedTarget, match=f"target 'a' names a: its weight is {dtype}, quantised"):
        resolve(nn.ModuleDict({"a": layer}), ["a"])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_layers_are_refused_by_name() -> None:
    quantized = torch.ao.nn.quantized.dynamic.Linear(4, 4)
    with pytest.raises(UnsupportedTarget, match=r"target 'a' names a: Linear is not a linear layer"):
        resolve(nn.ModuleDict({"a": quantized}), ["a"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["head"], ("head",)),
        (["blocks.11"], ("blocks.11",)),
        (["0.attn.norm", "blocks.0.attn"], ("blocks.0.attn",)),
        (["head", "blocks.1?.mlp"], ("blocks.10.mlp", "blocks.11.mlp", "head")),
        (["re:blocks.0.attn.norm"], ("blocks.0.attn.norm",)),
        ([], ()),
    ],
)
def test_trained_modules(model: Model, names: list[str], expected: tuple[str, ...]) -> None:
    assert match_modules(model, names, "trainable") == expected


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("haed", NoTargetMatched, r"trainable: 'haed' matches none of the 122 modules; closest: head"),
        ("head[q]", ConfigurationError, r"trainable: 'head\[q\]': modules are trained in full"),
        ("", ConfigurationError, r"target ''"),
    ],
)
def test_trained_modules_that_do_not_exist(model: Model, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        match_modules(model, [name], "trainable")


def test_a_glob_does_not_pass_over_linears_it_cannot_adapt() -> None:
    class Quantised(nn.Linear):
        pass

    model = nn.Module()
    model.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Quantised(4, 4))
    with pytest.raises(UnsupportedTarget, match=r"names body\.2: Quantised is a subclass of nn\.Linear"):
        resolve(model, ["body.*"])
    assert [t.path for t in resolve(model, ["body.0"])] == ["body.0"]


def test_fused_for_a_layer_targeted_in_full() -> None:
    model = nn.Module()
    model.qkv = nn.Linear(4, 12)
    with pytest.raises(ConfigurationError, match="which is targeted in full"):
        resolve(model, ["qkv"], {"qkv": {"q": 4, "k": 4, "v": 4}})
