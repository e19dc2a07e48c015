"""Experiments: what a recipe may say, what is made of figures of several seeds, and one small study from end to end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from scipy import stats
from sklearn.metrics import roc_auc_score
from test_loop import TINY, write_config

from pathalign.cli import main
from pathalign.config import ConfigError
from pathalign.experiments import measures, page, recipe, study
from pathalign.experiments.answers import answers, other_answers, span, title_of
from pathalign.experiments.measures import Figure
from pathalign.experiments.results import over_seeds, summarize
from pathalign.experiments.running import execute, runs_of
from pathalign.grading.simulated import SimulatedGrader
from pathalign.images import ImageSet
from pathalign.ledger import Ledger
from pathalign.reward import RewardModel
from pathalign.schema import InputError
from pathalign.workflow import plan

ARMS = {"main": {}, "base": {"set": "before"}, "short": {"settings": {"reward": {"epochs": 1}}}}
TINY_STUDY = {
    "title": "Epochs",
    "question": "Do more epochs help?",
    "seeds": [0],
    "arms": ARMS,
    "against": "base",
    "show": ["plausible_share", "precision"],
}


def write_study(folder: Path, **changed) -> Path:
    """A study on the phantom, as small as it can be."""
    settings = yaml.safe_load(write_config(folder).read_text())
    settings["generate"]["varied_steps"] = []
    settings["data"]["source"] = "phantom"
    path = folder / "epochs.yaml"
    path.write_text(yaml.safe_dump({**TINY_STUDY, "settings": settings, **changed}, sort_keys=False))
    return path


def load(tmp_path: Path, **changed) -> recipe.Experiment:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**TINY_STUDY, **changed}, sort_keys=False))
    return recipe.load(str(tmp_path / "study.yaml"))


def test_every_experiment_of_the_package_can_be_planned_at_both_scales(tmp_path):
    names = recipe.names()
    assert len(names) == 9
    for name in names:
        for scale in ("cpu", "full"):
            experiment = recipe.load(name, scale)
            assert experiment.title and experiment.question.endswith("?")
            for arm in experiment.arms:
                if arm.runs:
                    jobs = experiment.jobs(arm, 0, tmp_path, "somewhere", None)
                    assert any(job.stage.name == arm.until for job in jobs), (name, arm.name)


def test_every_figure_that_a_recipe_shows_has_a_title_for_readers():
    for name in recipe.names():
        for figure in recipe.load(name).show:
            title, share = title_of(figure)
            assert title != figure.replace("_", " ") or figure.startswith("plausible_share of"), figure
            assert (
                share
                or figure in ("density", "kid", "marks", "reward_first", "reward_last", "kept_epoch", "best_epoch")
                or (figure.startswith("roc_auc"))
            ), figure


def test_an_arm_with_another_method_leaves_the_recipes_settings_of_its_own_one_behind(tmp_path):
    settings = {"align": {"lora_rank": 2}}
    experiment = load(tmp_path, settings=settings, arms={**ARMS, "draft": {"settings": {"align": {"method": "draft"}}}})
    assert experiment.values(experiment.arm("main"), 3, None, None)["align"] == {
        "method": "reward-weighted",
        "mixed_precision": "auto",
        "lora_rank": 2,
    }
    values = experiment.values(experiment.arm("draft"), 3, "cells", None)
    assert values["align"] == {"method": "draft", "mixed_precision": "auto", "lora_rank": 2}
    assert values["seed"] == 3 and values["data"]["source"] == "cells"


def test_controls_are_measured_in_the_first_arms_run_only(tmp_path):
    experiment = load(tmp_path)
    made = {
        arm.name: {job.step.folder for job in experiment.jobs(arm, 0, tmp_path, "cells", None)}
        for arm in experiment.arms
        if arm.runs
    }
    assert made["main"] - made["short"] == {"control", "samples_control", "samples_best_of_n"}


@pytest.mark.parametrize(
    ("changed", "texts"),
    [
        ({"arm": {}}, ["`arm` is not known; did you mean `arms`?"]),
        ({"arms": {}}, ["`arms` is missing"]),
        ({"arms": {"base": {"set": "before"}}}, ["first arm, `base`, must have a run of its own"]),
        ({"arms": {"main": {}, "B C": {"sett": {}}}}, ["'B C'; use small letters", "did you mean `set`?"]),
        ({"arms": {"main": {}, "x": {"set": "befor"}}}, ["Did you mean 'before'?"]),
        ({"arms": {"main": {}, "x": {"of": "nobody"}}}, ["`of` is 'nobody'"]),
        ({"against": "bass", "measure": "evalution"}, ["Did you mean 'base'?", "Did you mean 'evaluation'?"]),
        ({"seeds": [0, -1]}, ["`seeds` is [0, -1]"]),
        ({"arms": ["main"]}, ["`arms` must hold `name:"]),
        ({"show": "precision"}, ["`show` is 'precision'; give a list"]),
        ({"measure": "rare_class"}, ["`options` has nothing; the measure rare_class wants class, added"]),
        ({"arms": {"main": {"until": "align"}}}, ["`arms.main.until` is 'align'; the measure evaluation needs"]),
        ({"base": "demo_rea"}, ["Did you mean 'demo_real'?"]),
    ],
)
def test_a_wrong_recipe_is_refused_with_all_that_is_wrong(changed, texts, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **changed)
    for text in texts:
        assert text in str(caught.value)


def test_an_unknown_name_is_answered_with_the_nearest_one():
    with pytest.raises(ConfigError, match="Did you mean 'rare-class'"):
        recipe.load("rare-clas")


def test_a_wrong_setting_of_an_arm_is_refused_before_anything_starts(tmp_path):
    arms = {**ARMS, "wrong": {"settings": {"reward": {"epoch": 3}}}}
    study = write_study(tmp_path, arms=arms)
    result = CliRunner().invoke(main, ["experiment", str(study), "--output-dir", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "did you mean `epochs`?" in result.stderr and "'wrong'" in result.stderr
    assert not list((tmp_path / "out").rglob("stages.json"))


def test_without_real_images_an_experiment_does_not_start(tmp_path):
    result = CliRunner().invoke(main, ["experiment", "rounds", "--output-dir", str(tmp_path / "out")])
    assert result.exit_code == 2 and "give `--data DIR_OR_HUB_ID`" in result.stderr


def figures_of(values: dict[str, list[float]]) -> dict:
    return {
        arm: {seed: {"plausible_share": Figure(value, [0.1, 0.9], 50)} for seed, value in enumerate(row)}
        for arm, row in values.items()
    }


def test_intervals_and_differences_are_those_of_students_t_over_seeds(tmp_path):
    experiment = load(tmp_path, seeds=[0, 1, 2])
    values = {"main": [0.6, 0.7, 0.65], "base": [0.4, 0.45, 0.41], "short": [0.5, 0.3, 0.7]}
    found = summarize(experiment, figures_of(values))
    main_arm = found["main"]["plausible_share"]
    assert main_arm.mean == pytest.approx(0.65)
    expected = stats.ttest_1samp(values["main"], 0).confidence_interval(0.95)
    assert main_arm.interval == pytest.approx([expected.low, expected.high])
    paired = stats.ttest_rel(values["main"], values["base"]).confidence_interval(0.95)
    assert main_arm.difference_interval == pytest.approx([paired.low, paired.high])
    assert main_arm.difference == pytest.approx(np.mean(values["main"]) - np.mean(values["base"]))
    assert main_arm.clear and not found["short"]["plausible_share"].clear
    assert found["base"]["plausible_share"].difference is None


def test_with_one_seed_the_interval_is_that_over_images_and_no_difference_has_one(tmp_path):
    found = summarize(load(tmp_path), figures_of({"main": [0.6], "base": [0.4], "short": [0.5]}))
    summary = found["main"]["plausible_share"]
    assert summary.interval == [0.1, 0.9] and summary.difference == pytest.approx(0.2)
    assert summary.difference_interval is None and not summary.clear
    assert over_seeds([0.5, 0.6]) is None


def test_of_two_seeds_the_page_shows_both_and_claims_no_interval(tmp_path):
    experiment = load(tmp_path, seeds=[0, 1])
    found = summarize(experiment, figures_of({"main": [0.6, 0.7], "base": [0.4, 0.45], "short": [0.5, 0.3]}))
    table = page.main_table(experiment, found)
    assert table.rows[0].cells[0] == page.Cell("65.0 %", "60.0 % and 70.0 %; +22.5")
    assert "Mean over the seeds 0, 1, the values of both" in table.caption
    assert "(2 seeds: +10.0 and -15.0, too few for an interval)" in answers(experiment, found)[1]


def test_the_answer_says_of_every_further_figure_whether_it_differs_clearly(tmp_path):
    def figures(values):
        return {
            arm: {seed: {"precision": Figure(value, None, 50)} for seed, value in enumerate(row)}
            for arm, row in values.items()
        }

    experiment = load(tmp_path, seeds=[0, 1, 2])
    values = {"main": [0.6, 0.7, 0.65], "base": [0.4, 0.45, 0.41], "short": [0.5, 0.3, 0.44]}
    said = other_answers(experiment, summarize(experiment, figures(values)))
    assert said == ["Precision against 'base': clearly higher: main (+23.0); may be chance: short (-0.7)."]
    lower = {**values, "main": [0.2, 0.26, 0.2]}
    said = other_answers(experiment, summarize(experiment, figures(lower)))
    assert said == ["Precision against 'base': clearly lower: main (-20.0); may be chance: short (-0.7)."]
    one_seed = load(tmp_path)
    assert other_answers(one_seed, summarize(one_seed, figures(values))) == []


def test_intervals_of_shares_end_where_shares_do():
    assert span([0.83, 1.01], share=True) == "83.0 to 100.0"
    assert span([-0.31, 0.02], share=True) == "-31.0 to 0.0"  # of what is kept less what is best
    assert span([-0.31, 0.02], share=True, difference=True) == "-31.0 to 2.0"
    assert span([-0.31, 1.02], share=False) == "-0.310 to 1.020"


def test_the_answer_says_what_may_be_chance(tmp_path):
    experiment = load(tmp_path, seeds=[0, 1, 2])
    found = summarize(
        experiment, figures_of({"main": [0.6, 0.7, 0.65], "base": [0.4, 0.45, 0.41], "short": [0.5, 0.3, 0.7]})
    )
    lines = answers(experiment, found)
    assert len(lines) == 2
    assert "65.0 % against 42.0 %" in lines[0] and "+23.0 points" in lines[0] and "chance" not in lines[0]
    assert "may be chance" in lines[1]


@pytest.mark.slow
def test_a_study_runs_is_interrupted_goes_on_and_reports(tmp_path):
    study, output = write_study(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "pathalign.cli", "experiment", str(study), "--output-dir", str(output), "--json"]
    command += ["--workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    runs = output / "epochs" / "runs"
    while not (runs / "main" / "seed-0" / "candidates").is_dir():
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr[-2000:]
    assert still_running() == []
    before = Ledger(runs / "main" / "seed-0").steps

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)["experiments"]["epochs"]
    ledgers = {arm: Ledger(runs / arm / "seed-0").steps for arm in ("main", "short")}
    assert ledgers["main"]["base"] == before["base"]  # not made again
    weights = "base/unet/diffusion_pytorch_model.safetensors"
    assert (runs / "short" / "seed-0" / weights).samefile(runs / "main" / "seed-0" / weights)
    assert ledgers["short"]["reward"]["content"] != ledgers["main"]["reward"]["content"]

    folder = output / "epochs"
    assert json.loads((folder / "results.json").read_text())["arms"] == result["arms"]
    metrics = json.loads((runs / "main" / "seed-0" / "evaluation" / "metrics.json").read_text())["metrics"]
    shown = {arm: entry["summary"]["plausible_share"]["mean"] for arm, entry in result["arms"].items()}
    assert (
        shown["main"] == metrics["after"]["plausible_share"] and shown["base"] == metrics["before"]["plausible_share"]
    )
    text = (folder / "index.html").read_text()
    for part in ("Do more epochs help?", "Never for diagnosis", "epochs: 1", "figures/arms.svg"):
        assert part in text, part
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
    assert (folder / "results.md").read_text().startswith("## Epochs")
    assert {path.name for path in (folder / "figures").iterdir()} == {"arms.png", "arms.svg"}

    check_measures(recipe.load(str(study)), runs / "main" / "seed-0")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and json.loads(again.stdout)["experiments"]["epochs"]["arms"] == result["arms"]
    distinct = {entry["key"] for steps in ledgers.values() for entry in steps.values()}
    assert f"Behind epochs: {len(distinct)} steps of " in again.stderr
    assert len(distinct) < sum(map(len, ledgers.values()))  # what both runs share is counted once
    assert Ledger(runs / "short" / "seed-0").steps == ledgers["short"]


def check_measures(experiment: recipe.Experiment, run_dir: Path) -> None:
    """Measures that look at a run again, against the package's own public ways to ask the same."""
    place = measures.Place(experiment, experiment.arms[0], run_dir, run_dir)
    images = ImageSet.load(run_dir / "samples_before")
    pictures = [Image.fromarray(image) for image in images.images.permute(0, 2, 3, 1).numpy()]
    scores = [row["score"] for row in RewardModel.from_pretrained(run_dir / "reward").score(pictures, images.labels())]
    verdicts = SimulatedGrader.load(run_dir / "grader").judge_set(images).plausible
    if len(set(verdicts.tolist())) == 2:
        ranked = measures.reward_ranking(place)["roc_auc_by_grader"]
        assert ranked.value == pytest.approx(roc_auc_score(verdicts, scores)) and ranked.n == len(images)
    for name, added in (("after", 4), ("real", 0)):
        options = {"class": "lymphocyte", "added": 4}
        arm = replace(experiment.arms[0], set=name)
        found = measures.rare_class(replace(place, experiment=replace(experiment, options=options), arm=arm))
        assert found["added"].value == added and found["real_of_class"].value == 8
        assert found["class_recall"].n == (ImageSet.load(run_dir / "data", "test").class_ids == 1).sum()
    with pytest.raises(InputError, match="has 8 images of lymphocyte, not 9"):
        measures.rare_class(replace(place, experiment=replace(experiment, options={"class": "lymphocyte", "added": 9})))


def still_running() -> list[str]:
    """Command lines of processes that work on the study's runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = path.read_text().replace("\0", " ")
            found += [line] if "epochs/runs" in line else []
    return found


def test_a_trial_has_a_name_of_its_own_so_that_it_takes_no_results_place(tmp_path):
    found = {}
    for scale, minutes, seeds in (("cpu", None, None), ("cpu", None, [0]), ("cpu", None, [3, 0]), ("full", 2.0, [1])):
        varied = study._varied(load(tmp_path), scale, minutes, seeds)
        found[varied.name] = varied.seeds
    assert found == {"study": (0,), "study-seeds-3-0": (3, 0), "study-full-2min-seeds-1": (1,)}


@pytest.mark.parametrize(("data", "shown"), [(".", "DIR"), ("lab/cells", "lab/cells")])
def test_the_command_on_the_page_names_no_folder_of_this_machine(data, shown):
    words = study._command(["/home/ada/my study.yaml"], data, [0, 1], "cpu", None, 2)
    assert words == f"pathalign experiment 'my study.yaml' --data {shown} --seeds 0,1 --workers 2"


def test_figures_carry_the_number_of_images_behind_them():
    entry = {"n": 1500, "n_fidelity": 500, "precision": 0.8, "precision_ci": [0.7, 0.9], "plausible_share": 0.9}
    found = measures.figures_in({**entry, "plausible_ci": [0.88, 0.92], "kid": 0.1, "fid_dimensions": 64})
    assert found["precision"] == Figure(0.8, [0.7, 0.9], 500)
    assert found["plausible_share"] == Figure(0.9, [0.88, 0.92], 1500)
    assert found["kid"].n == 500 and "n_fidelity" not in found


def test_the_last_round_is_that_of_the_settings_not_of_an_earlier_run(tmp_path):
    for name in ("adapter", "round-2/adapter", "round-3/adapter"):
        (tmp_path / name).mkdir(parents=True)
    for rounds, expected in ((1, "adapter"), (2, "round-2/adapter"), (3, "round-3/adapter")):
        (tmp_path / "config.yaml").write_text(f"rounds: {rounds}")
        assert measures.last_round(tmp_path, "adapter") == tmp_path / expected
    with pytest.raises(InputError, match="has no evaluation"):
        measures.last_round(tmp_path, "evaluation")


def test_a_run_that_fails_is_reported_with_the_end_of_its_log(tmp_path):
    settings = {"data": {"source": str(tmp_path / "nothing")}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**TINY_STUDY, "settings": settings}, sort_keys=False))
    result = CliRunner().invoke(
        main, ["experiment", str(tmp_path / "study.yaml"), "--output-dir", str(tmp_path / "out")]
    )
    assert result.exit_code == 1
    assert "study: main, seed 0 failed" in result.stderr and str(tmp_path / "nothing") in result.stderr


def test_an_experiment_whose_run_fails_is_left_out_and_the_others_go_on(tmp_path):
    runs = []
    for name, source in (("broken", str(tmp_path / "nothing")), ("fine", "phantom")):
        study = {**TINY_STUDY, "settings": {"data": {**TINY["data"], "source": source}}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        found = runs_of(recipe.load(str(tmp_path / f"{name}.yaml")), tmp_path / "out")
        runs += [replace(run, arm=replace(run.arm, until="data")) for run in found]
    ended = execute(runs, tmp_path / "out", workers=1, data=None, minutes=None)
    over = {experiment.name: failure for experiment, failure in ended}
    assert list(over) == ["broken", "fine"] and over["fine"] is None
    assert "broken: main, seed 0 failed" in str(over["broken"]) and str(tmp_path / "nothing") in str(over["broken"])
    assert [run.folder.is_dir() for run in runs] == [True, False, True, True]
    assert [(run.folder / "data").is_dir() for run in runs] == [False, False, True, True]


def test_the_data_stage_makes_one_class_rare_and_leaves_the_others_as_they_are(tmp_path):
    data = TINY["data"]
    plain = plan({"data": data}, tmp_path / "plain")[0]
    rare = plan({"data": {**data, "rare": ["lymphocyte=3"]}}, tmp_path / "rare")[0]
    from pathalign.data import prepare
    from pathalign.images import ImageSet

    for job in (plain, rare):
        prepare(job.config, job.folder)
    splits = {name: [ImageSet.load(job.folder, name) for job in (plain, rare)] for name in ("train", "grader", "test")}
    counts = [dict(zip(*np.unique(one.labels(), return_counts=True), strict=True)) for one in splits["train"]]
    assert counts[0] == {"basophil": 8, "lymphocyte": 8, "neutrophil": 8}
    assert counts[1] == {"basophil": 8, "lymphocyte": 3, "neutrophil": 8}
    kept = [set(one.image_ids) for one in splits["train"]]
    assert kept[1] < kept[0]
    for name in ("grader", "test"):
        assert splits[name][0].image_ids == splits[name][1].image_ids
