"""`training/run_smoke.sh` as its users start it: every script and configuration of the folder, one after the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_recipes import METHOD_FILES, PROJECT

ADAPTERS = ["adapter", *(f"adapter_{name}" for name in METHOD_FILES.values())]


@pytest.mark.slow
def test_all_scripts_run_in_their_order_and_what_each_writes_is_what_the_next_one_reads(tmp_path):
    shutil.copytree(PROJECT / "training", tmp_path / "training")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "training/run_smoke.sh"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = tmp_path / "runs" / "smoke"
    for name in ADAPTERS:
        weights = load_file(runs / name / "pytorch_lora_weights.safetensors")
        learned = any(tensor.abs().max() > 0 for key, tensor in weights.items() if "lora_B" in key)  # 0 at first
        # So short a training may gain nothing: then its guard keeps the adapter of before.
        kept_epoch = json.loads((runs / name / "run.json").read_text())["metrics"].get("kept_epoch", 1)
        assert learned == (kept_epoch > 0), name
    metrics = json.loads((runs / "evaluation" / "metrics.json").read_text())
    assert {"before", "after", "control", "best_of_n"} <= set(metrics["metrics"])
