"""Grades and preferences on their way out: JSONL, CSV, Parquet, graded images, the paper's folders, pairs for DPO.

An export is one folder that appears whole or not at all. It names graders by pseudonyms only, says that the images are
synthetic and not for diagnosis, and marks simulated grades wherever they stand.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pathalign.artefacts import artefact, fingerprint
from pathalign.grades import compacted_kind, current_grades, read_grades, recorded_at
from pathalign.grading import paper_layout
from pathalign.grading.batches import kind_of, read_batch
from pathalign.grading.catalogue import Catalogue
from pathalign.grading.preferences import contest, preference_pairs, save_pairs, standing_preferences
from pathalign.grading.sinks import SinkError, open_sink
from pathalign.grading.study import Study
from pathalign.images import ImageSet
from pathalign.progress import say
from pathalign.schema import DISCLAIMER, PSEUDONYM, Grade, InputError, Preference, RunRecord, unknown_name

FORMATS = ("jsonl", "csv", "parquet", "images", "paper", "preferences")
NEEDS_IMAGES = ("images", "paper", "preferences")
TABLES = ("jsonl", "csv", "parquet")
NAME_REMOVED = "[name removed]"
FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n']")  # what a spreadsheet may run, and our own guard
TEXT, WHOLE, LOGICAL = "string", "int64", "bool"
COLUMN_TYPES = {"confidence": "float64", "simulated": LOGICAL, "active_ms": WHOLE, "idle_ms": WHOLE, "hidden_ms": WHOLE}


@dataclass(frozen=True)
class Recorded:
    """What graders have said, as it was recorded: corrections and copies among it."""

    grades: Sequence[Grade]
    preferences: Sequence[Preference] = ()


@dataclass(frozen=True)
class ExportOptions:
    """What is written.

    Attributes:
        formats: Some of `FORMATS`.
        simulated: Whether simulated grades may be among it; every file then says so.
        comments: Whether the graders' free text is among it.
        names: Graders' names, which are taken out of comments.

    Raises:
        InputError: If a format is not known, or none is given.
    """

    formats: Sequence[str] = TABLES
    simulated: bool = False
    comments: bool = True
    names: Collection[str] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        if not self.formats:
            raise InputError(f"No export format is given; use one or more of {', '.join(FORMATS)}.")
        if unknown:
            raise InputError(" ".join(unknown_name("export format", name, FORMATS) for name in unknown))


def read_recorded(source: str | Path) -> Recorded:
    """Read what a study has kept.

    Args:
        source: The study's sink, a folder or `hf://datasets/USER/REPO`; or a `.jsonl` file or folder with grades only.

    Raises:
        InputError: If there is nothing, or a row cannot be read.
    """
    path = Path(source)
    is_sink = str(source).startswith("hf://") or any((path / name).exists() for name in _SINK_FILES)
    if not is_sink:
        return Recorded(read_grades(path))
    rows: dict[str, list[dict[str, Any]]] = {"grade": [], "preference": []}
    try:
        sink = open_sink(source)
        for name in sink.list(""):
            kind = kind_of(name)
            content = (sink.read(name) or b"") if kind in rows else b""
            if kind in rows and (name.endswith(".jsonl") or compacted_kind(content) == kind):
                rows[kind] += [row.content for row in read_batch(name, content, kind)]
    except SinkError as error:
        raise InputError(f"{source} cannot be read: {error}") from error
    if not rows["grade"] and not rows["preference"]:
        raise InputError(f"{source} holds no grades yet; grade images with `pathalign grade serve` first.")
    grades = [Grade.from_mapping(row) for row in rows["grade"]]
    for grade in grades:
        try:
            recorded_at(grade)
        except ValueError as error:
            raise InputError(f"Grade {grade.grade_id} in {source} has no readable time: {error}.") from error
    return Recorded(grades, [Preference.from_mapping(row) for row in rows["preference"]])


_SINK_FILES = ("grades", "preferences", "grades.parquet", "preferences.parquet")


def export_from(
    source: str, output_dir: str | Path, options: ExportOptions, candidates: str | None = None
) -> RunRecord:
    """Export what a study or a sink holds.

    Args:
        source: A study's YAML file, or what `read_recorded` takes.
        output_dir: Folder that is made.
        options: What is written. A study adds the names of its graders and owners to take out of comments.
        candidates: Folder or Hub id of the images that were graded; a study names its own.

    Raises:
        InputError: As `read_recorded` and `export`.
    """
    if Path(source).suffix.lower() not in (".yaml", ".yml"):
        return export(read_recorded(source), output_dir, options, ImageSet.load(candidates) if candidates else None)
    study = Study.load(source)
    names = [*options.names, *(person.name for person in study.people), *study.owners]
    options = replace(options, names=names)
    images = ImageSet.load(candidates) if candidates else Catalogue.load(study).images
    return export(read_recorded(study.sink), output_dir, options, images)


def export(
    recorded: Recorded, output_dir: str | Path, options: ExportOptions, candidates: ImageSet | None = None
) -> RunRecord:
    """Write what stands of the grades and preferences, with a README.md and a run record.

    Args:
        recorded: See `read_recorded`.
        output_dir: Folder that is made.
        options: What is written.
        candidates: The images that were graded; needed for the formats that hold images, else only for `kind`.

    Raises:
        InputError: If simulated grades would pass for expert feedback, candidates are missing, there is nothing to
            write, or the place cannot be written to.
    """
    started = time.monotonic()
    if candidates is None and set(options.formats) & set(NEEDS_IMAGES):
        raise InputError(
            "The formats images, paper and preferences hold images: give the candidate set with `--candidates`."
        )
    grades = list(current_grades(recorded.grades).grades)
    preferences = standing_preferences(recorded.preferences)
    if not grades and set(options.formats) - {"preferences"}:
        raise InputError("There is no grade to export yet; grade images first, or export `preferences` only.")
    n_simulated = sum(grade.simulated for grade in grades) + sum(
        row.grader.startswith("simulated") for row in preferences
    )
    if n_simulated and not options.simulated:
        raise InputError(
            f"{n_simulated} of {len(grades) + len(preferences)} verdicts are by simulated graders and would pass for "
            "expert feedback. Export them with `--simulated`, which marks them in every file, or leave them out."
        )
    graders = [*(row.grader for row in grades), *(row.grader for row in preferences)]
    pseudonyms = pseudonyms_for(graders)
    grades = [_cleaned(grade, pseudonyms, options) for grade in grades]
    preferences = [replace(row, grader=pseudonyms[row.grader]) for row in preferences]
    marks: dict[str, Any] = {"notice": DISCLAIMER, "simulated": n_simulated > 0}
    metrics: dict[str, Any] = {
        "n_grades": len(grades),
        "n_preferences": len(preferences),
        "n_graders": len(set(pseudonyms.values())),
        "n_simulated": n_simulated,
        "formats": sorted(options.formats),
    }
    with artefact(output_dir) as folder:
        _empty(folder)
        for name in options.formats:
            if name == "images" and candidates is not None:
                metrics["images"] = _save_graded(grades, candidates, folder)
            elif name == "paper" and candidates is not None:
                metrics["paper"] = paper_layout.write(folder / "paper", grades, candidates, n_simulated > 0)
            elif name == "preferences" and candidates is not None:
                pairs = preference_pairs(preferences)
                save_pairs(pairs, picture_of(candidates), folder / "preferences", candidates.class_names, marks)
                metrics["preferences"] = {"pairs": len(pairs), "undecided": len(preferences) - len(pairs)}
                metrics["preferences"] |= _won(preferences, candidates)
            elif name not in NEEDS_IMAGES:
                (folder / f"grades.{name}").write_bytes(_WRITERS[name](grades, _kinds(candidates)))
        (folder / "README.md").write_text(readme(metrics, options.comments))
        record = RunRecord(
            stage="export",
            config={"formats": list(options.formats), "simulated": options.simulated, "comments": options.comments},
            inputs={"grades": fingerprint([grade.to_json() for grade in grades])},
            metrics=metrics,
            wall_s=time.monotonic() - started,
        )
        record.save(folder)
    return record


def _save_graded(grades: Sequence[Grade], candidates: ImageSet, folder: Path) -> int:
    """Write the graded images, hidden controls among them, as the candidate set that these grades are about."""
    graded = {grade.image_id for grade in grades}
    chosen = candidates.select([row for row, image_id in enumerate(candidates.image_ids) if image_id in graded])
    chosen.save(folder)
    return len(chosen)


def pseudonyms_for(graders: Iterable[str]) -> dict[str, str]:
    """What each grader is called in an export: a pseudonym stays, anything else becomes a number.

    Args:
        graders: As the rows call them.
    """
    present = sorted(set(graders))
    known = {name for name in present if PSEUDONYM.fullmatch(name)}
    free = (name for number in count(1) if (name := f"grader-{number}") not in known)
    if renamed := len(present) - len(known):
        say(f"{renamed} of {len(present)} graders are called by what is no pseudonym; the export numbers them.")
    return {name: name if name in known else next(free) for name in present}


def picture_of(images: ImageSet) -> Any:
    """A function from image id to the image.

    Raises:
        InputError: By that function, if the image is not among them.
    """
    from PIL import Image

    place = {image_id: row for row, image_id in enumerate(images.image_ids)}

    def picture(image_id: str) -> Image.Image:
        if image_id not in place:
            raise InputError(
                f"Image {image_id} is not in the candidate set of {len(images)} images. "
                "Give the candidate set that these rows are about as `--candidates`."
            )
        return Image.fromarray(images.images[place[image_id]].permute(1, 2, 0).numpy())

    return picture


def jsonl_bytes(grades: Sequence[Grade], kinds: Mapping[str, str]) -> bytes:
    """Grades as `pathalign feedback` reads them, one line of JSON each."""
    return "".join(f"{grade.to_json()}\n" for grade in grades).encode()


def csv_bytes(grades: Sequence[Grade], kinds: Mapping[str, str]) -> bytes:
    """A table for spreadsheets; a text that one might run as a formula gets a `'` in front."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(_columns()))
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in _table_row(row, kinds).items()} for row in grades)
    return text.getvalue().encode()


def csv_cell(value: Any) -> str:
    """A value as CSV text. `imports.from_csv_cell` takes the guard away again."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    text = ";".join(value) if isinstance(value, list | tuple) else str(value)
    return f"'{text}" if FORMULA.match(text) else text


def parquet_bytes(grades: Sequence[Grade], kinds: Mapping[str, str]) -> bytes:
    """A typed table; its metadata holds the notice too."""
    import pyarrow
    import pyarrow.parquet

    types = {name: pyarrow.list_(pyarrow.string()) if kind == "list" else kind for name, kind in _columns().items()}
    schema = pyarrow.schema(list(types.items()), metadata={"notice": DISCLAIMER})
    rows = [_table_row(grade, kinds) for grade in grades]
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content)
    return content.getvalue()


_WRITERS = {"jsonl": jsonl_bytes, "csv": csv_bytes, "parquet": parquet_bytes}


def readme(metrics: Mapping[str, Any], comments: bool = True) -> str:
    """Text of the README.md in an export, with the front matter of a dataset card."""
    formats = set(metrics["formats"])
    paths = {"grades": "grades.parquet", "images": "data/*.parquet", "preferences": "preferences/data/*.parquet"}
    present = {name: {"grades": "parquet"}.get(name, name) in formats for name in paths}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("export_readme.md.jinja").render(
        **{name: metrics[name] for name in ("n_grades", "n_preferences", "n_graders", "n_simulated")},
        disclaimer=DISCLAIMER,
        comments=comments,
        configs={name: path for name, path in paths.items() if present[name]},
        tables=formats - set(NEEDS_IMAGES),
        images=metrics.get("images", 0),
        paper="paper" in formats,
        preferences="preferences" in formats,
    )


def _won(preferences: Sequence[Preference], candidates: ImageSet) -> dict[str, Any]:
    """Who won, where the candidates are of two models; see `versus`."""
    if "role" not in candidates.columns:
        return {}
    roles: dict[str, set[str]] = {"base": set(), "aligned": set()}
    for image_id, role in zip(candidates.image_ids, candidates.columns["role"], strict=True):
        roles.setdefault(role, set()).add(image_id)
    return {"aligned_over_base": asdict(contest(preferences, roles["base"], roles["aligned"]))}


def _columns() -> dict[str, str]:
    names = [*Grade.__dataclass_fields__, "kind", "notice"]
    return {name: "list" if name == "failed_criteria" else COLUMN_TYPES.get(name, TEXT) for name in names}


def _table_row(grade: Grade, kinds: Mapping[str, str]) -> dict[str, Any]:
    values = asdict(grade) | {"kind": kinds.get(grade.image_id, ""), "notice": DISCLAIMER}
    return values | {"failed_criteria": list(grade.failed_criteria)}


def _kinds(candidates: ImageSet | None) -> dict[str, str]:
    if candidates is None or "kind" not in candidates.columns:
        return {}
    return dict(zip(candidates.image_ids, candidates.columns["kind"], strict=True))


def _cleaned(grade: Grade, pseudonyms: Mapping[str, str], options: ExportOptions) -> Grade:
    comment = grade.comment if options.comments else None
    for name in options.names:
        comment = comment and re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", NAME_REMOVED, comment, flags=re.IGNORECASE)
    return replace(grade, grader=pseudonyms[grade.grader], comment=comment)


def _empty(folder: Path) -> None:
    """An interrupted run may have left files of other formats."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
