"""The README's lines for consumers are run as they stand, against a loopback Hub that holds what they name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tiny_artefacts as tiny
from hub import serve
from PIL import Image

PROJECT = Path(__file__).resolve().parents[1]
SECTION = "## Use an aligned model"
CLASSES = ("monocyte", "neutrophil")
UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi()
for name in sys.argv[1:]:
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=name.partition("/")[2])
    api.create_tag(name, tag="v1")
"""


def section(title: str = SECTION) -> str:
    """A part of the README, by default the one for consumers."""
    text = (PROJECT / "README.md").read_text()
    return text[text.index(title) :].split("\n## ")[0]


@pytest.mark.hub
@pytest.mark.slow
def test_what_the_readme_tells_consumers_to_type_works_as_it_stands(tmp_path: Path):
    blocks = re.findall(r"```python\n(.*?)```", section(), flags=re.DOTALL)
    assert len(blocks) == 4
    base = tiny.pipeline(classes=CLASSES)
    base.save_pretrained(tmp_path / "cells")
    tiny.save_adapter(tmp_path / "cells-aligned", base, seed=1)
    tiny.save_adapter(tmp_path / "cells-granules", base, seed=2)
    tiny.reward_model(classes=CLASSES).save_with_processor(tmp_path / "cells-reward")
    named = sorted(set(re.findall(r'"(lab/[\w-]+)"', "".join(blocks))))
    assert named == ["lab/cells", "lab/cells-aligned", "lab/cells-granules", "lab/cells-reward"]
    results = "\nimport json\nprint(json.dumps([judged, rewards.tolist(), len(images)]))"
    with serve(tmp_path / "hub") as hub:
        tiny.run(UPLOAD, tmp_path, hub, *named)
        judged, rewards, count = tiny.run("\n".join(blocks) + results, tmp_path, hub)
    assert count == len(judged) == 16
    assert {row["label"] for row in judged} == {"neutrophil"}
    assert all(0 < score < 1 for score in [*rewards, *(row["score"] for row in judged)])
    with Image.open(tmp_path / "neutrophil.png") as image:
        assert image.size == (16, 16)


def test_what_the_readme_tells_of_metrics_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (block,) = re.findall(r"```python\n(.*?)```", section("## Experiments"), flags=re.DOTALL)
    features = np.random.default_rng(0).normal(size=(128, 8))
    features[64:] += 1
    found = {"features": features, "classes": ["neutrophil"] * 128}
    exec(block, found)
    assert found["values"]["kid"] > 0.1
