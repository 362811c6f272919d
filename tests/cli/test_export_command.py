"""`export`: every format, from the folder of a run; what is wrong input is in test_export_errors.py."""

import json
import shutil

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pera_lightning import load_adapter
from pera_lightning.adapters import PERA, AuroRA, FullFineTuning, HiRA, LinearProbe, LoRA
from pera_lightning.cli.checkpoints import configured
from pera_lightning.tasks.image_classification.data import ImageDataModule
from tests.cli import trained_runs as runs
from tests.cli.trained_runs import refused, text


@torch.no_grad()
def logits(model, ids=None):
    return model(runs.token_ids() if ids is None else ids).logits.float()


# ---- merged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["checkpoint", "adapter"])
def test_merged_language_model(export, llama_run, tmp_path, source):
    out = tmp_path / "out"
    result = export(getattr(llama_run, source), "merged")
    assert "Merged 4 layers" in result.out
    assert f"Load it: transformers.AutoModelForCausalLM.from_pretrained('{out}')" in result.out
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert (logits(loaded) - logits(llama_run.network)).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(out)("q1")["input_ids"] == text.tokenizer()("q1")["input_ids"]
    assert (out / "generation_config.json").is_file()


@pytest.mark.slow
def test_merged_folder_in_a_process_without_this_package(export, llama_run, tmp_path):
    export(llama_run.checkpoint, "merged")
    ids = runs.token_ids()
    given = runs.run_alone(
        "import json, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "try:\n    import pera_lightning\n    raise SystemExit('it can be imported')\nexcept ImportError:\n    pass\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.tensor(json.loads(sys.argv[2]))\n"
        "words = AutoTokenizer.from_pretrained(sys.argv[1])('q1 q2')['input_ids']\n"
        "text = model.generate(ids, max_new_tokens=5, do_sample=False)\n"
        "with torch.no_grad():\n    print(json.dumps([model(ids).logits.tolist(), text.tolist(), words]))\n",
        tmp_path / "out",
        json.dumps(ids.tolist()),
    )
    assert (torch.tensor(given[0]) - logits(llama_run.network)).abs().max() < 1e-4
    ours = llama_run.network.generate(ids, max_new_tokens=5, do_sample=False)
    assert given[1] == ours.tolist()
    assert given[2] == text.tokenizer()("q1 q2")["input_ids"]


def test_a_base_in_bfloat16_and_a_head_in_float32(export, llama, small_sets, tmp_path):
    run = runs.language_run(tmp_path / "run", llama, small_sets, trainable=["lm_head"], base_dtype="bfloat16")
    head = run.network.lm_head.weight
    assert head.dtype == torch.float32
    result = export(run.checkpoint, "merged")
    assert "lm_head was trained in float32 and is bfloat16, as the base is" in result.out
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["lm_head.weight"], head.to(torch.bfloat16))
    loaded, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), logits(run.network)
    assert (logits(loaded) - ours).norm() < 0.03 * ours.norm()


def test_a_model_without_tokenizer_is_written_without(export, small_sets, tmp_path):
    run = runs.language_run(tmp_path / "run", text.save_tiny(tmp_path / "base"), small_sets)
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    assert "note: no tokenizer was written: tokenizer in folder" in export(run.adapter, "merged").out
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_the_tokenizer_is_the_data_s_where_it_has_one(export, llama_run, tmp_path):
    words = text.tokenizer()
    words.add_tokens(["q60"])
    words.save_pretrained(tmp_path / "words")
    export(llama_run.adapter, "merged", "--data.tokenizer", tmp_path / "words")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("q60")["input_ids"] == [text.VOCABULARY]


def predictions(folder, pictures):
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        return network(pictures)


def test_merged_image_classifier(export, vit_run, tmp_path):
    result = export(vit_run.checkpoint, "merged", "--mode", "static")
    assert "layers, static" in result.out
    assert "the error of the static merge was not measured" in result.out
    assert f"timm.create_model('local-dir:{tmp_path / 'out'}', pretrained=True)" in result.out
    from pera_lightning.adapters.aurora import static_inference

    with static_inference(vit_run.network), torch.no_grad():
        expected = vit_run.module(runs.images())
    assert torch.allclose(predictions(tmp_path / "out", runs.images()), expected, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    seen = config["pretrained_cfg"]
    assert seen["input_size"] == [3, 8, 8]
    assert seen["mean"] == [0.1, 0.2, 0.3]
    assert (seen["interpolation"], seen["crop_mode"]) == ("nearest", "squash")


def test_another_image_size_and_normalisation_than_the_base_s(export, vit, tmp_path):
    data = {"transform": "center", "image_size": 16, "mean": [0.5, 0.5, 0.5], "crop_pct": 0.9}
    run = runs.image_run(tmp_path / "run", vit, LoRA(rank=3), data=data, image_size=16, base_dtype="bfloat16")
    export(run.adapter, "merged")
    pictures = runs.images(size=16)
    with torch.no_grad():
        expected = run.module(pictures).float()
    ours = predictions(tmp_path / "out", pictures)
    assert (ours - expected).norm() < 0.03 * expected.norm()
    head = load_file(tmp_path / "out" / "model.safetensors")["head.weight"]
    assert torch.equal(head, run.network.head.weight)
    seen = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (seen["input_size"], seen["mean"], seen["crop_pct"]) == ([3, 16, 16], [0.5, 0.5, 0.5], 0.9)


def test_a_calibrated_merge_takes_training_images_without_augmentation(export, vit, tmp_path, monkeypatch):
    data = {"transform": "fourierft", "eval_batch_size": 40}
    run = runs.image_run(tmp_path / "run", vit, data=data)
    asked = []
    images = ImageDataModule._images

    def watched(self, split, *, training=False, **options):
        asked.append((split, training))
        return images(self, split, training=training, **options)

    monkeypatch.setattr(ImageDataModule, "_images", watched)
    result = export(run.checkpoint, "merged", "--mode", "calibrated", "--batches", "2")
    assert asked == [("train", False), ("validation", False)]
    assert "layers, calibrated" in result.out
    assert "(relative, on 2 batches); loss" in result.out
    assert "the error was measured on the batches of the calibration" not in result.out
    # The data were read, so the classes have names.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == ["5", "6", "7", "8", "9"]


def test_names_of_classes_are_those_that_the_fit_wrote_down(export, vit_run, fitted, tmp_path):
    result = export(vit_run.checkpoint, "merged", "--mode", "static")
    assert "the names of the classes are not known" in result.out
    export(fitted.checkpoint, "merged", "--mode", "static", "--overwrite")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == ["5", "6", "7", "8", "9"]


@pytest.mark.parametrize("method", [LinearProbe(), FullFineTuning()], ids=["probe", "full"])
def test_methods_without_adapters_are_written_as_they_are(export, vit, tmp_path, method):
    run = runs.image_run(tmp_path / "run", vit, method)
    assert "adapts no layers" in export(run.checkpoint, "merged").out
    with torch.no_grad():
        assert torch.allclose(predictions(tmp_path / "out", runs.images()), run.module(runs.images()), atol=1e-5)
    assert "export merged weights" in refused(export(run.checkpoint, "peft", "--overwrite", code=2))


# ---- adapter and peft -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["checkpoint", "adapter"])
def test_adapter_folder(export, vit_run, vit, tmp_path, source):
    result = export(getattr(vit_run, source), "adapter")
    assert "pera_lightning.load_adapter(base" in result.out
    base = timm.create_model(f"local-dir:{vit}", pretrained=True, num_classes=5)
    load_adapter(base, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(base.eval()(runs.images()), vit_run.module(runs.images()))


def test_peft_folder(export, llama_run, llama, tmp_path):
    peft = pytest.importorskip("peft")
    result = export(llama_run.checkpoint, "peft")
    assert f"Load it: peft.PeftModel.from_pretrained(base, '{tmp_path / 'out'}')" in result.out
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out").eval()
    assert (logits(loaded) - logits(llama_run.network)).abs().max() < 1e-4
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == llama


def test_peft_folder_cut_by_svd(export, llama, small_sets, tmp_path):
    run = runs.language_run(tmp_path / "run", llama, small_sets, HiRA(rank=3))
    refused = export(run.adapter, "peft", code=2)
    assert "rank" in refused.err
    refused = export(run.adapter, "peft", "--rank", "2", "--max_error", "0.01", code=2)
    assert "max_error=0.01" in refused.err
    assert "relative error" in export(run.adapter, "peft", "--rank", "2", "--max_error", "1").out


def test_peft_folder_of_a_calibrated_aurora(export, llama, small_sets, tmp_path):
    peft = pytest.importorskip("peft")
    run = runs.language_run(tmp_path / "run", llama, small_sets, AuroRA(rank=3))
    options = ["--mode", "calibrated", "--batches", "2"]
    told = export(run.checkpoint, "peft", *options).out
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out").eval()
    ours = logits(loaded)
    # The same batches, and so the same fit and drift.
    drift = next(line for line in told.splitlines() if "(relative, on " in line)
    assert drift in export(run.checkpoint, "merged", *options, "--overwrite").out.splitlines()
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - ours).abs().max() < 1e-4
    assert (logits(run.network) - ours).abs().max() > 1e-2


def test_vllm_is_told_what_to_start(export, llama_run, llama, tmp_path):
    result = export(llama_run.checkpoint, "peft", "--target", "vllm")
    out = tmp_path / "out"
    assert f"vllm serve {llama} --enable-lora --max-lora-rank 16 --lora-modules out={out}" in result.out


# ---- where the config comes from, and what counts -------------------------------------------------------------------


def test_a_config_is_given_where_there_is_no_run(export, llama_run, tmp_path):
    lonely = tmp_path / "lonely.ckpt"
    shutil.copy(llama_run.checkpoint, lonely)
    refused = export(lonely, "merged", code=2)
    assert refused.err.splitlines()[-1].endswith(
        "it is in no run's folder (RUN/checkpoints/ or RUN/adapter): give --config"
    )
    # Its own ckpt_path, null, does not replace the one given before it.
    export(lonely, "merged", "--config", llama_run.run / "config.yaml")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(loaded) - logits(llama_run.network)).abs().max() < 1e-4


def test_configs_come_first_however_they_are_given(llama_run):
    path, config = str(llama_run.checkpoint), str(llama_run.run / "config.yaml")
    assert configured([f"--ckpt_path={path}", "--rank", "2"], path) == [
        "--config",
        config,
        f"--ckpt_path={path}",
        "--rank",
        "2",
    ]
    given = ["--ckpt_path", path, "-c", "a.yaml", "--rank=2", "--config=b.yaml", "--overwrite"]
    first = ["--config", "a.yaml", "--config", "b.yaml", "--ckpt_path", path, "--rank=2", "--overwrite"]
    assert configured(given, path) == first


def test_the_adapters_are_those_of_the_checkpoint(export, llama_run, tmp_path):
    config = yaml.safe_load((llama_run.run / "config.yaml").read_text())
    config["adapter"]["method"] = LoRA(rank=7).spec()
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    result = export(llama_run.checkpoint, "merged", "--config", tmp_path / "other.yaml")
    assert "note: the config says LoRA(rank=7" in result.out
    assert "what counts is the checkpoint: PERA(rank=3" in result.out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(loaded) - logits(llama_run.network)).abs().max() < 1e-4
    assert "what counts" not in export(llama_run.checkpoint, "merged", "--overwrite").out


def test_the_command_line_wins_over_the_config(export, llama_run, llama, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(llama, moved)
    result = export(llama_run.checkpoint, "peft", f"--model.model_name={moved}")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)
    assert result.code == 0


def test_a_config_without_data(export, llama_run, vit_run, tmp_path):
    for run, method, kind in ((llama_run, None, "merged"), (vit_run, "static", "peft")):
        config = yaml.safe_load((run.run / "config.yaml").read_text())
        del config["data"]
        (tmp_path / "bare.yaml").write_text(yaml.safe_dump(config))
        words = ["--config", tmp_path / "bare.yaml", *(["--mode", method] if method else [])]
        export(run.checkpoint, kind, *words, "--overwrite")
    line = refused(export(vit_run.checkpoint, "merged", *words[:2], "--mode", "calibrated", "--overwrite", code=2))
    assert "the config has no data to measure on, or to calibrate with: give --data" in line


def test_methods_that_are_exact_need_no_data(export, llama, small_sets, tmp_path):
    run = runs.language_run(tmp_path / "run", llama, small_sets, PERA(rank=2))
    export(run.checkpoint, "merged", "--data.folder", tmp_path / "gone")


def test_help_lists_the_options(pera):
    result = pera("export", "--help")
    assert result.code == 0
    for option in ("--ckpt_path", "--format", "--output", "--overwrite", "--mode", "--batches", "--rank", "--target"):
        assert option in result.out
    assert "--weights_only" not in result.out
