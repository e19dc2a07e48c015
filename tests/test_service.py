"""The grading service with a real outbox: resuming, correcting, restoring, blinding, and twenty graders at once."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from small_study import answer, grade_on, images, make_study, serve

from pathalign.grades import current_grades
from pathalign.grading.sinks import FolderSink, SinkError
from pathalign.images import decode
from pathalign.schema import Grade, InputError


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("PATHALIGN_STUDY_SECRET", "the same after a wiped disk")


@pytest.fixture
def service(tmp_path):
    service = serve(tmp_path, make_study(tmp_path))
    yield service
    service.close()


def submit(service, item, grade_id, verdict="plausible", **more):
    reply = service.submit("grader-1", [answer(item, grade_id, verdict, **more)])
    assert reply["refused"] == [] and reply["recorded"] == [grade_id]
    return reply


def test_the_opening_has_all_that_the_page_shows_and_records_the_session(service):
    opening = service.opening("grader-1", {"session_id": "s1", "colour_note": "calibrated", "name": "Anna"})
    assert opening["study"]["modes"] == ["single", "grid", "pairwise"]
    assert opening["study"]["classes"][0] == {"name": "a", "display_name": "a", "description": "", "subtypes": []}
    assert opening["study"]["criteria"][0]["question"].endswith("?")
    assert {name: len(urls) for name, urls in opening["references"].items()} == {"a": 2, "b": 2, "c": 2}
    assert opening["progress"] == {"done": 0, "total": 75, "today": 0, "per_hour": None, "unsaved": 1}
    (row,) = service.outbox.rows("session")
    assert (row["session_id"], row["grader"], row["colour_note"]) == ("s1", "grader-1", "calibrated")
    assert "Anna" not in json.dumps(row)
    assert service.opening("grader-1", {})["session"]


def test_two_graders_in_one_tab_have_a_session_each(service):
    first = service.opening("grader-1", {"session_id": "s1"})["session"]
    assert service.opening("grader-1", {"session_id": "s1"})["session"] == first == "s1"
    second = service.opening("grader-2", {"session_id": "s1", "colour_note": "calibrated"})["session"]
    assert second != "s1"
    kept = {row["session_id"]: (row["grader"], row["colour_note"]) for row in service.outbox.rows("session")}
    assert kept == {"s1": ("grader-1", None), second: ("grader-2", "calibrated")}


def test_another_browser_goes_on_where_the_first_one_was(service):
    (first,) = service.next_items("grader-1", "single", 1)["items"]
    more = service.next_items("grader-1", "single", 2, [first["item_id"]])["items"]
    submit(service, first, "g1")
    again = service.next_items("grader-1", "single", 2)["items"]
    assert again == more
    assert service.history("grader-1")["items"][0]["item_id"] == first["item_id"]


def test_a_restarted_server_knows_open_items_and_answers(tmp_path):
    study = make_study(tmp_path)
    service = serve(tmp_path, study)
    grade_on(service, "grader-1", 30)
    held = service.next_items("grader-1", "single", 3)
    history = service.history("grader-1")
    service.close()
    service = serve(tmp_path, study)
    assert service.next_items("grader-1", "single", 3)["items"] == held["items"]
    assert service.history("grader-1") == history
    assert service.progress("grader-1")["done"] == 30
    service.close()


def test_a_wiped_disk_is_made_again_from_the_sink(tmp_path):
    study = make_study(tmp_path, graders_per_image=2)
    service = serve(tmp_path, study)
    items = [service.next_items("grader-1", "single", 1)["items"][0]]
    submit(service, items[0], "first")
    submit(service, items[0], "corrected", "unsure", supersedes="first")
    grade_on(service, "grader-1", 39)
    grade_on(service, "grader-2", 10, "grid")
    grade_on(service, "grader-2", 5, "pairwise")
    held = service.next_items("grader-1", "single", 2)["items"]
    before = [service.history("grader-1"), service.history("grader-2"), service.results_inputs()]
    service.close()
    shutil.rmtree(tmp_path / "state")
    service = serve(tmp_path, study)
    assert [service.history("grader-1"), service.history("grader-2")] == before[:2]
    after = service.results_inputs()
    assert after.showings == before[2].showings and sum(after.showings.values()) >= 1
    assert set(after.grades) == set(before[2].grades) and set(after.preferences) == set(before[2].preferences)
    submit(service, held[1], "after-the-wipe")  # the browser still shows it
    done = {item["item_id"] for item in service.history("grader-1", 200)["items"]}
    assert len(done) == 41
    rest = grade_on(service, "grader-1", 200)
    assert not set(rest) & done
    service.close()


def test_what_a_wiped_disk_has_forgotten_can_be_sent_again(tmp_path):
    study = make_study(tmp_path)
    service = serve(tmp_path, study)
    items = service.next_items("grader-1", "single", 3)["items"]
    rows = [answer(items[0], "g0"), answer(items[1], "g1"), answer(items[1], "g2", "unsure", supersedes="g1")]
    service.submit("grader-1", rows[:1])
    service.outbox.flush()
    service.submit("grader-1", rows[1:])
    service.outbox.database.close()  # killed before it could send
    shutil.rmtree(tmp_path / "state")
    service = serve(tmp_path, study)
    assert service.saved("grader-1", ["g0", "g1", "g2"]) == {"saved": ["g0"], "unknown": ["g1", "g2"]}
    reply = service.submit("grader-1", rows[1:])
    assert (reply["recorded"], reply["refused"]) == (["g1", "g2"], [])
    assert service.saved("grader-1", ["g1", "g2"])["unknown"] == []
    service.close()


def test_an_image_that_has_left_the_study_is_refused_without_blocking_the_others(tmp_path):
    study = make_study(tmp_path)
    service = serve(tmp_path, study)
    items = service.next_items("grader-1", "single", 60)["items"]
    service.close()
    images(60, 0).select(range(30)).save(tmp_path / "fewer")
    service = serve(tmp_path, make_study(tmp_path, candidates=str(tmp_path / "fewer")))
    reply = service.submit("grader-1", [answer(item, f"g{number}") for number, item in enumerate(items)])
    assert len(reply["recorded"]) > 10
    assert len(reply["refused"]) > 10
    shown = {f"g{number}": item["item_id"] for number, item in enumerate(items)}
    for entry in reply["refused"]:
        item_id = shown[entry["grade_id"]]
        assert entry["reason"] == f"The item '{item_id}' is no longer part of the study; load the page again."
    service.close()


def test_without_its_sink_a_server_starts_with_what_it_has_but_not_from_nothing(tmp_path, monkeypatch, capsys):
    study = make_study(tmp_path)
    service = serve(tmp_path, study)
    grade_on(service, "grader-1", 3)
    service.close()

    def unreachable(self, prefix):
        raise SinkError("The sink cannot be reached.")

    monkeypatch.setattr(FolderSink, "list", unreachable)
    with pytest.raises(InputError, match="cannot be reached"):
        serve(tmp_path, study, state="fresh")
    service = serve(tmp_path, study)
    assert service.progress("grader-1")["done"] == 3
    assert "Going on with the grades that are here" in capsys.readouterr().err
    service.close()


def test_what_a_killed_server_recorded_but_did_not_index_is_indexed_at_the_next_start(tmp_path, monkeypatch):
    study = make_study(tmp_path)
    service = serve(tmp_path, study)
    (item,) = service.next_items("grader-1", "single", 1)["items"]
    with monkeypatch.context() as killed:
        killed.setattr(service.answers, "add", lambda answers: None)
        submit(service, item, "g1")
    service.close()
    service = serve(tmp_path, study)
    assert service.history("grader-1")["items"][0]["item_id"] == item["item_id"]
    assert service.submit("grader-1", [answer(item, "g1")])["recorded"] == ["g1"]
    assert len(service.outbox.rows("grade")) == 1
    service.close()


def test_a_row_sent_twice_counts_once(service):
    (item,) = service.next_items("grader-1", "single", 1)["items"]
    row = answer(item, "g1")
    first = service.submit("grader-1", [row, row])
    second = service.submit("grader-1", [{**row, "verdict": "unsure"}])
    assert first["recorded"] == second["recorded"] == ["g1"]
    assert [grade["verdict"] for grade in service.outbox.rows("grade")] == ["plausible"]
    assert second["progress"]["done"] == 1


def test_one_bad_row_does_not_block_the_others(service):
    items = service.next_items("grader-1", "single", 3)["items"]
    foreign = service.next_items("grader-2", "single", 1)["items"][0]
    rows = [
        answer(items[0], "good"),
        answer(items[1], "bad", "excellent"),
        None,
        answer(foreign, "foreign"),
        answer({"item_id": "0" * 32}, "nothing"),
        answer(items[1], "choice", "left", "pairwise"),
        answer(items[2], "also-good", "unsure"),
    ]
    reply = service.submit("grader-1", rows)
    assert reply["recorded"] == ["good", "also-good"]
    assert [entry["grade_id"] for entry in reply["refused"]] == ["bad", None, "foreign", "nothing", "choice"]
    reasons = [entry["reason"] for entry in reply["refused"]]
    assert reasons[0].startswith("The verdict is 'excellent'; it must be one of plausible")
    assert reasons[2] == f"The item '{foreign['item_id']}' was never handed out to you; load the page again."
    assert reasons[4].endswith("was handed out in mode single; it cannot be answered in mode pairwise.")


def test_an_id_that_somebody_else_used_is_refused(service):
    mine, yours = (service.next_items(grader, "single", 1)["items"][0] for grader in ("grader-1", "grader-2"))
    submit(service, mine, "g1")
    service.opening("grader-1", {"session_id": "s1"})
    for taken in ("g1", "s1"):
        reply = service.submit("grader-2", [answer(yours, taken)])
        assert reply["recorded"] == [] and f"has the id '{taken}' already" in reply["refused"][0]["reason"]
    assert service.submit("grader-2", [answer(yours, "g2")])["recorded"] == ["g2"]


def test_a_correction_is_a_new_row_that_names_the_old_one(service):
    first, second = service.next_items("grader-1", "single", 2)["items"]
    reply = service.submit(
        "grader-1",
        [answer(first, "g1"), answer(second, "g2"), answer(first, "g3", "unsure", supersedes="g1")],
    )
    assert reply["recorded"] == ["g1", "g2", "g3"] and reply["progress"]["done"] == 2
    for other in ("g2", "unknown"):
        refused = service.submit("grader-1", [answer(first, "g4", supersedes=other)])["refused"]
        wanted = "it must name an earlier answer of yours to the same item."
        assert refused[0]["reason"] == f"`supersedes` is '{other}'; {wanted}"
    standing = current_grades(service.results_inputs().grades)
    assert {grade.grade_id for grade in standing.grades} == {"g2", "g3"}
    assert [item["answer"]["grade_id"] for item in service.history("grader-1")["items"]] == ["g2", "g3"]


def test_answers_of_two_browsers_to_one_item_make_one_chain(service):
    (item,) = service.next_items("grader-1", "single", 1)["items"]
    submit(service, item, "g1")
    submit(service, item, "g2", "unsure")
    submit(service, item, "g3", "plausible", supersedes="g1")
    rows = {row["grade_id"]: row["supersedes"] for row in service.outbox.rows("grade")}
    assert rows == {"g1": None, "g2": "g1", "g3": "g2"}
    assert [grade.grade_id for grade in current_grades(service.results_inputs().grades).grades] == ["g3"]


def test_a_grade_that_comes_after_the_lease_went_to_somebody_else_is_kept(service):
    late = service.next_items("grader-1", "single", 60)["items"]
    service.clock.now += 31 * 60
    taken = service.next_items("grader-2", "single", 60)["items"]
    assert len(late) == len(taken) == 60
    reply = service.submit("grader-1", [answer(item, f"late-{n}") for n, item in enumerate(late)])
    assert len(reply["recorded"]) == len(late) and reply["refused"] == []
    reply = service.submit("grader-2", [answer(item, f"other-{n}") for n, item in enumerate(taken)])
    assert len(reply["recorded"]) == len(taken)
    assert len(service.outbox.rows("grade")) == len(late) + len(taken)


def test_saved_is_said_only_of_what_is_in_the_sink_and_ones_own(service):
    (item,) = service.next_items("grader-1", "single", 1)["items"]
    assert submit(service, item, "g1")["saved"] == []
    assert service.saved("grader-1", ["g1"]) == {"saved": [], "unknown": []}
    assert service.progress("grader-1")["unsaved"] == 1
    service.outbox.flush()
    assert service.saved("grader-1", ["g1", "g2"]) == {"saved": ["g1"], "unknown": ["g2"]}
    assert service.saved("grader-2", ["g1"]) == {"saved": [], "unknown": ["g1"]}
    assert service.submit("grader-1", [answer(item, "g1")])["saved"] == ["g1"]
    assert service.progress("grader-1")["unsaved"] == 0


def test_a_kept_grade_says_what_was_done_and_nothing_that_was_hidden(service):
    (item,) = service.next_items("grader-1", "single", 1)["items"]
    more = {"failed_criteria": ["cell_size"], "subtype": "band", "confidence": 0.5, "comment": "<i>pale</i>"}
    submit(service, item, "g1", "implausible", session="s1", active_ms=900, idle_ms=10, hidden_ms=0, **more)
    (row,) = service.outbox.rows("grade")
    grade = Grade.from_mapping(row)
    assert (grade.grader, grade.class_label, grade.session) == ("grader-1", item["class_label"], "s1")
    assert (grade.active_ms, grade.idle_ms, grade.hidden_ms) == (900, 10, 0)
    assert (grade.failed_criteria, grade.subtype, grade.comment) == (("cell_size",), "band", "<i>pale</i>")
    assert (grade.drawn_by, grade.recorded_at) == ("random", "2026-02-02T02:40:00.000Z")
    assert not {"kind", "seed", "reward", "repeat", "item_id", "name"} & set(row)
    assert service.history("grader-1")["items"][0]["answer"] == {
        "grade_id": "g1",
        "verdict": "implausible",
        "recorded_at": grade.recorded_at,
        **more,
    }


def test_a_preference_names_its_images_as_they_stood(service):
    (pair,) = service.next_items("grader-1", "pairwise", 1)["items"]
    reply = service.submit("grader-1", [answer(pair, "p1", "left", "pairwise", active_ms=5)])
    assert reply["recorded"] == ["p1"] and reply["progress"]["done"] == 1
    (kept,) = service.results_inputs().preferences
    assert (kept.choice, kept.active_ms, kept.class_label) == ("left", 5, pair["class_label"])
    for side, image_id in (("left", kept.left_image_id), ("right", kept.right_image_id)):
        assert np.array_equal(decoded(pair[side]), service.catalogue.pixels(image_id) & 0xFE)
        assert np.array_equal(decoded(service.picture(image_id)), decoded(pair[side]))
    assert service.history("grader-1")["items"][0]["answer"]["choice"] == "left"
    assert service.next_items("grader-1", "single", 1)["progress"]["done"] == 0


def decoded(url: str) -> np.ndarray:
    """Pixels of a data URL without their lowest bits."""
    return decode(base64.b64decode(url.partition(",")[2])) & 0xFE


def test_a_grid_stores_one_row_an_image(service):
    found = service.next_items("grader-1", "grid", 1)
    assert len(found["items"]) > 10 and len({item["class_label"] for item in found["items"]}) == 1
    rows = [answer(item, f"g{n}", mode="grid") for n, item in enumerate(found["items"])]
    assert service.submit("grader-1", rows)["progress"]["done"] == len(rows)
    assert {row["mode"] for row in service.outbox.rows("grade")} == {"grid"}
    assert len({row["image_id"] for row in service.outbox.rows("grade")}) == len(rows)


@pytest.mark.parametrize("mode", ["single", "grid", "pairwise"])
def test_nothing_that_a_browser_gets_tells_kinds_repeats_or_image_ids(tmp_path, mode):
    study = make_study(tmp_path, count=200, repeat_share=0.2, real_control_share=0.2)
    service = serve(tmp_path, study)
    received, totals, shown = [service.opening("grader-1", {})], set(), []
    verdict, keys = ("left", ("left", "right")) if mode == "pairwise" else ("plausible", ("image",))
    while len(shown) < 150:
        found = service.next_items("grader-1", mode, 1)
        totals.add(found["progress"]["total"])
        rows = [answer(item, item["item_id"], verdict, mode, session="s") for item in found["items"]]
        shown += found["items"]
        received += [found, service.submit("grader-1", rows)]
    assert received[-1]["refused"] == []
    received.append(service.history("grader-1", 200))
    text = json.dumps(received)
    inputs = service.results_inputs()
    kinds = Counter(inputs.images[grade.image_id]["kind"] for grade in inputs.grades)
    if mode == "pairwise":
        assert len(inputs.preferences) == 150
    else:
        assert kinds["real control"] > 15 and len(inputs.repeats) > 15
    assert not [image_id for image_id in inputs.images if image_id in text]
    for word in ("synthetic", "control", "repeat", "seed", "reward", "kind", "uncertainty", str(tmp_path)):
        assert f'"{word}' not in text
    assert len(totals) == 1
    urls = [item[key] for item in shown for key in keys]
    assert len({item["item_id"] for item in shown}) == len(shown) and len(set(urls)) == len(urls)
    assert len({len(url) for url in urls}) == 1
    assert {frozenset(item) for item in shown} == {frozenset({"item_id", "class_label", *keys})}
    assert {len(url) for urls in received[0]["references"].values() for url in urls} == {len(shown[0][keys[0]])}
    service.close()


def test_results_inputs_tell_kinds_and_repeats_to_the_owner(service):
    grade_on(service, "grader-1", 70)
    inputs = service.results_inputs()
    assert Counter(entry["kind"] for entry in inputs.images.values()) == {"synthetic": 60, "real control": 39}
    looks = Counter((grade.grader, grade.image_id) for grade in inputs.grades)
    twice = [key for key, count in looks.items() if count == 2]
    assert len(twice) == len(inputs.repeats) >= 3
    assert all(inputs.showings[grade.grade_id] in (0, 1) for grade in inputs.grades)
    assert service.picture(inputs.grades[0].image_id).startswith("data:image/png;base64,")
    with pytest.raises(InputError, match="no image"):
        service.picture("../secret")


def test_images_ordered_by_uncertainty_are_marked_and_a_fifth_stays_random(tmp_path):
    from pathalign.reward import RewardModel, RewardModelConfig

    torch.manual_seed(0)
    config = RewardModelConfig(class_names=["a", "b", "c"], convnet_channels=[4, 8], image_size_px=8)
    RewardModel(config).save_with_processor(tmp_path / "reward")
    study = make_study(tmp_path, order="uncertainty", reward_model=str(tmp_path / "reward"), repeat_distance=5)
    service = serve(tmp_path, study)
    grade_on(service, "grader-1", 40)
    inputs = service.results_inputs()
    drawn = Counter(grade.drawn_by for grade in inputs.grades if inputs.images[grade.image_id]["kind"] == "synthetic")
    assert drawn["random"] >= 0.2 * drawn.total() and drawn["uncertainty"] > 15
    controls = {g.drawn_by for g in inputs.grades if inputs.images[g.image_id]["kind"] == "real control"}
    assert controls == {"random"}
    marks = {(grade.image_id, grade.drawn_by) for grade in inputs.grades}
    assert len(marks) == len({image_id for image_id, _ in marks})  # a repeat is marked as its first look
    service.close()
    assert len(json.loads((tmp_path / "state" / "rewards.json").read_text())["rewards"]) == 48  # all but the random 12


def test_progress_counts_today_and_pace_without_pauses(service):
    for number in range(10):
        (item,) = service.next_items("grader-1", "single", 1)["items"]
        submit(service, item, f"g{number}")
        service.clock.now += 3600 if number == 4 else 5
    found = service.progress("grader-1")
    assert (found["done"], found["today"], found["per_hour"], found["total"]) == (10, 10, 720.0, 75)
    service.clock.now += 86_400
    assert service.progress("grader-1")["today"] == 0


def test_at_the_end_the_service_says_so(service):
    done = grade_on(service, "grader-1", 1000)
    found = service.next_items("grader-1", "single", 1)
    assert found["items"] == [] and found["done"]
    assert found["progress"]["done"] == found["progress"]["total"] == len(done)
    graded = {grade.image_id for grade in service.results_inputs().grades}
    assert set(service.catalogue.candidates) <= graded


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("singel", 1, []), "`mode` is 'singel'; it must be one of single, grid, pairwise"),
        (("single", 0, []), "`count` is 0"),
        (("single", "3", []), "`count` is '3'"),
        (("single", 1, "item"), "`exclude` has 'item'; it must be a list of ids"),
        (("single", 1, ["a", {}]), r"`exclude` has \[{}\]; it must be a list of ids"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(service, arguments, text):
    with pytest.raises(InputError, match=text):
        service.next_items("grader-1", *arguments)


def test_a_mode_that_the_study_does_not_offer_is_refused(tmp_path):
    service = serve(tmp_path, make_study(tmp_path, modes=["grid"]))
    with pytest.raises(InputError, match="`mode` is 'single'; it must be one of grid"):
        service.next_items("grader-1", "single", 1)
    (item, *_) = service.next_items("grader-1", "grid", 1)["items"]
    assert "it must be one of grid" in service.submit("grader-1", [answer(item, "g")])["refused"][0]["reason"]
    service.close()


def test_twenty_graders_at_once_lose_nothing_and_share_the_images(tmp_path):
    service = serve(tmp_path, make_study(tmp_path, count=300, real=90, graders_per_image=2), time.time)
    start = threading.Barrier(20)

    def grade(number: int) -> int:
        start.wait()
        return len(grade_on(service, f"grader-{number}", 1000))

    with ThreadPoolExecutor(20) as pool:
        counts = list(pool.map(grade, range(20)))
    inputs = service.results_inputs()
    assert len(inputs.grades) == sum(counts) == len({grade.grade_id for grade in inputs.grades})
    first = [grade for grade in inputs.grades if inputs.showings[grade.grade_id] == 0]
    graders = Counter(grade.image_id for grade in first if inputs.images[grade.image_id]["kind"] == "synthetic")
    assert len(graders) == 300 and set(graders.values()) == {2}
    service.close()
