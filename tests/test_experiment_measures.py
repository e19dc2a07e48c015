"""What experiments measure beside evaluations: the subtype judge, checks of a training, how a reward ranks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_artefacts as tiny
import torch
from scipy import stats

from pathalign.diffusion import lora
from pathalign.experiments import page, recipe, subtypes
from pathalign.experiments.measures import Place, checks
from pathalign.images import ImageSet
from pathalign.randomness import seeded
from pathalign.schema import RunRecord
from pathalign.settings.subtypes import subtype_rule

RULES = ["cell:shape:pale=round", "cell:shape:dark=lobed+band"]


def cells(count: int, seed: int) -> ImageSet:
    """Cells whose shape shows in their brightness, and others whose does not matter."""
    generator = torch.Generator().manual_seed(seed)
    dark = torch.arange(count) % 2
    noise = torch.randint(-20, 21, (count, 3, 32, 32), generator=generator)
    images = (200 - 120 * dark[:, None, None, None] + noise).clamp(0, 255).to(torch.uint8)
    class_ids = (torch.arange(count) % 5 == 4).long()
    shapes = ["round" if not one else ("lobed", "band")[row % 3 == 0] for row, one in enumerate(dark.tolist())]
    return ImageSet.build(images, class_ids, ("cell", "other"), {"shape": shapes})


def test_the_subtype_judge_learns_from_other_images_than_those_that_measure_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(subtypes, "JUDGE_STEPS", 25)
    for name, seed in (("judge", 1), ("judge_validation", 2), ("test", 3)):
        cells(60, seed).save(tmp_path / "data", name)
    split = subtypes.Split(tuple(map(subtype_rule, RULES)))
    assert (split.parent, split.attribute, split.names) == ("cell", "shape", ["pale", "dark"])
    learned, unseen = subtypes.halves(ImageSet.load(tmp_path / "data", "test"))
    assert not set(learned.image_ids) & set(unseen.image_ids) and len(learned) == len(unseen) == 30
    ids = split.ids(unseen)
    assert (ids == -1).sum() == (unseen.class_ids == 1).sum() > 0
    place = tmp_path / "judge.safetensors"
    judge = subtypes.fit_judge(tmp_path / "data", split, 0, place)
    shares = judge.shares(unseen.images)
    assert (shares.argmax(1) == ids)[ids >= 0].float().mean() > 0.9
    again = subtypes.fit_judge(tmp_path / "data", split, 0, place)
    assert torch.equal(again.shares(unseen.images), shares)


def test_images_of_new_classes_are_drawn_once_with_their_guidance_judged_and_shown(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(subtypes, "JUDGE_STEPS", 2)
    monkeypatch.setattr(subtypes, "evaluation", lambda _: {})
    run_dir, rules = tmp_path / "seed-0", ["a:shade:dark=black", "a:shade:light=white"]
    real = ImageSet.build(
        torch.randint(0, 256, (24, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
        torch.arange(24) % 3,
        tiny.CLASSES,
        {"shade": ["black" if row // 3 % 4 < 2 else "white" for row in range(24)]},
    )
    tiny.save_all(run_dir, real)
    for name in ("judge", "judge_validation", "test"):
        real.save(run_dir / "data", name)
    shutil.rmtree(run_dir / "adapter")
    base = tiny.pipeline()
    lora.attach(base.unet, rank=2, alpha=4, convolutions=True, generator=seeded(1, 0))
    lora.add_concepts(base, {"light a": "a", "dark a": "a"}, noise=3.0, generator=seeded(1, 2))
    lora.save(base.unet, run_dir / "adapter", base.class_names)
    entries = [{"name": f"{mark} a", "parent": "a", "subtype": mark, "marks": 3} for mark in ("light", "dark")]
    config = {"subtypes": rules, "seed": 0}
    RunRecord(stage="align", config=config, metrics={"concepts": entries}).save(run_dir / "adapter")
    (run_dir / "samples_after").mkdir()
    RunRecord(stage="generate", config={"inference_steps": 2, "seed": 5}).save(run_dir / "samples_after")
    (run_dir / "config.yaml").write_text("seed: 0")

    found, pictures = {}, {}
    for scale in (1.0, 6.0):
        experiment = replace(recipe.load("concepts"), options={"images": 4, "guidance_scale": scale})
        place = Place(experiment, experiment.arms[0], run_dir, run_dir)
        found[scale] = subtypes.concepts(place)
        names, folder = subtypes.samples_of(place)
        drawn = ImageSet.load(folder)
        pictures[scale] = (drawn.images, page._sheets(experiment, {arm.name: {0: place} for arm in experiment.arms}))
        assert names == ["light a", "dark a"] and drawn.columns["guidance"] == [scale] * 8
        assert (
            found[scale]["subtype_right"].n == found[scale]["concepts_plausible"].n == 8 and drawn.labels() == ["a"] * 8
        )
        halves = [found[scale][f"subtype_right of {mark}"].value for mark in ("dark", "light")]
        assert found[scale]["subtype_right"].value == sum(halves) / 2 and found[scale]["marks"].value == 6
    assert not torch.equal(pictures[1.0][0], pictures[6.0][0])
    assert [sheet["title"] for sheet in pictures[6.0][1]] == ["neutrophils split: light a, dark a; seeds of their own"]
    (folder / "samples.png").write_bytes(b"kept")  # it is not drawn again
    subtypes.concepts(place)
    assert page._sheets(experiment, {arm.name: {0: place} for arm in experiment.arms})[0]["png"] == b"kept"


def test_checks_of_a_training_compare_its_end_with_what_was_kept(tmp_path: Path):
    rows = [
        {"epoch": 0, "judge_share": 0.4, "reward": 0.5},
        {"epoch": 2, "judge_share": 0.7, "reward": 0.7},
        {"epoch": 4, "judge_share": 0.6, "reward": 0.8},
        {"epoch": 6, "judge_share": 0.3, "reward": 0.9},
    ]
    run_dir = tmp_path / "seed-0"
    (run_dir / "adapter").mkdir(parents=True)
    (run_dir / "config.yaml").write_text("seed: 0")
    record = RunRecord(stage="align", config={}, metrics={"checks": rows, "kept_epoch": 4, "n_check_images": 200})
    record.save(run_dir / "adapter")
    experiment = recipe.load("over-optimization")
    found = checks(Place(experiment, experiment.arms[0], run_dir, run_dir))
    assert set(experiment.show) <= set(found)
    values = {name: figure.value for name, figure in found.items()}
    assert (values["judge_kept"], values["judge_best"], values["judge_last"]) == (0.6, 0.7, 0.3)
    assert values["judge_kept_less_best"] == pytest.approx(-0.1) and values["best_epoch"] == 2
    assert (values["reward_first"], values["reward_last"], values["kept_epoch"]) == (0.5, 0.9, 4)
    wilson = stats.binomtest(120, 200).proportion_ci(method="wilson")
    assert found["judge_kept"].interval == pytest.approx([wilson.low, wilson.high]) and found["judge_kept"].n == 200
    assert found["judge_best"].interval is None  # picked with the judge in view
    assert json.dumps(values)
