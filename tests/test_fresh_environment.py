"""A virtual environment with the stock libraries and no pathalign draws and scores what pathalign does, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_artefacts as tiny
import torch
from hub import serve
from PIL import Image
from safetensors.torch import load_file

from pathalign.diffusion.pipeline import ClassConditionalPipeline
from pathalign.images import ImageSet
from pathalign.reward import RewardModel

pytestmark = [pytest.mark.hub, pytest.mark.slow]

PROJECT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch==2.13.0", "diffusers", "transformers", "peft")  # peft: diffusers asks for it where LoRA is loaded
UPLOAD = """
from huggingface_hub import HfApi
api = HfApi()
for folder in ("old", "."):
    for name in ("base", "adapter", "reward"):
        api.create_repo(f"lab/{name}", private=True, exist_ok=True)
        api.upload_folder(repo_id=f"lab/{name}", folder_path=f"{folder}/{name}")
        if folder == "old":
            api.create_tag(f"lab/{name}", tag="old")
"""
CONSUMER = (
    tiny.DRAWING
    + """
import importlib.util, json
from importlib.metadata import distributions
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, pipeline
shown = [Image.new("RGB", (20 + n, 20), (60 * n, 200 - 50 * n, 90)) for n in range(3)]
labels, found, scores = ["a", "b", "c"], {}, {}
for revision in ("main", "old"):
    folder = snapshot_download("lab/base", revision=revision)
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    found[f"base {revision}"] = draw(pipe)
    if not HF_HUB_OFFLINE:  # diffusers 0.42 asks the Hub for a repo's code even then
        code = {"custom_pipeline": "lab/base", "custom_revision": revision, "trust_remote_code": True}
        pipe = DiffusionPipeline.from_pretrained("lab/base", revision=revision, **code)
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(draw(pipe), found[f"base {revision}"])
    assert type(pipe).__module__.startswith("diffusers_modules"), type(pipe).__module__
    pipe.load_lora_weights("lab/adapter", revision=revision)
    found[f"adapter {revision}"] = draw(pipe)
    model = AutoModel.from_pretrained("lab/reward", trust_remote_code=True, revision=revision)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    processor = AutoImageProcessor.from_pretrained("lab/reward", trust_remote_code=True, revision=revision)
    rewards = model.rewards(processor(shown)["pixel_values"], torch.tensor([0, 1, 2])).tolist()
    judge = pipeline(model="lab/reward", trust_remote_code=True, revision=revision)
    scores[revision] = {
        "rewards": [{"label": label, "score": reward} for label, reward in zip(labels, rewards)],
        "score": model.score(shown, labels),
        "pipeline": judge(shown, labels),
        "pipeline in batches": judge(shown, labels, batch_size=2),
    }
save_file(found, "fresh.safetensors")
installed = sorted({distribution.name.lower() for distribution in distributions()})
print(json.dumps([scores, installed, importlib.util.find_spec("pathalign") is not None]))
"""
)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment that holds `LIBRARIES` and what they bring."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-qq", "--no-compile", "-c", str(PROJECT / "constraints.txt")]
    done = subprocess.run([*pip, *LIBRARIES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return python


def save_both(folder: Path) -> None:
    """All artefacts below `folder`, and others of another seed below `old`."""
    pixels = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    tiny.save_all(folder, ImageSet.build(pixels, torch.arange(3), tiny.CLASSES))
    old = tiny.pipeline(seed=9)
    old.save_pretrained(folder / "old/base")
    tiny.save_adapter(folder / "old/adapter", old, seed=9)
    tiny.reward_model(seed=9).save_with_processor(folder / "old/reward")


def test_stock_libraries_draw_and_score_the_same_at_any_revision_with_and_without_connection(
    python: Path, tmp_path: Path
):
    save_both(tmp_path)
    with serve(tmp_path / "hub") as hub:
        tiny.run(UPLOAD, tmp_path, hub)
        compare(tmp_path, *tiny.run(CONSUMER, tmp_path, hub, python=python, PYTHONPATH=""))
    compare(tmp_path, *tiny.run(CONSUMER, tmp_path, hub, python=python, PYTHONPATH="", HF_HUB_OFFLINE="1"))


def compare(folder: Path, scores: dict[str, Any], installed: list[str], importable: bool) -> None:
    """What the other environment found against the folders: images with difference 0, rewards to 1e-6."""
    assert "pathalign" not in installed and importable is False
    assert not {"datasets", "gradio", "efficientnet-lite-pytorch"} & set(installed)
    found = load_file(folder / "fresh.safetensors")
    shown = [Image.new("RGB", (20 + n, 20), (60 * n, 200 - 50 * n, 90)) for n in range(3)]
    for revision, below in (("main", folder), ("old", folder / "old")):
        pipeline = ClassConditionalPipeline.from_pretrained(below / "base")
        assert (found[f"base {revision}"] - tiny.draw(pipeline)).abs().max() == 0
        pipeline.load_lora_weights(below / "adapter")
        assert (found[f"adapter {revision}"] - tiny.draw(pipeline)).abs().max() == 0
        own = RewardModel.from_pretrained(below / "reward").score(shown, ["a", "b", "c"])
        assert set(scores[revision]) == {"rewards", "score", "pipeline", "pipeline in batches"}
        for rows in scores[revision].values():
            assert [row["label"] for row in rows] == [row["label"] for row in own]
            assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in own], abs=1e-6)
    differing = {tuple(images.flatten().tolist()) for images in found.values()}
    assert len(found) == len(differing) == 4
