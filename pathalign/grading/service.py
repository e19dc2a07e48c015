"""One study as graders' browsers see it: what comes next, what was recorded, what can be undone. No web framework.

Whoever calls has authenticated the grader: a pseudonym is an argument, never a part of what a browser sends.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pathalign.grading import order
from pathalign.grading.answers import Answer, Answers
from pathalign.grading.assignments import Showing, for_study
from pathalign.grading.catalogue import Catalogue
from pathalign.grading.opening import page_text, reference_urls
from pathalign.grading.order import PAIRWISE
from pathalign.grading.outbox import Outbox
from pathalign.grading.pictures import Pictures
from pathalign.grading.sinks import SinkError
from pathalign.grading.study import Study, study_secret
from pathalign.grading.submissions import RowError, as_sent, check_row, is_identifier, kept_row, session_row
from pathalign.progress import say
from pathalign.schema import DRAWN_BY, Grade, InputError, Preference

MOST_AT_ONCE = 60  # items in one reply
MOST_HISTORY = 200
APP_VERSION = version("pathalign")


@dataclass(frozen=True)
class ResultsInputs:
    """What the owner's results are computed from. Never sent to a grader.

    Attributes:
        grades: All rows, corrected ones too, in the order in which they came.
        preferences: Likewise.
        images: Image id -> `class_label` and `kind` (`synthetic` or `real control`), of all images of the study.
        showings: Grade id -> 0 for a grader's first look at an image, 1 for the hidden repeat.
    """

    grades: tuple[Grade, ...]
    preferences: tuple[Preference, ...]
    images: Mapping[str, Mapping[str, str]]
    showings: Mapping[str, int]

    @property
    def repeats(self) -> frozenset[str]:
        """Ids of grades given to a hidden repeat."""
        return frozenset(grade_id for grade_id, number in self.showings.items() if number)


class GradingService:
    """A study that is being graded. Thread-safe.

    Args:
        study: What is graded.
        state_dir: Folder of the secret; the outbox's database lies there too.
        outbox: Where rows are kept. Rows that its sink has and it has not are fetched now.
        clock: Seconds since 1970.

    Raises:
        InputError: If the images of the study cannot be loaded or do not fit it, or the sink cannot be read.
    """

    def __init__(
        self, study: Study, state_dir: str | Path, outbox: Outbox, clock: Callable[[], float] = time.time
    ) -> None:
        self.study, self.outbox, self.clock = study, outbox, clock
        self.catalogue = Catalogue.load(study)
        self.pictures = Pictures(self.catalogue.pixels, self.catalogue.candidates[0])
        self.assignments = for_study(study, self.catalogue, outbox, study_secret(state_dir), clock)
        self.answers = Answers(self.assignments, outbox)
        self._pairs = sum(sort == PAIRWISE for sort in self.assignments.sorts.values())
        self._criteria = tuple(criterion.name for criterion in study.checklist.criteria)
        self._references = reference_urls(self.catalogue)
        self._submitting: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._restore()

    def opening(self, grader: str, session: Mapping[str, Any]) -> dict[str, Any]:
        """What the page needs when it opens; keeps a row about the session.

        Args:
            grader: Pseudonym.
            session: `session_id` (made here if there is none, or another grader has it), `user_agent`, `viewport`,
                `device_pixel_ratio`, `colour_note`.

        Returns:
            `study`, `references` (class -> data URLs), `progress`, `grader`, `session` and `app_version`.
        """
        row = session_row(session) | {"grader": grader, "started_at": self._now(), "app_version": APP_VERSION}
        row["session_id"] = row["session_id"] or secrets.token_hex(16)
        if not self.outbox.record([("session", row["session_id"], row)]):  # another grader's, who used this tab before
            row["session_id"] = secrets.token_hex(16)
            self.outbox.record([("session", row["session_id"], row)])
        return {
            "study": page_text(self.study, self.catalogue.images.class_names),
            "references": self._references,
            "progress": self.progress(grader),
            "grader": grader,
            "session": row["session_id"],
            "app_version": APP_VERSION,
        }

    def next_items(self, grader: str, mode: str, count: int, exclude: Sequence[str] = ()) -> dict[str, Any]:
        """Items to grade: those that the grader holds and has not answered first, then new ones.

        Args:
            grader: Pseudonym.
            mode: One of the study's modes. In `grid` all images of a reply are of one class, at most `grid_size`.
            count: At most so many items; not heeded in `grid`.
            exclude: Ids of items that the browser has; they stay with the grader and are not sent again.

        Returns:
            `items` (`item_id`, `class_label`, and `image` or `left` and `right` as data URLs), `progress`, and `done`:
            whether nothing is left for this grader now. Without items and without `done`, all that is left is in
            `exclude`.

        Raises:
            InputError: If the study does not offer the mode, or `count` or `exclude` is of a wrong kind.
        """
        if mode not in self.study.modes:
            raise InputError(f"`mode` is {as_sent(mode)}; it must be one of {', '.join(self.study.modes)}.")
        _check_count(count)
        _check_ids("exclude", exclude)
        showings, done = self.assignments.lease(grader, mode, min(count, MOST_AT_ONCE), set(exclude))
        items = [self._item(grader, showing) for showing in showings]
        return {"items": items, "progress": self.progress(grader, mode, done), "done": done}

    def submit(self, grader: str, rows: Sequence[Any]) -> dict[str, Any]:
        """Keep what a browser sends. Rows that cannot be kept are refused one by one; sent twice, a row counts once.

        An answer to an item that has one already corrects it, whether it says so by `supersedes` or not. An answer
        that comes after the item went to somebody else is kept.

        Args:
            grader: Pseudonym.
            rows: See `submissions.check_row`.

        Returns:
            `recorded` (ids of rows that are on the disk), `saved` (those that are in the sink too), `refused`
            (`grade_id` and `reason`) and `progress`.

        Raises:
            InputError: If `rows` is no list, or the disk cannot be written to; then none was recorded.
        """
        if not isinstance(rows, list | tuple):
            raise InputError(f"`rows` is {as_sent(rows)}; it must be a list of grades.")
        refused = []
        accepted: dict[str, tuple[Answer, Showing]] = {}
        known: list[str] = []
        with self._submitting[grader]:
            for row in rows:
                try:
                    found = self._accept(grader, row, accepted)
                    if found is None:
                        known.append(row["grade_id"])
                    else:
                        accepted[row["grade_id"]] = found
                except RowError as error:
                    grade_id = row.get("grade_id") if isinstance(row, Mapping) else None
                    refused.append({"grade_id": grade_id if is_identifier(grade_id) else None, "reason": str(error)})
            recorded = set(self.outbox.record([_as_kept(answer) for answer, _ in accepted.values()]))
            self.answers.add([found for grade_id, found in accepted.items() if grade_id in recorded])
        refused += [
            {"grade_id": grade_id, "reason": _taken(grade_id)} for grade_id in accepted if grade_id not in recorded
        ]
        echoed = list(dict.fromkeys([*known, *(grade_id for grade_id in accepted if grade_id in recorded)]))
        mode = rows[-1].get("mode") if rows and isinstance(rows[-1], Mapping) else None
        return {
            "recorded": echoed,
            "saved": self._saved(echoed),
            "refused": refused,
            "progress": self.progress(grader, mode if mode in self.study.modes else None),
        }

    def saved(self, grader: str, grade_ids: Sequence[str]) -> dict[str, list[str]]:
        """Which of these rows of the grader are in the sink, read back, and which are not here at all.

        Returns:
            `saved`, and `unknown`: what a server whose disk was wiped has forgotten; the browser sends it again.

        Raises:
            InputError: If `grade_ids` is no list of ids.
        """
        _check_ids("grade_ids", grade_ids)
        own = self.answers.own(grader, grade_ids)
        return {"saved": self._saved(own), "unknown": sorted({*grade_ids} - {*own})}

    def history(self, grader: str, count: int = 50) -> dict[str, Any]:
        """The newest items that the grader answered, newest first.

        Returns:
            `items`, each as in `next_items` with its `mode` and `answer`: the row that stands.

        Raises:
            InputError: If `count` is no positive number.
        """
        _check_count(count)
        latest = self.answers.latest(grader, min(count, MOST_HISTORY))
        return {
            "items": [
                {**self._item(grader, showing), "mode": showing.mode, "answer": _shown(answer)}
                for showing, answer in latest
                if showing.unit in self.assignments.sorts
            ]
        }

    def progress(self, grader: str, mode: str | None = None, finished: bool = False) -> dict[str, Any]:
        """How far the grader is: `done`, `total`, `today`, `per_hour` (None if unknown) and `unsaved`.

        `total` is the grader's expected part of the study. It depends on nothing that would tell a control or a repeat.

        Args:
            grader: Pseudonym.
            mode: Whether images or pairs are counted; by default what the study's first mode shows.
            finished: Whether nothing is left.
        """
        pairwise = (mode or self.study.modes[0]) == PAIRWISE
        found = self.answers.done(grader, pairwise, self.clock())
        graders = max(1, len(self.study.people), len(self.answers.graders | {grader}))
        part = min(1.0, self.study.graders_per_image / graders)
        hidden = 0.0 if pairwise else self.study.real_control_share + self.study.repeat_share
        units = self._pairs if pairwise else len(self.catalogue.candidates)
        total = found.done if finished else max(found.done, math.ceil(units * part / (1 - hidden)))
        return {**asdict(found), "total": total, "unsaved": self.outbox.pending(grader)}

    def results_inputs(self) -> ResultsInputs:
        """Everything that results are computed from; for the owner only."""
        labels, kinds = self.catalogue.labels, self.catalogue.kinds
        return ResultsInputs(
            grades=tuple(Grade.from_mapping(row) for row in self.outbox.rows("grade")),
            preferences=tuple(Preference.from_mapping(row) for row in self.outbox.rows("preference")),
            images={image_id: {"class_label": labels[image_id], "kind": kinds[image_id]} for image_id in labels},
            showings=self.answers.numbers(),
        )

    def picture(self, image_id: str) -> str:
        """Data URL of an image by its id; for the owner only.

        Raises:
            InputError: If the study has no such image.
        """
        if image_id not in self.catalogue.labels:
            raise InputError(f"The study has no image {image_id!r}.")
        return self.pictures.url(image_id, "")

    def close(self) -> None:
        """Send what waits to the sink and stop."""
        self.outbox.close()

    def _restore(self) -> None:
        """Take in what the sink has. Without a connection, what is on this disk will do, but a fresh disk won't."""
        self.answers.catch_up()
        try:
            self.outbox.restore()
        except SinkError as error:
            if not self.answers.graders:
                raise InputError(
                    f"The grades kept so far cannot be read from {self.study.sink}: {error} Start again when they can: "
                    "without them, graders would see the same images anew."
                ) from error
            say(f"{error} Going on with the grades that are here.")
        self.answers.catch_up()

    def _item(self, grader: str, showing: Showing) -> dict[str, Any]:
        """A showing as the browser gets it."""
        if showing.mode != PAIRWISE:
            image = self.pictures.url(showing.unit, showing.item_id)
            return {"item_id": showing.item_id, "class_label": self.catalogue.labels[showing.unit], "image": image}
        left, right = self.assignments.sides(grader, showing.unit)
        return {
            "item_id": showing.item_id,
            "class_label": self.catalogue.labels[left],
            "left": self.pictures.url(left, f"{showing.item_id} left"),
            "right": self.pictures.url(right, f"{showing.item_id} right"),
        }

    def _accept(
        self, grader: str, row: Any, accepted: Mapping[str, tuple[Answer, Showing]]
    ) -> tuple[Answer, Showing] | None:
        """What is to be kept of a row; None if it is kept already.

        Raises:
            RowError: If it cannot be.
        """
        row = check_row(row, self.study.modes, self._criteria, self.study.reason_for)
        answer_id = row["grade_id"]
        if answer_id in accepted:
            return accepted[answer_id]
        if known := self.answers.find(answer_id):
            if known.grader != grader:
                raise RowError(_taken(answer_id))
            return None
        showing = self.assignments.locate(grader, row["item_id"])
        if showing is None:
            raise RowError(f"The item {row['item_id']!r} was never handed out to you; load the page again.")
        if showing.unit not in self.assignments.sorts:
            raise RowError(f"The item {row['item_id']!r} is no longer part of the study; load the page again.")
        if (row["mode"] == PAIRWISE) != (showing.mode == PAIRWISE):
            given = f"The item {row['item_id']!r} was handed out in mode {showing.mode}"
            raise RowError(f"{given}; it cannot be answered in mode {row['mode']}.")
        own = [answer for answer, _ in accepted.values() if answer.item_id == showing.item_id]
        if row["supersedes"] is not None:
            old = (
                accepted[row["supersedes"]][0]
                if row["supersedes"] in accepted
                else self.answers.find(row["supersedes"])
            )
            if old is None or (old.grader, old.item_id) != (grader, showing.item_id):
                given = f"`supersedes` is {row['supersedes']!r}"
                raise RowError(f"{given}; it must name an earlier answer of yours to the same item.")
        standing = own[-1] if own else self.answers.standing(showing.item_id)
        about = {
            "grader": grader,
            "supersedes": standing.answer_id if standing else None,
            "rubric_version": self.study.checklist.version,
            "app_version": APP_VERSION,
            "recorded_at": self._now(),
        }
        if row["mode"] == PAIRWISE:
            left, right = self.assignments.sides(grader, showing.unit)
            about |= {"left_image_id": left, "right_image_id": right, "class_label": self.catalogue.labels[left]}
        else:
            about |= {"image_id": showing.unit, "class_label": self.catalogue.labels[showing.unit]}
            by_model = self.assignments.sorts[showing.unit] == order.UNCERTAINTY
            about["drawn_by"] = self.study.order if by_model else DRAWN_BY[0]
        kept = kept_row(row, about)
        return Answer(answer_id, grader, showing.item_id, asdict(kept)), replace(showing, mode=row["mode"])

    def _saved(self, ids: Sequence[str]) -> list[str]:
        there = self.outbox.saved(ids)
        return [answer_id for answer_id in ids if answer_id in there]

    def _now(self) -> str:
        now = datetime.fromtimestamp(self.clock(), UTC)
        return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _check_count(count: Any) -> None:
    if not isinstance(count, int) or count < 1:
        raise InputError(f"`count` is {as_sent(count)}; ask for 1 item or more.")


def _check_ids(name: str, ids: Any) -> None:
    wrong = [value for value in ids if not is_identifier(value)] if isinstance(ids, list | tuple) else ids
    if wrong or not isinstance(ids, list | tuple):
        raise InputError(f"`{name}` has {as_sent(wrong)}; it must be a list of ids.")


def _taken(row_id: str) -> str:
    return f"Another row has the id {row_id!r} already; send yours with a new one."


def _as_kept(answer: Answer) -> tuple[str, str, Mapping[str, Any]]:
    return "preference" if "preference_id" in answer.row else "grade", answer.answer_id, answer.row


def _shown(answer: Answer) -> dict[str, Any]:
    """A standing answer as the page needs it to correct it: without image ids, which would tell repeats."""
    keys = ("verdict", "failed_criteria", "subtype", "confidence", "comment", "choice", "recorded_at")
    return {"grade_id": answer.answer_id, **{key: answer.row[key] for key in keys if key in answer.row}}
