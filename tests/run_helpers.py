"""The command line in process, and the quickstart cut down to two steps."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
QUICK = {
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 2,
    "trainer.limit_val_batches": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
}


def run_pera(*words):
    """Runs the command line in process; returns its exit code, 0 where it simply ends."""
    from pera_lightning.cli.main import main

    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return end.code or 0
    return 0


def quick_words(folder, command="fit", config=QUICKSTART):
    """The quickstart cut down to two steps, its files under `folder`."""
    words = [command, "--config", str(config)]
    for key, value in {**QUICK, "trainer.logger.init_args.save_dir": folder}.items():
        words += [f"--{key}", str(value)]
    return words
