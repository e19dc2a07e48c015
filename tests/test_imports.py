"""Grades from elsewhere: the paper's label is flipped once, and what went out comes back in with the same verdicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from test_exports import grades_of

from pathalign.cli import main
from pathalign.feedback import build
from pathalign.grades import read_grades
from pathalign.grading.exports import ExportOptions, Recorded, export
from pathalign.grading.imports import import_grades
from pathalign.images import ImageSet
from pathalign.schema import InputError
from pathalign.settings.feedback import FeedbackConfig


def verdicts(folder: Path) -> dict[str, str]:
    return {grade.image_id: grade.verdict for grade in read_grades(folder)}


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def paper_folder(tmp_path: Path) -> Path:
    """What the authors' scripts read: two classes, `normal` and `abnormal`."""
    for number in range(4):
        picture(tmp_path / f"paper/blast/normal/blast_{number:03d}.png", (10, number, 0))
        picture(tmp_path / f"paper/lymphocyte/abnormal/lymphocyte_{number:03d}.png", (20, number, 0))
    return tmp_path / "paper"


def test_abnormal_and_label_1_mean_implausible(tmp_path, paper_folder):
    record = import_grades(paper_folder, tmp_path / "out")
    assert (record.metrics["n_grades"], record.metrics["plausible"], record.metrics["simulated"]) == (8, 4, False)
    grades = read_grades(tmp_path / "out")
    assert {(grade.class_label, grade.verdict) for grade in grades} == {
        ("blast", "plausible"),
        ("lymphocyte", "implausible"),
    }
    assert {grade.grader for grade in grades} == {"imported"}


def test_the_csv_of_flat_files_has_the_papers_label(tmp_path):
    for number in range(4):
        picture(tmp_path / f"flat/blast_{number:03d}.png", (10, number, 0))
    lines = ["ID,label", "blast_000.png,0", "blast_001.png,1", "blast_002.png,1", "blast_003.png,0"]
    (tmp_path / "flat" / "labels.csv").write_text("\n".join(lines))
    import_grades(tmp_path / "flat", tmp_path / "out")
    images = ImageSet.load(tmp_path / "out")
    assert [verdicts(tmp_path / "out")[image_id] for image_id in images.image_ids] == [
        "plausible", "implausible", "implausible", "plausible"
    ]  # fmt: skip
    assert images.labels() == ["blast"] * 4


@pytest.mark.parametrize(
    ("yes", "no"), [("normal", "abnormal"), ("align", "notalign"), ("0", "1"), ("Normal", "Abnormal")]
)
def test_all_names_that_the_authors_give_the_two_folders_are_read(tmp_path, yes, no):
    picture(tmp_path / f"in/blast/{yes}/blast_1.png", (1, 2, 3))
    picture(tmp_path / f"in/blast/{no}/blast_2.png", (3, 2, 1))
    import_grades(tmp_path / "in", tmp_path / "out")
    assert [grade.verdict for grade in read_grades(tmp_path / "out")] in (
        ["plausible", "implausible"],
        ["implausible", "plausible"],
    )
    by_file = dict(zip(ImageSet.load(tmp_path / "out").image_ids, [no, yes] if no < yes else [yes, no], strict=True))
    assert {by_file[image]: verdict for image, verdict in verdicts(tmp_path / "out").items()} == {
        yes: "plausible",
        no: "implausible",
    }


def test_export_and_import_give_back_the_same_verdicts(tmp_path, tiny_images):
    rows = grades_of(replace(tiny_images, class_names=("early_blast", "b", "c")))
    images = replace(tiny_images, class_names=("early_blast", "b", "c"))
    export(Recorded(rows), tmp_path / "out", ExportOptions(("jsonl", "csv", "parquet", "paper")), images)
    expected = {(row.image_id, row.class_label, row.verdict) for row in rows}
    for number, source in enumerate(("grades.jsonl", "grades.csv", "grades.parquet", "paper")):
        import_grades(tmp_path / "out" / source, tmp_path / f"in{number}")
        found = read_grades(tmp_path / f"in{number}")
        assert {(row.image_id, row.class_label, row.verdict) for row in found} == expected, source
        if source != "paper":  # tables come back whole
            assert {row.to_json() for row in found} == {row.to_json() for row in rows}
    back = ImageSet.load(tmp_path / "in3")
    assert set(back.image_ids) == set(tiny_images.image_ids)
    assert set(back.class_names) == {"early_blast", "b", "c"}


def test_simulated_grades_stay_marked_through_the_papers_layout(tmp_path, tiny_images):
    rows = grades_of(tiny_images, "simulated-1", simulated=True)
    export(Recorded(rows), tmp_path / "out", ExportOptions(("paper",), simulated=True), tiny_images)
    record = import_grades(tmp_path / "out" / "paper", tmp_path / "in", candidates=tiny_images)
    assert record.metrics["simulated"] is True
    assert all(grade.simulated for grade in read_grades(tmp_path / "in"))


def test_what_is_imported_makes_a_feedback_dataset(tmp_path, tiny_images):
    export(Recorded(grades_of(tiny_images)), tmp_path / "out", ExportOptions(("paper",)), tiny_images)
    import_grades(tmp_path / "out" / "paper", tmp_path / "in")
    config = FeedbackConfig(candidates=str(tmp_path / "in"), grades=str(tmp_path / "in"), near_duplicate_bits=0)
    assert build(config, tmp_path / "feedback").metrics["n"] == 48


def test_importing_again_gives_the_same_ids_so_that_nothing_counts_twice(tmp_path, paper_folder):
    for name in ("one", "two"):
        import_grades(paper_folder, tmp_path / name)
    assert (tmp_path / "one/grades.jsonl").read_bytes() == (tmp_path / "two/grades.jsonl").read_bytes()


def test_images_are_found_among_the_candidates_by_their_pixels_or_refused(tmp_path, tiny_images, paper_folder):
    export(Recorded(grades_of(tiny_images)), tmp_path / "out", ExportOptions(("paper",)), tiny_images)
    import_grades(tmp_path / "out" / "paper", tmp_path / "in", candidates=tiny_images)
    assert not (tmp_path / "in" / "data").exists()
    with pytest.raises(InputError, match="8 of 8 graded images are not among the 48 candidates"):
        import_grades(paper_folder, tmp_path / "other", candidates=tiny_images)


def test_folder_and_csv_that_contradict_each_other_are_refused_with_the_file(tmp_path, paper_folder):
    (paper_folder / "feedback.csv").write_text("ID,label\nblast_000.png,1\n")
    with pytest.raises(InputError, match=r"blast_000\.png: the folder says plausible, the CSV implausible"):
        import_grades(paper_folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ID,label\nblast_000.png,2\n", r"labels\.csv:2: the label is '2'; use 0 \(plausible\) or 1 \(implausible\)"),
        ("ID,label\nblast_000.png,0\nblast_000.png,1\n", r"labels\.csv:3: blast_000\.png has both labels"),
        ("name,verdict\nblast_000.png,0\n", "1 of 1 images in .* have no clear verdict"),
    ],
)
def test_a_csv_that_cannot_be_followed_is_named_with_its_line(tmp_path, content, message):
    picture(tmp_path / "flat" / "blast_000.png", (1, 2, 3))
    (tmp_path / "flat" / "labels.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        import_grades(tmp_path / "flat", tmp_path / "out")


def test_broken_images_other_sizes_and_missing_sources_are_refused(tmp_path, paper_folder):
    with pytest.raises(InputError, match="There is nothing at"):
        import_grades(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        import_grades(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "grades.txt").write_text("")
    with pytest.raises(InputError, match="say what it is with `--layout`"):
        import_grades(tmp_path / "grades.txt", tmp_path / "out")
    other = paper_folder / "blast" / "normal" / "blast_100.png"
    picture(other, (1, 1, 1), (32, 32))
    with pytest.raises(InputError, match=r"blast_100\.png has \(32, 32\) pixels; all images must be square"):
        import_grades(paper_folder, tmp_path / "out")
    other.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"blast_100\.png cannot be read as an image"):
        import_grades(paper_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_no_table_of_grades_is_refused(tmp_path):
    (tmp_path / "grades.csv").write_text("grade_id,verdict\ng1,plausible\n")
    with pytest.raises(InputError, match="lacks"):
        import_grades(tmp_path / "grades.csv", tmp_path / "out")
    (tmp_path / "grades.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="cannot be read"):
        import_grades(tmp_path / "grades.parquet", tmp_path / "out")


def test_the_command_imports_and_prints_the_record(tmp_path, paper_folder):
    command = ["grade", "import", str(paper_folder), "--output-dir", str(tmp_path / "out"), "--grader", "imported-1"]
    result = CliRunner().invoke(main, [*command, "--rubric-version", "seven 1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["metrics"]["n_images"] == 8
    assert {grade.rubric_version for grade in read_grades(tmp_path / "out")} == {"seven 1"}
    wrong = CliRunner().invoke(main, [*command, "--verdict", "Looks real=perfect"])
    assert wrong.exit_code == 2
    assert "one of plausible, implausible, unsure" in wrong.output
