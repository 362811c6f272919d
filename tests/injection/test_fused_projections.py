"""Layouts against the real modules, and linears whose forward their owner passes by."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pera_lightning.adapters import AuroRA, HiRA, LinearAdapter, LoRA
from pera_lightning.adapters.adapted_layer import base_weight
from pera_lightning.errors import UnsupportedTarget
from pera_lightning.injection.inject import inject
from pera_lightning.injection.targets import resolve

# The two ways in which an adapter acts, on the output and on the weight; the second while the base is in eval mode.
every_way = pytest.mark.parametrize(
    ("method", "mode"), [(LoRA(rank=2), True), (HiRA(rank=2), False)], ids=["LoRA", "HiRA"]
)


def seeded(build: object, *args: object, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = build(*args, **options)
    with torch.no_grad():  # so that no bias, layer scale or head is zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def timm_model(name: str, **options: object) -> nn.Module:
    import timm

    small = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 3}
    return seeded(timm.create_model, name, **{**small, **options})


def beit() -> nn.Module:
    return timm_model("beit_base_patch16_224")


def eva() -> nn.Module:
    return timm_model("eva02_tiny_patch14_224", img_size=28)


def swin_v2() -> nn.Module:
    sizes = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "img_size": 32, "window_size": 4, "num_classes": 3}
    import timm

    return seeded(timm.create_model, "swinv2_tiny_window8_256", **sizes)


def vit() -> nn.Module:
    return timm_model("vit_tiny_patch16_224")


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return seeded(GPT2Model, GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def image(model: nn.Module) -> Tensor:
    size = model.patch_embed.img_size
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.arange(12).view(2, 6)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(image(model) if hasattr(model, "patch_embed") else tokens())
    return out if isinstance(out, Tensor) else out[0]


@torch.no_grad()
def change_rows(model: nn.Module, target: str, weight: float | None = None, shift: float = 0.0) -> None:
    """Multiplies the weight of the named rows by a number (None: leaves it), the same for the bias, plus a shift."""
    for found in resolve(model, [target]):
        (rows,) = found.slices.values()
        owner = model.get_submodule(found.path.rpartition(".")[0])
        bias = found.module.bias
        name = target.partition("[")[2][0]
        bias = bias[rows] if bias is not None else getattr(owner, f"{name}_bias", None)
        if weight is not None:
            base_weight(found.module)[rows].mul_(weight)
            bias.mul_(weight)
        if shift:
            bias.add_(shift * torch.arange(len(bias)))


@pytest.mark.parametrize(
    ("build", "name"),
    [(vit, "attn.qkv"), (beit, "attn.qkv"), (eva, "attn.qkv"), (gpt2, "attn.c_attn")],
)
def test_rows_are_what_their_names_say(build: object, name: str) -> None:
    """By what attention does with them, whatever the code looks like."""
    if build is not eva:  # rotary positions, which EVA has, break this invariance
        model = build()
        before = run(model)
        # A constant added to all keys moves all scores of a query alike, which softmax does not see …
        change_rows(model, f"{name}[k]", shift=0.3)
        torch.testing.assert_close(run(model), before, atol=1e-4, rtol=1e-4)
        # … and one added to queries does matter.
        change_rows(model, f"{name}[q]", shift=0.3)
        assert not torch.allclose(run(model), before, atol=1e-3)
    # Without keys, queries do not matter, and values still do.
    model = build()
    change_rows(model, f"{name}[k]", weight=0.0)
    before = run(model)
    change_rows(model, f"{name}[q]", weight=-3.0)
    torch.testing.assert_close(run(model), before, atol=1e-4, rtol=1e-4)
    change_rows(model, f"{name}[v]", weight=-3.0)
    assert not torch.allclose(run(model), before, atol=1e-3)


def test_phi3_rows_equal_a_llama_of_separate_layers() -> None:
    from transformers import LlamaConfig, LlamaModel, Phi3Config, Phi3Model

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    phi, llama = seeded(Phi3Model, Phi3Config(**sizes, **ids)), seeded(LlamaModel, LlamaConfig(**sizes, **ids))
    state = llama.state_dict()
    for key, value in phi.state_dict().items():
        if key in state:
            state[key] = value
    for target in resolve(phi, ["qkv_proj[q,k,v]", "gate_up_proj[gate,up]"]):
        owner = target.path.rpartition(".")[0]
        for name, rows in target.slices.items():
            state[f"{owner}.{name}_proj.weight"] = target.module.weight[rows]
    llama.load_state_dict(state)
    torch.testing.assert_close(run(phi), run(llama))


def test_gpt2_cross_attention_holds_keys_and_values() -> None:
    from transformers import GPT2Config, GPT2Model

    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = seeded(GPT2Model, GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, add_cross_attention=True))
    (found,) = resolve(model, ["crossattention.c_attn[k,v]"])
    assert found.slices == {"k": slice(0, 16), "v": slice(16, 32)}
    with torch.no_grad():  # without keys, all states count alike; without values, none counts
        rows = base_weight(found.module)
        states = torch.randn(2, 5, 16)
        rows[found.slices["v"]].zero_()
        found.module.bias[found.slices["v"]].zero_()
        outputs = [model(tokens(), encoder_hidden_states=s)[0] for s in (states, torch.randn(2, 5, 16))]
    torch.testing.assert_close(outputs[0], outputs[1])


def test_gpt_neox_interleaves_its_heads() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = seeded(GPTNeoXModel, GPTNeoXConfig(**sizes, intermediate_size=32, bos_token_id=0, eos_token_id=0))
    with pytest.raises(UnsupportedTarget, match=r"GPTNeoXAttention interleaves its heads, .* adapt it in full"):
        inject(model, LoRA(), targets=["query_key_value[q]"])
    assert inject(model, LoRA(), targets=["query_key_value"]).matched


def acts(model: nn.Module, method: object, targets: list[str], x: Tensor, mode: bool) -> None:
    """Injection changes nothing, randomised adapters do, and each of them has a gradient."""
    model.train(mode)
    with torch.no_grad():
        before = model(x)
    inject(model, method, targets=targets)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
    adapters = [m for m in model.modules() if isinstance(m, LinearAdapter)]
    for adapter in adapters:
        torch.nn.init.normal_(adapter.B, std=3.0)
    y = model(x)
    assert (y - before).abs().max() > 1e-3
    y.sum().backward()
    assert all(p.grad is not None for adapter in adapters for p in adapter.parameters())


@every_way
@pytest.mark.parametrize("build", [vit, beit, eva, swin_v2])
def test_timm_attention_calls_the_adapted_layer(build: object, method: object, mode: bool) -> None:
    model = build()
    acts(model, method, ["attn.qkv[q,v]"], image(model), mode)


@every_way
@pytest.mark.parametrize("target", ["linear1", "linear2"])
def test_torch_encoder_calls_the_adapted_layer(method: object, mode: bool, target: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = seeded(nn.TransformerEncoder, layer, num_layers=2)
    acts(model, method, [target], torch.randn(2, 5, 16), mode)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_encoder_with_padding() -> None:
    """The encoder's own fast path, taken with a padding mask, passes by the layers as well.

    It hands on nested tensors, with which AuroRA's splines cannot compute.
    """
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = seeded(nn.TransformerEncoder, layer, num_layers=2)
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        report = inject(model, AuroRA(rank=2), targets=["linear1"])
        after = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(after[~padding], before[~padding])
        for adapter in (m for m in model.modules() if isinstance(m, LinearAdapter)):
            torch.nn.init.normal_(adapter.B)
        assert (model(x, src_key_padding_mask=padding) - after)[~padding].abs().max() > 1e-2
    assert any("fast path" in note for note in report.notes)


def test_what_was_switched_is_reported() -> None:
    report = inject(beit(), LoRA(rank=2), targets=["attn.qkv"])
    assert any("qkv_bias_separate" in note for note in report.notes)
    assert not any("qkv_bias_separate" in note for note in inject(vit(), LoRA(rank=2), targets=["attn.qkv"]).notes)


def test_multihead_attention_is_refused_and_left_alone() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    before = copy.deepcopy(model.__dict__.get("activation_relu_or_gelu"))
    for targets in (["self_attn.out_proj"], ["linear1", "out_proj"]):
        with pytest.raises(UnsupportedTarget, match=r"names self_attn.out_proj: nn.MultiheadAttention reads"):
            inject(model, LoRA(rank=2), targets=targets)
    assert type(model.linear1) is nn.Linear
    assert model.activation_relu_or_gelu == before
