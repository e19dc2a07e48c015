"""Cards of models: base pipelines, adapters and reward models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub import ModelCard, ModelCardData

from pathalign.artefacts import write_atomically
from pathalign.cards import measures
from pathalign.cards.facts import SIMULATED_TAG, TAGS, Grading, MeasuredOn, Terms, fill
from pathalign.remote import is_repo_id
from pathalign.schema import DISCLAIMER, InputError, RunRecord

CardKind = Literal["diffusion_base", "lora_adapter", "reward_model"]

LIBRARY = {"diffusion_base": "diffusers", "lora_adapter": "diffusers", "reward_model": "transformers"}
PIPELINE_TAG = {
    "diffusion_base": "unconditional-image-generation",  # the Hub has no tag for images of a class
    "lora_adapter": "unconditional-image-generation",
    "reward_model": "image-classification",
}
KIND_TAGS = {
    "diffusion_base": ["diffusion", "class-conditional"],
    "lora_adapter": ["diffusion", "lora"],
    "reward_model": ["reward-model"],
}
SHOWN_SET = {"diffusion_base": "before", "lora_adapter": "after"}  # whose figures are the model's own
DEFAULT_TERMS = Terms(license="apache-2.0")


@dataclass(frozen=True)
class Sheet:
    """A picture of samples that goes with the card: its path beside the card, and what it shows."""

    path: str
    title: str


def render(
    kind: CardKind,
    record: RunRecord,
    report: Mapping[str, Any] | None = None,
    *,
    grading: Grading | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    class_names: Sequence[str] = (),
    prompts: Sequence[str] = (),
    criteria: Sequence[str] | None = None,
    repo_id: str = "PATH_OR_REPO_ID",
    terms: Terms = DEFAULT_TERMS,
    measured_on: MeasuredOn | None = None,
    sheets: Sequence[Sheet] = (),
) -> str:
    """Text of a card, with front matter that the Hub accepts.

    Args:
        kind: What the card is about.
        record: How the artefact was made.
        report: `metrics.json` of `pathalign evaluate`, or for a reward model its `evaluation.json`.
        grading: Who graded; a base model has none.
        base_model: Hub id or folder of the model that an adapter belongs to. A folder stays out of the front matter.
        base_revision: Commit of `base_model` whose weights and code the snippet loads; readers name it where None.
        class_names: Classes in the order of their ids.
        prompts: What Stable Diffusion is asked for, class by class; a class-conditional model has none.
        criteria: Checklist that the images were judged against; None if not known.
        repo_id: Where the usage snippet loads from.
        terms: Licences and consent.
        measured_on: The images behind the figures of `report`.
        sheets: Pictures of samples that lie beside the card.

    Raises:
        InputError: If the kind has no template, an adapter has no base model, or a model that learned from grades
            does not say whose.
    """
    _check(kind, grading, base_model)
    on_hub = base_model is not None and is_repo_id(base_model)
    report, measured_on = report or {}, measured_on or MeasuredOn()
    task = "text-to-image" if prompts else PIPELINE_TAG[kind]
    results = measures.model_index(own_measures(kind, report, grading), task, measured_on)
    metadata = ModelCardData(
        license=terms.license,
        library_name=LIBRARY[kind],
        pipeline_tag=task,
        tags=[*TAGS, *_tags(kind, record, grading, prompts)],
        datasets=[measured_on.dataset] if measured_on.dataset else None,
        base_model=base_model if on_hub else None,
        base_model_relation="adapter" if on_hub and kind == "lora_adapter" else None,
        model_name=repo_id if results else None,
        eval_results=results,
        widget=[_widget(sheets[-1], prompts or class_names)] if sheets else None,
    )
    content = fill(
        f"{kind}.md.jinja",
        front_matter=metadata.to_yaml(),
        disclaimer=DISCLAIMER,
        record=record,
        grading=grading,
        base_model=base_model if on_hub or base_model is None else Path(base_model).name,
        base_revision=base_revision if on_hub else None,
        base_on_hub=on_hub,
        class_names=list(class_names),
        concepts=record.metrics.get("concepts") or [],
        prompts=list(prompts),
        criteria=criteria,
        repo_id=repo_id,
        terms=terms,
        measured_on=measured_on,
        sheets=sheets,
        **_figures(kind, report),
    )
    ModelCard(content)  # parses the front matter again: refuses what the Hub would refuse
    return content


def _figures(kind: CardKind, report: Mapping[str, Any]) -> dict[str, Any]:
    """What templates show of a report."""
    figures = own_figures(kind, report)
    columns = ("before", "real") if kind == "diffusion_base" else tuple(measures.COLUMNS)
    return {
        # A report's headline is about the aligned model.
        "headline": report.get("headline") if kind == "lora_adapter" else None,
        "image_table": measures.image_table(report.get("metrics") or {}, columns),
        "n_own": figures.get("n"),
        "no_near_copy": measures.number(measures.by_present_names(figures), "no_near_copy"),
        "reward_table": [(title, measures.number(figures, key)) for key, title in measures.REWARD_MEASURES.items()],
        "confidence": report.get("confidence"),
        "worse": measures.losses(report),
        "simulated_judge": report.get("simulated", False),
        "phantom": report.get("phantom", False),
    }


def own_figures(kind: CardKind, report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures of a report that are about the model itself: not those of what it is compared with."""
    if kind == "reward_model":
        return report.get("overall") or {}
    return (report.get("metrics") or {}).get(SHOWN_SET[kind]) or {}


def own_measures(kind: CardKind, report: Mapping[str, Any], grading: Grading | None = None) -> list[measures.Measure]:
    """The model's own measured figures, which its front matter and `.eval_results` hold; arguments as for `render`."""
    figures = own_figures(kind, report)
    if kind == "reward_model":
        return measures.reward_measures(figures, simulated_graders=grading is not None and grading.simulated)
    return measures.image_measures(figures, simulated_judge=bool(report.get("simulated")))


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


def _tags(kind: CardKind, record: RunRecord, grading: Grading | None, prompts: Sequence[str]) -> list[str]:
    """Tags say whose feedback it was if networks gave it, and of an adapter what it belongs to and how it was made."""
    tags = list(KIND_TAGS[kind])
    if grading is not None and grading.simulated:
        tags.append(SIMULATED_TAG)
    if kind == "lora_adapter":
        method = record.metrics.get("method")
        tags += ["stable-diffusion" if prompts else "class-conditional", *([method] if method else [])]
    return tags


def _widget(sheet: Sheet, asked: Sequence[str]) -> dict[str, Any]:
    """A picture for the top of the model's page."""
    return {"text": ", ".join(asked) or sheet.title, "output": {"url": sheet.path}}
