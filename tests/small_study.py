"""A small study made in place, for the tests of the grading core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pathalign.grading.outbox import Outbox
from pathalign.grading.service import GradingService
from pathalign.grading.sinks import FolderSink
from pathalign.grading.study import Study
from pathalign.images import ImageSet

CLASSES = ("a", "b", "c")


def images(count: int, seed: int, size_px: int = 8, classes: tuple[str, ...] = CLASSES) -> ImageSet:
    """Noise, classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, size_px, size_px), generator=generator, dtype=torch.uint8)
    return ImageSet.build(pixels, torch.arange(count) % len(classes), classes)


def make_study(folder: Path, count: int = 60, real: int = 45, **options: Any) -> Study:
    """Write candidates and real images below `folder` unless they are there."""
    if not (folder / "candidates").is_dir():
        images(count, 0).save(folder / "candidates")
        images(real, 1).save(folder / "real")
    given = {"candidates": str(folder / "candidates"), "references": str(folder / "real"), "reason_for": []}
    return Study(**{**given, "references_per_class": 2, "sink": str(folder / "grades"), **options})


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 1_770_000_000.0

    def __call__(self) -> float:
        return self.now


def serve(folder: Path, study: Study, clock: Any = None, state: str = "state") -> GradingService:
    """A service whose outbox sends only when told to."""
    clock = clock or Clock()
    outbox = Outbox(folder / state, FolderSink(study.sink), clock=clock, start=False)
    return GradingService(study, folder / state, outbox, clock)


def answer(item: dict[str, Any], grade_id: str, verdict: str = "plausible", mode: str = "single", **more: Any) -> dict:
    """What the page would send."""
    if mode == "pairwise":
        return {"grade_id": grade_id, "item_id": item["item_id"], "mode": mode, "choice": verdict, **more}
    return {"grade_id": grade_id, "item_id": item["item_id"], "mode": mode, "verdict": verdict, **more}


def grade_on(service: GradingService, grader: str, count: int, mode: str = "single") -> list[str]:
    """Answer items one after the other; returns their ids in order, fewer if nothing is left."""
    seen: list[str] = []
    while len(seen) < count:
        found = service.next_items(grader, mode, 1)["items"]
        if not found:
            break
        for item in found[: count - len(seen)]:
            verdict = "left" if mode == "pairwise" else "plausible"
            reply = service.submit(grader, [answer(item, f"{grader}-{mode}-{item['item_id']}", verdict, mode)])
            assert reply["refused"] == []
            seen.append(item["item_id"])
    return seen
