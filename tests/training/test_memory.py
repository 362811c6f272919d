"""Memory of a training step: what is computed without values against what real tensors, runs and processes hold."""

import gc

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pera_lightning import inject
from pera_lightning.adapters import PERA, AuroRA, FullFineTuning, HiRA, LoRA
from pera_lightning.errors import ConfigurationError
from pera_lightning.training.memory import (
    StepMemory,
    as_fake,
    device_memory,
    fake_like,
    gathered_bytes,
    measure_step,
    shard_bytes,
)
from pera_lightning.training.sharding import shard, units
from tests.tasks.causal_lm import language_helpers as text
from tests.tasks.image_classification import vision_helpers as vision
from tests.training.distributed.forked import run_forked

METHODS = {"LoRA": LoRA(rank=2), "PERA": PERA(rank=3), "HiRA": HiRA(rank=2), "AuroRA": AuroRA(rank=2)}
DROPPING = {f"{n}, dropout": type(m)(rank=m.rank, dropout=0.1) for n, m in METHODS.items()}
TARGETS = ["q_proj", "v_proj", "down_proj"]
B, T, H, F, LAYERS = 3, 20, 16, 24, 2  # of the batch and of the small Llama


def build(module, method, targets, trainable=(), *, fake):
    """The module with its injected network, with values or on the meta device."""
    module.adapter_injection = lambda network: inject(network, method, targets, trainable, seed=0)
    module.build_injected(weights=not fake)
    module.model.train()
    return module


def llama_step(folder, method, *, fake, autocast=None, as_on_cuda=False, sizes=((T, 15), (T - 1, 14), (12, 9)), **more):
    """The module, its loss as a function, and the memory of a step."""
    module = build(text.module(folder, **more), method, TARGETS, fake=fake)
    batch = text.padded(text.examples(sizes))
    if fake:
        mode = as_fake(module.model)
        batch = {name: value if name == "labels" else fake_like(value, mode) for name, value in batch.items()}

    def loss():
        return module._shared_step(batch)[0]

    return module, loss, measure_step(module.model, loss, autocast=autocast, as_on_cuda=as_on_cuda)


# ---- the step, without values and with them -------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [*METHODS.values(), *DROPPING.values()], ids=[*METHODS, *DROPPING])
def test_fake_tensors_need_what_real_ones_do(llama, method, base_dtype):
    fake = llama_step(llama, method, fake=True, base_dtype=base_dtype)[2]
    module, loss, real = llama_step(llama, method, fake=False, base_dtype=base_dtype)
    assert fake == real
    saved = saved_bytes(loss, apart=[*module.model.parameters(), *module.model.buffers()])
    assert saved <= real.kept <= saved + 4 * B * T * 8  # and the batch, where a view of it is there


def saved_bytes(loss, apart):
    """What autograd is given to keep, each storage once."""
    kept = {}

    def save(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        value = loss()
    assert value.grad_fn is not None
    excluded = {tensor.untyped_storage()._cdata for tensor in apart}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in excluded)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_mixed_precision(llama, base_dtype, checkpointing):
    options = {"base_dtype": base_dtype, "activation_checkpointing": checkpointing, "autocast": torch.bfloat16}
    fake, real = (llama_step(llama, PERA(rank=3, dropout=0.1), fake=fake, **options)[2] for fake in (True, False))
    assert fake == real
    if base_dtype == "float32" and not checkpointing:
        # Half of the activations, but a copy of each frozen weight in bfloat16 for the gradient of its input.
        full = llama_step(llama, PERA(rank=3, dropout=0.1), fake=True, base_dtype=base_dtype)[2]
        assert real.kept != full.kept


@pytest.mark.parametrize("method", [*METHODS.values()], ids=[*METHODS])
def test_a_vit(vit, method):
    found = []
    for fake in (True, False):
        module = build(vision.module(vit), method, ["attn.qkv[q,v]"], ["head"], fake=fake)
        images, labels = torch.randn(5, 3, vision.SIZE, vision.SIZE), torch.zeros(5, dtype=torch.int64)
        if fake:
            mode = as_fake(module.model)
            images, labels = fake_like(images, mode), fake_like(labels, mode)
        batch = (images, labels)
        found.append(measure_step(module.model, lambda m=module, b=batch: m._shared_step(b)[0], as_on_cuda=False))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_other_architectures(tmp_path, kind):
    folder = text.save_tiny(tmp_path, kind)
    targets = ["c_attn[q,v]"] if kind == "gpt2" else TARGETS
    found = []
    for fake in (True, False):
        module = build(text.module(folder), LoRA(rank=2), targets, fake=fake)
        batch = text.padded(text.examples([(12, 8), (9, 5)]))
        if fake:
            mode = as_fake(module.model)
            batch = {name: value if name == "labels" else fake_like(value, mode) for name, value in batch.items()}
        found.append(measure_step(module.model, lambda m=module, b=batch: m._shared_step(b)[0], as_on_cuda=False))
    assert found[0] == found[1]


# ---- against the allocator ------------------------------------------------------------------------------------------


def allocated(compute):
    """Bytes that are there when `compute` has ended, and the most there were, as the profiler saw them allocated."""
    gc.collect()
    gc.disable()  # what earlier tests left must not be freed meanwhile
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            kept = compute()
    finally:
        gc.enable()
    live = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del kept
    return live, peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["LoRA, dropout", "PERA", "HiRA", "AuroRA"])
def test_the_allocator_sees_the_same(tmp_path, method, checkpointing):
    folder = text.save_tiny(tmp_path, hidden_size=64, intermediate_size=160)
    sizes = [(60, 15), (59, 14), (58, 12), (60, 30)]
    options = {"fake": False, "sizes": sizes, "activation_checkpointing": checkpointing}
    module, loss, step = llama_step(folder, {**METHODS, **DROPPING}[method], **options)
    module.zero_grad(set_to_none=False)
    random_state = torch.get_rng_state().nbytes if checkpointing else 0  # kept for each block
    assert step.kept == pytest.approx(allocated(loss)[0] - LAYERS * random_state, rel=0.02)
    peak = allocated(lambda: loss().backward())[1]
    assert step.peak == pytest.approx(peak - LAYERS * random_state, rel=0.02)


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_storages_count_once_and_while_they_are_held():
    network = nn.Linear(5, 1, bias=False)
    x = torch.ones(7, 5)

    def loss():
        y = (x + 0).exp()  # frees its input
        return (network(y) * 1.0).sum()

    step = measure_step(network, loss)
    assert step.kept == 7 * 5 * 4 + 4  # y, and the loss
    assert step.peak >= 2 * 7 * 5 * 4


def test_checkpointing_keeps_the_inputs_of_blocks(tmp_path):
    steps = {}
    for layers in (2, 3):
        folder = text.save_tiny(tmp_path / str(layers), num_hidden_layers=layers)
        for again in (False, True):
            options = {"fake": True, "activation_checkpointing": again}
            steps[layers, again] = llama_step(folder, LoRA(rank=2), **options)[2]
    assert steps[3, True].kept - steps[2, True].kept == B * T * H * 4
    block = steps[3, False].kept - steps[2, False].kept
    assert steps[2, True].peak - steps[2, True].kept > 0.9 * block  # one block, computed again
    assert steps[2, True].peak < steps[2, False].peak


def test_masks_of_dropout_are_bools_on_cuda(llama):
    cpu, cuda = (llama_step(llama, DROPPING["LoRA, dropout"], fake=True, as_on_cuda=on)[2] for on in (False, True))
    # Of q_proj, v_proj and down_proj; the first block's input needs no gradient, so no mask of it is kept.
    inputs = B * T * (LAYERS * (H + H + F) - (H + H))
    assert cpu.kept - cuda.kept == inputs * (4 - 1)
    assert (
        llama_step(llama, LoRA(rank=2), fake=True, as_on_cuda=True)[2] == llama_step(llama, LoRA(rank=2), fake=True)[2]
    )


def test_dropped_scores_are_not_kept_on_cuda(tmp_path):
    folder = text.save_tiny(tmp_path, "gpt2", attn_pdrop=0.1)
    kept = {}
    for on in (False, True):
        module = build(text.module(folder), LoRA(rank=2), ["c_attn[q,v]"], fake=True)
        mode = as_fake(module.model)
        batch = {
            n: v if n == "labels" else fake_like(v, mode) for n, v in text.padded(text.examples([(64, 8)])).items()
        }
        kept[on] = measure_step(module.model, lambda m=module, b=batch: m._shared_step(b)[0], as_on_cuda=on).kept
    assert kept[False] - kept[True] > 2 * 4 * 64 * 64 * 4  # layers, heads, scores in float32


def test_ties_stay_ties(tmp_path):
    folder = text.save_tiny(tmp_path, tie_word_embeddings=True)
    module = build(text.module(folder), LoRA(rank=2), TARGETS, fake=True)
    as_fake(module.model)
    assert module.model.get_output_embeddings().weight is module.model.get_input_embeddings().weight


# ---- what is held between steps -------------------------------------------------------------------------------------


class Held(Callback):
    """Bytes that a training step of Lightning holds."""

    def on_train_batch_end(self, trainer, module, *_):
        parameters = [*module.model.parameters()]
        states = [s for o in trainer.optimizers for s in o.state.values()]
        self.base = sum(p.nbytes for p in parameters if not p.requires_grad)
        self.trained = sum(p.nbytes for p in parameters if p.requires_grad)
        self.gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        self.optimizer = sum(v.nbytes for s in states for v in s.values() if v.dim())
        self.buffers = sum(b.nbytes for b in module.model.buffers())


@pytest.mark.parametrize("method", [*METHODS.values()], ids=[*METHODS])
def test_a_real_fit_holds_as_much(llama, tmp_path, method):
    options = {"method": method, "targets": TARGETS, "trainable": ["lm_head"], "callbacks": [held := Held()]}
    text.fit(tmp_path, text.module(llama, base_dtype="bfloat16"), [text.padded(text.examples([(8, 4)]))], **options)
    network = build(text.module(llama, base_dtype="bfloat16"), method, TARGETS, ["lm_head"], fake=True).model
    memory = device_memory(network, StepMemory(kept=0, peak=0))
    assert memory.base == held.base
    assert memory.adapters + memory.heads == held.trained
    assert memory.heads == text.VOCABULARY * H * 4  # float32 over a base in bfloat16
    assert (memory.gradients, memory.optimizer, memory.buffers) == (held.gradients, held.optimizer, held.buffers)


def test_strategies_add_and_divide():
    network = nn.Sequential(*(nn.Sequential(nn.Linear(6, 4), nn.ReLU()) for _ in range(2)))
    for parameter in network[0].parameters():
        parameter.requires_grad_(False)
    network.register_buffer("table", torch.zeros(10))
    block, step = (6 * 4 + 4) * 4, StepMemory(kept=1000, peak=1300)
    one = device_memory(network, step)
    assert (one.base, one.gradients, one.optimizer, one.buffers) == (2 * block, block, 2 * block, 40)
    assert (one.kept, one.besides, one.buckets, one.gathered) == (1000, 300, 0, 0)
    assert one.total == (2 + 1 + 2) * block + 40 + 1300
    ddp = device_memory(network, step, strategy="ddp")
    assert (ddp.buckets, ddp.total) == (block, one.total + block)
    three = device_memory(network, step, strategy="fsdp2", devices=3)
    assert three.base == 2 * (2 * 6 + 2) * 4  # 4 rows over 3 devices: 2 on the first
    assert (three.optimizer, three.buffers, three.gathered) == (three.base, 40, 3 * block + block)
    # The optimizer's step is the peak where little is kept for the backward.
    assert device_memory(network, StepMemory(kept=5, peak=9)).besides == block - 5


@pytest.mark.parametrize(("shape", "shards", "rows"), [((8, 3), 4, 2), ((9, 3), 4, 3), ((2, 3), 4, 1), ((0, 3), 4, 0)])
def test_shards_are_filled_up(shape, shards, rows):
    assert shard_bytes(torch.empty(shape, dtype=torch.bfloat16), shards) == rows * 3 * 2


def fsdp_step(folder, method, results):
    """Of one of two processes, for each base dtype: bytes of its shards and the most that a step allocated."""
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    found = {}
    for base_dtype in ("float32", "bfloat16"):
        sizes = [(20, 15), (19, 14)]
        module, loss, step = llama_step(folder, method, fake=False, sizes=sizes, base_dtype=base_dtype)
        module.zero_grad()
        memory = device_memory(module.model, step, strategy="fsdp2", devices=2)
        shard(module.model, mesh, torch.device("cpu"))
        local = sum(p.to_local().nbytes for p in module.model.parameters())
        loss().backward()
        module.zero_grad(set_to_none=False)
        # gloo frees a gathered block when both processes are done with it: where one lags, a step holds one block more.
        peak = min(allocated(lambda loss=loss: loss().backward())[1] for _ in range(5))
        found[base_dtype] = {"local": local, "held": memory.base + memory.adapters, "peak": peak}
        found[base_dtype]["computed"] = memory.gathered + memory.kept + memory.besides
    if torch.distributed.get_rank() == 0:
        torch.save(found, results / "found.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_fsdp2(tmp_path):
    folder = text.save_tiny(tmp_path / "model", hidden_size=256, intermediate_size=700, num_hidden_layers=6)
    run_forked(lambda: fsdp_step(folder, PERA(rank=3), tmp_path), 2, tmp_path, 240)
    for base_dtype, found in torch.load(tmp_path / "found.pt").items():
        assert found["local"] == found["held"], base_dtype
        assert 0.9 * found["computed"] < found["peak"] < 1.02 * found["computed"], base_dtype


def test_blocks_are_gathered_one_after_the_other(llama):
    network = build(text.module(llama), LoRA(rank=2), TARGETS, fake=True).model
    block = sum(p.nbytes for p in network.model.layers[0].parameters())
    trained = sum(p.nbytes for p in network.model.layers[0].parameters() if p.requires_grad)
    root = 2 * text.VOCABULARY * H * 4 + H * 4  # embeddings, head and the last norm
    assert len(units(network)) == LAYERS
    assert gathered_bytes(network) == root + 3 * block + trained


# ---- what cannot be computed ----------------------------------------------------------------------------------------


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x):
        return self.part(x[x.sum(-1) > 0])


def test_a_network_that_computes_by_values():
    network = Chooses()
    assert measure_step(network, lambda: network(torch.ones(3, 4)).sum()).kept > 0
    x = fake_like(torch.ones(3, 4), as_fake(network))
    with pytest.raises(ConfigurationError, match=r"^Chooses computes by its values \(.+\), and there are none"):
        measure_step(network, lambda: network(x).sum())


def test_nothing_is_trained():
    network = nn.Linear(3, 1).requires_grad_(False)
    with pytest.raises(ConfigurationError, match="nothing is trained"):
        measure_step(network, lambda: network(torch.ones(2, 3)).sum())


def test_full_fine_tuning(llama):
    network = build(text.module(llama), FullFineTuning(), (), fake=True).model
    memory = device_memory(network, StepMemory(kept=0, peak=0))
    assert (memory.gradients, memory.optimizer, memory.besides) == (memory.base, 2 * memory.base, memory.base)
