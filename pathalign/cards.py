"""Model cards: what an artefact is, how it was made, who graded and what was measured, computed from its records.

A number comes from a record or a report, with its sample count; one that is absent reads "not measured".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pathalign.artefacts import write_atomically
from pathalign.schema import DISCLAIMER, InputError, RunRecord

CardKind = Literal["diffusion_base", "lora_adapter", "reward_model"]
NOT_MEASURED = "not measured"

LIBRARY = {"diffusion_base": "diffusers", "lora_adapter": "diffusers", "reward_model": "transformers"}
PIPELINE_TAG = {
    "diffusion_base": "unconditional-image-generation",  # the Hub has no tag for images of a class
    "lora_adapter": "unconditional-image-generation",
    "reward_model": "image-classification",
}
TAGS = {
    "diffusion_base": ["diffusion", "class-conditional"],
    "lora_adapter": ["diffusion", "lora"],
    "reward_model": ["reward-model"],
}
COLUMNS = {  # name in the report -> what readers see
    "before": "base",
    "after": "aligned",
    "control": "continued pretraining",
    "best_of_n": "best of N",
    "real": "real",
}


IMAGE_MEASURES = {
    "plausible_share": "plausible, by the judge",
    "n_fidelity": "images that the measures below rest on",
    "precision": "precision (fidelity)",
    "recall": "recall (diversity)",
    "density": "density (fidelity)",
    "coverage": "coverage (diversity)",
    "authenticity": "authenticity (no near-copies of training images)",
    "kid": "KID (less is better)",
}
REWARD_MEASURES = {
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "brier": "Brier score (less is better)",
    "ece": "expected calibration error (less is better)",
}


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


def template_dir() -> Path:
    """Folder of card templates: inside an installed wheel, else beside the package in a checkout."""
    packaged = Path(str(files("pathalign"))) / "model_cards"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[1] / "model_cards"


def render(
    kind: CardKind,
    record: RunRecord,
    report: Mapping[str, Any] | None = None,
    *,
    grading: Grading | None = None,
    base_model: str | None = None,
    class_names: Sequence[str] = (),
    prompts: Sequence[str] = (),
    repo_id: str = "PATH_OR_REPO_ID",
    license: str = "apache-2.0",
) -> str:
    """Text of a card, with front matter that the Hub accepts.

    Args:
        kind: What the card is about.
        record: How the artefact was made.
        report: `metrics.json` of `pathalign evaluate`, or for a reward model its `evaluation.json`.
        grading: Who graded; a base model has none.
        base_model: Hub id or folder of the model that an adapter belongs to. A folder stays out of the front matter.
        class_names: Classes in the order of their ids.
        prompts: What Stable Diffusion is asked for, class by class; a class-conditional model has none.
        repo_id: Where the usage snippet loads from.
        license: Hub identifier of the licence of the weights.

    Raises:
        InputError: If the kind has no template, an adapter has no base model, or a model that learned from grades
            does not say whose.
    """
    _check(kind, grading, base_model)
    on_hub = base_model is not None and _is_repo_id(base_model)
    metadata = ModelCardData(
        license=license,
        library_name=LIBRARY[kind],
        pipeline_tag="text-to-image" if prompts else PIPELINE_TAG[kind],
        tags=["pathalign", "medical-imaging", "synthetic", "not-for-diagnosis", *_tags(kind, record, prompts)],
        base_model=base_model if on_hub else None,
        base_model_relation="adapter" if on_hub and kind == "lora_adapter" else None,
    )
    report = report or {}
    figures = report.get("overall") or {}
    environment = Environment(
        loader=FileSystemLoader(template_dir()), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    content = environment.get_template(f"{kind}.md.jinja").render(
        front_matter=metadata.to_yaml(),
        disclaimer=DISCLAIMER,
        record=record,
        grading=grading,
        base_model=base_model if on_hub or base_model is None else Path(base_model).name,
        class_names=list(class_names),
        prompts=list(prompts),
        repo_id=repo_id,
        headline=report.get("headline"),
        image_table=_image_table(
            report.get("metrics") or {}, ("before", "real") if kind == "diffusion_base" else tuple(COLUMNS)
        ),
        reward_table=[(measure, _number(figures, key)) for key, measure in REWARD_MEASURES.items()],
        n_held_out=figures.get("n", NOT_MEASURED),
        worse=report.get("worse"),
        simulated_judge=report.get("simulated", False),
        phantom=report.get("phantom", False),
        known=lambda value: NOT_MEASURED if value is None else value,
    )
    ModelCard(content)  # parses the front matter again: refuses what the Hub would refuse
    return content


def write_card(
    folder: str | Path, kind: CardKind, record: RunRecord, report: Mapping[str, Any] | None = None, **facts: Any
) -> Path:
    """Write `README.md` into an artefact's folder; arguments as for `render`."""
    path = Path(folder) / "README.md"
    write_atomically(path, render(kind, record, report, **facts))
    return path


def _check(kind: str, grading: Grading | None, base_model: str | None) -> None:
    if kind not in get_args(CardKind):
        raise InputError(f"There is no card for {kind!r}; use one of {', '.join(get_args(CardKind))}.")
    if kind == "lora_adapter" and base_model is None:
        raise InputError("An adapter's card needs `base_model`: the Hub id or folder of the model it belongs to.")
    if kind != "diffusion_base" and grading is None:
        raise InputError(f"The card of a {kind} needs `grading`: who gave the grades that it learned from.")


def _tags(kind: CardKind, record: RunRecord, prompts: Sequence[str]) -> list[str]:
    """An adapter's tags say what it belongs to, and which method made it."""
    if kind != "lora_adapter":
        return TAGS[kind]
    method = record.metrics.get("method")
    return [*TAGS[kind], "stable-diffusion" if prompts else "class-conditional", *([method] if method else [])]


def _is_repo_id(path_or_repo_id: str) -> bool:
    if Path(path_or_repo_id).exists():
        return False
    try:
        validate_repo_id(path_or_repo_id)
    except HFValidationError:
        return False
    return "/" in path_or_repo_id


def _number(values: Mapping[str, Any], key: str) -> str:
    """`0.712 (0.68 to 0.74)`, the interval where there is one; a count as it is; or "not measured"."""
    value = values.get(key)
    if value is None:
        return NOT_MEASURED
    if isinstance(value, int):
        return str(value)
    interval = values.get("plausible_ci" if key == "plausible_share" else f"{key}_ci")
    return f"{value:.3g}" + (f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else "")


def _image_table(metrics: Mapping[str, Mapping[str, Any] | None], columns: Sequence[str]) -> dict[str, Any]:
    """Header and rows of the table of image measures; columns nothing is known of are left out, except the first."""
    sets = {name: metrics.get(name) or {} for name in columns}
    shown = [name for index, name in enumerate(columns) if index == 0 or sets[name]]
    return {
        "header": [f"{COLUMNS[name]}, n = {sets[name].get('n', NOT_MEASURED)}" for name in shown],
        "rows": [(title, [_number(sets[name], key) for name in shown]) for key, title in IMAGE_MEASURES.items()],
    }
