"""Which stages run, which are kept, and what an interruption leaves behind; with stages that only write text."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path

import pytest

from pathalign import stages, workflow
from pathalign.artefacts import artefact, partial_dir
from pathalign.config import ConfigError, StageConfig, option, parse_overrides
from pathalign.ledger import LEDGER_NAME
from pathalign.schema import InputError, RunRecord
from pathalign.stages import Stage, Step


@dataclass
class SourceConfig(StageConfig):
    """No input."""

    source: str = option("", "A file.")
    text: str = option("cells", "What is written.")
    seed: int = option(0, "Seed.")


@dataclass
class CopyConfig(StageConfig):
    """One input."""

    source: str = option("", "An artefact.")
    suffix: str = option("", "What is added.")
    note: str = option("", "Changes nothing that is written.")
    kind: str = option("plain", "Kind.")
    architecture: str = option("one", "Network.")
    seed: int = option(0, "Seed.")


class Loop:
    """Runs the fake stages in one directory and remembers which folders were made."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.made, self.interrupt_in = run_dir, [], ""
        self.resumed: list[str] = []

    def work(self, output_dir: Path, text: str) -> None:
        with artefact(output_dir) as folder:
            if (folder / "checkpoints").is_dir():
                self.resumed.append(output_dir.name)
            (folder / "checkpoints").mkdir(exist_ok=True)
            if self.interrupt_in == output_dir.name:
                raise KeyboardInterrupt
            (folder / "text").write_text(text)
            RunRecord("work", {}, metrics={"made": len(self.made)}).save(folder)
        self.made.append(output_dir.name)

    def write(self, config: SourceConfig, output_dir: Path) -> None:
        self.work(output_dir, config.text)

    def copy(self, config: CopyConfig, output_dir: Path) -> None:
        self.work(output_dir, (Path(config.source) / "text").read_text() + config.suffix)

    def __call__(self, start=None, until=None, new_grades=False, **sections) -> list[str]:
        """Names of the folders that this run made."""
        self.made = []
        workflow.execute(workflow.plan(sections, self.run_dir), self.run_dir, start, until, new_grades)
        return self.made


ALL = ["data", "base", "grader", "judge", "report"]


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect() -> Iterator[None]:
    """A run collects garbage after each step: what hundreds of tests before left in memory need not be gone through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def loop(tmp_path, monkeypatch):
    loop = Loop(tmp_path / "run")
    module = types.ModuleType("fake_stages")
    vars(module).update(write=loop.write, copy=loop.copy, SourceConfig=SourceConfig, CopyConfig=CopyConfig)
    monkeypatch.setitem(sys.modules, "fake_stages", module)
    copy = ("fake_stages:copy", "fake_stages:CopyConfig")
    table = (
        Stage("data", "fake_stages:write", "fake_stages:SourceConfig", (Step("data"),), files=("source",)),
        Stage("pretrain", *copy, (Step("base", {"source": "data"}),)),
        Stage(
            "graders",
            *copy,
            (
                Step("grader", {"source": "data"}, fixed={"kind": "grader"}),
                Step("judge", {"source": "data"}, {"suffix": "!", "architecture": "two"}, {"kind": "judge"}),
            ),
        ),
        Stage("report", *copy, (Step("report", {"source": "base"}),), inherits="pretrain", seed=lambda seed: seed + 10),
    )
    monkeypatch.setattr(stages, "STAGES", table)
    monkeypatch.setattr(workflow, "STAGES", table)
    return loop


def test_all_stages_run_once_in_order_and_unchanged_ones_are_kept(loop, capsys):
    assert loop() == ALL
    assert (loop.run_dir / "report" / "text").read_text() == "cells"
    assert loop() == []
    assert capsys.readouterr().err.count("unchanged, not run again") == len(ALL)


def test_a_changed_stage_and_those_that_read_it_run_again(loop):
    loop()
    assert loop(pretrain={"suffix": "+"}, report={"suffix": ""}) == ["base", "report"]
    assert loop(pretrain={"suffix": "+"}, report={"suffix": ""}, data={"text": "other"}) == ALL


def test_one_part_of_a_stage_can_be_changed_alone(loop):
    loop()
    assert loop(graders={"judge": {"suffix": "?"}}) == ["judge"]
    assert (loop.run_dir / "judge" / "text").read_text() == "cells?"


def test_a_stage_that_writes_the_same_again_spares_those_after_it(loop):
    loop()
    assert loop(pretrain={"note": "new"}, report={"note": ""}) == ["base"]


def test_a_changed_input_file_of_the_users_counts(loop, tmp_path):
    source = tmp_path / "source"
    source.write_text("1")
    data = {"source": str(source)}
    assert loop(data=data) == ALL
    assert loop(data=data) == []
    source.write_text("22")
    assert loop(data=data) == ["data"]


@pytest.mark.parametrize("spelling", ["{name}", "{name}=0.5"])
def test_an_edited_reward_function_counts(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "pathalign_test_rewards" / "colour.py"
    module.parent.mkdir()
    module.write_text("def red(images, labels): ...\n")
    source = spelling.format(name="pathalign_test_rewards.colour:red")
    key = "reward_model" if source.endswith("red") else "other_rewards"
    align = {"method": "ddpo", key: source if key == "reward_model" else [source]}
    job = next(job for job in workflow.plan({"align": align}, tmp_path / "run") if job.stage.name == "align")
    contents = dict.fromkeys(("base", "data", "reward", "judge", "held_out_reward", "feedback"), "made before")
    first = workflow._key(job, contents)
    assert workflow._key(job, contents) == first
    module.write_text("def red(images, labels): return images[:, 0]\n")
    assert workflow._key(job, contents) != first


@pytest.mark.parametrize("harm", ["deleted", "altered"])
def test_a_folder_that_was_deleted_or_altered_is_made_again(loop, harm):
    loop()
    if harm == "deleted":
        shutil.rmtree(loop.run_dir / "base")
    else:
        (loop.run_dir / "base" / "text").write_text("tampered")
    assert loop() == ["base"]
    assert (loop.run_dir / "base" / "text").read_text() == "cells"


def test_a_touched_or_moved_directory_with_the_same_contents_is_kept(loop, tmp_path):
    loop()
    (loop.run_dir / "base" / "text").write_text("cells")
    loop.run_dir = loop.run_dir.rename(tmp_path / "moved")
    assert loop() == []


def test_until_ends_early_and_from_runs_again(loop):
    assert loop(until="pretrain") == ["data", "base"]
    assert loop() == ["grader", "judge", "report"]
    assert loop(start="graders") == ["grader", "judge", "report"]
    assert loop(start="pretrain", until="pretrain") == ["base"]
    assert loop(start="pretrain", until="pretrain") == ["base"]


def test_new_grades_are_looked_for_whenever_that_is_asked_for_and_at_no_other_time(loop, monkeypatch):
    come = count()
    vars(sys.modules["fake_stages"])["look"] = lambda config, output_dir: loop.work(output_dir, str(next(come)))
    settings = "fake_stages:CopyConfig"
    table = (
        Stage("data", "fake_stages:write", "fake_stages:SourceConfig", (Step("data"),)),
        Stage("grade", "fake_stages:look", settings, (Step("grades", {"source": "data"}),)),
        Stage("feedback", "fake_stages:copy", settings, (Step("feedback", {"source": "grades"}),)),
    )
    for module in (stages, workflow):
        monkeypatch.setattr(module, "STAGES", table)
    assert loop() == ["data", "grades", "feedback"]
    loop.interrupt_in = "feedback"
    with pytest.raises(KeyboardInterrupt):
        loop(new_grades=True)
    loop.interrupt_in = ""
    assert loop(new_grades=True) == ["grades", "feedback"]  # more may have come since the run that failed
    assert loop(new_grades=True, until="data") == []
    assert loop() == []
    loop.interrupt_in = "grades"
    with pytest.raises(KeyboardInterrupt):
        loop(new_grades=True)
    assert loop() == []  # a look that failed takes away nothing


def test_wrong_stages_are_refused_before_anything_runs(loop):
    with pytest.raises(ConfigError, match="did you mean `graders`"):
        loop(start="grader")
    with pytest.raises(ConfigError, match="`data` comes before `report`"):
        loop(start="report", until="data")
    assert loop.made == []


@pytest.mark.parametrize("start", [None, "pretrain"])
def test_after_ctrl_c_the_same_command_goes_on_where_it_was(loop, start):
    if start:
        loop()
    loop.interrupt_in = "grader"
    with pytest.raises(KeyboardInterrupt):
        loop(start=start)
    assert not loop.run_dir.joinpath("grader").exists() or start
    loop.interrupt_in = ""
    assert loop(start=start) == ["grader", "judge", "report"]
    assert loop.resumed == ["grader"]
    assert loop() == []


def test_what_other_settings_left_half_made_is_removed(loop):
    loop.interrupt_in = "base"
    with pytest.raises(KeyboardInterrupt):
        loop()
    assert partial_dir(loop.run_dir / "base").is_dir()
    loop.interrupt_in = ""
    assert loop(pretrain={"suffix": "+"}) == ["base", "grader", "judge", "report"]
    assert loop.resumed == []


def test_settings_come_from_the_run_the_section_and_its_parts(loop):
    sections = {"seed": 3, "pretrain": {"suffix": "a", "note": "n"}, "report": {"note": "own"}, "graders": {"seed": 7}}
    jobs = {job.step.folder: job for job in workflow.plan(sections, Path("x"))}
    assert jobs["data"].config.seed == 3 and jobs["report"].config.seed == 13 and jobs["judge"].config.seed == 7
    assert (jobs["report"].config.suffix, jobs["report"].config.note) == ("a", "own")
    assert (jobs["judge"].config.kind, jobs["judge"].config.suffix) == ("judge", "!")
    assert jobs["report"].config.source == str(Path("x") / "base")
    elsewhere = workflow.plan({"report": {"source": "elsewhere"}}, Path("x"))
    assert elsewhere[-1].config.source == "elsewhere"


def test_everything_wrong_in_all_sections_is_reported_together(loop):
    with pytest.raises(ConfigError) as caught:
        workflow.plan(
            {
                "pretrian": {},
                "seed": -1,
                "data": {"txet": "x", "text": 5},
                "graders": {"kind": "judge", "jduge": {}, "judge": {"sufix": ""}},
                "report": 3,
            },
            loop.run_dir,
        )
    message = str(caught.value)
    for text in (
        "did you mean `pretrain`",
        "`seed` is -1",
        "did you mean `text`",
        "`text` is 5",
        "`kind` is not known",
        "did you mean `judge`",
        "did you mean `suffix`",
        "`report` is 3",
    ):
        assert text in message
    assert not loop.run_dir.exists()


def test_a_judge_with_the_graders_network_is_refused(loop):
    with pytest.raises(ConfigError, match="grader and judge both have `architecture: three`"):
        loop(graders={"architecture": "three"})


def test_two_runs_cannot_work_in_one_directory(loop):
    loop.run_dir.mkdir()
    code = (
        "import sys, filelock\nlock = filelock.FileLock(sys.argv[1])\nlock.acquire()\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(loop.run_dir / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="Another pathalign run is working in"):
            loop()
        holder.kill()
    assert loop() == ALL


def test_a_run_directory_that_cannot_be_made_is_explained(loop, tmp_path):
    (tmp_path / "file").write_text("")
    loop.run_dir = tmp_path / "file" / "run"
    with pytest.raises(InputError, match=r"Cannot write to .*Choose another"):
        loop()


def test_an_unreadable_ledger_is_explained(loop):
    loop(until="data")
    (loop.run_dir / LEDGER_NAME).write_text("{")
    with pytest.raises(InputError, match="delete it"):
        loop()


def test_the_ledger_tells_time_and_memory_of_each_step(loop):
    loop()
    steps = json.loads((loop.run_dir / LEDGER_NAME).read_text())["steps"]
    assert sorted(steps) == sorted(ALL)
    assert all(entry["wall_s"] >= 0 and entry["peak_rss_mb"] > 1 for entry in steps.values())


def test_overrides_go_deep_and_read_numbers():
    overrides = parse_overrides(["reward.learning_rate=1e-4", "sample.best_of_n.best_of=8", "seed=3"])
    assert overrides == {"reward": {"learning_rate": 1e-4}, "sample": {"best_of_n": {"best_of": 8}}, "seed": 3}
    merged = workflow.merge({"reward": {"epochs": 2}, "seed": 1}, overrides)
    assert merged["reward"] == {"epochs": 2, "learning_rate": 1e-4} and merged["seed"] == 3
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["seed", "a=1", "a.b=2", "c=[1"])
    assert len(caught.value.problems) == 3


def test_the_real_table_reads_only_folders_that_earlier_steps_make():
    made: set[str] = set()
    for stage in stages.STAGES:
        for step in stage.steps:
            assert set(step.inputs.values()) <= made, step.folder
            made.add(step.folder)
    assert len(made) == 17  # two of them only where another step reads them


def test_measured_images_have_other_seeds_than_graded_ones_and_than_other_runs():
    ranges = []
    for seed in (0, 1, 2):
        jobs = {job.step.folder: job.config for job in workflow.plan({"seed": seed}, Path("x"))}
        same = {jobs[name].seed for name in jobs if name.startswith("samples_")}
        assert len(same) == 1
        ranges += [*same, jobs["candidates"].seed]
    ordered = sorted(ranges)
    assert all(later - earlier >= 100_000 for earlier, later in pairwise(ordered))


@dataclass
class WatchedConfig(CopyConfig):
    """Reads a folder that is made for it alone."""

    watcher: str = option("", "An artefact that watches.")


@pytest.fixture
def watched(loop, monkeypatch):
    """`loop` with a step `watcher` for stages that read it; the last stage does."""
    copy = ("fake_stages:copy", "fake_stages:CopyConfig")
    vars(sys.modules["fake_stages"])["WatchedConfig"] = WatchedConfig
    optional = Step(
        "watcher", {"source": "data"}, seed_offset=1, wanted_as="watcher", beside={"suffix": "half", "note": "n"}
    )
    last = {"source": "main", "watcher": "watcher"}
    table = (
        Stage("data", "fake_stages:write", "fake_stages:SourceConfig", (Step("data"),)),
        Stage("main", *copy, (Step("main", {"source": "data"}), optional)),
        Stage("last", "fake_stages:copy", "fake_stages:WatchedConfig", (Step("last", last),)),
    )
    for module in (stages, workflow):
        monkeypatch.setattr(module, "STAGES", table)
    return loop


def test_a_step_that_a_later_one_reads_is_made_and_changes_the_defaults_beside_it(watched):
    sections = {"seed": 4, "main": {"note": "own"}}
    jobs = {job.step.folder: job for job in workflow.plan(sections, Path("x"))}
    assert list(jobs) == ["data", "main", "watcher", "last"]
    assert (jobs["main"].config.suffix, jobs["main"].config.note) == ("half", "own")
    assert (jobs["watcher"].config.suffix, jobs["watcher"].config.seed) == ("", 5)
    assert jobs["last"].config.watcher == str(Path("x") / "watcher")
    assert [jobs[name].label for name in ("main", "watcher")] == ["main", "main (watcher)"]
    assert workflow.plan({"main": {"main": {"suffix": "all"}}}, Path("x"))[1].config.suffix == "all"


def test_a_step_that_no_later_one_reads_is_not_made(watched, monkeypatch):
    assert watched() == ["data", "main", "watcher", "last"]
    assert watched(last={"watcher": "elsewhere"}) == ["main", "last"]
    assert (watched.run_dir / "main" / "text").read_text() == "cells"
    vars(sys.modules["fake_stages"])["WatchedConfig"] = CopyConfig  # a method that nothing watches
    assert [job.step.folder for job in workflow.plan({}, Path("x"))] == ["data", "main", "last"]
    assert watched() == ["last"]


def test_the_default_method_needs_no_held_out_reward_model():
    folders = [job.step.folder for job in workflow.plan({}, Path("x"))]
    assert "reward" in folders and "held_out_reward" not in folders


def test_a_held_out_reward_model_learns_from_other_grades_by_another_network(monkeypatch):
    align = next(stage for stage in stages.STAGES if stage.name == "align")
    guarded = replace(align, settings="pathalign.settings.adapter:GuardedConfig")
    table = tuple(guarded if stage is align else stage for stage in stages.STAGES)
    monkeypatch.setattr(workflow, "STAGES", table)
    jobs = {job.step.folder: job.config for job in workflow.plan({}, Path("x"))}
    main, other = jobs["reward"], jobs["held_out_reward"]
    assert (main.grades, other.grades) == ("even", "odd")
    assert main.encoder != other.encoder and main.seed != other.seed
    adapter = jobs["adapter"]
    assert adapter.held_out_reward_model == str(Path("x") / "held_out_reward")
    assert adapter.judge == str(Path("x") / "judge")
    with pytest.raises(ConfigError, match=r"reward and held_out_reward both have `encoder: densenet`"):
        workflow.plan({"reward": {"encoder": "densenet"}}, Path("x"))
