"""Who sees what, in SQLite: an item is leased to one grader, and what was answered enough is not given out again.

A *unit* is an image id or the key of a pair; a *showing* is its n-th appearance before one grader (0, or 1 for a
repeat). The table is an index: what was answered follows from the rows that are kept, so a lost one is made again.
Leases are in no row: servers share them only if they share the database, so a study has one state folder.
"""

from __future__ import annotations

import hmac
import sqlite3
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from pathalign.grading import order
from pathalign.grading.catalogue import Catalogue
from pathalign.grading.database import Database
from pathalign.grading.order import PAIRWISE, REPEAT, Plan, Shares
from pathalign.grading.outbox import Outbox
from pathalign.grading.proposals import rank_by_proposal, read_proposal
from pathalign.grading.study import Study
from pathalign.grading.visit import Visit

PLANS_KEPT = 256  # graders
REWARDS_NAME = "rewards.json"  # beside the database: what the reward model says of the candidates
TABLES = """
CREATE TABLE IF NOT EXISTS showings (
    item_id TEXT PRIMARY KEY, grader TEXT NOT NULL, unit TEXT NOT NULL, number INTEGER NOT NULL, mode TEXT NOT NULL,
    sort TEXT NOT NULL, batch INTEGER NOT NULL, leased_until REAL NOT NULL, place INTEGER, answered_at REAL
);
CREATE INDEX IF NOT EXISTS showings_by_unit ON showings (unit, number);
CREATE INDEX IF NOT EXISTS showings_open ON showings (grader) WHERE place IS NULL;
CREATE INDEX IF NOT EXISTS showings_answered ON showings (grader, place) WHERE place IS NOT NULL;
CREATE INDEX IF NOT EXISTS showings_by_sort ON showings (grader, sort);
"""  # `place` counts a grader's answered showings: 1, 2, 3, ...; NULL while a showing is open


@dataclass(frozen=True)
class Showing:
    """One appearance of a unit before a grader.

    Attributes:
        item_id: What the browser knows it by.
        unit: Image id, or key of a pair.
        number: 0, or 1 for a repeat.
        mode: In which it was handed out, or answered.
    """

    item_id: str
    unit: str
    number: int
    mode: str


@dataclass(frozen=True)
class Rules:
    """How items are handed out; see the options of the same names in `Study`."""

    shares: Shares
    graders_per_image: int
    repeat_distance: int
    grid_size: int
    lease_s: float
    seed: int


@dataclass
class Settled:
    """What this process has seen to be over, so that it need not ask again: answers are never taken back."""

    full: set[str] = field(default_factory=set)  # units with enough answers
    own: dict[str, set[str]] = field(default_factory=dict)  # grader -> units that this grader answered


class Assignments:
    """Leases and answers of all graders. Thread-safe; several processes may share the database.

    Args:
        database: Where the table is.
        rules: How items are handed out.
        sorts: Unit -> `control`, `random`, `uncertainty` or `pairwise`.
        labels: Image id -> class.
        plan_of: A grader's plan.
        secret: Key of the item ids.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        database: Database,
        rules: Rules,
        sorts: Mapping[str, str],
        labels: Mapping[str, str],
        plan_of: Callable[[str], Plan],
        secret: bytes,
        clock: Callable[[], float],
    ) -> None:
        self.database, self.rules, self.sorts, self.labels = database, rules, sorts, labels
        self.plan_of, self.secret, self.clock = plan_of, secret, clock
        self.settled = Settled()
        self._writing = threading.Lock()  # threads of this process queue here rather than poll SQLite's lock
        self._enumerated: dict[str, dict[str, Showing]] = {}
        with self.database.transaction() as connection:
            for statement in TABLES.split(";"):
                connection.execute(statement)

    def item_id(self, grader: str, unit: str, number: int) -> str:
        """Name of a showing for the browser: it tells nothing, and a repeat has another one."""
        return self._digest(grader, unit, number)[:16].hex()

    def sides(self, grader: str, pair: str) -> tuple[str, str]:
        """Left and right image of a pair, at random for each grader."""
        one, other = pair.split("|")
        return (one, other) if self._digest(grader, pair, 0)[16] & 1 else (other, one)

    def _digest(self, grader: str, unit: str, number: int) -> bytes:
        return hmac.digest(self.secret, f"{grader}|{unit}|{number}".encode(), "sha256")

    def lease(self, grader: str, mode: str, count: int, exclude: Collection[str] = ()) -> tuple[list[Showing], bool]:
        """Hand out items: the grader's open ones first, then new ones, in one transaction.

        Args:
            grader: Pseudonym.
            mode: One of `MODES`. A grid is one batch of images of one class, and `count` is not heeded.
            count: At most so many.
            exclude: Ids of items that the browser has: they stay leased, and are not handed out again.

        Returns:
            The items, and whether nothing is left for this grader now, neither open nor new.
        """
        plan = self.plan_of(grader)
        with self._writing, self.database.transaction() as connection:
            visit = Visit(self, connection, grader, plan, mode, self.clock())
            rows = visit.next_grid(exclude) if mode == "grid" else visit.next(count, exclude)
            items = [Showing(row["item_id"], row["unit"], row["number"], mode) for row in rows]
            return items, not (items or visit.open_rows())

    def locate(self, grader: str, item_id: str) -> Showing | None:
        """The showing behind an item id, if it is this grader's; also where the table was lost."""
        query = "SELECT item_id, unit, number, mode FROM showings WHERE item_id = ? AND grader = ?"
        row = self.database.connection.execute(query, (item_id, grader)).fetchone()
        if row:
            return Showing(*row)
        if grader not in self._enumerated:
            possible = (self.showing(grader, unit, number) for unit in self.sorts for number in (0, 1))
            self._enumerated[grader] = {showing.item_id: showing for showing in possible}
        return self._enumerated[grader].get(item_id)

    def showing(self, grader: str, unit: str, number: int) -> Showing:
        """A showing that need not have been handed out."""
        mode = PAIRWISE if "|" in unit else "single"
        return Showing(self.item_id(grader, unit, number), unit, number, mode)

    def mark_answered(self, connection: sqlite3.Connection, grader: str, showing: Showing, at: float) -> None:
        """Note, inside the caller's transaction, that a showing has an answer; only the first one changes anything."""
        query = "SELECT COALESCE(MAX(place), 0) + 1 FROM showings WHERE grader = ? AND place IS NOT NULL"
        place = connection.execute(query, (grader,)).fetchone()[0]
        # A unit that the study no longer has counts as one of the random ones.
        sort = (
            REPEAT
            if showing.number
            else self.sorts.get(showing.unit, showing.mode if "|" in showing.unit else "random")
        )
        connection.execute(
            "INSERT INTO showings VALUES (?, ?, ?, ?, ?, ?, 0, 0, ?, ?) ON CONFLICT (item_id) DO UPDATE SET "
            "mode = excluded.mode, place = excluded.place, answered_at = excluded.answered_at WHERE place IS NULL",
            (showing.item_id, grader, showing.unit, showing.number, showing.mode, sort, place, at),
        )


def for_study(
    study: Study, catalogue: Catalogue, outbox: Outbox, secret: bytes, clock: Callable[[], float]
) -> Assignments:
    """The desk of a study, with each grader's plan made once."""
    share = 1.0 if study.order == "random" else study.random_share
    drawn = order.random_sample(catalogue.candidates, share, study.seed)
    at_random = [image_id for image_id in catalogue.candidates if image_id in drawn]
    rest = catalogue.images.select([i for i, id in enumerate(catalogue.candidates) if id not in drawn])
    ranked: list[str] = []
    if study.order == "uncertainty" and study.reward_model:
        ranked = order.rank_by_uncertainty(rest, study.reward_model, outbox.database.path.with_name(REWARDS_NAME))
    elif study.order == "proposed" and study.proposal:
        proposed = read_proposal(study.proposal)
        ranked = rank_by_proposal(rest.image_ids, proposed, set(catalogue.candidates), study.seed, study.proposal)
    labels = {image_id: catalogue.labels[image_id] for image_id in catalogue.candidates}
    pairs = order.draw_pairs(labels, study.pairs_per_class, study.seed) if PAIRWISE in study.modes else []

    @lru_cache(PLANS_KEPT)
    def plan_of(grader: str) -> order.Plan:
        return order.plan(grader, at_random, ranked, catalogue.controls, pairs, study.seed)

    rules = Rules(
        shares=order.Shares(study.real_control_share, study.repeat_share, share),
        graders_per_image=study.graders_per_image,
        repeat_distance=study.repeat_distance,
        grid_size=study.grid_size,
        lease_s=study.lease_minutes * 60,
        seed=study.seed,
    )
    sorts = {
        **dict.fromkeys(at_random, order.RANDOM),
        **dict.fromkeys(ranked, order.UNCERTAINTY),
        **dict.fromkeys(catalogue.controls, order.CONTROL),
        **dict.fromkeys(pairs, PAIRWISE),
    }
    return Assignments(outbox.database, rules, sorts, catalogue.labels, plan_of, secret, clock)
