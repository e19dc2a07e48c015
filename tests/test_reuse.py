"""Runs that take over each other's steps: linked, not made again, waited for while another makes them."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
from test_workflow import ALL, Loop, few_objects_to_collect, loop  # noqa: F401 - fixtures

from pathalign import workflow
from pathalign.ledger import Ledger, run_dirs


def other(loop: Loop, name: str) -> None:  # noqa: F811
    """Let the same stages run in another directory."""
    loop.run_dir = loop.run_dir.parent / name


def go(loop: Loop, **sections) -> dict[str, str]:  # noqa: F811
    """What became of each folder."""
    results = workflow.execute(workflow.plan(sections, loop.run_dir), loop.run_dir, reuse=loop.run_dir.parent)
    return {result.folder.name: result.status for result in results}


def test_a_step_that_another_run_made_is_linked_and_counts_as_its_own(loop):  # noqa: F811
    assert set(go(loop).values()) == {"made"}
    first = loop.run_dir
    other(loop, "second")
    assert go(loop) == dict.fromkeys(ALL, "taken")
    for name in ALL:
        assert (first / name / "text").samefile(loop.run_dir / name / "text")
    shutil.rmtree(first)
    assert go(loop) == dict.fromkeys(ALL, "kept")
    assert Ledger(loop.run_dir).steps["base"]["wall_s"] >= 0


def test_only_steps_of_the_same_settings_and_inputs_are_taken_over(loop):  # noqa: F811
    go(loop)
    other(loop, "second")
    found = go(loop, pretrain={"suffix": "+"}, report={"suffix": ""})
    assert found == {"data": "taken", "grader": "taken", "judge": "taken", "base": "made", "report": "made"}
    assert (loop.run_dir / "report" / "text").read_text() == "cells+"


def test_a_folder_that_was_changed_since_is_not_taken_over(loop):  # noqa: F811
    go(loop)
    (loop.run_dir / "grader" / "text").write_text("spoilt")
    other(loop, "second")
    assert go(loop)["grader"] == "made"


def test_a_copy_with_other_times_is_taken_over_all_the_same(loop):  # noqa: F811
    go(loop)
    shutil.copytree(loop.run_dir, loop.run_dir.parent / "copied", copy_function=shutil.copy)
    shutil.rmtree(loop.run_dir)
    other(loop, "second")
    assert set(go(loop).values()) == {"taken"}


def test_one_of_two_runs_makes_a_step_and_the_other_waits_for_it(loop, monkeypatch):  # noqa: F811
    work = loop.work

    def slowly(output_dir, text):
        time.sleep(0.3)
        work(output_dir, text)

    loop.work = slowly
    first, second = loop.run_dir, loop.run_dir.parent / "second"
    found = {}

    def run(folder):
        results = workflow.execute(workflow.plan({}, folder), folder, reuse=folder.parent)
        found[folder.name] = [result.status for result in results]

    threads = [threading.Thread(target=run, args=(folder,)) for folder in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(loop.made) == sorted(ALL)  # each once
    assert [sorted(pair) for pair in zip(*found.values(), strict=True)] == [["made", "taken"]] * len(ALL)


def test_run_directories_are_found_down_to_the_fourth_folder(tmp_path):
    for place in ("", "a", "a/b", "a/b/c", "a/b/c/d", "a/b/c/d/e"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "stages.json").write_text("{}")
    found = [path.relative_to(tmp_path).as_posix() for path in run_dirs(tmp_path)]
    assert found == [".", "a", "a/b", "a/b/c", "a/b/c/d"]


@pytest.mark.parametrize("dropped", [("control",), ("best_of_n",), ("control", "best_of_n")])
def test_what_no_evaluation_reads_is_not_made(dropped, tmp_path):
    values = {"evaluate": dict.fromkeys(dropped)}
    folders = {job.step.folder for job in workflow.plan(values, tmp_path)}
    unwanted = {"control": {"control", "samples_control"}, "best_of_n": {"samples_best_of_n"}}
    everything = {job.step.folder for job in workflow.plan({}, tmp_path)}
    assert everything - folders == set().union(*(unwanted[name] for name in dropped))


def test_what_is_asked_for_with_from_is_made_and_not_taken_over(loop):  # noqa: F811
    go(loop)
    other(loop, "second")
    plan = workflow.plan({}, loop.run_dir)
    results = workflow.execute(plan, loop.run_dir, start="graders", reuse=loop.run_dir.parent)
    assert [result.status for result in results] == ["taken", "taken", "made", "made", "made"]


def test_a_broken_run_beside_it_harms_no_other(loop):  # noqa: F811
    go(loop)
    (loop.run_dir / "stages.json").write_text("{}")
    other(loop, "second")
    assert set(go(loop).values()) == {"made"}
