"""Units of real architectures, and networks sharded over two processes: values, ties, and what is refused."""

import copy
import datetime

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, SwinConfig, SwinModel, T5Config, T5EncoderModel

from pera_lightning import inject, merge
from pera_lightning.adapters import PERA, HiLoRA, HiRA
from pera_lightning.errors import ConfigurationError, NotMergeableError
from pera_lightning.injection.inject import injection_of
from pera_lightning.merging.merge import merged_layers
from pera_lightning.training.sharding import AdapterWrapPolicy, full_tensors, reads_weights, shard, sharded_like, units
from tests.training.distributed.ddp_helpers import assert_close
from tests.training.distributed.rounding import BFLOAT16, FLOAT32, assert_within

CPU = torch.device("cpu")
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
QV = ["q_proj", "v_proj"]


def llama(**options):
    torch.manual_seed(0)
    small = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**{**small, **options}))


def injected(network, method=None):
    inject(network, method or PERA(rank=2), QV, seed=1)
    generator = torch.Generator().manual_seed(2)
    for _, parameter in sorted(network.named_parameters()):
        if parameter.requires_grad and not parameter.is_meta:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return network


def _rank(rank, world, store, function, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    try:
        torch.save(function(rank), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two(function, folder):
    """What a function of the rank gives on each of two processes."""
    mp.start_processes(
        _rank, args=(2, folder / "store", function, folder), nprocs=2, start_method="fork"
    )  # raises a child's error
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def refusal(function):
    """The message of a `ConfigurationError`."""
    try:
        function()
    except ConfigurationError as error:
        return str(error)
    return None


# ---- units ----------------------------------------------------------------------------------------------------------


def test_units_are_the_blocks():
    network = injected(llama())
    assert units(network) == list(network.model.layers)
    assert units(llama(num_hidden_layers=1)) == []  # one block is the network
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=2, depth=3)
    inject(vit, PERA(rank=2), ["attn.qkv[q,v]"])
    assert units(vit) == list(vit.blocks)
    swin = SwinModel(SwinConfig(image_size=32, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4))
    assert units(swin) == list(swin.encoder.layers)
    t5 = T5EncoderModel(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, vocab_size=40))
    assert units(t5) == list(t5.encoder.block)


def test_layers_on_their_own_are_no_units():
    """Neither plain layers in a row, nor the adapters of an adapted one."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(network, PERA(rank=1), ["0", "1"])
    assert units(network) == []


# ---- two processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "method", [PERA(rank=2), HiRA(rank=2, reference="svd", reference_rank=2)], ids=["PERA", "HiRA svd"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_others_get_the_values_of_the_first(tmp_path, method, tied, dtype):
    """Weights, adapters, buffers (saved or not) and the fingerprint; and the outputs are those of the whole network."""

    def build(rank):
        mesh = init_device_mesh("cpu", (2,))
        if reads_weights(mesh):
            network = injected(llama(tie_word_embeddings=tied).to(dtype), method)
        else:
            with torch.device("meta"):
                network = injected(llama(tie_word_embeddings=tied).to(dtype), method)
        shard(network, mesh, CPU)
        ids = torch.arange(8)[None]
        return {
            "state": full_tensors(network.state_dict()),
            "buffers": dict(network.named_buffers()),
            "fingerprint": injection_of(network).fingerprint,
            "share": sum(p.to_local().numel() for p in network.parameters()),
            "trained": [n for n, p in network.named_parameters() if p.requires_grad],
            "tied": network.lm_head.weight is network.model.embed_tokens.weight,
            "logits": network(input_ids=ids).logits.detach(),
        }

    one, other = on_two(build, tmp_path)
    network = injected(llama(tie_word_embeddings=tied).to(dtype), method)
    for part in ("state", "buffers"):
        expected = network.state_dict() if part == "state" else dict(network.named_buffers())
        for found in (one[part], other[part]):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], value) for name, value in expected.items())
    mark = injection_of(network)
    assert one["fingerprint"] == other["fingerprint"] == mark.fingerprint
    assert all(value.partition(":")[2] for value in other["fingerprint"].values())
    total = sum(p.numel() for p in network.parameters())
    assert one["share"] + other["share"] == total
    assert one["share"] < 0.6 * total
    trained = [n for n, p in network.named_parameters() if p.requires_grad]
    assert one["trained"] == other["trained"] == trained
    assert one["tied"] is other["tied"] is tied
    logits = network(input_ids=torch.arange(8)[None]).logits.detach()
    # The weights lie elsewhere in memory, so equal to rounding: `rounding` counts what a forward of 3 blocks adds up.
    off = (3 * 228 + 402) * FLOAT32[1] if dtype == torch.float32 else (3 * 12 + 3) * BFLOAT16[1]
    for found in (one["logits"], other["logits"]):
        assert_within({"logits": logits}, {"logits": found}, {"logits": 2 * off * logits.abs().max()})


def test_full_and_sharded_tensors_are_inverse(tmp_path):
    def there_and_back(rank):
        network = injected(llama())
        shard(network, init_device_mesh("cpu", (2,)), CPU)
        parameter = next(p for n, p in network.named_parameters() if n.endswith(".h"))
        values = torch.arange(float(parameter.numel()))
        again = sharded_like(values, parameter)
        nested = full_tensors({"a": [again, 3], "b": {"c": again}})
        left_out = full_tensors({"a": again, "step": torch.tensor(4.0)}, keep=False)
        return {
            "is": isinstance(again, DTensor),
            "odd": parameter.numel() % 2,
            "equal": torch.equal(nested["a"][0], values) and torch.equal(nested["b"]["c"], values),
            "rest": nested["a"][1],
            "left_out": left_out,
            "plain": sharded_like(values, values) is values,
        }

    for found in on_two(there_and_back, tmp_path):
        left_out = found.pop("left_out")
        assert left_out["a"] is None
        assert left_out["step"] == 4
        assert found == {"is": True, "odd": 1, "equal": True, "rest": 3, "plain": True}


def test_sharded_weights_are_not_merged(tmp_path):
    def refused(rank):
        network = injected(llama())
        shard(network, init_device_mesh("cpu", (2,)), CPU)
        with pytest.raises(NotMergeableError) as error:
            merge(network)
        return str(error.value), len(merged_layers(network))

    for message, count in on_two(refused, tmp_path):
        assert "self_attn.q_proj is sharded or on the meta device: merge on one process, from the checkpoint" in message
        assert count == 0


def test_networks_that_differ_are_refused(tmp_path):
    def build(rank):
        network = injected(llama(num_hidden_layers=3 + rank))
        return refusal(lambda: shard(network, init_device_mesh("cpu", (2,)), CPU))

    for message in on_two(build, tmp_path):
        assert "process 1 built another network than process 0" in message
        assert "model.layers.3" in message


def test_a_parameter_without_dimension_is_refused(tmp_path):
    def build(rank):
        network = llama()
        network.scale = nn.Parameter(torch.tensor(1.0))
        return refusal(lambda: shard(network, init_device_mesh("cpu", (2,)), CPU))

    assert on_two(build, tmp_path) == ["FSDP cannot shard parameters without a dimension: scale"] * 2


def test_a_parameter_of_two_blocks_is_refused(tmp_path):
    def build(rank):
        network = llama()
        network.model.layers[2].mlp.up_proj.weight = network.model.layers[0].mlp.up_proj.weight
        return refusal(lambda: shard(network, init_device_mesh("cpu", (2,)), CPU))

    for message in on_two(build, tmp_path):
        assert message == "FSDP cannot shard model.layers.0.mlp.up_proj.weight, which two blocks of the network share"


@pytest.mark.parametrize(("dtype", "wrapped"), [(torch.float32, 4), (torch.bfloat16, 10)])
@pytest.mark.parametrize("method", [PERA(rank=2), HiRA(rank=2), HiLoRA(hira_rank=2)], ids=["PERA", "HiRA", "HiLoRA"])
def test_the_policy_for_fsdp1(tmp_path, method, dtype, wrapped):
    """torch's own FSDP1 with it: the gradients are those of one process with both batches."""

    def loss(network, rank):
        return network(input_ids=torch.arange(8)[None] + rank).logits.float().square().mean()

    def gradients(rank):
        network = injected(llama().to(dtype), method)
        network = FullyShardedDataParallel(
            network, auto_wrap_policy=AdapterWrapPolicy(), use_orig_params=True, device_id=CPU
        )
        loss(network, rank).backward()
        count = sum(isinstance(m, FullyShardedDataParallel) for m in network.modules())
        with FullyShardedDataParallel.summon_full_params(network, with_grads=True):
            named = network.named_parameters()
            found = {n.replace("_fsdp_wrapped_module.", ""): p.grad for n, p in named if p.requires_grad}
            return count, copy.deepcopy(found)

    network = injected(llama().to(dtype), method)
    (loss(network, 0) / 2 + loss(network, 1) / 2).backward()
    expected = {n: p.grad for n, p in network.named_parameters() if p.requires_grad}
    for count, found in on_two(gradients, tmp_path):
        assert count == wrapped  # the whole, three blocks and, in low precision, six adapters
        assert_close(expected, found)
