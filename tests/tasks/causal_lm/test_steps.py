"""The causal-LM module's optimizer steps: one mean over all tokens of the window, whatever it is cut into."""

import copy

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from pera_lightning.adapters import PERA, HiRA, LoRA
from tests.tasks.causal_lm.language_helpers import (
    Gradients,
    examples,
    fit,
    loader,
    make_trainer,
    module,
    padded,
    trained,
)

# Length and first label: 3 labels, 31, 1, 10, and 6 in the shorter last window. Few need padding.
SIZES = [(9, 6), (40, 9), (12, 11), (15, 5), (8, 2)]
ROWS = examples(SIZES)


def run(folder, llama, batches, **options):
    """Gradients of every step before and after clipping, and the module."""
    network, seen = module(llama, **options.pop("module", {})), Gradients()
    fit(folder, network, batches, callbacks=[seen, *options.pop("callbacks", ())], **options)
    return seen, network


def assert_close(one, other, **tolerance):
    assert one.keys() == other.keys()
    assert one
    for name, value in one.items():
        assert value.abs().max() > 1e-4, name  # a gradient of zero shows nothing
        torch.testing.assert_close(value, other[name], **{"rtol": 1e-4, "atol": 1e-6, **tolerance})


@pytest.mark.parametrize("window", [2, 3, 5, 7])
def test_accumulated_batches_are_one_big_batch(llama, tmp_path, window):
    """Batches of one example, of very different label counts; the last window is mostly shorter."""
    parts = [ROWS[k : k + window] for k in range(0, len(ROWS), window)]
    whole, one = run(tmp_path, llama, [padded(part) for part in parts])
    cut, other = run(tmp_path, llama, [padded([row]) for row in ROWS], accumulate_grad_batches=window)
    assert len(whole.before) == len(cut.before) == len(parts)
    assert_close(whole.before[0], cut.before[0])
    for name, value in trained(one).items():
        torch.testing.assert_close(trained(other)[name], value, rtol=1e-3, atol=1e-5)


def test_the_gradient_of_a_step_is_of_the_plain_mean(llama, tmp_path):
    """By hand: the sum over all labelled tokens, each predicted by the one before it, over their number."""
    started = {}

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            started["network"] = copy.deepcopy(pl_module.model)

    seen, _ = run(tmp_path, llama, [padded([row]) for row in ROWS[:3]], accumulate_grad_batches=3, callbacks=[Start()])
    network, total, count = started["network"], 0.0, 0
    for row in ROWS[:3]:
        ids, start = torch.tensor([row["input_ids"]]), row["start"]
        logs = network(input_ids=ids).logits[0].log_softmax(-1)
        total = total - sum(logs[k - 1, ids[0, k]] for k in range(start, ids.shape[1]))
        count += ids.shape[1] - start
    (total / count).backward()
    expected = {f"model.{n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert count == 3 + 31 + 1
    assert_close(seen.before[0], expected)


def test_the_logged_loss_is_of_the_batch(llama, tmp_path):
    logged = []

    class Logged(Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append(trainer.logged_metrics["train/loss"].item())

    options = {"lr": 1e-12, "lr_schedule": "constant"}
    cut = [padded([row]) for row in ROWS[:3]]
    for batches, window in ((cut, 3), ([padded(ROWS[:3])], 1)):
        callbacks = [Logged()]
        run(tmp_path, llama, batches, accumulate_grad_batches=window, module=options, callbacks=callbacks)
    tokens = [length - start for length, start in SIZES[:3]]
    assert logged[3] == pytest.approx(sum(x * n for x, n in zip(logged[:3], tokens, strict=True)) / 35, rel=1e-5)
    assert min(logged[:3]) < max(logged[:3]) - 0.1


def norm(gradients):
    return torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients.values()])).item()


def test_clipping_sees_the_corrected_gradient(llama, tmp_path):
    """The first batch of the window has 3 labels of 35, so that before the correction far too much is there."""
    batches = [padded([row]) for row in ROWS[:3]]
    free, _ = run(tmp_path, llama, batches, accumulate_grad_batches=3)
    true = norm(free.before[0])
    above, _ = run(tmp_path, llama, batches, accumulate_grad_batches=3, gradient_clip_val=1.01 * true)
    below, _ = run(tmp_path, llama, batches, accumulate_grad_batches=3, gradient_clip_val=0.5 * true)
    assert norm(above.after[0]) == pytest.approx(true, rel=1e-5)
    assert norm(below.after[0]) == pytest.approx(0.5 * true, rel=1e-4)


def test_a_batch_without_labels_changes_nothing(llama, tmp_path):
    empty = examples([(6, 6)], seed=1)  # all of its answer was cut
    one, _ = run(tmp_path, llama, [padded(empty), padded(ROWS[:1])], accumulate_grad_batches=2)
    other, _ = run(tmp_path, llama, [padded(ROWS[:1])])
    assert_close(one.before[0], other.before[0])
    alone, network = run(tmp_path, llama, [padded(empty)])
    assert norm(alone.before[0]) == 0
    assert all(p.isfinite().all() for p in trained(network).values())


def test_the_last_window_of_an_epoch_ends_with_it(llama, tmp_path):
    """Five batches cut to three by the trainer, in windows of two: 2 and 1, in each of two epochs."""
    batches = [padded([row]) for row in ROWS]
    options = {"accumulate_grad_batches": 2, "limit_train_batches": 3, "max_epochs": 2}
    cut, _ = run(tmp_path, llama, batches, **options)
    whole, _ = run(tmp_path, llama, [padded(ROWS[:2]), padded(ROWS[2:3])], max_epochs=2)
    assert len(cut.before) == len(whole.before) == 4
    for one, other in zip(whole.before, cut.before, strict=True):
        assert_close(one, other, rtol=1e-2, atol=1e-4)  # of four steps


def test_a_fit_stopped_within_a_window_leaves_nothing_to_the_next(llama, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise InterruptedError

    network = module(llama)
    batches = [padded([row]) for row in ROWS[:3]]
    with pytest.raises(InterruptedError):
        fit(tmp_path, network, batches[:2], accumulate_grad_batches=2, callbacks=[Stop()])
    seen = Gradients()
    fit(tmp_path, network, batches, accumulate_grad_batches=3, callbacks=[seen])
    clean, _ = run(tmp_path, llama, batches, accumulate_grad_batches=3)
    assert_close(clean.before[0], seen.before[0], rtol=0, atol=0)


# ---- resume ---------------------------------------------------------------------------------------------------------


class SaveAt(Callback):
    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 0 and batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("method", [PERA(rank=2, dropout=0.3), HiRA(rank=2, dropout=0.3)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4])
def test_resumed_anywhere_in_a_window_to_the_bit(llama, tmp_path, method, batch):
    """Windows are batches 0 to 2 and 3 to 4; three batches in are 1 and 31 and 1 labels."""
    batches = [padded([row]) for row in ROWS]
    options = {"method": method, "accumulate_grad_batches": 3, "max_epochs": 2}
    path = tmp_path / "middle.ckpt"
    _, whole = run(tmp_path, llama, batches, callbacks=[SaveAt(path, batch)], **options)
    state = torch.load(path, weights_only=True)["step_tokens"]
    assert (state == [0, 0]) == (batch in (2, 4))
    _, resumed = run(tmp_path, llama, batches, ckpt=str(path), seed=99, **options)
    for name, value in trained(whole).items():
        assert torch.equal(trained(resumed)[name], value), name


# ---- several processes ----------------------------------------------------------------------------------------------


class SaveGradients(Callback):
    """Gradients of every step into a file a rank."""

    def __init__(self, folder):
        self.folder, self.seen = folder, Gradients()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_end(self, trainer, pl_module):
        kept = {"gradients": self.seen.before, "state": trained(pl_module)}
        kept["logged"] = {k: v.item() for k, v in trainer.callback_metrics.items()}
        torch.save(kept, self.folder / f"rank{trainer.global_rank}.pt")


class InTurn(LightningDataModule):
    """Batches given to the ranks in turn: Lightning's own sampler would shuffle the training batches."""

    def __init__(self, train, val):
        super().__init__()
        self.batches = {"train": train, "val": val}

    def _loader(self, name):
        return loader(self.batches[name][self.trainer.global_rank :: self.trainer.world_size])

    def train_dataloader(self):
        return self._loader("train")

    def val_dataloader(self):
        return self._loader("val")


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.filterwarnings("error:.*sync_dist=True.*")
def test_two_processes_are_one_with_the_double_batch(llama, tmp_path, window):
    """Ranks take examples in turn. Label counts differ much, so that a mean of means would be another gradient."""
    rows = [*ROWS[:4], *ROWS[:4]]
    val = [padded([row]) for row in ROWS[:4]]
    options = {"accumulate_grad_batches": window, "use_distributed_sampler": False}
    for folder, world in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        folder.mkdir()
        size = 2 // world
        batches = [padded(rows[k : k + size]) for k in range(0, len(rows), size)]
        more = {"devices": 2, "strategy": "ddp_fork"} if world == 2 else {}
        fit(folder, module(llama), InTurn(batches, val), callbacks=[SaveGradients(folder)], **options, **more)
    one = torch.load(tmp_path / "one" / "rank0.pt")
    ranks = [torch.load(tmp_path / "two" / f"rank{r}.pt") for r in (0, 1)]
    assert len(one["gradients"]) == len(ranks[0]["gradients"]) == 4 // window
    assert_close(one["gradients"][0], ranks[0]["gradients"][0])
    for name, value in one["state"].items():
        assert torch.equal(ranks[0]["state"][name], ranks[1]["state"][name])
        torch.testing.assert_close(ranks[0]["state"][name], value, rtol=1e-3, atol=1e-5)
    for name in ("val/loss", "val/perplexity", "val/token_accuracy"):
        assert ranks[0]["logged"][name] == ranks[1]["logged"][name]
        assert ranks[0]["logged"][name] == pytest.approx(one["logged"][name], rel=1e-3)


# ---- LoRA among the others ------------------------------------------------------------------------------------------


class NoProducts(Callback):
    """Holds PERA's coefficients of the products at zero."""

    def on_fit_start(self, trainer, pl_module):
        for name, parameter in pl_module.named_parameters():
            if name.endswith(".h"):
                parameter.data.zero_()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, parameter in pl_module.named_parameters():
            if name.endswith(".h"):
                parameter.grad.zero_()


def test_lora_is_pera_with_linear_terms_and_pera_without_products(llama, tmp_path):
    """From the usual initial values, B zero; five steps."""
    batches = [padded(ROWS[k % 4 : k % 4 + 2]) for k in range(5)]
    ends = []
    for method, more in ((LoRA(rank=2), []), (PERA(rank=2, terms="linear"), []), (PERA(rank=2), [NoProducts()])):
        network = module(llama)
        trainer = make_trainer(tmp_path, method, callbacks=more)
        torch.manual_seed(0)
        trainer.fit(network, loader(batches))
        assert trainer.global_step == 5
        ends.append({n: p for n, p in trained(network).items() if not n.endswith(".h")})
    assert all(ends[0][name].abs().max() > 1e-3 for name in ends[0])
    for other in ends[1:]:
        assert other.keys() == ends[0].keys()
        for name, value in ends[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_at_the_end_of_a_window_has_nothing_of_it(llama, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="end", enable_version_counter=False)
    run(tmp_path, llama, [padded([row]) for row in ROWS], callbacks=[keep], enable_checkpointing=True)
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["step_tokens"] == [0, 0]
