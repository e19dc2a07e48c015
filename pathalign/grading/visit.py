"""One grader asks for items: what is open comes first, then what the plan says, all inside one transaction."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING

from pathalign.grading.order import CONTROL, PAIRWISE, RANDOM, REPEAT, UNCERTAINTY, Counts, Plan, choose

if TYPE_CHECKING:
    from pathalign.grading.assignments import Assignments

MOST_OPEN = 200  # items that one grader may hold
CHUNK = 50  # units looked up at once


class Visit:
    """One call of `Assignments.lease`.

    Args:
        desk: Rules, labels, item ids.
        connection: With a transaction that nobody else's can run beside (`BEGIN IMMEDIATE`).
        grader: Pseudonym.
        plan: This grader's order.
        mode: One of `MODES`.
        now: Seconds since 1970.
    """

    def __init__(
        self, desk: Assignments, connection: sqlite3.Connection, grader: str, plan: Plan, mode: str, now: float
    ) -> None:
        self.desk, self.rules, self.connection = desk, desk.rules, connection
        self.grader, self.plan, self.mode, self.now = grader, plan, mode, now
        self.own = desk.settled.own.setdefault(grader, set())
        self._renew()

    def next(self, count: int, exclude: Collection[str]) -> list[sqlite3.Row]:
        """At most `count` items for single or pairwise mode."""
        found = [row for row in self.open_rows() if row["item_id"] not in exclude][:count]
        if len(found) < count:
            found += self._draw(count - len(found), None)
        return found or self._take_over(count, exclude, one_class=False)

    def next_grid(self, exclude: Collection[str]) -> list[sqlite3.Row]:
        """The rest of the oldest open grid, or a new one: images of one class."""
        found = [row for row in self.open_rows() if row["item_id"] not in exclude]
        if found:
            return [row for row in found if row["batch"] == found[0]["batch"]]
        first = next(chain(self._available(self.plan.random), self._available(self.plan.uncertainty)), None)
        drawn = self._draw(self.rules.grid_size, self.desk.labels[first]) if first else []
        return drawn or self._take_over(self.rules.grid_size, exclude, one_class=True)

    def open_rows(self) -> list[sqlite3.Row]:
        """What the grader holds in this mode and has not answered, in the order in which it was handed out."""
        query = "SELECT rowid, * FROM showings WHERE grader = ? AND place IS NULL AND mode = ? ORDER BY rowid"
        return list(self.connection.execute(query, (self.grader, self.mode)))

    def _renew(self) -> None:
        """Keep what is open in this mode; of what was open too long, give up what others took or another mode had."""
        query = "SELECT rowid, * FROM showings WHERE grader = ? AND place IS NULL AND leased_until <= ?"
        for row in list(self.connection.execute(query, (self.grader, self.now))):
            limited = row["sort"] not in (CONTROL, REPEAT)
            if row["mode"] != self.mode or (limited and not self._has_room(row["unit"])):
                self.connection.execute("DELETE FROM showings WHERE rowid = ?", (row["rowid"],))
        self.connection.execute(
            "UPDATE showings SET leased_until = ? WHERE grader = ? AND place IS NULL AND mode = ?",
            (self.now + self.rules.lease_s, self.grader, self.mode),
        )

    def _has_room(self, unit: str) -> bool:
        query = (
            "SELECT COUNT(*) FROM showings WHERE unit = ? AND number = 0 AND grader != ? "
            "AND (place IS NOT NULL OR leased_until > ?)"
        )
        taken: int = self.connection.execute(query, (unit, self.grader, self.now)).fetchone()[0]
        return taken < self.rules.graders_per_image

    def _draw(self, count: int, label: str | None) -> list[sqlite3.Row]:
        """Lease at most `count` new units, of one class if one is given."""
        query = "SELECT COUNT(*), COALESCE(MAX(batch), 0) FROM showings WHERE grader = ? AND place IS NULL"
        held, last_batch = self.connection.execute(query, (self.grader,)).fetchone()
        units = self._pairs() if self.mode == PAIRWISE else self._images(label)
        drawn = []
        for sort, unit in islice(units, max(0, min(count, MOST_OPEN - held))):
            number = int(sort == REPEAT)
            item_id = self.desk.item_id(self.grader, unit, number)
            until = self.now + self.rules.lease_s
            values = (item_id, self.grader, unit, number, self.mode, sort, last_batch + 1, until)
            self.connection.execute("INSERT INTO showings VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)", values)
            drawn.append(item_id)
        rows = {row["item_id"]: row for row in self.open_rows()} if drawn else {}
        return [rows[item_id] for item_id in drawn]

    def _pairs(self) -> Iterator[tuple[str, str]]:
        return ((PAIRWISE, unit) for unit in self._available(self.plan.pairs))

    def _images(self, label: str | None) -> Iterator[tuple[str, str]]:
        """Sort and unit of one new item after the other, until no candidate is left.

        Each sort is looked up before one is chosen, so that the time it takes does not tell which it was.
        """
        sources = {
            RANDOM: self._available(self.plan.random, label),
            UNCERTAINTY: self._available(self.plan.uncertainty, label),
            CONTROL: self._controls(label),
            REPEAT: self._repeats(label),
        }
        found: dict[str, str | None] = dict.fromkeys(sources)
        counts = self._counts()
        while True:
            found = {sort: found[sort] or next(source, None) for sort, source in sources.items()}
            wanted = choose(counts, self.rules.shares, f"{self.rules.seed}|{self.grader}|{counts.shown}")
            for sort in (wanted, RANDOM, UNCERTAINTY):
                unit, found[sort] = found[sort], None
                if unit is not None:
                    break
            else:
                return
            yield sort, unit
            counts = replace(counts, **{sort: getattr(counts, sort) + 1})

    def _counts(self) -> Counts:
        query = "SELECT sort, COUNT(*) FROM showings WHERE grader = ? AND sort != ? GROUP BY sort"
        return Counts(**dict(self.connection.execute(query, (self.grader, PAIRWISE))))

    def _controls(self, label: str | None) -> Iterator[str]:
        """Real images that fewest have seen come first; where there are few, more graders than usual see them."""
        return chain(self._available(self.plan.controls, label), self._available(self.plan.controls, label, False))

    def _available(self, units: Sequence[str], label: str | None = None, limited: bool = True) -> Iterator[str]:
        """Units that this grader has not been shown and, if `limited`, that not enough others have or had."""
        full, labels = self.desk.settled.full, self.desk.labels
        left = (
            unit
            for unit in units
            if unit not in self.own and not (limited and unit in full) and label in (None, labels.get(unit))
        )
        while chunk := list(islice(left, CHUNK)):
            taken = self._looked_up(chunk)
            for unit in chunk:
                own, others = taken.get(unit, (0, 0))
                if not own and not (limited and others >= self.rules.graders_per_image):
                    yield unit

    def _looked_up(self, units: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Unit -> showings of this grader, and of others who answered or hold it."""
        query = (
            "SELECT unit, SUM(grader = ?1) AS own, SUM(grader = ?1 AND place IS NOT NULL) AS own_answered, "
            "SUM(place IS NOT NULL) AS answered, "
            "SUM(grader != ?1 AND (place IS NOT NULL OR leased_until > ?2)) AS others "
            f"FROM showings WHERE number = 0 AND unit IN ({','.join('?' * len(units))}) GROUP BY unit"
        )
        rows = list(self.connection.execute(query, (self.grader, self.now, *units)))
        self.own.update(row["unit"] for row in rows if row["own_answered"])
        enough = self.rules.graders_per_image
        self.desk.settled.full.update(row["unit"] for row in rows if row["answered"] >= enough)
        return {row["unit"]: (row["own"], row["others"]) for row in rows}

    def _repeats(self, label: str | None) -> Iterator[str]:
        """Images that this grader answered in this mode, far enough back, and that did not come again."""
        query = "SELECT COALESCE(MAX(place), 0) FROM showings WHERE grader = ? AND place IS NOT NULL"
        answered: int = self.connection.execute(query, (self.grader,)).fetchone()[0]
        last = answered + 1 - self.rules.repeat_distance  # a repeat is answered at the place after `answered`, or later
        if last < 1:
            return
        start = random.Random(f"{self.rules.seed}|{self.grader}|repeat|{answered}").randint(1, last)
        query = (
            "SELECT place, unit FROM showings AS first WHERE grader = ? AND place BETWEEN ? AND ? AND number = 0 "
            "AND mode = ? AND NOT EXISTS (SELECT 1 FROM showings AS again WHERE again.unit = first.unit "
            f"AND again.number = 1 AND again.grader = first.grader) ORDER BY place LIMIT {CHUNK}"
        )
        for low, high in ((start, last), (1, start - 1)):
            while rows := list(self.connection.execute(query, (self.grader, low, high, self.mode))):
                low = rows[-1]["place"] + 1
                for _, unit in rows:
                    if unit in self.desk.labels and label in (None, self.desk.labels[unit]):
                        yield unit

    def _take_over(self, count: int, exclude: Collection[str], *, one_class: bool) -> list[sqlite3.Row]:
        """Where nothing else is left: images that the grader holds in the other image mode."""
        query = "SELECT rowid, * FROM showings WHERE grader = ? AND place IS NULL AND mode NOT IN (?, ?) ORDER BY rowid"
        rows = list(self.connection.execute(query, (self.grader, self.mode, PAIRWISE)))
        rows = [row for row in rows if row["item_id"] not in exclude] if self.mode != PAIRWISE else []
        if one_class and rows:
            label, _ = Counter(self.desk.labels[row["unit"]] for row in rows).most_common(1)[0]
            rows = [row for row in rows if self.desk.labels[row["unit"]] == label]
        taken = rows[:count]
        self.connection.executemany(
            "UPDATE showings SET mode = ?, batch = 0, leased_until = ? WHERE rowid = ?",
            [(self.mode, self.now + self.rules.lease_s, row["rowid"]) for row in taken],
        )
        return taken
