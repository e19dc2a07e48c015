"""The layout in which the paper's authors keep feedback, in their repository AlaaLab/pathologist-in-the-loop.

    CLASS/normal/CLASS_XXX.png      plausible     label 0
    CLASS/abnormal/CLASS_XXX.png    implausible   label 1

Their label is 1 for IMPLAUSIBLE, ours is 1 for plausible. Their scripts take the class from the folder two levels up,
or from the file name before its first `_`; their README calls the folders `align` and `notalign`. A CSV file may say
the same: columns `ID` (file name), `label` (1 = implausible), and here also `celltype` and `simulated`.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pathalign.images import ImageSet
from pathalign.ratings import REAL_CONTROL, collect_ratings
from pathalign.schema import DISCLAIMER, Grade, InputError
from pathalign.sources import SUFFIXES

CSV_NAME = "feedback.csv"
FOLDERS = {"plausible": "normal", "implausible": "abnormal"}
LABELS = {"plausible": 0, "implausible": 1}  # the paper's
VERDICT_OF_FOLDER = dict.fromkeys(("normal", "align", "aligned", "plausible", "0"), "plausible")
VERDICT_OF_FOLDER |= dict.fromkeys(("abnormal", "notalign", "not_align", "implausible", "1"), "implausible")


@dataclass(frozen=True)
class GradedFile:
    """One image of the layout with its verdict."""

    path: Path
    class_label: str
    verdict: str
    simulated: bool


def write(folder: Path, grades: Sequence[Grade], candidates: ImageSet, simulated: bool) -> dict[str, Any]:
    """Write the majority's verdict on each synthetic candidate; ties are left out.

    Args:
        folder: Made anew.
        grades: Standing ones, oldest first.
        candidates: Graded images; those of kind `real control` are left out, as are grades of other images.
        simulated: Whether to mark the rows as simulated.

    Returns:
        How many images were written by verdict, and how many were left out by reason.

    Raises:
        InputError: If nothing is left, or a class name cannot be that of a folder.
    """
    counts: Counter[str] = Counter()
    rows = []
    place = {image_id: row for row, image_id in reversed(list(enumerate(candidates.image_ids)))}
    kinds = candidates.columns.get("kind", [""] * len(candidates))
    ratings = collect_ratings(grades, [grade.image_id for grade in grades], "drop")
    for column, image_id in enumerate(ratings.image_ids):
        scores = ratings.scores[:, column][~np.isnan(ratings.scores[:, column])]
        reason = _reason(scores, image_id not in place or kinds[place[image_id]] == REAL_CONTROL)
        if reason:
            counts[reason] += 1
            continue
        verdict = "plausible" if scores.mean() > 0.5 else "implausible"
        label = candidates.class_names[int(candidates.class_ids[place[image_id]])]
        name = f"{label.replace('_', '-')}_{image_id}.png"
        target = folder / _folder_name(label) / FOLDERS[verdict] / name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(candidates.images[place[image_id]].permute(1, 2, 0).numpy()).save(target, "PNG")
        counts[verdict] += 1
        rows.append([name, label, LABELS[verdict], len(scores), str(simulated).lower(), DISCLAIMER])
    if not rows:
        raise InputError(
            f"No synthetic image has a verdict to write ({dict(counts)}): grade more, or leave out `paper`."
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([["ID", "celltype", "label", "n_grades", "simulated", "notice"], *rows])
    (folder / CSV_NAME).write_text(text.getvalue())
    return dict(counts)


def read(folder: Path) -> list[GradedFile]:
    """All graded images below a folder, sorted by path.

    Raises:
        InputError: If a file has no verdict, folder and CSV contradict each other, or there are no images.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.name[0] != "."]
    if not files:
        raise InputError(f"{folder} holds no images ({', '.join(SUFFIXES)}).")
    table = _read_csv(folder)
    found, problems = [], []
    for path in files:
        place = path.relative_to(folder)
        parts = place.parts
        own = VERDICT_OF_FOLDER.get(parts[-2].lower()) if len(parts) >= 2 else None
        row = table.get(path.name, {})
        told = row.get("verdict")
        if own is None and told is None:
            problems.append(f"{place}: neither in a folder {sorted(VERDICT_OF_FOLDER)} nor in a CSV")
        elif own and told and own != told:
            problems.append(f"{place}: the folder says {own}, the CSV {told} (label 1 = implausible)")
        else:
            label = parts[-3] if own and len(parts) >= 3 else row.get("celltype") or path.stem.split("_")[0]
            found.append(GradedFile(path, label, own or told or "", row.get("simulated") == "true"))
    if problems:
        listed = "\n".join(f"- {text}" for text in problems[:5])
        raise InputError(
            f"{len(problems)} of {len(files)} images in {folder} have no clear verdict. Wanted: CLASS/normal/ and "
            f"CLASS/abnormal/, or a CSV with the columns ID and label (1 = implausible).\n{listed}"
        )
    return found


def _reason(scores: np.ndarray, other_image: bool) -> str:
    """Why an image is left out, or nothing."""
    if other_image:
        return "no synthetic candidate"
    if len(scores) == 0:
        return "unsure"
    return "tie" if scores.mean() == 0.5 else ""


def _folder_name(label: str) -> str:
    if label != Path(label).name or label.startswith(".") or "\\" in label or "\0" in label:
        raise InputError(f"The class {label!r} cannot be the name of a folder; rename it in the candidate set.")
    return label


def _read_csv(folder: Path) -> dict[str, dict[str, str]]:
    """File name -> cells of its row, with `verdict`, from all CSV files of the top folder that have labels."""
    table: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*.csv")):
        try:
            rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} cannot be read as CSV ({error}); save it as UTF-8.") from error
        if not rows or not {"ID", "label"} <= set(rows[0]):
            continue
        for number, row in enumerate(rows, start=2):
            label = (row["label"] or "").strip()
            if label not in ("0", "1"):
                raise InputError(f"{path}:{number}: the label is {label!r}; use 0 (plausible) or 1 (implausible).")
            name = Path(row["ID"]).name
            verdict = "implausible" if label == "1" else "plausible"
            if table.get(name, {}).get("verdict", verdict) != verdict:
                raise InputError(f"{path}:{number}: {name} has both labels; keep one of the rows.")
            table[name] = {**row, "verdict": verdict}
    return table
