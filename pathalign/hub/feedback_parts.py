"""Grades and feedback as a dataset of three parts: the graded images, the grades, and how graders agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pathalign.artefacts import fingerprint
from pathalign.feedback import AGREEMENT_FILE, agreement_report, check_against_candidates
from pathalign.grades import CurrentGrades, current_grades, read_grades
from pathalign.grading.batches import Row
from pathalign.grading.compact import parquet_bytes
from pathalign.hub.columns import SYNTHETIC
from pathalign.hub.kinds import Artefact
from pathalign.images import ImageSet, dataset_file, read_table
from pathalign.ratings import REPEAT, collect_ratings
from pathalign.schema import Grade, InputError, RunRecord
from pathalign.settings.publish import PublishConfig

GRADES, AGREEMENT = "feedback/grades.parquet", "feedback/agreement.parquet"
SPLITS = ("train", "validation", "test")
BOOTSTRAP_SAMPLES = 500


@dataclass(frozen=True)
class Parts:
    """What was staged.

    Attributes:
        grades: Those that stand.
        agreement: See `feedback.agreement_report`.
        criteria: Those that failed.
        configs: Name -> split -> path.
        all_real: Whether all graded images are of a set of real ones.
        synthetic: Ids of images that the graded set calls synthetic, as far as it is here.
    """

    grades: tuple[Grade, ...]
    agreement: dict[str, Any]
    criteria: list[str]
    configs: dict[str, dict[str, str]]
    all_real: bool
    synthetic: frozenset[str]


def stage_parts(artefact: Artefact, config: PublishConfig, place: Path) -> Parts:
    """Write the parts below `place`.

    Raises:
        InputError: If grades or images are not where the record says, or do not belong together, or simulated grades
            would pass for expert feedback.
    """
    standing, sources = _grades(artefact, config), _sources(artefact, config)
    grades = [_marked(grade) for grade in standing.grades]
    simulated = sum(grade.simulated for grade in grades)
    if simulated and not config.simulated:
        raise InputError(
            f"{simulated} of {len(grades)} grades are by simulated graders and would pass for expert feedback. Publish "
            "them with `--simulated`, which says so in the card's first line, or leave them out."
        )
    if not config.comments:
        grades = [replace(grade, comment=None) for grade in grades]
    standing = replace(standing, grades=tuple(grades))
    if artefact.record.stage == "feedback":
        agreement = json.loads((artefact.folder / AGREEMENT_FILE).read_text()) | _simulated(grades)
        present = [name for name in SPLITS if (artefact.folder / _data(name)).is_file()]
        for name in present:
            _copy(artefact.folder / _data(name), place / _data(name))
    else:
        images = _candidates(artefact, sources)
        check_against_candidates(grades, images)
        agreement, present = _agreement(standing, images), ["train"]
        graded = {grade.image_id for grade in grades}
        images.select([row for row, name in enumerate(images.image_ids) if name in graded]).save(place)
    (place / AGREEMENT_FILE).write_text(json.dumps(agreement, indent=2, sort_keys=True) + "\n")
    (place / GRADES).parent.mkdir(exist_ok=True)
    rows = [Row.make("grade", grade.grade_id, json.loads(grade.to_json())) for grade in grades]
    (place / GRADES).write_bytes(parquet_bytes("grade", rows))
    _write_agreement(agreement, place / AGREEMENT)
    criteria = sorted({name for grade in grades for name in grade.failed_criteria})
    splits = {name: f"data/{name}-*" for name in present}
    return Parts(
        tuple(grades),
        agreement,
        criteria,
        {"candidates": splits, "grades": {"train": GRADES}, "agreement": {"train": AGREEMENT}},
        any(_stage(source) == "data" for source in sources),
        _synthetic(sources),
    )


def _grades(artefact: Artefact, config: PublishConfig) -> CurrentGrades:
    """The grades that stand."""
    if artefact.record.stage != "feedback":
        return current_grades(read_grades(artefact.folder))
    sources = [Path(source) for source in config.grades] or artefact.input_folders("grades")
    if absent := [source for source in sources if not source.exists()]:
        raise InputError(
            f"The grades that {artefact.folder} was made of are not at {absent[0]}; name them with `--grades`."
        )
    standing = current_grades([grade for source in sources for grade in read_grades(source)])
    if fingerprint([grade.to_json() for grade in standing.grades]) != artefact.record.inputs["grades"]:
        raise InputError(
            f"{', '.join(map(str, sources))} does not hold the grades that {artefact.folder} was made of; name those "
            "with `--grades`, or make the feedback again with `pathalign feedback`."
        )
    return standing


def _marked(grade: Grade) -> Grade:
    """A grade that says so if it is simulated: by its own mark, or its grader's name."""
    simulated = grade.simulated or grade.grader.startswith("simulated")
    return replace(grade, simulated=simulated)


def _simulated(grades: Sequence[Grade]) -> dict[str, Any]:
    count = sum(grade.simulated for grade in grades)
    return {"simulated": count > 0, "simulated_share": count / len(grades)}


def _sources(artefact: Artefact, config: PublishConfig) -> list[str]:
    """Where the graded images are: folders, or Hub datasets."""
    graded = artefact.record.stage != "feedback" and (artefact.folder / _data("train")).is_file()
    inside = [artefact.folder] if graded else []
    return [str(source) for source in config.candidates or inside or artefact.input_folders("candidates")]


def _candidates(artefact: Artefact, sources: Sequence[str]) -> ImageSet:
    """The images that were graded."""
    if not sources:
        raise InputError(
            f"{artefact.folder} has no images, and its record does not say which were graded; name them with "
            "`--candidates`."
        )
    return ImageSet.joined([ImageSet.load(source) for source in sources])


def _stage(source: str) -> str | None:
    """The stage that made a set; None if nobody can say."""
    try:
        return RunRecord.load(dataset_file(source, RunRecord.FILE_NAME).parent).stage
    except InputError:
        return None


def _synthetic(sources: Sequence[str]) -> frozenset[str]:
    """Ids of images that are called so by the sets that are here."""
    import pyarrow.parquet

    found: set[str] = set()
    for path in (path for source in sources for path in sorted(Path(source).glob("data/*.parquet"))):
        names = set(pyarrow.parquet.read_schema(path).names)
        if {"image_id", "kind"} <= names:
            table = read_table(path, ["image_id", "kind"])
            rows = zip(table.column("image_id").to_pylist(), table.column("kind").to_pylist(), strict=True)
            found |= {name for name, kind in rows if kind in SYNTHETIC}
    return frozenset(found)


def _agreement(standing: CurrentGrades, images: ImageSet) -> dict[str, Any]:
    ratings = collect_ratings(standing.grades, images.image_ids, "drop")
    kinds = dict(zip(images.image_ids, images.columns.get("kind", [""] * len(images)), strict=True))
    repeats = np.array([kinds[name] == REPEAT for name in ratings.image_ids])
    return agreement_report(standing, ratings, repeats, BOOTSTRAP_SAMPLES, seed=0)


def _write_agreement(agreement: dict[str, Any], path: Path) -> None:
    """One row for each estimate: of all graders, of each pair, and of each grader with itself."""
    import pyarrow
    import pyarrow.parquet

    rows: list[tuple[str, list[str], dict[str, Any]]] = [
        ("krippendorff_alpha", [], agreement["krippendorff_alpha"]),
        ("fleiss_kappa", [], agreement["fleiss_kappa"]),
    ]
    rows += [("cohen_kappa", entry["graders"], entry) for entry in agreement["cohen_kappa"]]
    rows += [("intra_rater_kappa", [name], entry["intra_rater_kappa"]) for name, entry in agreement["graders"].items()]
    names = {"measure": pyarrow.string(), "graders": pyarrow.list_(pyarrow.string()), "value": pyarrow.float64()}
    names |= {"low": pyarrow.float64(), "high": pyarrow.float64(), "n": pyarrow.int64(), "simulated": pyarrow.bool_()}
    table = [
        {
            "measure": measure,
            "graders": graders,
            "value": found["value"],
            "low": found["ci"][0] if found["ci"] else None,
            "high": found["ci"][1] if found["ci"] else None,
            "n": found["n"],
            "simulated": agreement["simulated"],
        }
        for measure, graders, found in rows
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table, schema=pyarrow.schema(list(names.items()))), path)


def _data(split: str) -> str:
    return f"data/{split}-00000-of-00001.parquet"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
