"""What cards say beside their numbers: who graded, under which terms, on which data; and where their templates are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

NOT_MEASURED, NOT_STATED = "not measured", "not stated"
TAGS = ["pathalign", "medical-imaging", "synthetic", "not-for-diagnosis"]
SIMULATED_TAG = "simulated-feedback"


@dataclass(frozen=True)
class Grading:
    """Who graded the images that an artefact learned from.

    Attributes:
        simulated: Whether the graders were networks, not experts.
        n_grades: Grades given, None if not known.
        n_graders: Graders who gave them, None if not known.
        krippendorff_alpha: Their agreement, 1 is perfect; None where it was not measured.
        functions: Python functions that gave rewards beside, or in place of, a model of the grades.
    """

    simulated: bool
    n_grades: int | None = None
    n_graders: int | None = None
    krippendorff_alpha: float | None = None
    functions: tuple[str, ...] = ()

    @property
    def by_nobody(self) -> bool:
        """Whether no grades are behind it, functions only."""
        return bool(self.functions) and not self.simulated and self.n_grades is None

    @classmethod
    def from_agreement(cls, agreement: Mapping[str, Any]) -> Grading:
        """Take the facts from `agreement.json` of a feedback dataset."""
        return cls(
            simulated=agreement["simulated"],
            n_grades=agreement["n_grades"],
            n_graders=agreement["n_graders"],
            krippendorff_alpha=agreement["krippendorff_alpha"]["value"],
        )


@dataclass(frozen=True)
class Terms:
    """What only the publisher can say; None reads "not stated".

    Attributes:
        license: Hub identifier of the licence of what is published.
        data_license: Licence of the real images behind it.
        consent: What the patients, or whoever decides for them, agreed to.
    """

    license: str | None = None
    data_license: str | None = None
    consent: str | None = None


@dataclass(frozen=True)
class MeasuredOn:
    """The images that figures were measured on.

    Attributes:
        dataset: `OWNER/NAME` of a Hub dataset; None if it is on no Hub.
        revision: Its commit or tag, None if not known.
        split: Name of the split.
        stated: Whether the publisher says so, and no record does.
    """

    dataset: str | None = None
    revision: str | None = None
    split: str = "test"
    stated: bool = False

    def __str__(self) -> str:
        where = f"`{self.dataset}`" if self.dataset else "a dataset that is not on the Hub"
        said = ", as the publisher states" if self.stated else ""
        return f"split `{self.split}` of {where}, revision {self.revision or NOT_STATED}{said}"


def template_dir() -> Path:
    """Folder of card templates: inside an installed wheel, else beside the package in a checkout."""
    packaged = Path(str(files("pathalign"))) / "model_cards"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "model_cards"


def fill(template: str, **values: Any) -> str:
    """Text of a card's template with these values; a name that it asks for and does not get is an error."""
    environment = Environment(
        loader=FileSystemLoader(template_dir()), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        known=lambda value: NOT_MEASURED if value is None else value,
        stated=lambda value: NOT_STATED if value is None else " ".join(str(value).split()).replace("|", "\\|"),
    )
    return environment.get_template(template).render(**values)
