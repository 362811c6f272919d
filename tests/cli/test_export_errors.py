"""`export`: wrong input is one line that says what to do, and leaves nothing."""

import shutil
from collections import namedtuple

import pytest
import torch

from pera_lightning.adapters import AuroRA
from tests.cli import trained_runs as runs
from tests.cli.trained_runs import refused, text
from tests.run_helpers import QUICKSTART

WRONG = {
    "unknown format": (
        ["--format", "mergd"],
        "one of 'adapter', 'peft', 'diffusers', 'merged' is needed; given mergd; closest: m",
    ),
    "unknown method": (["--format", "peft", "--mode", "statik"], "one of 'static', 'calibrated' is needed; given st"),
    "unknown target": (["--format", "peft", "--target", "vlm"], "one of 'peft', 'vllm' is needed; given vlm"),
    "unknown option": (["--format", "peft", "--rnak", "3"], "unknown option --rnak; closest: --rank"),
    "no format": ([], "no --format: give adapter, peft, diffusers, merged"),
    "a rank for merged weights": (["--format", "merged", "--rank", "4"], "--rank does not act with --format merged"),
    "merged for vllm": (["--format", "merged", "--target", "vllm"], "--target does not act with --format merged"),
    "a method for our folder": (
        ["--format", "adapter", "--mode", "static"],
        "--mode does not act with --format a",
    ),
    "a bound without a rank": (["--format", "peft", "--max_error", "0.5"], "--max_error acts with --rank only"),
    "batches without a method": (["--format", "merged", "--batches", "4"], "--batches acts with --mode only"),
    "no batches": (["--format", "peft", "--mode", "static", "--batches", "0"], "batches=0: a positive integer"),
    "rank 0": (["--format", "peft", "--rank", "0"], "rank=0: a positive integer is needed"),
    "another method": (
        ["--format", "merged", "--adapter.method", "LoRA"],
        "--adapter.method would not act: the adapters are those of the checkpoint; leave it out",
    ),
    "a method that is not needed": (
        ["--format", "merged", "--mode", "static"],
        "acts on AuroRA with dynamic",
    ),
}


@pytest.mark.parametrize(("words", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_options(pera, llama_run, tmp_path, words, expected):
    result = pera("export", "--ckpt_path", llama_run.checkpoint, "--output", tmp_path / "out", *words)
    assert expected in refused(result)
    assert list(tmp_path.iterdir()) == []


def test_no_output(pera, llama_run):
    assert "no --output: give a folder" in refused(
        pera("export", "--ckpt_path", llama_run.checkpoint, "--format", "peft")
    )


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_a_dynamic_aurora_without_a_method(export, vit_run, tmp_path, kind):
    line = refused(export(vit_run.checkpoint, kind, code=2))
    assert "AuroRA in dynamic mode is not a linear map" in line
    assert "calibrated" in line
    assert "static" in line
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists(export, llama_run, tmp_path):
    export(llama_run.checkpoint, "merged")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for kind in ("adapter", "peft", "merged"):
        assert "exists; give another --output, or --overwrite" in refused(export(llama_run.checkpoint, kind, code=2))
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    export(llama_run.checkpoint, "adapter", "--overwrite")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"adapter.safetensors", "adapter_config.json"}


def test_checkpoints_that_are_none(pera, export, llama_run, tmp_path):
    bare, broken = tmp_path / "bare.ckpt", tmp_path / "broken.ckpt"
    torch.save({"state_dict": {}, "global_step": 1}, bare)
    broken.write_bytes(llama_run.checkpoint.read_bytes()[:-200])
    config = ["--config", llama_run.run / "config.yaml"]
    assert "holds no adapters" in refused(export(bare, "merged", *config, code=2))
    assert "is damaged, or another kind of file" in refused(export(broken, "merged", *config, code=2))
    missing = llama_run.run / "checkpoints" / "lst.ckpt"
    for more in ([], config):
        assert "lst.ckpt does not exist; " in refused(export(missing, "merged", *more, code=2))
    line = refused(export(llama_run.run, "merged", *config, code=2))
    assert f"is neither a checkpoint nor an adapter folder; it has {llama_run.adapter}" in line
    assert "no --ckpt_path" in refused(pera("export", "--format", "merged", "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_folder(export, llama_run, tmp_path):
    folder = tmp_path / "run" / "adapter"
    shutil.copytree(llama_run.adapter, folder)
    shutil.copy(llama_run.run / "config.yaml", folder.parent)
    data = bytearray((folder / "adapter.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "adapter.safetensors").write_bytes(data)
    assert "adapter.safetensors is damaged" in refused(export(folder, "merged", code=2))
    (folder / "adapter.safetensors").unlink()
    assert "adapter.safetensors is missing" in refused(export(folder, "merged", code=2))


def test_a_base_that_does_not_fit(export, llama_run, tmp_path):
    other = text.save_tiny(tmp_path / "other", seed=1)
    line = refused(export(llama_run.checkpoint, "merged", "--model.model_name", other, code=2))
    assert "was trained on another base: 16 of 21 frozen tensors differ: " in line
    assert not (tmp_path / "out").exists()


def test_a_config_of_another_module(export, llama_run, vit_run, tmp_path):
    line = refused(export(llama_run.checkpoint, "merged", "--config", QUICKSTART, code=2))
    assert "without a trained head the number of classes is not known" in line
    line = refused(export(vit_run.checkpoint, "merged", "--config", llama_run.run / "config.yaml", code=2))
    assert "blocks.0.attn.qkv" in line
    assert "LlamaForCausalLM does not have" in line
    demo = ["--model", "lightning.pytorch.demos.boring_classes.BoringModel"]
    line = refused(export(llama_run.checkpoint, "merged", *demo, code=2))
    assert "BoringModel is not a module of this package" in line
    assert not (tmp_path / "out").exists()


def test_another_number_of_classes(export, vit_run, tmp_path):
    line = refused(export(vit_run.checkpoint, "adapter", "--model.num_classes", "4", code=2))
    assert "does the data have another number of classes?" in line


def test_data_that_cannot_be_had(export, llama, small_sets, tmp_path):
    run = runs.language_run(tmp_path / "run", llama, small_sets, AuroRA(rank=3))
    gone = ["--data.folder", tmp_path / "gone", "--mode", "calibrated"]
    line = refused(export(run.checkpoint, "merged", *gone, code=2))
    assert "the data cannot be had" in line
    assert "say where they are by --data" in line
    assert not (tmp_path / "out").exists()
    export(run.checkpoint, "merged", *gone[:2], "--mode", "static")  # needs none


@pytest.mark.parametrize("kind", ["adapter", "peft", "merged"])
def test_no_room_on_the_disk(export, llama_run, tmp_path, monkeypatch, kind):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    line = refused(export(llama_run.checkpoint, kind, code=2))
    assert "make room, or give another --output" in line
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_is_not_written_over(pera, llama_run):
    for output in (llama_run.run / "adapter", llama_run.module.hparams["model_name"]):
        words = ["export", "--ckpt_path", llama_run.run / "adapter", "--format", "merged", "--output", output]
        line = refused(pera(*words, "--overwrite"))
        assert "which is read, are or hold one another: give another --output" in line


def test_of_two_checkpoints_the_last_counts(pera, llama_run, vit_run, tmp_path):
    """For its config too."""
    words = [f"--ckpt_path={vit_run.checkpoint}", "--ckpt_path", llama_run.checkpoint]
    result = pera("export", *words, "--format", "adapter", "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert "note" not in result.out


def test_a_folder_of_a_run_names_what_can_be_given(export, llama_run):
    line = refused(export(llama_run.run, "adapter", code=2))
    assert "is neither a checkpoint nor an adapter folder; it has" in line


def test_data_of_other_classes(export, vit_run, tmp_path):
    line = refused(
        export(vit_run.checkpoint, "merged", "--mode", "static", "--batches", "1", "--data.classes", "[1, 2]", code=2)
    )
    assert "the data have 2 classes, and the trained head" in line
