"""The whole loop on the phantom, as small as it can be: all folders, all figures, and nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from transformers import ResNetConfig, ResNetModel

from pathalign.cli import main
from pathalign.ledger import LEDGER_NAME
from pathalign.schema import RunRecord
from pathalign.stages import STAGES

# The graders learn next to nothing in so few steps; `flip_rate` makes sure that both verdicts occur.
TINY = {
    "data": {
        "image_size_px": 16,
        "classes": ["basophil", "lymphocyte", "neutrophil"],
        "roles": True,
        "per_class": 8,
        "phantom_per_class": 50,
    },
    "pretrain": {
        "block_out_channels": [8, 16],
        "attention_levels": [1],
        "steps": 12,
        "batch_size": 8,
        "validate_every_steps": 4,
        "checkpoint_every_steps": 4,
    },
    "graders": {"steps": 4, "batch_size": 12},
    "generate": {"images_per_class": 24, "inference_steps": 2, "batch_size": 12},
    "grade": {"flip_rate": 0.4},
    "feedback": {"bootstrap_samples": 100, "near_duplicate_bits": 0},
    "reward": {"epochs": 3, "batch_size": 16},
    "align": {
        "rounds": 2,
        "images_per_class": 4,
        "inference_steps": 2,
        "steps_per_round": 4,
        "batch_size": 4,
        "real_batch_size": 4,
        "lora_rank": 2,
        "sample_batch_size": 6,
        "checkpoint_every_steps": 2,
    },
    "control": {"steps": 8},
    "sample": {"images_per_class": 8, "inference_steps": 2, "batch_size": 12, "best_of_n": {"best_of": 2}},
    "evaluate": {"bootstrap_samples": 100},
}
ASKED_FOR = {"held_out_reward", "selection"}  # by methods that others watch; to replay what is graded
FOLDERS = [step.folder for stage in STAGES for step in stage.steps if step.folder not in ASKED_FOR]


def write_config(folder: Path) -> Path:
    """The configuration `TINY` with an encoder of a few weights, as a YAML file in `folder`."""
    encoder = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=32)
    ResNetModel(encoder).save_pretrained(folder / "encoder")
    (folder / "encoder" / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    evaluate = TINY["evaluate"] | {"encoder": str(folder / "encoder")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"evaluate": evaluate}))
    return folder / "tiny.yaml"


def run(config: Path, run_dir: Path, *overrides: str) -> dict:
    arguments = [word for pair in overrides for word in ("--set", pair)]
    result = CliRunner().invoke(main, ["run", str(config), "--output-dir", str(run_dir), "--json", *arguments])
    assert result.exit_code == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def made(summary: dict) -> list[str]:
    return [Path(step["folder"]).name for step in summary["steps"] if step["status"] == "made"]


@pytest.mark.slow
def test_the_whole_loop_makes_all_folders_measures_and_does_nothing_twice(tmp_path):
    config, run_dir = write_config(tmp_path), tmp_path / "run"
    summary = run(config, run_dir)
    assert made(summary) == FOLDERS and len(FOLDERS) == 15
    for folder in FOLDERS:
        assert RunRecord.load(run_dir / folder).stage, folder
    visible = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")}
    assert visible == {*FOLDERS, LEDGER_NAME}
    check_metrics(run_dir, summary["evaluation"])
    check_report(run_dir / "evaluation")

    again = run(config, run_dir)
    assert made(again) == []
    assert again["wall_s"] < 0.1 * summary["wall_s"]
    assert again["evaluation"] == summary["evaluation"]

    changed = made(run(config, run_dir, "reward.epochs=2"))
    earlier = FOLDERS[: FOLDERS.index("reward")]
    assert changed[0] == "reward" and changed[-1] == "evaluation"
    assert not set(changed) & {*earlier, "control", "samples_before", "samples_control"}
    assert {"adapter", "samples_after"} <= set(changed)


def check_metrics(run_dir: Path, printed: dict) -> None:
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    assert metrics == printed
    assert set(metrics["metrics"]) == {"before", "after", "control", "best_of_n", "real"}
    keys = {"plausible_share", "fid", "kid", "precision", "recall", "density", "coverage"}
    keys |= {"authenticity", "utility_accuracy", "mean_reward", "grader_share", "no_near_copy", "nearer_to_train"}
    keys |= {"alpha_precision", "beta_recall", "augment_accuracy", "kid_unbiased"}
    for name, figures in metrics["metrics"].items():
        assert keys <= set(figures), name
        assert 0 <= figures["plausible_share"] <= 1
    keys = {"plausible_gain", "plausible_gain_ci", "gain_over_control", "gap_closed", "reward_gain", "reward_hacking"}
    assert keys | {"worse", "headline", "reward", "confidence"} <= set(metrics)
    assert metrics["simulated"] is True and metrics["phantom"] is True
    gain = metrics["metrics"]["after"]["plausible_share"] - metrics["metrics"]["before"]["plausible_share"]
    assert metrics["plausible_gain"] == pytest.approx(gain)


def check_report(folder: Path) -> None:
    report = (folder / "report.html").read_text()
    assert len(report) > 10_000 and "http://" not in report.replace("http://www.w3.org", "")
    assert "phantom" in report and "simulated" in report
