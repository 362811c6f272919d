"""The quickstart at its real length: an adapter that does not clearly beat the probe is broken."""

import json

import pytest

from tests.run_helpers import ROOT, run_pera


def accuracies(folder, method):
    common = ["--config", ROOT / "configs" / "quickstart.yaml", "--adapter.method", method]
    common += ["--trainer.logger.init_args.save_dir", folder, "--trainer.enable_progress_bar", "false"]
    run = folder / "quickstart"
    assert run_pera("fit", *common) == 0
    assert run_pera("test", *common, "--ckpt_path", run / "checkpoints" / "best.ckpt") == 0
    results = json.loads((run / "results.json").read_text())
    assert results["n"] == 179
    return results["metrics"]


@pytest.mark.slow
def test_adapters_beat_the_probe(tmp_path):
    """Measured with seeds 0 to 2: AuroRA 0.89 to 0.91, PERA 0.90, the probe 0.69; one image is 0.006."""
    probe = accuracies(tmp_path / "probe", "LinearProbe")
    aurora = accuracies(tmp_path / "aurora", "AuroRA")
    pera = accuracies(tmp_path / "pera", "PERA")
    assert 0.60 < probe["test/accuracy"] < 0.75
    assert "test_static/accuracy" not in probe
    for name, scores in (("AuroRA", aurora), ("PERA", pera)):
        assert scores["test/accuracy"] > 0.82, name
        assert scores["test/accuracy"] > probe["test/accuracy"] + 0.10, name
    # The paper's merge on weights trained dynamic loses what was learnt, and is reported, not hidden.
    assert aurora["test_static/accuracy"] < aurora["test/accuracy"] - 0.2
