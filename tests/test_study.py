"""Study files: defaults, all problems at once, paths that move with the folder, and the secret."""

from __future__ import annotations

import ast
import dataclasses
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from pathalign.config import ConfigError
from pathalign.grading.study import ClassText, Person, Study, study_secret
from pathalign.schema import InputError, Rubric

PROJECT = Path(__file__).resolve().parents[1]


def write(folder: Path, **values) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"references": "real", **values}))
    return path


def test_a_short_study_gets_the_documented_defaults(tmp_path):
    study = Study.load(write(tmp_path, candidates="made"))
    assert (study.real_control_share, study.repeat_share, study.repeat_distance) == (0.1, 0.1, 20)
    assert (study.order, study.random_share, study.graders_per_image) == ("random", 0.2, 1)
    assert (study.modes, study.grid_size, study.reason_for) == (["single", "grid", "pairwise"], 20, ["implausible"])
    assert study.checklist.name == "white blood cells"
    assert study.sink == str(tmp_path / "grades")


def test_all_that_is_wrong_is_reported_together_with_the_nearest_key(tmp_path):
    path = write(
        tmp_path,
        candidate="made",
        grid_size=1,
        random_share=0.1,
        order="uncertain",
        modes=["singel"],
        classes={"a": {"display": "A", "subtypes": "band"}},
        graders=["anna", {"name": "anna", "pseudonym": "../x"}],
        rubric={"name": "mine", "criteria": []},
        sink="s3://bucket",
    )
    with pytest.raises(ConfigError) as caught:
        Study.load(path)
    text = str(caught.value)
    for expected in (
        "`candidate` is not known; did you mean `candidates`?",
        "`grid_size` is 1; it must be from 2 to 60",
        "`random_share` is 0.1; it must be from 0.2 to 1.0",
        "Did you mean 'uncertainty'?",
        "`singel` is not known; did you mean `single`?",
        "`display` is not known; did you mean `display_name`?",
        "`classes.a.subtypes` is 'band'",
        "The pseudonym '../x'",
        "in the study lacks or misuses 'version'",
        "hf://datasets/USER/REPO",
    ):
        assert expected in text
    assert len(caught.value.problems) == 10


def test_hidden_controls_need_real_images_and_leave_room_for_candidates(tmp_path):
    with pytest.raises(ConfigError, match="`references` names no real images"):
        Study()
    with pytest.raises(ConfigError, match=r"come to 0\.6"):
        Study(references="real", real_control_share=0.3, repeat_share=0.3)
    assert Study(real_control_share=0.0).references is None


def test_uncertainty_and_the_reward_model_belong_together():
    with pytest.raises(ConfigError, match="name the reward model"):
        Study(references="real", order="uncertainty")
    with pytest.raises(ConfigError, match="leave out `reward_model`"):
        Study(references="real", reward_model="runs/reward")


def test_paths_beside_the_study_move_with_it_and_other_names_stay(tmp_path):
    (tmp_path / "made").mkdir()
    study = Study.load(write(tmp_path, candidates="made", references="USER/real", sink="hf://datasets/USER/grades"))
    assert study.candidates == str(tmp_path / "made")
    assert (study.references, study.sink) == ("USER/real", "hf://datasets/USER/grades")


def test_every_preset_is_a_checklist_whose_criteria_are_questions():
    names = ("white_blood_cells", "seven_criteria", "dermatology")
    presets = [Rubric.load(name) for name in names]
    assert all(criterion.question.endswith("?") for rubric in presets for criterion in rubric.criteria)
    assert len(presets[1].criteria) == 7


def test_a_checklist_may_stand_in_the_study_or_in_a_file_beside_it(tmp_path):
    content = {"name": "mine", "version": 3, "criteria": [{"name": "edge", "question": "Is the edge sharp?"}]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    for rubric in (content, "mine.yaml"):
        assert Study.load(write(tmp_path, rubric=rubric)).checklist.version == "3"
    content["criteria"] *= 2
    with pytest.raises(ConfigError, match=r"several criteria named \['edge'\]"):
        Study(references="real", rubric=content)


def test_graders_are_names_with_or_without_a_pseudonym():
    study = Study(references="real", graders=["anna", {"name": "bert", "pseudonym": "reader-2"}])
    assert study.people == (Person("anna"), Person("bert", "reader-2"))
    assert study.pseudonyms == {"bert": "reader-2"}
    with pytest.raises(ConfigError, match="the name 'anna' 2 times"):
        Study(references="real", graders=["anna", {"name": "anna", "pseudonym": "x"}])
    with pytest.raises(ConfigError, match="write a name"):
        Study(references="real", graders=[3])


def test_a_class_that_the_study_does_not_describe_is_called_by_its_name():
    study = Study(references="real", classes={"band_cell": {"description": "Young."}, "other": None})
    assert study.class_text("band_cell") == ClassText("band cell", "Young.")
    assert study.class_text("other") == ClassText("other")


def test_every_option_of_a_study_is_read_somewhere():
    files = [*PROJECT.glob("pathalign/**/*.py"), *PROJECT.glob("spaces/grade/*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert [item.name for item in dataclasses.fields(Study) if item.name not in read] == []
    assert all(item.metadata["help"].endswith(".") for item in dataclasses.fields(Study))


def test_the_secret_is_made_once_for_its_owner_only(tmp_path, monkeypatch):
    monkeypatch.delenv("PATHALIGN_STUDY_SECRET", raising=False)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: study_secret(tmp_path / "state"), range(32)))
    assert len(found) == 1 and len(found.pop()) == 64
    assert stat.S_IMODE((tmp_path / "state" / "secret").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["secret"]


def test_the_secret_can_come_from_the_environment_if_it_is_long_enough(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHALIGN_STUDY_SECRET", "0123456789abcdef")
    assert study_secret(tmp_path) == b"0123456789abcdef"
    monkeypatch.setenv("PATHALIGN_STUDY_SECRET", "short")
    with pytest.raises(InputError, match="has 5 characters"):
        study_secret(tmp_path)
    assert list(tmp_path.iterdir()) == []
