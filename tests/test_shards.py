"""Sets in shards: the same images however many processes made them, killed or not, for all that read one file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from hub import serve
from test_hub_server import client

from pathalign import generate as module
from pathalign import shards
from pathalign.artefacts import partial_dir
from pathalign.generate import generate, score
from pathalign.images import ImageSet, dataset_shards, shard_name
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.schema import InputError, RunRecord
from pathalign.scoring import score_set
from pathalign.settings.generate import GenerateConfig
from pathalign.settings.pretrain import PretrainConfig
from pathalign.settings.score import ScoreConfig
from pathalign.shards import Process
from pathalign.trainers.pretrain import new_pipeline

PROJECT = Path(__file__).resolve().parents[1]
NAMES = [shard_name("train", index, 4) for index in range(4)]


@pytest.fixture
def config(tiny_pipeline, tmp_path: Path) -> GenerateConfig:
    """15 images in shards of 4, 4, 4 and 3."""
    tiny_pipeline.save_pretrained(tmp_path / "model")
    settings = {"images_per_class": 5, "inference_steps": 2, "batch_size": 3, "seed": 7, "images_per_shard": 4}
    return GenerateConfig(model=str(tmp_path / "model"), **settings)


@pytest.fixture
def reward_model(tmp_path: Path) -> str:
    """An untrained one with two criteria that knows the classes in another order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = RewardModelConfig(class_names=["c", "a", "b"], criteria=["size", "colour"], convnet_channels=[8, 8])
        RewardModel(config).save_with_processor(tmp_path / "reward")
    return str(tmp_path / "reward")


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch):
    """Makes this process one of several, as a launcher would."""

    def become(index: int, count: int = 2) -> None:
        monkeypatch.setenv("RANK", str(index))
        monkeypatch.setenv("WORLD_SIZE", str(count))

    return become


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an artefact but the record, which holds times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != RunRecord.FILE_NAME]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Generation.


@pytest.mark.parametrize("change", [{}, {"varied_steps": [1, 3]}, {"classes": ["c", "a"]}])
def test_shards_hold_the_images_of_the_single_file(config: GenerateConfig, tmp_path: Path, change: dict):
    config = replace(config, **change)
    generate(config, tmp_path / "set")
    generate(replace(config, images_per_shard=None), tmp_path / "one")
    whole, one = ImageSet.load(tmp_path / "set"), ImageSet.load(tmp_path / "one")
    assert (whole.labels(), whole.columns) == (one.labels(), one.columns)
    assert (whole.images.int() - one.images.int()).abs().max() <= 1  # batches are cut elsewhere
    sizes = [len(part) for part in ImageSet.shards(tmp_path / "set")]
    assert sizes == [4] * (len(one) // 4) + ([len(one) % 4] if len(one) % 4 else [])
    assert sorted(contents(tmp_path / "set")) == sorted(
        [*(f"data/{shard_name('train', index, len(sizes))}" for index in range(len(sizes))), "samples.png"]
    )
    table = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))["train"]
    assert tuple(table["image_id"][:]) == whole.image_ids


def test_two_processes_write_what_one_writes_and_the_first_finishes(
    config: GenerateConfig, drawn: list[int], as_process, tmp_path: Path
):
    generate(config, tmp_path / "one")
    drawn.clear()
    as_process(1)
    generate(config, tmp_path / "two")
    assert not (tmp_path / "two").exists()
    as_process(0)
    generate(config, tmp_path / "two")
    assert sorted(drawn) == list(range(7, 22))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert RunRecord.load(tmp_path / "two").metrics == RunRecord.load(tmp_path / "one").metrics


def test_a_process_without_shards_does_nothing(config: GenerateConfig, drawn: list[int], as_process, tmp_path: Path):
    as_process(1)
    generate(replace(config, images_per_shard=None), tmp_path / "set")
    assert drawn == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("after", [2, 6, 12])
def test_an_interrupted_set_goes_on_with_any_number_of_processes_and_draws_nothing_twice(
    config: GenerateConfig, drawn: list[int], as_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
):
    generate(config, tmp_path / "straight")
    drawn.clear()
    counted = module.sample

    def interrupt(*args):
        if len(drawn) >= after:
            raise KeyboardInterrupt
        return counted(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "sample", interrupt)
        generate(config, tmp_path / "set")
    for index in (1, 0):
        as_process(index)
        generate(config, tmp_path / "set")
    assert sorted(drawn) == list(range(7, 22))
    assert contents(tmp_path / "set") == contents(tmp_path / "straight")


def test_a_finished_set_is_kept_unless_its_settings_or_files_changed(
    config: GenerateConfig, drawn: list[int], as_process, tmp_path: Path
):
    generate(config, tmp_path / "set")
    for index in (1, 0):
        as_process(index)
        assert generate(config, tmp_path / "set").metrics["n"] == 15
    assert len(drawn) == 15
    assert not partial_dir(tmp_path / "set").exists()
    as_process(0, 1)
    (tmp_path / "set" / "data" / NAMES[2]).write_bytes(b"damaged")
    generate(config, tmp_path / "set")
    assert len(drawn) == 30
    generate(replace(config, seed=8), tmp_path / "set")
    assert len(drawn) == 45


def test_killed_between_the_last_two_steps_it_is_only_shown(
    config: GenerateConfig, drawn: list[int], as_process, tmp_path: Path
):
    generate(config, tmp_path / "set")
    made = contents(tmp_path / "set")
    (tmp_path / "set").rename(partial_dir(tmp_path / "set"))
    generate(config, tmp_path / "set")
    assert (len(drawn), contents(tmp_path / "set")) == (15, made)


def test_a_process_that_starts_after_the_end_leaves_nothing_behind(
    config: GenerateConfig, drawn: list[int], as_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    generate(config, tmp_path / "set")
    is_made, looks = shards._is_made, []

    def late(folder, *args):
        looks.append(folder)
        return len(looks) > 1 and is_made(folder, *args)  # the first process ends between two looks of this one

    as_process(1)
    monkeypatch.setattr(shards, "_is_made", late)
    generate(config, tmp_path / "set")
    assert (len(drawn), len(looks)) == (15, 2)
    assert not partial_dir(tmp_path / "set").exists()


def test_a_missing_process_is_named_and_nothing_waits_for_ever(
    config: GenerateConfig, drawn: list[int], as_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards, "PEER_TIMEOUT_S", 0.6)
    monkeypatch.setattr(shards, "POLL_S", 0.05)
    as_process(0, 3)
    with pytest.raises(InputError, match=r"2 of 4 shards are missing.*process 1, 2 of 3 has written nothing.*with few"):
        generate(config, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    as_process(0, 1)
    generate(config, tmp_path / "set")
    assert sorted(drawn) == list(range(7, 22))


def test_memory_holds_one_shard_at_a_time(config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    build = ImageSet.build.__func__

    def measured(cls, images, *args):
        sizes.append(len(images))
        return build(cls, images, *args)

    monkeypatch.setattr(ImageSet, "build", classmethod(measured))
    generate(config, tmp_path / "set")
    assert sizes == [4, 4, 4, 3]


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2"), ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one")],
)
def test_a_launchers_numbers_are_checked(monkeypatch: pytest.MonkeyPatch, variables: dict, message: str):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{message}.*must be a number from 0 and below WORLD_SIZE"):
        Process.current()


# Reading.


def test_a_missing_shard_and_files_of_two_sets_are_refused(config: GenerateConfig, tmp_path: Path):
    generate(config, tmp_path / "set")
    data = tmp_path / "set" / "data"
    shutil.copy(data / NAMES[0], data / shard_name("train", 0, 1))
    with pytest.raises(InputError, match=r"several sets of 'train', of \[1, 4\]"):
        ImageSet.load(tmp_path / "set")
    (data / shard_name("train", 0, 1)).unlink()
    (data / NAMES[2]).unlink()
    with pytest.raises(InputError, match=f"lacks 1 of 4 shards, such as data/{NAMES[2]}"):
        dataset_shards(tmp_path / "set")


def test_shards_of_other_classes_or_columns_are_refused(tiny_images: ImageSet, tmp_path: Path):
    tiny_images.save(tmp_path, shard=(0, 2))
    replace(tiny_images, class_names=("a", "b", "z")).save(tmp_path, shard=(1, 2))
    with pytest.raises(InputError, match="differ in classes or columns"):
        ImageSet.load(tmp_path)


@pytest.mark.hub
def test_a_set_in_shards_is_read_from_the_hub_and_from_the_cache_without_a_connection(
    tiny_images: ImageSet, tmp_path: Path
):
    for index in range(3):
        tiny_images.select(range(16 * index, 16 * index + 16)).save(tmp_path / "set", shard=(index, 3))
    code = """
    from pathalign.images import ImageSet, dataset_shards
    print(*ImageSet.load("lab/grades").image_ids, len(dataset_shards("lab/grades")))
    """
    with serve(tmp_path / "hub", "lab/grades") as hub:
        client(hub, tmp_path, "api.upload_folder(repo_id='lab/grades', repo_type='dataset', folder_path='set')")
        printed = client(hub, tmp_path, code, PYTHONPATH=str(PROJECT))
        assert printed.split() == [*tiny_images.image_ids, "3"]
        assert client(hub, tmp_path, code, PYTHONPATH=str(PROJECT), HF_HUB_OFFLINE="1") == printed


# Scoring.


def test_scores_are_the_reward_models_probabilities_by_class_name(
    config: GenerateConfig, reward_model: str, tmp_path: Path
):
    generate(config, tmp_path / "set")
    wanted = ScoreConfig(candidates=str(tmp_path / "set"), reward_model=reward_model, batch_size=3)
    record = score_set(wanted, tmp_path / "scores")
    table = datasets.load_dataset(str(tmp_path / "scores"), cache_dir=str(tmp_path / "cache"))["train"]
    assert table.column_names == ["image_id", "label", "reward", "criterion_size", "criterion_colour"]
    candidates, model = ImageSet.load(tmp_path / "set"), RewardModel.from_pretrained(reward_model)
    expected = score(model, candidates.images, candidates.class_ids.tolist(), candidates.class_names)
    assert table["reward"][:] == pytest.approx(expected.tolist(), abs=1e-6)
    ids = torch.tensor([["c", "a", "b"].index(name) for name in candidates.labels()])
    with torch.no_grad():
        logits = model(pixel_values=candidates.pixel_values(), class_ids=ids).criteria_logits
    assert table["criterion_colour"][:] == pytest.approx(torch.special.expit(logits[:, 1]).tolist(), abs=1e-6)
    assert (tuple(table["image_id"][:]), table["label"][:]) == (candidates.image_ids, candidates.class_ids.tolist())
    assert record.metrics["n"] == 15 and record.metrics["reward"] == pytest.approx(float(expected.mean()))
    for name, rewards in zip("abc", expected.split(5), strict=True):
        assert record.metrics["by_class"][name] == {
            "n": 5,
            "reward": pytest.approx(float(rewards.mean())),
            "above_half": pytest.approx(float((rewards > 0.5).float().mean())),
        }
    assert sorted(contents(tmp_path / "scores")) == [f"data/{name}" for name in NAMES]


def test_with_images_the_scores_are_a_candidate_set(config: GenerateConfig, reward_model: str, tmp_path: Path):
    generate(replace(config, images_per_shard=None), tmp_path / "set")
    wanted = ScoreConfig(candidates=str(tmp_path / "set"), reward_model=reward_model, with_images=True)
    score_set(wanted, tmp_path / "scores")
    before, after = ImageSet.load(tmp_path / "set"), ImageSet.load(tmp_path / "scores")
    assert after.image_ids == before.image_ids and torch.equal(after.images, before.images)
    assert set(after.columns) == {*before.columns, "reward", "criterion_size", "criterion_colour"}


def test_scores_of_two_processes_are_those_of_one_and_no_shard_is_scored_twice(
    config: GenerateConfig, reward_model: str, as_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    generate(config, tmp_path / "set")
    wanted = ScoreConfig(candidates=str(tmp_path / "set"), reward_model=reward_model)
    score_set(wanted, tmp_path / "one")
    read, seen = ImageSet.read.__func__, []
    monkeypatch.setattr(ImageSet, "read", classmethod(lambda cls, path: seen.append(path.name) or read(cls, path)))
    for index in (1, 1, 0):
        as_process(index)
        score_set(wanted, tmp_path / "two")
    assert sorted(seen) == NAMES
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_class_that_the_reward_model_does_not_know_is_named(
    config: GenerateConfig, tmp_path: Path, tiny_images: ImageSet, reward_model: str
):
    replace(tiny_images, class_names=("a", "b", "z")).save(tmp_path / "set")
    with pytest.raises(InputError, match=r"does not know the classes \['z'\]"):
        score_set(ScoreConfig(candidates=str(tmp_path / "set"), reward_model=reward_model), tmp_path / "scores")


# Real processes.


def launch(processes: int, *arguments: str, cwd: Path) -> subprocess.Popen:
    """The command line in so many processes, which do not know each other but by their numbers."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "pathalign.cli", *arguments, "--json"]
    return subprocess.Popen(command, env=environment, cwd=cwd, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for a launcher and all that it started: nobody can tidy up."""
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.kill()
    process.wait()


def killed_and_started_again(folder: Path, after: int, *arguments: str) -> tuple[dict[str, int], dict]:
    """Kill two processes once they have made `after` shards, and start them again.

    Returns:
        Inodes of the shards that were there when they were killed, and what the second launch printed.
    """
    command = (*arguments, "--output-dir", str(folder))
    process = launch(2, *command, cwd=folder.parent)
    checkpoints = partial_dir(folder) / "checkpoints"
    while len(list(checkpoints.glob("*/data/*.parquet"))) < after:
        assert process.poll() is None
        time.sleep(0.02)
    kill(process)
    assert not folder.exists()
    kept = {path.name: path.stat().st_ino for path in checkpoints.glob("*/data/*.parquet")}
    process = launch(2, *command, cwd=folder.parent)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return kept, json.loads(output)


@pytest.mark.slow
def test_two_killed_processes_make_and_score_20000_images_as_one_does(tmp_path: Path):
    classes = ("a", "b", "c", "d")
    settings = PretrainConfig(block_out_channels=[8, 8], attention_levels=[], layers_per_block=1)
    new_pipeline(settings, 32, classes).save_pretrained(tmp_path / "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RewardModel(RewardModelConfig(class_names=list(classes), criteria=["size"], convnet_channels=[8, 8]))
        model.save_with_processor(tmp_path / "reward")
    sizes = {"images_per_class": 5000, "images_per_shard": 1000, "inference_steps": 2, "batch_size": 16}
    config = GenerateConfig(model=str(tmp_path / "model"), **sizes)
    options = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    kept, printed = killed_and_started_again(tmp_path / "two", 5, "generate", "--model", config.model, *options)
    assert 5 <= len(kept) < 20
    assert {name: (tmp_path / "two" / "data" / name).stat().st_ino for name in kept} == kept  # not drawn again
    generate(config, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    rows = [
        row
        for part in ImageSet.shards(tmp_path / "two")
        for row in zip(part.columns["seed"], part.labels(), strict=True)
    ]
    assert rows == [(row, classes[row // 5000]) for row in range(20_000)]
    assert printed["metrics"] == RunRecord.load(tmp_path / "one").metrics and printed["metrics"]["n"] == 20_000

    scoring = ScoreConfig(candidates=str(tmp_path / "two"), reward_model=str(tmp_path / "reward"))
    arguments = ["reward", "score", "--candidates", scoring.candidates, "--reward-model", scoring.reward_model]
    kept, printed = killed_and_started_again(tmp_path / "two_scores", 5, *arguments)
    assert 5 <= len(kept) < 20
    assert {name: (tmp_path / "two_scores" / "data" / name).stat().st_ino for name in kept} == kept
    record = score_set(scoring, tmp_path / "one_scores")
    assert contents(tmp_path / "two_scores") == contents(tmp_path / "one_scores")
    assert printed["metrics"] == record.metrics and record.metrics["n"] == 20_000
