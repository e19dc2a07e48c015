"""Card of the Space that shows a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import SpaceCard, SpaceCardData

from pathalign.cards import measures
from pathalign.cards.facts import TAGS, MeasuredOn, Terms, fill
from pathalign.schema import DISCLAIMER, RunRecord


def report_card(
    record: RunRecord,
    report: Mapping[str, Any],
    *,
    repo_id: str,
    terms: Terms,
    measured_on: MeasuredOn,
) -> str:
    """Text of the README of a static Space whose page is a report.

    Args:
        record: How the report was made.
        report: Its `metrics.json`.
        repo_id: Of the Space.
        terms: Licences and consent.
        measured_on: The images behind the figures.
    """
    metadata = SpaceCardData(
        title=repo_id.split("/")[-1],
        emoji="🔬",
        colorFrom="indigo",
        colorTo="pink",
        sdk="static",
        app_file="index.html",
        pinned=False,
        license=terms.license,
        short_description="Synthetic images before and after feedback",
        datasets=[measured_on.dataset] if measured_on.dataset else None,
        tags=TAGS,
    )
    content = fill(
        "report.md.jinja",
        front_matter=metadata.to_yaml(),
        disclaimer=DISCLAIMER,
        record=record,
        repo_id=repo_id,
        terms=terms,
        measured_on=measured_on,
        headline=report.get("headline"),
        image_table=measures.image_table(report.get("metrics") or {}, tuple(measures.COLUMNS)),
        confidence=report.get("confidence"),
        worse=measures.losses(report),
        simulated_judge=report.get("simulated", False),
        phantom=report.get("phantom", False),
    )
    SpaceCard(content)  # parses the front matter again: refuses what the Hub would refuse
    return content
