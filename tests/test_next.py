"""`pathalign study next` and a study that shows what it proposes: who is proposed, what it promises, and blinding."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from small_study import CLASSES, grade_on, images, make_study, serve

from pathalign.cli import main
from pathalign.config import ConfigError
from pathalign.grading.order import random_sample
from pathalign.grading.study import Study
from pathalign.images import ImageSet
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.reward.ensemble import opinions
from pathalign.schema import Grade, InputError


def bright_enough(count: int) -> ImageSet:
    """Images of three classes, flat grey with noise; every other one is bright."""
    generator = torch.Generator().manual_seed(0)
    grey = torch.tensor([60, 190])[torch.arange(count) // 3 % 2]
    noise = torch.randint(-40, 41, (count, 3, 16, 16), generator=generator)
    return ImageSet.build((grey[:, None, None, None] + noise).to(torch.uint8), torch.arange(count) % 3, CLASSES)


def write_study(folder: Path, candidates: ImageSet, graded: int, **values) -> Path:
    """A study without real images whose first `graded` candidates have a grade: plausible if they are bright."""
    candidates.save(folder / "candidates")
    grades = [
        Grade(f"g{row}", candidates.image_ids[row], candidates.labels()[row], verdict, "reader-1", simulated=True)
        for row in range(graded)
        for verdict in ["plausible" if candidates.images[row].float().mean() > 128 else "implausible"]
    ]
    if grades:
        (folder / "grades").mkdir()
        (folder / "grades" / "grades.jsonl").write_text("".join(grade.to_json() + "\n" for grade in grades))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"candidates": "candidates", "real_control_share": 0, **values}))
    return path


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = RewardModelConfig(class_names=list(CLASSES), convnet_channels=[4, 8], image_size_px=16, num_members=2)
    RewardModel(config).save_with_processor(tmp_path / "reward")
    return tmp_path / "reward"


def run(*arguments: str | Path, code: int = 0):
    result = CliRunner().invoke(main, ["study", "next", *map(str, arguments)])
    assert result.exit_code == code, result.stderr
    return result


def test_it_proposes_the_most_doubtful_images_that_nobody_graded_and_that_do_not_come_at_random(tmp_path, reward):
    candidates = bright_enough(90)
    study = write_study(tmp_path, candidates, 30)
    found = json.loads(
        run(study, "--reward-models", reward, "--strategy", "disagreement", "--count", "8", "--json").stdout
    )
    graded, at_random = set(candidates.image_ids[:30]), random_sample(candidates.image_ids, 0.2, 0)
    left = [row for row, name in enumerate(candidates.image_ids) if name not in graded | at_random]
    members = opinions([RewardModel.from_pretrained(reward)], candidates).probabilities

    def entropy(p):
        return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))

    bits = entropy(members.mean(axis=0)) - entropy(members).mean(axis=0)
    expected = sorted(left, key=lambda row: -bits[row])[:8]
    assert [row["image_id"] for row in found["images"]] == [candidates.image_ids[row] for row in expected]
    assert [row["score"] for row in found["images"]] == pytest.approx(bits[expected].tolist())
    assert found["expected"]["bits_proposed"] == pytest.approx(bits[expected].sum())
    assert found["expected"]["bits_at_random"] == pytest.approx(8 * bits[left].mean())
    assert found["graded"]["by_class"]["a"] == {"graded": 10, "plausible": 5}
    assert str(tmp_path) not in (tmp_path / "study.next" / "next.json").read_text()  # it may be handed on
    with Image.open(tmp_path / "study.next" / "next.png") as sheet:
        assert sheet.width == 10 * (16 * 6 + 2) and sheet.height == 16 * 6 + 2


def test_with_too_few_grades_it_says_what_is_needed_and_ranks_by_a_model_only(tmp_path, reward):
    study = write_study(tmp_path, bright_enough(60), 12)
    needed = "12 images have a grade that counts, 6 plausible and 6 implausible; learning from them takes 100"
    text = run(study, "--reward-models", reward, "--count", "5").stdout
    assert needed in text and "No learning curve" in text and "class has 4 graded, 2 plausible" in text
    assert "proposal: study.next/next.json" in text  # as the study will look for it, beside itself
    refused = run(study, "--output-dir", tmp_path / "other", code=1)
    assert needed in refused.stderr and "--reward-models" in refused.stderr and not (tmp_path / "other").exists()
    (tmp_path / "grades" / "grades.jsonl").unlink()
    (tmp_path / "grades").rmdir()
    assert "0 images have a grade" in run(study, "--reward-models", reward, "--strategy", "diverse").stdout


def test_what_cannot_be_ranked_is_refused(tmp_path, reward):
    study = write_study(tmp_path, bright_enough(12), 12)
    assert "nothing is left to propose" in run(study, "--reward-models", reward, code=1).stderr
    assert "`refits` is 1" in run(study, "--refits", "1", code=2).stderr
    assert "no/study.yaml" in run("no/study.yaml", code=2).stderr


@pytest.mark.slow
def test_without_a_model_small_ones_learn_from_the_grades_and_tell_the_expected_gain(tmp_path):
    study = write_study(tmp_path, bright_enough(240), 150)
    options = ["--refits", "2", "--scout-steps", "12", "--count", "6", "--strategy", "disagreement"]
    found = json.loads(run(study, *options, "--json").stdout)
    sizes = [point["training_images"] for point in found["expected"]["learning_curve"]]
    assert sizes == sorted(sizes) and len(sizes) == 4 and sizes[-1] <= 0.7 * 150
    gain = found["expected"]["log_loss"]
    assert gain["low"] <= gain["high"] and gain["gain"] == pytest.approx(gain["now"] - gain["later"])
    assert found["expected"]["log_loss_doubled"]["gain"] >= gain["gain"]
    assert found["networks"] == 2 and found["expected"]["reason"] == "" and len(found["images"]) == 6
    assert not (tmp_path / "study.next" / "scouts").exists()


def test_a_study_shows_the_proposed_images_first_to_everyone_and_keeps_its_random_share(tmp_path):
    ids = images(60, 0).image_ids
    at_random = random_sample(ids, 0.2, 0)
    proposed = random.Random(1).sample(ids, 12)
    (tmp_path / "next.json").write_text(json.dumps({"images": [{"image_id": name} for name in proposed]}))
    study = make_study(tmp_path, order="proposed", proposal=str(tmp_path / "next.json"), repeat_distance=5)
    service = serve(tmp_path, study)
    plans = [service.assignments.plan_of(grader) for grader in ("reader-1", "reader-2")]
    wanted = [name for name in proposed if name not in at_random]
    assert all(list(plan.uncertainty[: len(wanted)]) == wanted for plan in plans)
    assert sorted(plans[0].uncertainty) == sorted(set(ids) - at_random)
    assert set(plans[0].random) == at_random and plans[0].random != plans[1].random
    shown = service.next_items("reader-2", "single", 5)
    assert not {"proposed", "score", "why", "order", *proposed} & set(json.dumps(shown).replace('"', " ").split())
    grade_on(service, "reader-1", 30)
    inputs = service.results_inputs()
    marks = {(g.image_id, g.drawn_by) for g in inputs.grades if inputs.images[g.image_id]["kind"] == "synthetic"}
    drawn = Counter(mark for _, mark in marks)  # a repeat is marked as its first look
    assert set(drawn) == {"random", "proposed"} and drawn["random"] >= 0.2 * drawn.total()
    service.close()


def test_a_proposal_that_cannot_be_used_is_refused_by_name(tmp_path):
    file = tmp_path / "next.json"
    for content, text in (
        (
            {"images": [{"image_id": "elsewhere"}]},
            "1 of 1 images that are no candidates of this study, such as elsewhere",
        ),
        ({"pictures": []}, "is no proposal"),
        ({"images": [{"image_id": "a"}] * 2}, "is there twice"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=text):
            serve(tmp_path, make_study(tmp_path, order="proposed", proposal=str(file)))
    for values, text in (
        ({"order": "proposed"}, "make a next.json by `pathalign study next`"),
        ({"proposal": "next.json"}, "`proposal` is for `order: proposed`"),
        ({"order": "uncertainty"}, "name the reward model"),
        ({"reward_model": "x"}, "set `order`, or leave out `reward_model`"),
    ):
        with pytest.raises(ConfigError, match=text):
            Study(real_control_share=0, **values)


def test_a_proposal_beside_the_study_is_found_and_travels_to_a_space_as_ids_only(tmp_path):
    from pathalign.commands.serving import spaces_dir
    from pathalign.hub.space_files import collect_files

    images(9, 0).save(tmp_path / "candidates")
    row = {"image_id": images(9, 0).image_ids[0], "why": "a secret"}
    (tmp_path / "next.json").write_text(json.dumps({"images": [row]}))
    values = {"candidates": "candidates", "real_control_share": 0, "order": "proposed", "proposal": "next.json"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    assert Study.load(tmp_path / "study.yaml").proposal == str(tmp_path / "next.json")
    requirement = "pathalign[space] @ git+https://example.org/pathalign"
    files = collect_files(spaces_dir() / "grade", tmp_path / "study.yaml", "lab/grades", requirement, False)
    assert json.loads(files.contents["next.json"]) == {"images": [{"image_id": row["image_id"]}]}
    assert yaml.safe_load(files.contents["study.yaml"])["proposal"] == "next.json"
