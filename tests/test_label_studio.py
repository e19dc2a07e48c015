"""A Label Studio export becomes grades: fields are told by what they hold, and no annotator's name stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pathalign.grades import read_grades
from pathalign.grading import label_studio
from pathalign.grading.imports import import_grades
from pathalign.grading.label_studio import Reading
from pathalign.images import ImageSet
from pathalign.schema import InputError


def annotation(number: int, verdict: str, person: Any = 1, **extra) -> dict[str, Any]:
    """As Label Studio 1.x writes it."""
    fields = [{"from_name": "verdict", "to_name": "image", "type": "choices", "value": {"choices": [verdict]}}]
    if failed := extra.pop("failed", None):
        fields.append({"from_name": "failed_criteria", "type": "choices", "value": {"choices": failed}})
    if note := extra.pop("note", None):
        fields.append({"from_name": "note", "type": "textarea", "value": {"text": [note]}})
    if stars := extra.pop("stars", None):
        fields.append({"from_name": "confidence", "type": "rating", "value": {"rating": stars}})
    created = "2026-03-01T10:00:00.000000Z"
    base = {"id": number, "completed_by": person, "created_at": created, "lead_time": 12.5, "was_cancelled": False}
    return {**base, "ground_truth": False, "result": fields, **extra}


def export_file(folder: Path, tasks: list[dict[str, Any]]) -> Path:
    path = folder / "project.json"
    path.write_text(json.dumps(tasks))
    return path


def task(image: str, *annotations: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {"id": 7, "data": {"image": image, **data}, "annotations": list(annotations), "predictions": []}


def test_verdict_criteria_comment_and_confidence_are_read_and_images_found_by_id(tmp_path, tiny_images):
    ids = tiny_images.image_ids
    tasks = [
        task(
            f"/data/upload/3/0a1b2c3d-a_{ids[0]}.png",
            annotation(1, "Implausible", failed=["granules"], note="too coarse", stars=4),
            annotation(2, "Plausible", person=2),
        ),
        task("s3://bucket/x.png", annotation(3, "unsure"), image_id=ids[4]),
    ]
    record = import_grades(export_file(tmp_path, tasks), tmp_path / "out", candidates=tiny_images)
    assert record.metrics["n_graders"] == 2
    first, second, third = read_grades(tmp_path / "out")
    assert (first.image_id, first.class_label, first.verdict) == (ids[0], "a", "implausible")
    assert (first.failed_criteria, first.comment, first.confidence) == (("granules",), "too coarse", 0.8)
    assert (second.verdict, third.verdict, third.image_id, third.class_label) == ("plausible", "unsure", ids[4], "b")
    assert first.grader == third.grader != second.grader
    assert first.active_ms is None  # Label Studio's lead time does not tell idle time apart
    assert not (tmp_path / "out" / "data").exists()


def test_images_are_found_in_a_folder_by_their_names_with_and_without_the_prefix_of_an_upload(tmp_path):
    for number in range(3):
        path = tmp_path / "images" / f"early_blast_{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (number, 50, 90)).save(path)
    tasks = [
        task("/data/upload/3/0a1b2c3d-early_blast_0.png", annotation(1, "plausible")),
        task("/data/local-files/?d=cells/early_blast_1.png", annotation(2, "implausible")),
        task("https://example.org/early%5Fblast_2.png?x=1", annotation(3, "plausible"), class_label="blast"),
    ]
    import_grades(export_file(tmp_path, tasks), tmp_path / "out", images=tmp_path / "images")
    images = ImageSet.load(tmp_path / "out")
    assert images.labels() == ["early_blast", "early_blast", "blast"]
    found = {grade.image_id: grade for grade in read_grades(tmp_path / "out")}
    assert [found[name].verdict for name in images.image_ids] == ["plausible", "implausible", "plausible"]
    assert [found[name].class_label for name in images.image_ids] == images.labels()


def test_no_name_or_address_of_an_annotator_is_kept(tmp_path, tiny_images):
    person = {"id": 5, "email": "jane@example.org", "first_name": "Jane", "last_name": "Roe"}
    tasks = [task("x.png", annotation(1, "plausible", person), image_id=tiny_images.image_ids[0])]
    import_grades(export_file(tmp_path, tasks), tmp_path / "out", candidates=tiny_images)
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or (b"jane" not in path.read_bytes().lower() and b"roe" not in path.read_bytes())
    (only,) = read_grades(tmp_path / "out")
    assert only.grader.startswith("imported-") and only.grader.endswith("-1")


def test_cancelled_and_empty_annotations_are_counted_and_left_out(tmp_path, tiny_images):
    tasks = [
        task(
            "x.png",
            annotation(1, "plausible"),
            annotation(2, "implausible", was_cancelled=True),
            {**annotation(3, "plausible"), "result": []},
            image_id=tiny_images.image_ids[0],
        )
    ]
    record = import_grades(export_file(tmp_path, tasks), tmp_path / "out", candidates=tiny_images)
    assert record.metrics["n_grades"] == 1
    assert record.metrics["left_out"] == {"cancelled": 1, "no verdict": 1}


def test_json_min_is_read_too(tmp_path, tiny_images):
    rows = [
        {
            "image": f"/data/upload/1/a_{tiny_images.image_ids[row]}.png",
            "id": row,
            "verdict": verdict,
            "failed_criteria": {"choices": ["granules", "chromatin"]} if verdict == "implausible" else None,
            "annotator": 1 + row % 2,
            "annotation_id": row,
            "created_at": "2026-03-01T10:00:00Z",
            "lead_time": 3.1,
        }
        for row, verdict in enumerate(["plausible", "implausible", "plausible"])
    ]
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    import_grades(export_file(tmp_path, rows), tmp_path / "out", candidates=tiny_images)
    grades = read_grades(tmp_path / "out")
    assert [grade.verdict for grade in grades] == ["plausible", "implausible", "plausible"]
    assert grades[1].failed_criteria == ("granules", "chromatin")
    assert len({grade.grader for grade in grades}) == 2


def test_own_words_for_verdicts_are_mapped_and_unknown_ones_are_named(tmp_path, tiny_images):
    tasks = [
        task("x.png", annotation(1, "Would sign out"), image_id=tiny_images.image_ids[0]),
        task("x.png", annotation(2, "Artefact"), image_id=tiny_images.image_ids[1]),
    ]
    path = export_file(tmp_path, tasks)
    with pytest.raises(InputError, match=r"verdict: Artefact, Would sign out.*--verdict 'CHOICE=plausible'"):
        import_grades(path, tmp_path / "out", candidates=tiny_images)
    words = {"would sign out": "plausible", "Artefact": "implausible"}
    import_grades(path, tmp_path / "out", candidates=tiny_images, reading=Reading(words=words))
    assert [grade.verdict for grade in read_grades(tmp_path / "out")] == ["plausible", "implausible"]
    with pytest.raises(InputError, match=r"mapped to \['fine'\]"):
        Reading(words={"x": "fine"})


def test_two_fields_with_verdicts_need_a_name(tmp_path, tiny_images):
    entry = annotation(1, "plausible")
    entry["result"].append({"from_name": "stain", "type": "choices", "value": {"choices": ["good"]}})
    path = export_file(tmp_path, [task("x.png", entry, image_id=tiny_images.image_ids[0])])
    with pytest.raises(InputError, match=r"2 fields whose choices are all verdicts.*--verdict-field"):
        label_studio.read(path, Reading())
    ((answer,), _) = label_studio.read(path, Reading(verdict="verdict"))
    assert answer.grade.verdict == "plausible"


def test_images_that_cannot_be_told_are_named(tmp_path, tiny_images):
    path = export_file(tmp_path, [task("/data/upload/unknown.png", annotation(1, "plausible"))])
    with pytest.raises(InputError, match="Give the graded images too"):
        import_grades(path, tmp_path / "out")
    with pytest.raises(InputError, match=r"1 of 1 annotations cannot be told.*\n- /data/upload/unknown.png: no such"):
        import_grades(path, tmp_path / "out", candidates=tiny_images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is no list of tasks"),
        ("[]", "is no list of tasks"),
        ("no json", "cannot be read as JSON"),
        ('[{"data": {"image": "x.png"}, "annotations": []}]', "1 tasks and no annotation"),
    ],
)
def test_a_file_that_is_no_export_is_refused(tmp_path, content, message):
    (tmp_path / "project.json").write_text(content)
    with pytest.raises(InputError, match=message):
        label_studio.read(tmp_path / "project.json", Reading())
