"""The Spaces as folders that can be pushed as they are: front matter, pinned requirements, readable templates."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import yaml
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement

from pathalign import phantom
from pathalign.commands.serving import space_app, spaces_dir
from pathalign.grading import example
from pathalign.grading.study import Study
from pathalign.images import ImageSet
from pathalign.schema import DISCLAIMER, InputError

PROJECT = Path(__file__).resolve().parents[1]
GRADE = PROJECT / "spaces" / "grade"


def pinned() -> dict[str, str]:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_spaces_are_found_beside_the_package():
    assert spaces_dir() == PROJECT / "spaces"


def test_front_matter_is_valid_and_its_gradio_is_the_one_that_was_tested():
    data = SpaceCard.load(GRADE / "README.md").data.to_dict()
    assert (data["sdk"], data["sdk_version"], data["app_file"]) == ("gradio", pinned()["gradio"], "app.py")
    assert data["license"] == "apache-2.0"
    assert data["hf_oauth"] is True
    assert 1 <= data["hf_oauth_expiration_minutes"] <= 43200
    assert isinstance(data["datasets"], list)
    assert isinstance(data["models"], list)
    assert len(data["short_description"]) <= 60
    assert "not-for-diagnosis" in data["tags"]
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {data["colorFrom"], data["colorTo"]} <= colours


def test_readme_and_page_say_what_they_are_not_for():
    for name in ("README.md", "page.html", "door.html"):
        assert DISCLAIMER in (GRADE / name).read_text(), name


def test_requirements_pin_this_version_and_the_tested_gradio():
    found = {entry.name: entry for entry in map(Requirement, (GRADE / "requirements.txt").read_text().split())}
    version = re.search(r'^version = "(.+)"', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert str(found["pathalign"].specifier) == f"=={version}"
    assert str(found["gradio"].specifier) == f"=={pinned()['gradio']}"
    assert found["gradio"].extras == {"oauth"}


def test_everything_that_the_compare_space_asks_for_is_pinned_as_tested():
    lines = (PROJECT / "spaces" / "compare" / "requirements.txt").read_text().split()
    found = {entry.name: str(entry.specifier) for entry in map(Requirement, lines)}
    tested = {name: f"=={pinned()[name]}" for name in ("gradio", "captum")}
    version = re.search(r'^version = "(.+)"', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert found == {"pathalign": f"=={version}", **tested}


@pytest.mark.parametrize("name", ["page.html", "page.css"])
def test_templates_hold_nothing_that_gradio_would_run_or_fill_in(name: str):
    text = (GRADE / name).read_text()
    assert not re.search(r"`|\$\{|\{\{|\\|@children", text)


def test_page_files_name_no_other_site():
    for name in ("page.html", "page.css", "keeping.js", "views.js", "page.js", "door.html"):
        assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]", (GRADE / name).read_text()), name


def test_the_example_study_draws_its_images_in_place_and_serves_them(tmp_path: Path):
    (tmp_path / "study.yaml").write_text((GRADE / "study.yaml").read_text())
    example.make_images(tmp_path, per_class=4, image_size_px=16)
    study = Study.load(tmp_path / "study.yaml")
    candidates = ImageSet.load(study.candidates)
    assert len(candidates) == 20
    assert len(set(candidates.image_ids)) == 20
    assert yaml.safe_load((tmp_path / "study.yaml").read_text())["classes"].keys() == set(candidates.class_names)
    service = space_app("grade").open_service(study, tmp_path / "state")
    opening = service.opening("grader-1", {})
    assert opening["study"]["disclaimer"] == DISCLAIMER
    assert service.next_items("grader-1", "single", 1)["items"]
    service.close()


def test_example_images_that_are_there_stay(tmp_path: Path):
    for folder in (example.CANDIDATES, example.REFERENCES):
        (tmp_path / folder).mkdir(parents=True)
    example.make_images(tmp_path)
    assert list(tmp_path.rglob("*.parquet")) == []


def small_space(folder: Path, monkeypatch: pytest.MonkeyPatch, study: str) -> types.ModuleType:
    """The Space with another study, which ends as soon as it would serve."""
    app = space_app("grade")
    phantom.draw(2, 16, seed=1).save(folder / "candidates")
    (folder / "study.yaml").write_text(f"candidates: candidates\nreal_control_share: 0\n{study}")
    monkeypatch.setattr(app, "HERE", folder)
    monkeypatch.setattr(app, "create_app", lambda *arguments: None)
    monkeypatch.setattr(app, "serve", lambda app, service, host, port: service.close())
    return app


def test_a_space_refuses_to_keep_grades_on_the_hub_under_pseudonyms_that_a_restart_would_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PATHALIGN_STUDY_SECRET", raising=False)
    app = small_space(tmp_path, monkeypatch, "sink: hf://datasets/lab/grades\ngraders: [ada]\n")
    with pytest.raises(InputError, match=r"PATHALIGN_STUDY_SECRET is not set.* Set it as a secret of the Space"):
        app.main()


def test_a_space_whose_grades_stay_on_its_disk_says_that_they_will_be_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    small_space(tmp_path, monkeypatch, "graders: [ada]\n").main()
    assert "which a Space forgets: name hf://datasets/USER/REPO as `sink`" in capsys.readouterr().err


def test_a_free_accounts_space_shows_its_gpu_function_and_others_do_not(monkeypatch: pytest.MonkeyPatch):
    app = space_app("grade")
    launched, shown = [], []
    monkeypatch.setattr(app.gr.Blocks, "launch", lambda self, **options: launched.append(options))
    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=shown.append))
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    app.claim_zero_gpu()
    assert (launched, shown) == ([], [])
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    app.claim_zero_gpu()
    assert len(launched) == len(shown) == 1
    assert launched[0]["server_name"] == "127.0.0.1"
