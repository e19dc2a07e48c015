"""What the page shows before the first item: texts, classes, checklist, reference pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pathalign.grading.catalogue import Catalogue
from pathalign.grading.pictures import data_url
from pathalign.grading.study import Study
from pathalign.schema import DISCLAIMER


def page_text(study: Study, class_names: Sequence[str]) -> dict[str, Any]:
    """What graders read and may do: texts, classes, checklist, modes."""
    classes = [{"name": name, **asdict(study.class_text(name))} for name in class_names]
    return {
        "title": study.title,
        "instructions": study.instructions,
        "disclaimer": DISCLAIMER,
        "modes": list(study.modes),
        "classes": [{**entry, "subtypes": list(entry["subtypes"])} for entry in classes],
        "criteria": [{"name": entry.name, "question": entry.question} for entry in study.checklist.criteria],
        "reason_for": list(study.reason_for),
        "microns_per_pixel": study.microns_per_pixel,
        "rubric_version": study.checklist.version,
    }


def reference_urls(catalogue: Catalogue) -> dict[str, list[str]]:
    """Data URLs of each class's reference pictures, made as those of the items are."""
    urls: dict[str, list[str]] = {name: [] for name in catalogue.images.class_names}
    for place, (label, pixels) in enumerate(catalogue.reference_pixels()):
        urls[label].append(data_url(pixels, f"reference {place}"))
    return urls
