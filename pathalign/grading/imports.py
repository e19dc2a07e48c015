"""Grades from elsewhere: the paper's folders, a Label Studio export, or tables that `exports` wrote.

Each becomes a folder with `grades.jsonl`, and the graded images as a candidate set where they came along, so that
`pathalign feedback --grades FOLDER --candidates FOLDER` goes on from there.
"""

from __future__ import annotations

import csv
import io
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pathalign.artefacts import artefact, fingerprint
from pathalign.data import read_rows
from pathalign.grades import current_grades, read_grades
from pathalign.grading import label_studio, paper_layout
from pathalign.images import ImageSet
from pathalign.schema import Grade, InputError, RunRecord, unknown_name
from pathalign.sources import SUFFIXES, Row

LAYOUTS = ("auto", "paper", "label-studio", "table")
APP_VERSION = "import"


@dataclass(frozen=True)
class Imported:
    """Grades, the images they came with, and what was left out with the reason."""

    grades: list[Grade]
    images: ImageSet | None
    left_out: dict[str, int]


def import_grades(
    source: str | Path,
    output_dir: str | Path,
    layout: str = "auto",
    candidates: ImageSet | str | None = None,
    images: Path | None = None,
    reading: label_studio.Reading | None = None,
    grader: str = "imported",
    rubric_version: str = "",
) -> RunRecord:
    """Read grades and write them as an artefact.

    Args:
        source: Folder, JSON file or table.
        output_dir: Folder that is made.
        layout: What `source` is; `auto` looks at it.
        candidates: The candidate set that the grades are about, or its folder or Hub id. Without it, images come from
            `source` or `images`.
        images: Folder of the images that a Label Studio export names.
        reading: How Label Studio's fields become grades.
        grader: Pseudonym for grades of the paper's layout, which names no graders.
        rubric_version: Checklist that the verdicts were given against, if known.

    Raises:
        InputError: If the source cannot be read, or its images are not found or not among the candidates.
    """
    started = time.monotonic()
    source = Path(source)
    if isinstance(candidates, str):
        candidates = ImageSet.load(candidates)
    if layout not in LAYOUTS:
        raise InputError(unknown_name("layout", layout, LAYOUTS))
    kind = layout if layout != "auto" else layout_of(source)
    if kind == "paper":
        imported = from_paper(source, candidates, grader)
    elif kind == "label-studio":
        imported = from_label_studio(source, candidates, images, reading or label_studio.Reading())
    else:
        imported = Imported(read_table(source), None, {})
    if rubric_version:
        imported = replace(
            imported, grades=[replace(grade, rubric_version=rubric_version) for grade in imported.grades]
        )
    standing = current_grades(imported.grades)
    record = RunRecord(
        stage="import",
        config={"layout": kind, "grader": grader, "rubric_version": rubric_version},
        inputs={"grades": fingerprint([grade.to_json() for grade in imported.grades])},
        metrics={
            "n_grades": len(standing.grades),
            "n_graders": len({grade.grader for grade in standing.grades}),
            "n_images": len({grade.image_id for grade in standing.grades}),
            "plausible": sum(grade.verdict == "plausible" for grade in standing.grades),
            "simulated": any(grade.simulated for grade in standing.grades),
            "left_out": imported.left_out,
        },
        wall_s=time.monotonic() - started,
    )
    with artefact(output_dir) as folder:
        shutil.rmtree(folder / "data", ignore_errors=True)
        (folder / "grades.jsonl").write_text("".join(f"{grade.to_json()}\n" for grade in imported.grades))
        if imported.images is not None:
            imported.images.save(folder)
        record.save(folder)
    return record


def layout_of(source: Path) -> str:
    """What a source is, by its looks.

    Raises:
        InputError: If it is missing or nothing that is known.
    """
    if not source.exists():
        raise InputError(f"There is nothing at {source}; give a folder of graded images, a .json or a table.")
    if source.is_dir():
        has_images = any(path.suffix.lower() in SUFFIXES for path in source.rglob("*"))
        return "table" if not has_images and any(source.rglob("*.jsonl")) else "paper"
    layouts = {".json": "label-studio", ".jsonl": "table", ".csv": "table", ".parquet": "table"}
    if source.suffix.lower() not in layouts:
        raise InputError(f"{source} is no folder, .json, .jsonl, .csv or .parquet; say what it is with `--layout`.")
    return layouts[source.suffix.lower()]


def from_paper(folder: Path, candidates: ImageSet | None, grader: str = "imported") -> Imported:
    """Grades of the paper's folders. Its label 1 (`abnormal`) means implausible: verdicts are flipped here, once.

    Args:
        folder: See `paper_layout`.
        candidates: Candidate set of the images, found there by their pixels; by default a new one is made.
        grader: Pseudonym of whoever gave the feedback.

    Raises:
        InputError: As `paper_layout.read`, or if images cannot be read, are of several sizes, or are no candidates.
    """
    files = paper_layout.read(folder)
    read = read_images({str(file.path): file.class_label for file in files})
    if candidates is not None:
        _check_among([*read.image_ids], candidates)
    grades = [
        Grade(
            grade_id=fingerprint(["paper", grader, image_id, file.class_label]),
            image_id=image_id,
            class_label=file.class_label,
            verdict=file.verdict,
            grader=grader,
            app_version=APP_VERSION,
            simulated=file.simulated,
        )
        for file, image_id in zip(files, read.image_ids, strict=True)
    ]
    return Imported(grades, None if candidates is not None else read, {})


def from_label_studio(
    path: Path, candidates: ImageSet | None, images: Path | None, reading: label_studio.Reading
) -> Imported:
    """Grades of a Label Studio JSON export.

    An image is found by the task's `image_id`, by an image id in the file name, or by the file name in `images`, where
    Label Studio's prefix of an upload is taken off.

    Raises:
        InputError: If the export cannot be read, or no image of a task can be told.
    """
    answers, left_out = label_studio.read(path, reading)
    if candidates is None and images is None:
        raise InputError("Give the graded images too: `--candidates` with their set, or `--images` with their folder.")
    files = {file.name: file for file in sorted(images.rglob("*")) if file.suffix.lower() in SUFFIXES} if images else {}
    known = dict(zip(candidates.image_ids, candidates.labels(), strict=True)) if candidates else {}
    wanted: dict[str, str] = {}
    problems = []
    for answer in answers:
        if answer.known_id(known) is None:
            file = next((files[name] for name in answer.file_names() if name in files), None)
            label = answer.class_label or (file.stem.rpartition("_")[0] if file else None)
            if file and label:
                wanted[str(file)] = label
            else:
                problems.append(f"{answer.image}: {'no class' if file else 'no such image'}")
    if problems:
        listed = "\n".join(f"- {text}" for text in problems[:5])
        raise InputError(
            f"The images of {len(problems)} of {len(answers)} annotations cannot be told. Wanted in each task: "
            f"`image_id`, or a file name found in `--images`; and `class_label` where the name has no class.\n{listed}"
        )
    read = read_images(wanted) if wanted else None
    by_file = dict(zip(wanted, read.image_ids, strict=True)) if read else {}
    if read and candidates is not None:
        _check_among(read.image_ids, candidates)
    labels = known | (dict(zip(read.image_ids, read.labels(), strict=True)) if read else {})
    grades = []
    for answer in answers:
        image_id = answer.known_id(known) or next(
            by_file[str(files[name])] for name in answer.file_names() if name in files
        )
        grades.append(replace(answer.grade, image_id=image_id, class_label=labels[image_id]))
    return Imported(grades, None if candidates is not None else read, left_out)


def read_images(files: Mapping[str, str]) -> ImageSet:
    """Images as a candidate set.

    Args:
        files: Path -> class, in the order of the result.

    Raises:
        InputError: If one cannot be read, is not square, or is of another size than the first.
    """
    sizes = {}
    for name in files:
        try:
            with Image.open(name) as image:
                sizes[name] = image.size
        except OSError as error:
            raise InputError(f"{name} cannot be read as an image ({error}); repair or remove it.") from error
    first = next(iter(sizes.values()))
    other = next((name for name, size in sizes.items() if size != first or size[0] != size[1]), None)
    if other is not None:
        raise InputError(f"{other} has {sizes[other]} pixels; all images must be square and of one size, {first} here.")
    rows = [Row(name, label, None, partial(_open, Path(name)), {"kind": "synthetic"}) for name, label in files.items()]
    reading = read_rows(rows, first[0])
    if reading.unreadable:
        name, reason = next(iter(reading.unreadable.items()))
        raise InputError(f"{len(reading.unreadable)} images cannot be used, such as {name} ({reason}).")
    names = sorted(set(files.values()))
    return ImageSet.build(
        torch.from_numpy(reading.images).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([names.index(label) for label in files.values()]),
        names,
        {"kind": ["synthetic"] * len(files)},
    )


def read_table(path: Path) -> list[Grade]:
    """Grades of a table that `exports` wrote: `.jsonl`, `.csv` or `.parquet`.

    Raises:
        InputError: If it cannot be read, or a row is no grade.
    """
    if path.suffix.lower() == ".jsonl" or path.is_dir():
        return read_grades(path)
    import pyarrow
    import pyarrow.parquet

    rows: list[dict[str, Any]]
    try:
        if path.suffix.lower() == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            text = path.read_bytes().decode("utf-8-sig")  # a cell may hold ends of lines: they stay as they are
            rows = [_csv_row(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); export it again.") from error
    known = set(Grade.__dataclass_fields__)
    return [
        Grade.from_mapping({key: value for key, value in row.items() if key in known and value is not None})
        for row in rows
    ]


def from_csv_cell(text: str) -> str:
    """What a cell said before `exports.csv_cell` guarded it."""
    return text[1:] if text.startswith("'") else text


def _csv_row(row: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {key: from_csv_cell(text) for key, text in row.items() if text}
    for key, convert in (("confidence", float), ("active_ms", int), ("idle_ms", int), ("hidden_ms", int)):
        if key in values:
            values[key] = convert(values[key])
    values["failed_criteria"] = tuple(filter(None, values.get("failed_criteria", "").split(";")))
    values["simulated"] = values.get("simulated") == "true"
    return values


def _check_among(image_ids: Sequence[str], candidates: ImageSet) -> None:
    missing = sorted(set(image_ids) - set(candidates.image_ids))
    if missing:
        raise InputError(
            f"{len(missing)} of {len(image_ids)} graded images are not among the {len(candidates)} candidates, such as "
            f"{missing[0]}. Give the candidate set that was graded, or none to make one of these images."
        )


def _open(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))
