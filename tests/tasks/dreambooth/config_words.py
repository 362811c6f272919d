"""The words of a command on a DreamBooth config of the repository, cut down to a tiny pipeline."""

from tests.run_helpers import ROOT

SIDE = 64  # pixels


def words(command, base, photos, folder, method="pera", **changes):
    """Of `pera COMMAND`; the run is FOLDER/METHOD, `changes` are further options with __ for dots."""
    options = {
        "model.model_name": base,
        "model.base_dtype": "float32",
        "model.lr": 0.05,
        "model.sampling_steps": 2,
        "model.dino": "null",
        "model.clip": "null",
        "data.instance_folder": photos,
        "data.resolution": SIDE,
        "data.cache_dir": folder / "cache",
        "data.seeds": "[0, 1]",
        "data.prompts": '["a photo of {}", "{} on a beach"]',
        "data.validation_seeds": "[0]",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 8,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger.init_args.save_dir": folder,
        "trainer.logger.init_args.name": method,
    }
    if command == "params":
        options = {k: v for k, v in options.items() if "logger" not in k}
    given = {**options, **{name.replace("__", "."): value for name, value in changes.items()}}
    start = [command, "--config", str(ROOT / "configs" / f"dreambooth_sdxl_{method}.yaml")]
    return [*start, *(word for name, value in given.items() for word in (f"--{name}", str(value)))]
