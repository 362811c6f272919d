"""One process, DDP and FSDP2 train and test alike, and a checkpoint of each goes on under every other."""

import itertools
import json

import pytest
import torch

from pera_lightning.training.accumulated_gradients import GRADIENTS
from tests.tasks.causal_lm.evaluator_helpers import COUNTS, close, data, evaluate, left
from tests.tasks.causal_lm.language_helpers import module
from tests.training.distributed import strategy_runs
from tests.training.distributed.ddp_helpers import assert_equal
from tests.training.distributed.forked import run_forked
from tests.training.distributed.rounding import (
    BFLOAT16,
    FLOAT32,
    assert_alike,
    assert_within,
    gradient_bounds,
    parameter_bounds,
)

WORLDS = {"single": 1, "ddp": 2, "fsdp2": 2}
METHODS = ["LoRA", "PERA", "HiRA", "HiRA svd", "HiLoRA", "PiSSA", "AuroRA"]
# name: base, precision, methods; 16-mixed needs a CUDA device. Each method once in low precision: an update of the
# outputs and one of the weight under autocast, those that read the frozen weights at the injection on a bfloat16 base.
PRECISIONS = {
    "float32": ("float32", "32-true", METHODS),
    "bf16-mixed": ("float32", "bf16-mixed", ["PERA", "HiRA"]),
    "bf16 base": ("bfloat16", "32-true", ["PiSSA"]),
    "bf16 base, bf16-mixed": ("bfloat16", "bf16-mixed", ["AuroRA"]),
}

pytestmark = pytest.mark.slow


def launch(cases, world, folder):
    """Runs cases after each other in the same processes."""
    folder.mkdir(parents=True)
    return run_forked(lambda: strategy_runs.run(cases), world, folder, 600)


def end(folder):
    return torch.load(folder / "end.pt", weights_only=True)


def case(folder, strategy, network, sets, **more):
    kind = more.pop("kind", "llama")
    shared = {"kind": kind, "network": str(network), "sets": str(sets), "method": "PERA"}
    return {**shared, "strategy": "auto" if strategy == "single" else strategy, "folder": str(folder), **more}


# Validation, and the checkpoint with it, after the first of the second step's two batches.
IN_A_WINDOW = {"accumulate_grad_batches": 2, "val_check_interval": 3, "max_epochs": 1, "max_steps": -1}
AT_VALIDATION = {"save_on_train_epoch_end": False}
MORE = {
    "clipped": {
        "module": {"activation_checkpointing": True},
        "trainer": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    },
    # A compilation for each shape of a batch; validation would be another three.
    "compiled": {"module": {"compile": True}, "trainer": {"max_steps": 2, "limit_val_batches": 0}},
    "images": {"kind": "vit", "method": "AuroRA"},
    "longer": {"trainer": {"max_steps": 5}},
    "cut": {"trainer": {"max_steps": 5}, "dies": 2},
    "window": {"trainer": IN_A_WINDOW, "keep": AT_VALIDATION, "batch": 2},
    "stopped": {"trainer": IN_A_WINDOW, "keep": AT_VALIDATION, "batch": 2, "dies": 3},
}
TRAINED = [
    *(f"{p}/{m}" for p, (_, _, methods) in PRECISIONS.items() for m in methods),
    *(name for name in MORE if name not in ("stopped", "cut")),
]
# DDP copies whatever a method made of the base; FSDP2 shards it, and so trains each method.
DDP = ["float32/PERA", "bf16-mixed/HiRA", *MORE]


def cases_of(strategy, root, networks, sets):
    """What a strategy trains: tiny Llamas by precision and method, and some more cases."""
    found = {}
    for precision, (base, trainer, methods) in PRECISIONS.items():
        for method in methods:
            options = {"module": {"base_dtype": base}, "trainer": {"precision": trainer}, "method": method}
            found[f"{precision}/{method}"] = options
    found |= MORE
    if strategy == "ddp":
        found = {name: found[name] for name in DDP}
    kinds = ((name, options, networks[options.get("kind", "llama")]) for name, options in found.items())
    return [case(root / strategy / name, strategy, network, sets, **options) for name, options, network in kinds]


def carried_cases(strategy, root, network, sets):
    """A strategy goes on from every strategy's checkpoint: of an optimizer step, and between two batches of one."""
    cases = []
    for source in WORLDS:
        step, window = (str(root / source / name / "last.ckpt") for name in ("cut", "stopped"))
        options = {
            "step": {"ckpt": step, "trainer": {"max_steps": 5}},
            "window": {"ckpt": window, "trainer": IN_A_WINDOW, "keep": AT_VALIDATION, "batch": 2},
        }
        if source == "fsdp2":  # whose checkpoints are those of the others, see below
            options["test"] = {"ckpt": step, "command": "test", "protocol": "strict"}
        folder = root / f"{source} to {strategy}"
        cases += [case(folder / name, strategy, network, sets, **more) for name, more in options.items()]
    return cases


@pytest.fixture(scope="module")
def matrix(tmp_path_factory, llama, vit, sets):
    """Every strategy's fits, and then every strategy from every other's checkpoint."""
    root, networks = tmp_path_factory.mktemp("matrix"), {"llama": llama, "vit": vit}
    launch(cases_of("single", root, networks, sets), 1, root / "one")
    two = [one for strategy in ("ddp", "fsdp2") for one in cases_of(strategy, root, networks, sets)]
    two += [one for strategy in ("ddp", "fsdp2") for one in carried_cases(strategy, root, llama, sets)]
    two.append(case(root / "model_parallel", "model_parallel", llama, sets))
    test = {"command": "test", "protocol": "strict"}
    two.append(case(root / "sharded", "fsdp2", llama, sets, dies=1, **test))
    two.append(case(root / "sharded", "fsdp2", llama, sets, forgets="predictions/*.partial-*/rank*.jsonl", **test))
    launch(two, 2, root / "two")
    launch(carried_cases("single", root, llama, sets), 1, root / "to one")
    return root


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TRAINED)
def test_the_strategies_train_alike(matrix, name):
    ends = {strategy: end(matrix / strategy / name) for strategy in WORLDS if strategy != "ddp" or name in DDP}
    for strategy, found in ends.items():
        assert all(found["sharded"]) if strategy == "fsdp2" else not any(found["sharded"])
    low = "bf16" in name
    for first, second in itertools.combinations(ends.values(), 2):
        assert second["losses"] == pytest.approx(first["losses"], rel=0.01 if low else 1e-5)
        assert_equal(first["frozen"], second["frozen"])
        assert_alike(first, second, BFLOAT16 if low else FLOAT32)
        for key, value in first["trained"].items():
            assert (second["trained"][key] - value).norm() < 0.1 * value.norm(), key


def test_a_plain_model_parallel_strategy_is_the_same(matrix):
    assert_equal(end(matrix / "model_parallel")["trained"], end(matrix / "fsdp2" / "float32" / "PERA")["trained"])
    assert (matrix / "model_parallel" / "last.ckpt").is_file()


def test_checkpoints_are_alike(matrix):
    """The same keys, in the same form, without the base."""
    ends = [end(matrix / strategy / "float32" / "PERA") for strategy in WORLDS]
    files = [torch.load(matrix / strategy / "float32" / "PERA" / "last.ckpt", weights_only=True) for strategy in WORLDS]
    off = gradient_bounds(ends[0], FLOAT32)
    for (one, other), ended in zip(itertools.pairwise(files), ends[1:], strict=True):
        assert one.keys() == other.keys()
        assert one["state_dict"].keys() == other["state_dict"].keys()
        described = [{**file["pera_lightning"], "run": None} for file in (one, other)]  # but for the name of the run
        assert torch.equal(*(about.pop("trained_examples") for about in described))
        assert described[0] == described[1]
        assert not [k for k in one["state_dict"] if "adapters" not in k and "metrics" not in k]
        assert_equal({n: other["state_dict"][n] for n in ended["trained"]}, ended["trained"])
        first, second = (file["optimizer_states"][0] for file in (one, other))
        assert first["param_groups"] == second["param_groups"]
        assert first["state"].keys() == second["state"].keys() == set(range(len(off)))
        for k, name in enumerate(ended["order"]):
            one_state, other_state = first["state"][k], second["state"][k]
            assert one_state["step"] == other_state["step"] == len(ended["gradients"])
            largest = max(gradients[name].abs().max() for gradients in ended["gradients"])
            # The first moment is a mean of gradients, of weight below 1; the second one of their squares.
            bounds = {"exp_avg": off[name], "exp_avg_sq": 2 * largest * off[name]}
            moments = ({key: state[key] for key in bounds} for state in (one_state, other_state))
            assert_within(*moments, bounds)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", WORLDS)
@pytest.mark.parametrize("source", WORLDS)
def test_a_checkpoint_goes_on_under_another_strategy(matrix, source, strategy):
    """As the run that never stopped where there are as many processes; else as the other strategy of as many.

    Bit for bit under the strategy that wrote it, to rounding under others.
    """
    stopped = torch.load(matrix / source / "stopped" / "last.ckpt", weights_only=True)
    assert all(stopped[GRADIENTS])  # of every process: it was written between the two batches of a step
    same = next(s for s in WORLDS if WORLDS[s] == WORLDS[source])
    for name, undisturbed in (("step", end(matrix / same / "longer")), ("window", end(matrix / same / "window"))):
        found = end(matrix / f"{source} to {strategy}" / name)
        alike = WORLDS[source] == WORLDS[strategy]
        expected = undisturbed if alike else end(matrix / f"{same} to {strategy}" / name)
        bounds = parameter_bounds(undisturbed, FLOAT32)
        assert_within(expected["trained"], found["trained"], bounds)
        if source == strategy:
            own = end(matrix / source / ("longer" if name == "step" else "window"))
            assert_equal(own["trained"], found["trained"])
        assert found["losses"] == pytest.approx(expected["losses"][-len(found["losses"]) :], rel=1e-5)


@pytest.mark.timeout(900)
def test_answers_are_the_same_under_every_strategy(matrix):
    files = {strategy: matrix / f"fsdp2 to {strategy}" / "test" / "metrics.json" for strategy in WORLDS}
    found = {strategy: json.loads(file.read_text()) for strategy, file in files.items()}
    assert found["single"]
    assert all(metrics == found["single"] for metrics in found.values())


@pytest.mark.timeout(900)
def test_an_interrupted_sharded_test_goes_on(matrix, llama, sets, tmp_path):
    """Ranks do as many forwards, or they would wait for each other; each question counts once, as if never stopped.

    Of 7 and 4 questions in batches of two, each rank has batches of 2, 2 and 2; they stop after one. Then the answers
    of the second are lost.
    """
    assert COUNTS == {"ARC-Easy": 7, "boolq": 4}
    assert json.loads((matrix / "sharded" / "answered.json").read_text()) == [2, 2]
    said = (matrix / "two" / "output").read_text()
    assert said.count("2 questions were answered by an interrupted run") == 1
    resumed, undisturbed = left(matrix / "sharded"), evaluate(tmp_path, module(llama), data(sets, "strict"))
    close(undisturbed.records, resumed["records"])
    assert resumed["results"]["metrics"] == undisturbed.results["metrics"]
    assert resumed["results"]["n"] == undisturbed.results["n"] == {"test": sum(COUNTS.values())}
