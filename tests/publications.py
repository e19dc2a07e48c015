"""Tiny artefacts of every kind, made in place, and the command that publishes them in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hub import HubServer
from PIL import Image
from small_study import images

from pathalign.artefacts import fingerprint
from pathalign.diffusion import lora
from pathalign.feedback import build
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.schema import Grade, RunRecord
from pathalign.settings.feedback import FeedbackConfig
from pathalign.settings.pretrain import PretrainConfig
from pathalign.trainers.pretrain import new_pipeline

CLASSES = ["a", "b", "c"]
GRADING = {"simulated": False, "n_grades": 90, "n_graders": 3, "krippendorff_alpha": 0.7, "functions": []}
HOME = "/home/someone/secret project"
SHARES = {"before": 0.54, "after": 0.71}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def record(folder: Path, stage: str, **facts: Any) -> None:
    config = {"data": "/home/someone/data", "seed": 0, **facts.pop("config", {})}
    RunRecord(stage, config, seeds={"seed": 0}, versions={"torch": "2.13.0"}, **facts).save(folder)


def make_base(folder: Path, seed: int = 0, classes: list[str] = CLASSES) -> Path:
    pipeline = new_pipeline(PretrainConfig(block_out_channels=[8, 16], attention_levels=[1], seed=seed), 16, classes)
    with torch.no_grad():
        pipeline.unet.conv_in.bias += seed
    pipeline.save_pretrained(folder)
    record(folder, "pretrain")
    (folder / "README.md").write_text("an older card")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-1.pt").write_bytes(b"pickle")
    return folder


def make_adapter(folder: Path, base: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    from pathalign.diffusion.pipeline import ClassConditionalPipeline

    unet = ClassConditionalPipeline.from_pretrained(base).unet
    lora.attach(unet, 2, 2.0, False, torch.Generator().manual_seed(seed))
    lora.save(unet, folder)
    metrics = {"method": "draft", "class_names": CLASSES, "criteria": ["nucleus"], "grading": GRADING}
    inputs = {"base_model": fingerprint(base), "reward_model": "0" * 16}
    config = {"base_model": str(base), "base_revision": None, "reward_model": "runs/reward", "prompt": "{class_name}"}
    record(folder, "align", config=config, inputs=inputs, metrics=metrics)
    return folder


def make_reward(folder: Path, mark: int = 0, classes: list[str] = CLASSES) -> Path:
    """A reward model whose configuration, weights and card all name `mark`."""
    torch.manual_seed(0)
    config = RewardModelConfig(
        class_names=classes, criteria=["nucleus"], image_size_px=16, convnet_channels=[4, 4, 4, 4],
        hidden_size=8, class_embedding_size=4, grading=GRADING, temperature=1.0 + mark,
    )  # fmt: skip
    model = RewardModel(config)
    with torch.no_grad():
        next(model.parameters()).fill_(mark)
    model.save_with_processor(folder)
    overall = {"n": 160 + mark, "roc_auc": 0.913, "roc_auc_ci": [0.87, 0.95], "ece": 0.04}
    write_json(folder / "evaluation.json", {"overall": overall})
    record(folder, "reward", config={"feedback": "runs/feedback"}, inputs={"feedback": "0" * 16})
    return folder


def make_candidates(folder: Path, seed: int = 0, controls: int = 0) -> Path:
    made = images(30, seed, 16)
    kinds = ["real control"] * controls + ["synthetic"] * (30 - controls)
    replace(made, columns={"seed": list(range(30)), "kind": kinds}).save(folder)
    Image.new("RGB", (8, 8)).save(folder / "samples.png")
    record(folder, "generate", inputs={"model": "0" * 16}, metrics={"n": 30})
    return folder


def make_real(folder: Path) -> Path:
    """A set by `pathalign data`: it has no column `kind`, and tells where its images come from."""
    made = images(30, 0, 16)
    columns = {"source_image": [f"slides/lovelace_{row}.svs" for row in range(30)], "auto_area_px": [1.0] * 30}
    replace(made, columns=columns).save(folder)
    record(folder, "data")
    return folder


def make_grades(
    folder: Path, candidates: Path, graders: tuple[str, ...] = ("reader-1", "reader-2", "reader-3")
) -> Path:
    folder.mkdir(parents=True)
    made = images(30, 0, 16)
    rows = []
    for place, grader in enumerate(graders):
        for number, (image_id, label) in enumerate(zip(made.image_ids, made.labels(), strict=True)):
            wrong = (number + place // 2) % 2 == 1
            verdict, failed = ("implausible", ("nucleus",)) if wrong else ("plausible", ())
            grade = Grade(
                f"{grader}-{image_id}", image_id, label, verdict, grader, failed, comment="seen at the Institute"
            )
            rows.append(grade)
    (folder / "grades.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    record(folder, "import", config={"candidates": str(candidates)})
    return folder


def make_feedback(folder: Path, candidates: Path, grades: Path) -> Path:
    config = FeedbackConfig(
        candidates=str(candidates), grades=str(grades), bootstrap_samples=100, near_duplicate_bits=0, test_share=0.3,
        validation_share=0.3,
    )  # fmt: skip
    build(config, folder)
    return folder


def make_evaluation(folder: Path, adapter: Path, phantom: bool = False) -> Path:
    (folder / "figures").mkdir(parents=True)
    for name in ("before", "after"):
        Image.new("RGB", (16, 16)).save(folder / "figures" / f"samples_{name}.png")
    figures = {name: {"n": 500, "plausible_share": share, "plausible_ci": [share - 0.04, share + 0.04], "kid": 0.1,
                      "n_fidelity": 480} for name, share in SHARES.items()}  # fmt: skip
    metrics = {
        "metrics": {**figures, "real": {"n": 600, "plausible_share": 0.9}, "control": None},
        "worse": [{"name": "recall", "before": 0.61, "after": 0.57, "notable": True}],
        "headline": "More of it is plausible.", "simulated": True, "phantom": phantom,
    }  # fmt: skip
    write_json(folder / "metrics.json", metrics)
    (folder / "report.html").write_text("<p>made of /home/someone/data/cells</p>")
    record(folder, "evaluate", inputs={"adapter": fingerprint(adapter), "data": "0" * 16}, metrics=metrics)
    return folder


def make_all(place: Path) -> dict[str, Path]:
    """One artefact of each kind below a folder, whose records name each other."""
    made = {"base": make_base(place / "base"), "reward": make_reward(place / "reward")}
    made["adapter"] = make_adapter(place / "adapter", made["base"])
    made["candidates"] = make_candidates(place / "candidates")
    made["grades"] = make_grades(place / "grades", made["candidates"])
    made["feedback"] = make_feedback(place / "feedback", made["candidates"], made["grades"])
    made["evaluation"] = make_evaluation(place / "evaluation", made["adapter"])
    return made


RUN = """
import json, sys
from click.testing import CliRunner
from pathalign.cli import main
for line in sys.stdin:
    done = CliRunner().invoke(main, ["publish", *json.loads(line)])
    print(json.dumps({"code": done.exit_code, "out": done.stdout, "err": done.stderr}), flush=True)
"""


class Publisher:
    """A process in which `pathalign publish` runs, once for each call: torch is imported once."""

    def __init__(self, hub: HubServer, home: Path, token: str | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN], env=hub.variables(home, token), text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __call__(self, *call: Any) -> dict[str, Any]:
        """Exit code, stdout and stderr of one call."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(word) for word in call]) + "\n")
        self.process.stdin.flush()
        result: dict[str, Any] = json.loads(self.process.stdout.readline())
        return result

    def made(self, *call: Any) -> dict[str, Any]:
        """What `--json` prints of a call that must go well."""
        result = self(*call, "--json")
        assert result["code"] == 0, result["err"]
        printed: dict[str, Any] = json.loads(result["out"])
        return printed

    def refused(self, *call: Any) -> str:
        """The error of a call that must go wrong."""
        result = self(*call)
        assert result["code"] != 0, result["out"]
        assert "Traceback" not in result["err"] and result["err"].count("Error: ") == 1, result["err"]
        error: str = result["err"]
        return error

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
