"""Leases: no image goes to too many graders, what is open comes back, and what was lost is found again."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_study import Clock

from pathalign.grading import order
from pathalign.grading.assignments import Assignments, Rules
from pathalign.grading.database import Database
from pathalign.grading.order import Shares
from pathalign.grading.visit import MOST_OPEN

SECRET = b"secret of the tests"
LABELS = {f"image{number:03}": "abc"[number % 3] for number in range(90)}
REAL = {f"real{number:03}": "abc"[number % 3] for number in range(30)}


def desk(folder: Path, clock: Clock | None = None, **changes) -> Assignments:
    """Assignments over 90 candidates, 30 controls and 12 pairs; no hidden items unless asked for."""
    rules = {
        "shares": Shares(0.0, 0.0, 1.0),
        "graders_per_image": 1,
        "repeat_distance": 20,
        "grid_size": 10,
        "lease_s": 600.0,
        "seed": 0,
    }
    rules = Rules(**{**rules, **changes})
    pairs = order.draw_pairs(LABELS, 4, 0)
    sorts = {
        **dict.fromkeys(LABELS, order.RANDOM),
        **dict.fromkeys(REAL, order.CONTROL),
        **dict.fromkeys(pairs, "pairwise"),
    }

    def plan_of(grader: str) -> order.Plan:
        return order.plan(grader, list(LABELS), [], list(REAL), pairs, rules.seed)

    database = Database(folder / "desk.sqlite")
    return Assignments(database, rules, sorts, {**LABELS, **REAL}, plan_of, SECRET, clock or Clock())


def finish(desk: Assignments, grader: str, *showings) -> None:
    for showing in showings:
        with desk.database.transaction() as connection:
            desk.mark_answered(connection, grader, showing, desk.clock())


def work(desk: Assignments, grader: str, count: int, mode: str = "single", ahead: int = 1) -> list:
    """Answer one after the other, holding `ahead` items, as a page that fetches in advance does."""
    done: list = []
    held: list = []
    while len(done) < count:
        found, _ = desk.lease(grader, mode, ahead - len(held), {item.item_id for item in held})
        held += found
        if not held:
            break
        done.append(held.pop(0))
        finish(desk, grader, done[-1])
    return done


def test_an_item_id_is_the_first_half_of_an_hmac(tmp_path):
    # RFC 2104, written out.
    padded = SECRET.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in padded) + b"g|image000|1").digest()
    expected = hashlib.sha256(bytes(b ^ 0x5C for b in padded) + inner).hexdigest()[:32]
    assert desk(tmp_path).item_id("g", "image000", 1) == expected


def test_open_items_come_back_first_and_those_that_the_browser_has_do_not(tmp_path):
    desk_ = desk(tmp_path)
    first, _ = desk_.lease("g", "single", 3)
    again, done = desk_.lease("g", "single", 3)
    assert again == first and not done
    more, _ = desk_.lease("g", "single", 3, {first[0].item_id})
    assert more[:2] == first[1:] and more[2].unit not in {item.unit for item in first}
    assert desk(tmp_path).lease("g", "single", 4)[0] == [*first, more[2]]


def test_an_item_of_one_grader_is_not_given_to_another(tmp_path):
    desk_ = desk(tmp_path)
    for grader in ("g", "h"):
        desk_.lease(grader, "single", 45)
    units = [item.unit for grader in ("g", "h") for item in desk_.lease(grader, "single", 45)[0]]
    assert len(set(units)) == 90
    assert desk_.lease("third", "single", 1) == ([], True)


def test_what_is_left_alone_goes_to_another_grader_after_the_lease(tmp_path):
    clock = Clock()
    desk_ = desk(tmp_path, clock)
    held, _ = desk_.lease("g", "single", 90)
    assert len(held) == 90
    clock.now += 599
    assert desk_.lease("h", "single", 1) == ([], True)
    clock.now += 2
    taken, _ = desk_.lease("h", "single", 60)
    assert len(taken) == 60
    back, _ = desk_.lease("g", "single", 90)
    assert {item.unit for item in back} == set(LABELS) - {item.unit for item in taken}


def test_asking_keeps_the_lease(tmp_path):
    clock = Clock()
    desk_ = desk(tmp_path, clock)
    held, _ = desk_.lease("g", "single", 90)
    for _ in range(5):
        clock.now += 400
        assert desk_.lease("g", "single", 1, {item.item_id for item in held}) == ([], False)
    assert desk_.lease("h", "single", 1) == ([], True)


@pytest.mark.parametrize("graders_per_image", [1, 2])
def test_twenty_graders_at_once_give_each_image_its_graders_and_no_more(tmp_path, graders_per_image):
    # Two desks on one database, as two processes have: only SQLite stands between them.
    desks = [desk(tmp_path, graders_per_image=graders_per_image) for _ in range(2)]
    start = threading.Barrier(20)

    def grade(number: int) -> list:
        start.wait()
        return work(desks[number % 2], f"grader-{number}", 90, ahead=3)

    with ThreadPoolExecutor(20) as pool:
        done = list(pool.map(grade, range(20)))
    looks = Counter(item.unit for found in done for item in found)
    assert set(looks) == set(LABELS)
    assert set(looks.values()) == {graders_per_image}
    assert all(len({item.unit for item in found}) == len(found) for found in done)


def test_a_late_answer_counts_and_the_image_is_not_given_out_again(tmp_path):
    clock = Clock()
    desk_ = desk(tmp_path, clock, graders_per_image=2)
    (late,), _ = desk_.lease("g", "single", 1)
    clock.now += 601
    for grader in ("h", "i"):
        work(desk_, grader, 90)
    finish(desk_, "g", desk_.locate("g", late.item_id))
    query = "SELECT COUNT(*) FROM showings WHERE unit = ? AND place IS NOT NULL"
    assert desk_.database.connection.execute(query, (late.unit,)).fetchone()[0] == 3
    assert desk_.lease("fourth", "single", 1) == ([], True)


@pytest.mark.parametrize("ahead", [1, 6])
def test_repeats_come_at_least_the_distance_later_and_controls_keep_their_share(tmp_path, ahead):
    done = work(desk(tmp_path, shares=Shares(0.1, 0.1, 1.0)), "g", 200, ahead=ahead)
    place = {(item.unit, item.number): number for number, item in enumerate(done)}
    repeats = [unit for unit, number in place if number == 1]
    assert 8 <= len(repeats) <= 14
    assert all(place[unit, 1] - place[unit, 0] >= 20 for unit in repeats)
    assert len({item.item_id for item in done}) == len(done)
    assert 8 <= sum(item.unit in REAL and item.number == 0 for item in done) <= 14
    assert {item.unit for item in done} >= set(LABELS)


def test_the_distance_holds_for_skipped_items_too(tmp_path):
    desk_ = desk(tmp_path, shares=Shares(0.0, 0.5, 1.0), repeat_distance=5)
    skipped, _ = desk_.lease("g", "single", 1)
    done = []
    for _ in range(60):
        found, _ = desk_.lease("g", "single", 1, {skipped[0].item_id})
        if not found:
            break
        finish(desk_, "g", *found)
        done += found
        if len(done) == 30:
            finish(desk_, "g", *skipped)
            done += skipped
            skipped, _ = desk_.lease("g", "single", 1)
    place = {(item.unit, item.number): number for number, item in enumerate(done)}
    assert sum(number for _, number in place) > 10
    assert all(place[unit, 1] - place[unit, 0] >= 5 for unit, number in place if number == 1)


def test_few_controls_are_shared_and_nobody_sees_one_twice(tmp_path):
    desk_ = desk(tmp_path, shares=Shares(0.3, 0.0, 1.0), graders_per_image=3)
    shown = [work(desk_, f"grader-{number}", 120) for number in range(6)]
    for found in shown:
        units = [item.unit for item in found]
        assert len(units) == len(set(units))
    looks = Counter(item.unit for found in shown for item in found if item.unit in LABELS)
    assert set(looks.values()) == {3}


def test_a_grid_is_of_one_class_and_comes_back_whole(tmp_path):
    desk_ = desk(tmp_path, shares=Shares(0.1, 0.1, 1.0))
    first, _ = desk_.lease("g", "grid", 1)
    assert len(first) == 10
    labels = {**LABELS, **REAL}
    assert len({labels[item.unit] for item in first}) == 1
    assert desk_.lease("g", "grid", 1)[0] == first
    second, _ = desk_.lease("g", "grid", 1, {item.item_id for item in first})
    assert len(second) == 10 and not {item.unit for item in second} & {item.unit for item in first}
    finish(desk_, "g", *first[:4])
    assert desk_.lease("g", "grid", 1)[0] == first[4:]
    finish(desk_, "g", *first[4:])
    assert desk_.lease("g", "grid", 1)[0] == second


def test_all_images_can_be_graded_in_grids(tmp_path):
    desk_ = desk(tmp_path, shares=Shares(0.1, 0.1, 1.0), repeat_distance=20)
    done, labels = [], {**LABELS, **REAL}
    while found := desk_.lease("g", "grid", 1)[0]:
        assert len({labels[item.unit] for item in found}) == 1
        finish(desk_, "g", *found)
        done += found
    place = {(item.unit, item.number): number for number, item in enumerate(done)}
    assert {item.unit for item in done} >= set(LABELS)
    assert sum(number for _, number in place) >= 5
    assert all(place[unit, 1] - place[unit, 0] >= 20 for unit, number in place if number == 1)


def test_what_is_held_in_the_other_mode_can_be_finished_in_this_one(tmp_path):
    desk_ = desk(tmp_path)
    grid, _ = desk_.lease("g", "grid", 1)
    single = work(desk_, "g", 200)
    assert len(single) == 90 and {item.unit for item in single[-10:]} == {item.unit for item in grid}
    other = desk(tmp_path / "other")
    held, _ = other.lease("g", "single", 90)
    back, _ = other.lease("g", "grid", 1)
    assert len(back) == 10 and {item.item_id for item in back} < {item.item_id for item in held}
    assert len({LABELS[item.unit] for item in back}) == 1


def test_nobody_can_hoard_the_study(tmp_path):
    desk_ = desk(tmp_path, graders_per_image=1, shares=Shares(0.0, 0.0, 1.0))
    desk_.sorts.update(dict.fromkeys((f"more{number}" for number in range(400)), order.RANDOM))
    desk_.labels.update(dict.fromkeys((f"more{number}" for number in range(400)), "a"))
    everything = [unit for unit, sort in desk_.sorts.items() if sort == order.RANDOM]
    desk_.plan_of = lambda grader: order.plan(grader, everything, [], [], [], 0)
    held: set[str] = set()
    while found := desk_.lease("g", "single", 60, held)[0]:
        held |= {item.item_id for item in found}
    assert len(held) == MOST_OPEN
    assert desk_.lease("g", "single", 60, held) == ([], False)


def test_no_pair_comes_twice_to_one_grader_and_sides_are_drawn(tmp_path):
    desk_ = desk(tmp_path, graders_per_image=30)
    lefts = Counter()
    for number in range(30):
        done = work(desk_, f"grader-{number}", 99, "pairwise")
        assert len(done) == len({item.unit for item in done}) == 12
        for item in done:
            left, right = desk_.sides(f"grader-{number}", item.unit)
            assert LABELS[left] == LABELS[right] and left != right
            assert desk_.sides(f"grader-{number}", item.unit) == (left, right)
            lefts[left < right] += 1
    assert 180 - 5 * 9.5 < lefts[True] < 180 + 5 * 9.5  # binomial, n = 360


def test_single_images_and_pairs_do_not_get_in_each_others_way(tmp_path):
    desk_ = desk(tmp_path)
    single, _ = desk_.lease("g", "single", 2)
    pairs, _ = desk_.lease("g", "pairwise", 2)
    assert desk_.lease("g", "single", 2)[0] == single
    assert desk_.lease("g", "pairwise", 2)[0] == pairs


def test_an_item_is_found_without_the_table_and_only_for_its_grader(tmp_path):
    desk_ = desk(tmp_path)
    (item,), _ = desk_.lease("g", "single", 1)
    (pair,), _ = desk_.lease("g", "pairwise", 1)
    other = desk(tmp_path / "other")
    assert other.locate("g", item.item_id) == item
    assert other.locate("g", pair.item_id) == pair
    assert other.locate("g", other.item_id("g", item.unit, 1)).number == 1
    assert other.locate("h", item.item_id) is None
    assert desk_.locate("h", item.item_id) is None


def test_handing_out_a_control_or_a_repeat_takes_the_same_steps(tmp_path):
    desk_ = desk(tmp_path, shares=Shares(0.15, 0.15, 1.0), repeat_distance=5)
    steps: dict[str, list[int]] = {"control": [], "repeat": [], "candidate": []}
    statements: list[str] = []
    desk_.database.connection.set_trace_callback(statements.append)
    for place in range(110):
        statements.clear()
        found, _ = desk_.lease("g", "single", 1)
        taken = len(statements)
        finish(desk_, "g", *found)
        kind = "repeat" if found[0].number else "control" if found[0].unit in REAL else "candidate"
        if place >= 20:
            steps[kind].append(taken)
    means = [sum(counts) / len(counts) for counts in steps.values()]
    assert min(map(len, steps.values())) >= 10
    assert max(means) - min(means) < 0.5
