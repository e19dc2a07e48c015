"""What passes between the stages: grades, checklists, run records, and the one error that users see.

Plain dataclasses without torch, so that every stage, the command line and the grading page can share them.
"""

from __future__ import annotations

import difflib
import json
import platform
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

VERDICTS = ("plausible", "implausible", "unsure")
CHOICES = ("left", "right", "tie", "both_bad")
MODES = ("single", "grid", "pairwise")
DRAWN_BY = ("random", "uncertainty", "proposed")
DISCLAIMER = "Synthetic images for research only. Never for diagnosis."
# What a grader may be called wherever others read it: a role and a number, a letter or what `grading.access` makes of a
# name. Whoever is called otherwise is numbered by exports and refused by `pathalign publish`.
PSEUDONYM = re.compile(
    r"(?!.{41})(?:grader|simulated|imported|reader|rater|reviewer|observer|expert|annotator|labell?er|voter|user|person|"
    r"participant|specialist|consultant|clinician|physician|doctor|dr|resident|fellow|student|technician|technologist|"
    r"scientist|nurse|[a-z]{2,12}ologist|[a-z])\d{0,6}"
    r"(?:[-_](?:[0-9a-f]{8}|\d{1,6}|[a-z]|one|two|three|four|five|six|seven|eight|nine|ten))*",
    re.IGNORECASE,
)
PSEUDONYMS_WANTED = "a role with a number or a letter, such as reader-1, haematologist-2 or expert-b,"
RUBRIC_DIR = Path(__file__).parent / "grading" / "rubrics"


class InputError(ValueError):
    """What the user gave cannot be used. The message names the value seen, the one wanted and what to do next."""


@dataclass(frozen=True)
class Criterion:
    """One line of a checklist.

    Attributes:
        name: Short identifier, written into `Grade.failed_criteria`.
        question: What a grader is asked.
        attribute: Attribute column of the real data that the criterion is about, if any.
        accepted: Class name -> attribute values that pass for that class.
    """

    name: str
    question: str
    attribute: str | None = None
    accepted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rubric:
    """A versioned checklist that graders judge images against."""

    name: str
    version: str
    criteria: tuple[Criterion, ...]

    @classmethod
    def load(cls, name_or_path: str | Path) -> Rubric:
        """Read a checklist from a YAML file, or a preset of `pathalign/grading/rubrics` by its name.

        Raises:
            InputError: If there is no such file or preset, it is not YAML, or a key is missing.
        """
        path = Path(name_or_path)
        if not path.is_file():
            path = RUBRIC_DIR / f"{name_or_path}.yaml"
        if not path.is_file():
            presets = sorted(preset.stem for preset in RUBRIC_DIR.glob("*.yaml"))
            raise InputError(f"No checklist {str(name_or_path)!r}: give a YAML file, or one of {presets}.")
        try:
            content = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"The checklist {path} is not valid YAML: {error}") from error
        return cls.from_mapping(content, str(path))

    @classmethod
    def from_mapping(cls, content: Any, source: str) -> Rubric:
        """Build a checklist from parsed YAML.

        Args:
            content: Mapping with `name`, `version` and `criteria`.
            source: Where it stands, for the error.

        Raises:
            InputError: If it is no such mapping, a key is missing, or two criteria have one name.
        """
        try:
            criteria = tuple(
                Criterion(
                    name=entry["name"],
                    question=entry["question"],
                    attribute=entry.get("attribute"),
                    accepted={label: tuple(values) for label, values in entry.get("accepted", {}).items()},
                )
                for entry in content["criteria"]
            )
            rubric = cls(name=content["name"], version=str(content["version"]), criteria=criteria)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"The checklist {source} lacks or misuses {error}; it needs `name`, `version` and a list `criteria` "
                "whose entries have `name` and `question`."
            ) from error
        if repeated := sorted(name for name, n in Counter(entry.name for entry in criteria).items() if n > 1):
            raise InputError(f"The checklist {source} has several criteria named {repeated}; give each its own name.")
        return rubric


@dataclass(frozen=True)
class Grade:
    """One verdict of one grader on one image. A correction is a new grade that names the old one in `supersedes`."""

    grade_id: str
    image_id: str
    class_label: str
    verdict: str  # one of VERDICTS
    grader: str  # pseudonym
    failed_criteria: tuple[str, ...] = ()
    subtype: str | None = None
    confidence: float | None = None  # 0..1
    comment: str | None = None
    supersedes: str | None = None
    mode: str = "single"  # one of MODES
    session: str | None = None  # one visit of the grader in one browser
    drawn_by: str = "random"  # one of DRAWN_BY: how the image came up; only random ones give unbiased shares
    active_ms: int | None = None  # looking at the image and at work
    idle_ms: int | None = None  # in front, without a key or a pointer moving
    hidden_ms: int | None = None  # the page was in another tab or minimized
    rubric_version: str = ""
    app_version: str = ""
    recorded_at: str = ""  # ISO 8601, UTC
    simulated: bool = False

    def to_json(self) -> str:
        """One line of JSON, keys sorted: the same grade always gives the same bytes."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_mapping(cls, row: Mapping[str, Any]) -> Grade:
        """Build a grade from a parsed JSON row.

        Raises:
            InputError: If a required key is missing, a key is unknown, or the verdict or `drawn_by` is none of those
                that exist.
        """
        unknown = sorted(set(row) - set(cls.__dataclass_fields__))
        missing = [key for key in ("grade_id", "image_id", "class_label", "verdict", "grader") if not row.get(key)]
        if unknown or missing:
            raise InputError(f"A grade has unknown keys {unknown} or lacks {missing}: {dict(row)}")
        if row["verdict"] not in VERDICTS:
            raise InputError(f"Grade {row['grade_id']} has verdict {row['verdict']!r}; use one of {VERDICTS}.")
        if row.get("drawn_by", "random") not in DRAWN_BY:
            raise InputError(f"Grade {row['grade_id']} is drawn by {row['drawn_by']!r}; use one of {DRAWN_BY}.")
        return cls(**{**row, "failed_criteria": tuple(row.get("failed_criteria") or ())})


@dataclass(frozen=True)
class Preference:
    """One grader's choice between two images of one class. A correction names the old one in `supersedes`."""

    preference_id: str
    class_label: str
    left_image_id: str  # as it was shown: sides are random
    right_image_id: str
    choice: str  # one of CHOICES
    grader: str  # pseudonym
    supersedes: str | None = None
    session: str | None = None
    active_ms: int | None = None
    idle_ms: int | None = None
    hidden_ms: int | None = None
    rubric_version: str = ""
    app_version: str = ""
    recorded_at: str = ""  # ISO 8601, UTC

    def to_json(self) -> str:
        """One line of JSON, keys sorted: the same preference always gives the same bytes."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_mapping(cls, row: Mapping[str, Any]) -> Preference:
        """Build a preference from a parsed JSON row.

        Raises:
            InputError: If a required key is missing, a key is unknown, the choice is not one of `CHOICES`, or an image
                stands on both sides.
        """
        required = ("preference_id", "class_label", "left_image_id", "right_image_id", "choice", "grader")
        unknown = sorted(set(row) - set(cls.__dataclass_fields__))
        missing = [key for key in required if not row.get(key)]
        if unknown or missing:
            raise InputError(f"A preference has unknown keys {unknown} or lacks {missing}: {dict(row)}")
        if row["choice"] not in CHOICES:
            raise InputError(f"Preference {row['preference_id']} is {row['choice']!r}; use one of {CHOICES}.")
        if row["left_image_id"] == row["right_image_id"]:
            raise InputError(f"Preference {row['preference_id']} has image {row['left_image_id']} on both sides.")
        return cls(**row)


@dataclass
class RunRecord:
    """How an artefact was made: everything needed to make it again."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)  # name -> fingerprint or Hub revision
    seeds: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    wall_s: float = 0.0
    peak_rss_mb: float = 0.0
    finished_at: str = ""

    FILE_NAME = "run.json"

    def save(self, folder: Path) -> None:
        """Write `run.json` into `folder`."""
        self.finished_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        (folder / self.FILE_NAME).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> RunRecord:
        """Read `run.json` of an artefact.

        Raises:
            InputError: If the folder holds none.
        """
        path = Path(folder) / cls.FILE_NAME
        if not path.is_file():
            raise InputError(f"{folder} has no {cls.FILE_NAME}: it is not an artefact that pathalign finished.")
        return cls(**json.loads(path.read_text()))


def library_versions() -> dict[str, str]:
    """Versions of Python, pathalign and the libraries that decide what numbers come out."""
    versions = {"python": platform.python_version()}
    for name in ("pathalign", "torch", "diffusers", "transformers", "peft", "accelerate", "datasets"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def peak_rss_mb() -> float:
    """Largest resident memory that this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that a name is unknown and which known one is nearest to it."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(map(repr, known))}."
    return f"There is no {kind} {name!r}. {hint}"
