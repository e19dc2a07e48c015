"""Exports hold what stands and no name, mark simulated grades, run nothing in a spreadsheet, and appear whole."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from datasets import load_dataset
from huggingface_hub import DatasetCard
from PIL import Image
from small_study import answer, make_study, serve

from pathalign.cli import main
from pathalign.grades import read_grades
from pathalign.grading import exports
from pathalign.grading.compact import compact
from pathalign.grading.exports import ExportOptions, Recorded, csv_cell, export, pseudonyms_for, read_recorded
from pathalign.grading.imports import from_csv_cell, read_table
from pathalign.grading.sinks import SinkBusy
from pathalign.images import ImageSet, content_id
from pathalign.schema import DISCLAIMER, Grade, InputError, Preference

ALL = ("jsonl", "csv", "parquet", "images", "paper", "preferences")


def grades_of(images: ImageSet, grader: str = "grader-1a2b3c4d", **values) -> list[Grade]:
    """Every image graded once, every third one implausible."""
    return [
        Grade(
            grade_id=f"{grader}-{row}",
            image_id=image_id,
            class_label=label,
            verdict="implausible" if row % 3 == 0 else "plausible",
            grader=grader,
            failed_criteria=("nucleus_shape", "granules") if row % 3 == 0 else (),
            confidence=0.5,
            active_ms=1200,
            recorded_at=f"2026-03-01T10:00:{row % 60:02d}+00:00",
            **values,
        )
        for row, (image_id, label) in enumerate(zip(images.image_ids, images.labels(), strict=True))
    ]


def preference(number: int, left: str, right: str, choice: str, **values) -> Preference:
    return Preference(
        preference_id=f"p{number}", class_label="a", left_image_id=left, right_image_id=right, choice=choice,
        grader=values.pop("grader", "grader-1a2b3c4d"), **values,
    )  # fmt: skip


def test_every_format_holds_the_same_verdicts_and_says_what_it_is_not_for(tmp_path, tiny_images):
    first, *rest = grades_of(tiny_images)
    corrected = replace(first, grade_id="later", verdict="unsure", supersedes=first.grade_id)
    rows = [first, *rest, corrected, rest[0]]
    choices = [preference(0, tiny_images.image_ids[0], tiny_images.image_ids[3], "left")]
    record = export(Recorded(rows, choices), tmp_path / "out", ExportOptions(ALL), tiny_images)
    assert record.metrics["n_grades"] == 48
    expected = {grade.image_id: grade.verdict for grade in [corrected, *rest]}
    for name in ("jsonl", "csv", "parquet"):
        read = read_table(tmp_path / "out" / f"grades.{name}")
        assert {grade.image_id: grade.verdict for grade in read} == expected
        assert set(read) == {corrected, *rest}
    for path in ("README.md", "grades.csv", "paper/feedback.csv"):
        assert DISCLAIMER in (tmp_path / "out" / path).read_text()


def test_the_parquet_and_the_pairs_load_as_the_datasets_that_the_card_names(tmp_path, tiny_images):
    rows = grades_of(tiny_images)
    choices = [preference(0, tiny_images.image_ids[0], tiny_images.image_ids[3], "right")]
    export(Recorded(rows, choices), tmp_path / "out", ExportOptions(ALL), tiny_images)
    card = DatasetCard.load(tmp_path / "out" / "README.md").data.to_dict()
    files = ["grades.parquet", "data/*.parquet", "preferences/data/*.parquet"]
    assert [entry["data_files"] for entry in card["configs"]] == files
    assert ImageSet.load(tmp_path / "out").image_ids == tiny_images.image_ids
    grades = load_dataset("parquet", data_files=str(tmp_path / "out/grades.parquet"), cache_dir=tmp_path / "cache")
    assert grades["train"][0]["failed_criteria"] == ["nucleus_shape", "granules"]
    assert set(grades["train"]["notice"]) == {DISCLAIMER}
    pairs = load_dataset(str(tmp_path / "out/preferences"), cache_dir=tmp_path / "cache")["train"]
    assert pairs.features["label"].names == ["a", "b", "c"]
    assert pairs[0]["chosen_id"] == tiny_images.image_ids[3]
    assert pairs[0]["rejected"].size == (16, 16)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "  =1+1", "＝1+1", "'quoted", "'=x"])
def test_no_cell_of_the_csv_begins_like_a_formula_and_reading_gives_back_the_text(tmp_path, tiny_images, text):
    assert csv_cell(text) == f"'{text}"
    assert from_csv_cell(csv_cell(text)) == text
    first, *rest = grades_of(tiny_images)
    rows = [replace(first, comment=text, subtype=text, session=text), *rest]
    export(Recorded(rows), tmp_path / "out", ExportOptions(("csv",)))
    path = tmp_path / "out" / "grades.csv"
    cells = [cell for row in csv.reader(io.StringIO(path.read_bytes().decode(), newline="")) for cell in row]
    assert not any(cell.strip()[:1] in tuple("=+-@＝") for cell in cells if cell)
    assert read_table(path)[0].subtype == text


def test_plain_text_is_not_guarded():
    for text in ("large nucleus", "2-lobed", "a=b", "3", ""):
        assert csv_cell(text) == text
    assert [csv_cell(value) for value in (None, True, 0.5, ("a", "b"))] == ["", "true", "0.5", "a;b"]


def test_simulated_grades_are_refused_or_marked_in_every_file(tmp_path, tiny_images):
    rows = [*grades_of(tiny_images), *grades_of(tiny_images, "simulated-1", simulated=True)]
    recorded = Recorded(rows, [preference(0, tiny_images.image_ids[0], tiny_images.image_ids[3], "left")])
    with pytest.raises(InputError, match=r"48 of 97 verdicts are by simulated graders.*`--simulated`"):
        export(recorded, tmp_path / "out", ExportOptions(ALL), tiny_images)
    assert not (tmp_path / "out").exists()
    export(recorded, tmp_path / "out", ExportOptions(ALL, simulated=True), tiny_images)
    assert "SIMULATED: 48 of 97 verdicts" in (tmp_path / "out" / "README.md").read_text()
    assert "simulated-feedback" in DatasetCard.load(tmp_path / "out" / "README.md").data.tags
    for name in ("jsonl", "csv", "parquet"):
        assert sum(grade.simulated for grade in read_table(tmp_path / "out" / f"grades.{name}")) == 48
    lines = list(csv.DictReader((tmp_path / "out" / "paper" / "feedback.csv").open()))
    assert {line["simulated"] for line in lines} == {"true"}
    pairs = load_dataset(str(tmp_path / "out/preferences"), cache_dir=tmp_path / "cache")["train"]
    assert pairs["simulated"] == [True]


def test_no_name_leaves_in_any_file(tmp_path, tiny_images):
    names = ("Dr. Jane Roe", "jane@example.org", "expert-a")
    rows = [row for name in names for row in grades_of(tiny_images, name)]
    rows = [replace(row, grade_id=f"id-{n}", comment="Asked jane roe; roebuck") for n, row in enumerate(rows)]
    options = ExportOptions(ALL, names=["Jane Roe"])
    choices = [preference(0, tiny_images.image_ids[0], tiny_images.image_ids[3], "left", grader="Dr. Jane Roe")]
    export(Recorded(rows, choices), tmp_path / "out", options, tiny_images)
    graders = {grade.grader for grade in read_table(tmp_path / "out" / "grades.csv")}
    assert graders == {"grader-1", "grader-2", "expert-a"}
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes().lower()
            assert b"jane" not in content, path
    assert b"asked [name removed]; roebuck" in (tmp_path / "out" / "grades.csv").read_bytes().lower()


def test_a_number_given_to_a_grader_is_not_another_graders():
    assert pseudonyms_for(["grader-1", "ann", "imported-0a1b2c3d-2", "simulated-3"]) == {
        "ann": "grader-2",
        "grader-1": "grader-1",
        "imported-0a1b2c3d-2": "imported-0a1b2c3d-2",
        "simulated-3": "simulated-3",
    }


def test_comments_stay_out_when_asked(tmp_path, tiny_images):
    rows = [replace(row, comment="free text") for row in grades_of(tiny_images)]
    export(Recorded(rows), tmp_path / "out", ExportOptions(("jsonl", "csv"), comments=False))
    assert "free text" not in "".join(path.read_text() for path in (tmp_path / "out").iterdir())


def test_the_papers_folders_hold_the_majoritys_verdict_and_their_label_1_is_implausible(tmp_path, tiny_images):
    images = replace(tiny_images, columns={"kind": ["real control"] + ["synthetic"] * 47})
    ids = images.image_ids
    verdicts = {
        "grader-1": {1: "plausible", 2: "implausible", 3: "plausible", 4: "unsure"},
        "grader-2": {1: "plausible", 2: "implausible", 3: "implausible", 0: "plausible"},
        "grader-3": {1: "implausible"},
    }
    rows = [
        Grade(f"{grader}-{row}", ids[row], images.labels()[row], verdict, grader)
        for grader, given in verdicts.items()
        for row, verdict in given.items()
    ]
    record = export(Recorded(rows), tmp_path / "out", ExportOptions(("paper",)), images)
    assert record.metrics["paper"] == {
        "plausible": 1, "implausible": 1, "tie": 1, "unsure": 1, "no synthetic candidate": 1
    }  # fmt: skip
    folder = tmp_path / "out" / "paper"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert files == [f"b/normal/b_{ids[1]}.png", f"c/abnormal/c_{ids[2]}.png"]
    lines = list(csv.DictReader((folder / "feedback.csv").open()))
    assert {line["ID"]: line["label"] for line in lines} == {f"b_{ids[1]}.png": "0", f"c_{ids[2]}.png": "1"}
    with Image.open(folder / files[0]) as image:
        assert image.info == {}  # no metadata
        assert content_id(torch.from_numpy(np.array(image)).permute(2, 0, 1)) == ids[1]


def test_the_class_of_a_file_is_before_its_first_underscore_as_the_authors_read_it(tmp_path, tiny_images):
    images = replace(tiny_images, class_names=("early_blast", "b", "c"))
    export(Recorded(grades_of(images)), tmp_path / "out", ExportOptions(("paper",)), images)
    names = [path.name for path in (tmp_path / "out/paper/early_blast").rglob("*.png")]
    assert len(names) == 16
    assert {name.split("_")[0] for name in names} == {"early-blast"}


def test_a_class_that_would_leave_the_folder_is_refused(tmp_path, tiny_images):
    for name in ("../up", "a/b", ".hidden", "..", "a\\b"):
        images = replace(tiny_images, class_names=(name, "b", "c"))
        with pytest.raises(InputError, match="cannot be the name of a folder"):
            export(Recorded(grades_of(images)), tmp_path / "out", ExportOptions(("paper",)), images)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_an_export_that_fails_leaves_the_earlier_one_as_it_was(tmp_path, tiny_images, monkeypatch):
    rows = grades_of(tiny_images)
    export(Recorded(rows), tmp_path / "out", ExportOptions(("jsonl",)))
    before = (tmp_path / "out" / "grades.jsonl").read_bytes()

    def fails(*_):
        raise RuntimeError("killed")

    monkeypatch.setitem(exports._WRITERS, "parquet", fails)
    with pytest.raises(RuntimeError):
        export(Recorded(rows[:5]), tmp_path / "out", ExportOptions(("csv", "parquet")))
    assert (tmp_path / "out" / "grades.jsonl").read_bytes() == before
    monkeypatch.undo()
    export(Recorded(rows[:5]), tmp_path / "out", ExportOptions(("parquet",)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "grades.parquet", "run.json"]


def test_images_are_needed_for_the_formats_that_hold_them_and_something_to_write(tmp_path, tiny_images):
    with pytest.raises(InputError, match="--candidates"):
        export(Recorded(grades_of(tiny_images)), tmp_path / "out", ExportOptions(("paper",)))
    with pytest.raises(InputError, match="no grade to export"):
        export(Recorded([]), tmp_path / "out", ExportOptions())
    with pytest.raises(InputError, match="Did you mean 'parquet'"):
        ExportOptions(("parket",))


def test_a_sink_is_read_with_its_preferences_and_without_its_sessions(tmp_path, tiny_images):
    rows = grades_of(tiny_images)
    for name, lines in {
        "grades/one.jsonl": rows[:20],
        "grades/two.jsonl": rows[20:],
        "preferences/one.jsonl": [preference(0, *tiny_images.image_ids[:2], "tie")],
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(f"{row.to_json()}\n" for row in lines))
    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions" / "one.jsonl").write_text('{"session_id": "s", "grader": "grader-1"}\n')
    found = read_recorded(tmp_path)
    assert (len(found.grades), len(found.preferences)) == (48, 1)
    assert read_recorded(tmp_path / "grades").grades == rows


def test_a_grade_with_an_unreadable_time_is_named(tmp_path, tiny_images):
    (tmp_path / "grades").mkdir()
    row = replace(grades_of(tiny_images)[0], recorded_at="yesterday")
    (tmp_path / "grades" / "one.jsonl").write_text(row.to_json() + "\n")
    with pytest.raises(InputError, match=r"Grade grader-1a2b3c4d-0 .* no readable time"):
        read_recorded(tmp_path)


def test_the_command_exports_and_prints_the_record(tmp_path, tiny_images):
    (tmp_path / "grades.jsonl").write_text("".join(f"{row.to_json()}\n" for row in grades_of(tiny_images)))
    tiny_images.save(tmp_path / "candidates")
    target = tmp_path / "out"
    command = ["grade", "export", tmp_path / "grades.jsonl", "--candidates", tmp_path / "candidates", "--json"]
    command += ["--format", "paper", "--format", "csv", "--output-dir", target]
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["metrics"]["paper"] == {"implausible": 16, "plausible": 32}
    assert (target / "paper" / "a" / "abnormal").is_dir()
    assert (target / "grades.csv").is_file()


def test_a_study_exports_its_own_images_and_takes_names_of_graders_and_owners_out(tmp_path, tiny_images):
    tiny_images.save(tmp_path / "candidates")
    (tmp_path / "grades" / "grades").mkdir(parents=True)
    rows = [replace(row, comment="as Jane Roe said to olga") for row in grades_of(tiny_images, "expert-a")]
    (tmp_path / "grades" / "grades" / "x.jsonl").write_text("".join(f"{row.to_json()}\n" for row in rows))
    study = "graders: [{name: Jane Roe, pseudonym: expert-a}]\nreal_control_share: 0\nrubric: white_blood_cells\n"
    (tmp_path / "study.yaml").write_text(study + "owners: [Olga]\n")
    command = ["grade", "export", str(tmp_path / "study.yaml"), "--output-dir", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*command, "--format", "csv", "--format", "paper"])
    assert result.exit_code == 0, result.output
    (first, *_) = csv.DictReader((tmp_path / "out" / "grades.csv").open())
    said = "as [name removed] said to [name removed]"
    assert (first["grader"], first["comment"], first["kind"]) == ("expert-a", said, "synthetic")


def test_a_graded_study_with_hidden_controls_becomes_feedback_on_its_synthetic_images(tmp_path):
    study = make_study(tmp_path, real_control_share=0.2, repeat_share=0.1, repeat_distance=5)
    service = serve(tmp_path, study)
    verdicts = {}
    while items := service.next_items("grader-1a2b3c4d", "single", 1)["items"]:
        verdict = "plausible" if len(verdicts) % 2 else "implausible"
        verdicts[items[0]["item_id"]] = verdict
        service.submit("grader-1a2b3c4d", [answer(items[0], f"g{len(verdicts)}", verdict)])
    controls = {image_id for image_id, kind in service.catalogue.kinds.items() if kind == "real control"}
    service.close()
    keys = ("candidates", "references", "references_per_class", "sink", "real_control_share", "repeat_distance")
    text = {key: getattr(study, key) for key in keys} | {"rubric": "white_blood_cells"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(text))
    command = ["grade", "export", str(tmp_path / "study.yaml"), "--output-dir", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    grades = read_grades(tmp_path / "out" / "grades.jsonl")
    assert len(grades) == len(verdicts) and controls & {grade.image_id for grade in grades}
    command = ["feedback", "--candidates", str(tmp_path / "out"), "--grades", str(tmp_path / "out" / "grades.jsonl")]
    result = CliRunner().invoke(main, [*command, "--output-dir", str(tmp_path / "feedback"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["metrics"]["n"] == 60  # every candidate, no control
    found = json.loads((tmp_path / "feedback" / "agreement.json").read_text())["real_controls"]["n"]
    assert found == len(controls & {grade.image_id for grade in grades})


def test_a_compacted_sink_and_an_earlier_export_are_read_too(tmp_path, tiny_images):
    rows = grades_of(tiny_images)
    choices = [preference(0, tiny_images.image_ids[0], tiny_images.image_ids[3], "left")]
    (tmp_path / "sink" / "grades").mkdir(parents=True)
    compacted = tmp_path / "sink" / "grades.parquet"
    lines = "".join(f"{row.to_json()}\n" for row in rows)
    (tmp_path / "sink" / "grades" / "x.jsonl").write_text(lines)
    compact(tmp_path / "sink", compacted)
    (tmp_path / "sink" / "grades" / "x.jsonl").unlink()
    assert sorted(read_recorded(tmp_path / "sink").grades, key=lambda g: g.grade_id) == sorted(
        rows, key=lambda g: g.grade_id
    )
    export(Recorded(rows, choices), tmp_path / "out", ExportOptions(ALL), tiny_images)
    assert set(read_recorded(tmp_path / "out").grades) == set(rows)


def test_a_sink_that_cannot_be_read_is_an_error_that_names_it(tmp_path, monkeypatch):
    def broken(_):
        raise SinkBusy("The Hub cannot be reached.")

    monkeypatch.setattr(exports, "open_sink", broken)
    with pytest.raises(InputError, match="hf://datasets/a/b cannot be read: The Hub cannot be reached"):
        read_recorded("hf://datasets/a/b")
