"""Folders as the released code of HiRA, PERA and MoSLoRA writes them, against plain loops of what it computes."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pera_lightning import load_peft, merge
from pera_lightning.adapters import PERA, HiRA, MoSLoRA
from pera_lightning.errors import CheckpointError
from pera_lightning.injection.inject import injection_of
from tests.export.peft_models import apart, bert, inputs, llama, outputs
from tests.export.test_peft_import import refused

RANK, LAYERS = 3, ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
# The two config classes, as they dump themselves: HiRA's and PERA's are one.
HADAMARD = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": "base",
    "init_a": "kaiming", "init_b": "zero", "rand_R": False, "r_ab": RANK, "target_modules": ["q_proj", "v_proj"],
    "lora_alpha": 32, "lora_dropout": 0.05, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None,
    "init_lora_weights": True, "scale_ab": 1.0, "train_a": True, "train_b": True,
}  # fmt: skip
MIXED = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": "base",
    "r": RANK, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 7, "lora_dropout": 0.1, "merge_weights": False,
    "fan_in_fan_out": False, "enable_lora": None, "bias": "none", "modules_to_save": None, "lora_use_mixer": True,
}  # fmt: skip


def hira(W, A, B, _):
    """Every element of W times that of BA."""
    return [[W[o][i] * sum(B[o][k] * A[k][i] for k in range(RANK)) for i in range(len(W[0]))] for o in range(len(W))]


def pera(W, A, B, h):
    """First the factors, then all products of two, row by row above the diagonal; h weighs those of A."""
    order = [(j, k) for j in range(RANK) for k in range(j, RANK)]

    def entry(o, i):
        first = sum(B[o][k] * A[k][i] for k in range(RANK))
        return first + sum(B[o][j] * B[o][k] * A[j][i] * A[k][i] * h[n] for n, (j, k) in enumerate(order))

    return [[entry(o, i) for i in range(len(W[0]))] for o in range(len(W))]


def moslora(W, A, B, M):
    rows = range(RANK)
    return [
        [7 / RANK * sum(B[o][j] * M[j][k] * A[k][i] for j in rows for k in rows) for i in range(len(W[0]))]
        for o in range(len(W))
    ]


FORKS = {  # config, ending of the names, the third tensor and its shape, ΔW, the method here
    "HiRA": (HADAMARD, "", None, (), hira, HiRA(rank=RANK)),
    "PERA": (HADAMARD, "", "lora_A_parameter", (6,), pera, PERA(rank=RANK, alpha=RANK, dropout=0.05)),
    "PERA in a row": (HADAMARD, "", "lora_A_parameter", (1, 6), pera, PERA(rank=RANK, alpha=RANK, dropout=0.05)),
    "PERA without": (HADAMARD, "", None, (), pera, PERA(rank=RANK, alpha=RANK)),
    "MoSLoRA": (MIXED, ".weight", "lora_AB.weight", (3, 3), moslora, MoSLoRA(rank=RANK, alpha=7, dropout=0.1)),
}
GIVEN = {"HiRA": {"method": "HiRA"}, "PERA without": {"method": "PERA"}}


def written(folder: Path, fork: str, suffix: str = ".bin"):
    """Writes a folder; gives its tensors by their names in the base."""
    config, ending, third, shape, _, _ = FORKS[fork]
    base, tensors = llama().state_dict(), {}
    torch.manual_seed(3)
    for path in LAYERS:
        out_features, in_features = base[f"{path}.weight"].shape
        tensors[f"{path}.lora_A{ending}"] = torch.randn(RANK, in_features)
        tensors[f"{path}.lora_B{ending}"] = torch.randn(out_features, RANK)
        if third:
            tensors[f"{path}.{third}"] = torch.randn(shape)
    save(folder, tensors, suffix)
    chosen = {"target_modules": r"model\.layers\.(0\.self_attn\.q_proj|1\.self_attn\.v_proj)"}
    (folder / "adapter_config.json").write_text(json.dumps(config | chosen))
    return tensors


def save(folder, tensors, suffix=".bin"):
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    write = save_file if suffix == ".safetensors" else torch.save
    write(named, folder / f"adapter_model{suffix}")


def theirs(fork, tensors):
    """The outputs of the base with the weights that the released code multiplies by."""
    _, ending, third, _, update, _ = FORKS[fork]
    model = llama().double()
    for path in LAYERS:
        weight = model.get_submodule(path).weight
        extra = tensors.get(f"{path}.{third}")
        if extra is None:  # 1 for the square of a row, 2 for the product of two
            extra = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0, 1.0])
        extra = extra if fork == "MoSLoRA" else extra.flatten()
        parts = (weight, tensors[f"{path}.lora_A{ending}"], tensors[f"{path}.lora_B{ending}"], extra)
        delta = update(*(part.double().tolist() for part in parts))
        weight.data += torch.tensor(delta, dtype=torch.float64)
    return outputs(model, inputs("llama"))


@pytest.mark.parametrize("fork", FORKS)
def test_what_the_released_code_computes(tmp_path, fork):
    expected = theirs(fork, written(tmp_path, fork))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_peft(llama(), tmp_path, **GIVEN.get(fork, {}))
    assert injection_of(model).method == FORKS[fork][-1]
    bound = 1e-5 * max(1.0, float(expected.abs().max()))
    assert apart(outputs(model, inputs("llama")), expected) <= bound
    merge(model)
    assert apart(outputs(model, inputs("llama")), expected) <= bound


def test_two_codes_that_write_the_same(tmp_path):
    written(tmp_path, "HiRA", ".safetensors")
    with pytest.warns(UserWarning, match="is taken for HiRA; the released code of PERA.*give method='PERA'"):
        assert injection_of(load_peft(llama(), tmp_path)).method == HiRA(rank=RANK)
    written(tmp_path, "PERA", ".safetensors")
    with pytest.raises(CheckpointError, match="is a PERA by its config and tensors, and method='HiRA' is given"):
        load_peft(llama(), tmp_path, method="HiRA")


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_what_does_not_fit(tmp_path, capsys):
    config = tmp_path / "adapter_config.json"
    tensors, first = written(tmp_path, "PERA"), LAYERS[0]
    for name, value, match in (
        (f"{first}.lora_A_parameter", torch.ones(3), r"lora_A_parameter of .* is \(3,\), expected \(6,\) \(rank 3\)"),
        (f"{first}.lora_A", tensors[f"{first}.lora_A"][:2], r"A and B of .* are \(2, 16\) and \(16, 3\), expected"),
        (f"{first}.lora_B", tensors[f"{first}.lora_B"] / 0, "values that are not finite"),
        (f"{first}.lora_B_parameter", torch.ones(1, 6), "1 unexpected: .*lora_B_parameter"),
        (f"{first}.lora_C", Evil(), "adapter_model.bin is damaged, or holds more than tensors"),
    ):
        save(tmp_path, tensors | {name: value})
        refused(llama(), tmp_path, match)
    assert "code ran" not in capsys.readouterr().out
    save(tmp_path, {name: value for name, value in tensors.items() if name != f"{first}.lora_A_parameter"})
    refused(llama(), tmp_path, "lack one of lora_A, lora_B, lora_A_parameter")
    for key, value in (("rand_R", True), ("r_ab", 0), ("r_ab", "3")):
        written(tmp_path, "PERA")
        config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
        refused(llama(), tmp_path, f"{key}=")


def test_a_base_with_biases_is_not_peras(tmp_path):
    """Its code feeds the bias into both products; a weight of BERT has one."""
    written(tmp_path, "PERA")
    model, path = bert(), "bert.encoder.layer.0.attention.self.query"
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"target_modules": ["0.attention.self.query"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    out_features, in_features = model.get_submodule(path).weight.shape
    shapes = {"lora_A": (RANK, in_features), "lora_B": (out_features, RANK), "lora_A_parameter": (6,)}
    save(tmp_path, {f"{path}.{name}": torch.ones(shape) for name, shape in shapes.items()})
    refused(model, tmp_path, "has a bias here: PERA's released code")
