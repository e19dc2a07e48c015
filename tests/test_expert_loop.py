"""A run that experts grade: it waits for what other processes send to the loopback Hub, and goes on in rounds."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hub import HubServer, serve
from small_study import grade_on, images
from small_study import serve as open_service
from test_loop import TINY, write_config

from pathalign import workflow
from pathalign.artefacts import fingerprint
from pathalign.config import ConfigError
from pathalign.feedback import build
from pathalign.grades import read_grades
from pathalign.grading import commission
from pathalign.grading.commission import collect
from pathalign.grading.pull import pull
from pathalign.grading.study import Study, study_secret
from pathalign.images import ImageSet
from pathalign.schema import Grade, InputError, RunRecord
from pathalign.settings.feedback import FeedbackConfig
from pathalign.settings.pull import CollectConfig, PullConfig

# A server's replica with one grader at its page: `python -c GRADER STUDY STATE NAME COUNT`.
GRADER = """
import sys
from pathalign.grading.outbox import Outbox
from pathalign.grading.service import GradingService
from pathalign.grading.sinks import open_sink
from pathalign.grading.study import Study

study, state, name, count = Study.load(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
outbox = Outbox(state, open_sink(study.sink))
service = GradingService(study, state, outbox)
for number in range(count):
    (item,) = service.next_items(name, "single", 1)["items"]
    said = {"grade_id": f"{name}-{item['item_id']}", "item_id": item["item_id"], "mode": "single"}
    failed = [study.checklist.criteria[0].name] if number % 2 else []
    said |= {"verdict": "implausible" if number % 2 else "plausible", "failed_criteria": failed}
    assert service.submit(name, [said])["refused"] == []
assert outbox.flush(30)
outbox.close()
"""
AGAIN = [
    "candidates",
    "grades",
    "feedback",
    "reward",
    "adapter",
    "samples_after",
    "samples_best_of_n",
    "evaluation",
]  # folders of a further round


class Lab:
    """A directory with a configuration, a Hub, and processes that work with both."""

    def __init__(self, folder: Path, hub: HubServer) -> None:
        self.folder, self.hub = folder, hub
        self.config = write_config(folder)
        values = {**yaml.safe_load(self.config.read_text()), "rounds": 2}
        values["grade"] = {"method": "pull", "source": "lab/grades", "poll_s": 0.3}
        self.config.write_text(yaml.safe_dump(values))
        self.environment = hub.variables(folder / "home")
        self.said: list[str] = []

    def start(self, *more: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "pathalign.cli", "run", str(self.config), "--output-dir", "run", "--json", *more]
        return subprocess.Popen(
            [*words, "--min-grades", "40"], env=self.environment, cwd=self.folder, text=True, **PIPES
        )

    def wait_for(self, process: subprocess.Popen[str], pattern: str) -> str:
        """Read what a run says until a line has the pattern."""
        assert process.stderr is not None
        for line in process.stderr:
            self.said.append(line)
            if re.search(pattern, line):
                return line
        raise AssertionError("".join(self.said[-20:]))

    def finish(self, process: subprocess.Popen[str]) -> dict:
        output, errors = process.communicate(timeout=200)
        self.said.append(errors)
        assert process.returncode == 0, errors[-3000:]
        return json.loads(output)

    def grade(self, study: str, state: str, name: str, count: int) -> None:
        words = [sys.executable, "-c", GRADER, study, state, name, str(count)]
        done = subprocess.run(words, env=self.environment, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with serve(tmp_path / "hub") as server:
        yield Lab(tmp_path, server)


def made(summary: dict) -> list[str]:
    return [step["folder"].removeprefix("run/") for step in summary["steps"] if step["status"] == "made"]


@pytest.mark.slow
@pytest.mark.hub
def test_a_run_waits_for_experts_through_a_kill_learns_from_them_and_draws_the_next_round_with_the_adapter(lab: Lab):
    process = lab.start()
    lab.wait_for(process, "pathalign grade serve run/study.yaml")
    lab.wait_for(process, "'lab/grades' .* does not exist")  # a Space is still to be deployed
    lab.hub.store.create("datasets", "lab/grades", private=True)
    lab.wait_for(process, "lab/grades: 0 of 40 grades")
    lab.grade("run/study.yaml", "one.state", "ada", 28)
    before = int(re.search(r"lab/grades: (\d+) of 40", lab.wait_for(process, "of 40 grades by 1 grader"))[1])
    assert 20 <= before < 40  # hidden controls are graded too, and are no candidates
    process.send_signal(signal.SIGKILL)
    process.communicate()

    process = lab.start()
    lab.wait_for(process, f"lab/grades: {before} of 40 grades")
    lab.grade("run/study.yaml", "two.state", "bob", 28)
    lab.wait_for(process, "evaluate: done")
    lab.wait_for(process, "pathalign grade serve run/round-2/study.yaml")
    run = lab.folder / "run"
    second = ImageSet.load(run / "round-2" / "candidates")
    assert set(second.columns["adapter"]) == {fingerprint(run / "adapter")}
    first = ImageSet.load(run / "candidates")
    assert not set(second.columns["seed"]) & set(first.columns["seed"])
    assert not set(second.image_ids) & set(first.image_ids)
    lab.wait_for(process, "lab/grades: 0 of 40 grades")
    lab.grade("run/round-2/study.yaml", "three.state", "ada", 56)
    summary = lab.finish(process)
    check_finished(lab, run, summary)
    assert lab.hub.token not in "".join(lab.said)

    asked = len(lab.hub.faults.requests)
    assert made(lab.finish(lab.start())) == []  # nobody asked for grades that came since
    assert len(lab.hub.faults.requests) == asked
    lab.grade("run/study.yaml", "four.state", "eve", 10)  # of round 1, and late
    summary = lab.finish(lab.start("--new-grades", "--until", "feedback", "--set", "reward.epochs=2"))
    assert made(summary) == ["grades", "round-2/grades", "round-2/feedback"]
    assert "kept, though settings or inputs have changed" in lab.said[-1]


def check_finished(lab: Lab, run: Path, summary: dict) -> None:
    """All folders of both rounds, and feedback that holds every grade of them."""
    assert {path.name for path in (run / "round-2").iterdir() if path.is_dir() and path.name[0] != "."} == set(AGAIN)
    assert made(summary)[-1] == "round-2/evaluation"
    grades = [read_grades(run / part / "grades") for part in ("", "round-2")]
    assert min(map(len, grades)) >= 40
    feedback = RunRecord.load(run / "round-2" / "feedback").metrics
    assert feedback["n_grades"] == sum(map(len, grades)) and feedback["simulated"] is False
    assert RunRecord.load(run / "feedback").metrics["n_grades"] == len(grades[0])
    repo = lab.hub.store.repo("datasets", "lab/grades", lab.hub.token)
    commits = [oid for oid, _, _ in lab.hub.store.history(repo, lab.hub.store.resolve(repo, "main"))]
    used = [RunRecord.load(run / part / "grades").inputs["grades"] for part in ("", "round-2")]
    assert commits.index(used[0]) > commits.index(used[1]) >= 0
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix in (".json", ".yaml", ".jsonl", ".md")]
    assert len(files) > 20 and not [path for path in files if lab.hub.token in path.read_text()]


def test_a_runs_study_goes_to_a_folder_and_graders_can_start_with_it_at_once(tmp_path: Path, capsys):
    run = tmp_path / "run"
    images(60, 0).save(run / "candidates")
    images(45, 1).save(run / "data")
    texts = {"title": "Round one", "classes": {"a": {"display_name": "alpha"}}, "graders": ["Ada"], "reason_for": []}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**texts, "references": "run/data", "sink": "elsewhere"}))
    config = CollectConfig(candidates=str(run / "candidates"), study=str(tmp_path / "mine.yaml"), min_grades=12)
    hurried = CollectConfig(**{**vars(config), "timeout_s": 0.1, "poll_s": 0.1, "min_grades": 70})
    with pytest.raises(InputError, match=r"0 of 70 grades .* after 0.1 s\. Run the same command to wait on\.$"):
        collect(hurried, run / "grades")
    said = capsys.readouterr().err
    assert f"pathalign grade serve {run / 'study.yaml'}" in said and "space deploy" not in said
    assert "asks for 1 x 60 grades, fewer than `min_grades` (70)" in said

    study = Study.load(run / "study.yaml")
    assert (study.title, study.class_text("a").display_name) == ("Round one", "alpha")
    assert study.sink == str(run / "expert_grades") and study.references == str(run / "data")
    service = open_service(tmp_path, study)
    grade_on(service, "grader-1", 20)
    assert service.outbox.flush()
    record = collect(config, run / "grades")
    assert record.metrics["n_grades"] >= 12 and record.metrics["n_grades"] + record.metrics["unknown_images"] == 20

    (run / "study.yaml").write_text((run / "study.yaml").read_text() + "# a note of the lab's\n")
    collect(config, run / "grades")
    assert "a note of the lab's" in (run / "study.yaml").read_text()
    moved = run.rename(tmp_path / "moved")
    assert Study.load(moved / "study.yaml").sink == str(moved / "expert_grades")


def test_a_run_without_a_source_gathers_grades_in_its_own_folder_wherever_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    images(12, 0).save(tmp_path / "run" / "candidates")
    config = CollectConfig(candidates="run/candidates", references=None, min_grades=1, timeout_s=0.1, poll_s=0.1)
    with pytest.raises(InputError, match=r"expert_grades has 0 of 1 grades"):
        collect(config, "run/grades")
    assert yaml.safe_load(Path("run/study.yaml").read_text())["sink"] == "expert_grades"
    assert Study.load("run/study.yaml").sink == str(tmp_path / "run" / "expert_grades")
    assert "space deploy" not in capsys.readouterr().err


def test_a_study_sends_grades_to_the_dataset_and_not_to_the_revision_that_the_run_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stopped(config: CollectConfig, output_dir: Path) -> RunRecord:
        raise InputError(f"would pull {config.source} at {config.revision}")

    monkeypatch.setattr(commission, "pull", stopped)
    images(12, 0).save(tmp_path / "candidates")
    config = CollectConfig(source="lab/grades@pilot", candidates=str(tmp_path / "candidates"), references=None)
    with pytest.raises(InputError, match="would pull hf://datasets/lab/grades at pilot"):
        collect(config, tmp_path / "grades")
    assert Study.load(tmp_path / "study.yaml").sink == "hf://datasets/lab/grades"


def test_simulated_grades_are_none_of_those_that_a_run_by_experts_waits_for(tmp_path: Path):
    images(12, 0).save(tmp_path / "candidates")
    made = ImageSet.load(tmp_path / "candidates")
    pairs = list(zip(made.image_ids, made.labels(), strict=True))
    said = [Grade(f"g{n}", *pair, "plausible", f"simulated-{n % 2}", simulated=True) for n, pair in enumerate(pairs)]
    said[0] = Grade("g0", *pairs[0], "plausible", "grader-1")
    (tmp_path / "in" / "grades").mkdir(parents=True)
    (tmp_path / "in" / "grades" / "all.jsonl").write_text("".join(f"{grade.to_json()}\n" for grade in said))
    given = {"source": str(tmp_path / "in"), "candidates": str(tmp_path / "candidates"), "timeout_s": 0.1}
    with pytest.raises(InputError, match=r"1 of 5 grades by 1 grader \(a 1, b 0, c 0\) and 11 simulated, which do not"):
        collect(CollectConfig(**given, references=None, min_grades=5), tmp_path / "grades")
    record = collect(CollectConfig(**given, references=None, min_grades=1), tmp_path / "grades")
    assert (record.metrics["n_grades"], record.metrics["n_simulated"], record.metrics["lacking"]) == (12, 11, 11)
    assert pull(PullConfig(**given, min_grades=5), tmp_path / "pulled").metrics["lacking"] == 0


def test_graders_keep_their_pseudonyms_from_round_to_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.delenv("PATHALIGN_STUDY_SECRET", raising=False)
    images(12, 0).save(tmp_path / "candidates")
    given = {"candidates": str(tmp_path / "candidates"), "references": None, "timeout_s": 0.1, "min_grades": 1}
    for number in (1, 2, 3):
        last = str(tmp_path / f"{number - 1}" / "study.yaml") if number > 1 else None
        (tmp_path / f"{number}").mkdir()
        with pytest.raises(InputError, match="0 of 1 grades"):
            collect(CollectConfig(**given, study=last), tmp_path / f"{number}" / "grades")
        if number == 1:
            secret = study_secret(tmp_path / "1" / "study.state")  # as its server makes it
        if number == 2:
            assert study_secret(tmp_path / "2" / "study.state") == secret
            assert (tmp_path / "2" / "study.state" / "secret").stat().st_mode & 0o077 == 0
            (tmp_path / "2" / "study.state" / "secret").unlink()  # graded elsewhere
            assert "PATHALIGN_STUDY_SECRET" not in capsys.readouterr().err
    assert "keeps a pseudonym only if PATHALIGN_STUDY_SECRET is the same here" in capsys.readouterr().err


def test_a_further_round_repeats_what_depends_on_grades_and_joins_all_of_them():
    run = Path("x")
    plans = {rounds: workflow.plan({"rounds": rounds, "seed": 1}, run) for rounds in (1, 3)}
    assert plans[3][: len(plans[1])] == plans[1]
    jobs = {job.step.folder: job.config for job in plans[3]}
    later = [name for name in jobs if name.startswith("round-3/")]
    assert [name.removeprefix("round-3/") for name in later] == AGAIN
    assert [jobs[name].adapter for name in ("candidates", "round-2/candidates", "round-3/candidates")] == [
        None,
        "x/adapter",
        "x/round-2/adapter",
    ]
    assert jobs["round-3/feedback"].grades == ["x/grades", "x/round-2/grades", "x/round-3/grades"]
    assert jobs["round-3/feedback"].candidates[1:] == ["x/round-2/candidates", "x/round-3/candidates"]
    assert jobs["round-3/adapter"].base_model == "x/base"  # a fresh adapter of the base
    assert jobs["round-3/adapter"].reward_model == "x/round-3/reward"
    assert (jobs["round-3/evaluation"].before, jobs["round-3/evaluation"].control) == (
        "x/samples_before",
        "x/samples_control",
    )
    seeds = [jobs[name].seed for name in ("candidates", "round-2/candidates", "round-3/candidates")]
    images_of_all = 5 * TINY["generate"]["images_per_class"]
    assert sorted(seeds) == seeds and all(b - a > images_of_all for a, b in pairwise(seeds))
    following = workflow.plan({"rounds": 10, "seed": 1}, run)
    assert max(job.config.seed for job in following if job.stage.name == "generate") + 50_000 <= 2_000_000


def test_an_experts_run_takes_the_last_rounds_study_and_none_of_the_simulated_settings():
    jobs = {job.step.folder: job.config for job in workflow.plan({"rounds": 3, "grade": {"method": "pull"}}, Path("x"))}
    assert [jobs[name].study for name in ("grades", "round-2/grades", "round-3/grades")] == [
        None,
        "x/study.yaml",
        "x/round-2/study.yaml",
    ]
    assert jobs["round-2/grades"].min_grades == 100 and jobs["round-2/grades"].references == "x/data"
    with pytest.raises(ConfigError, match="`flip_rate` is not known"):
        workflow.plan({"grade": {"method": "pull", "flip_rate": 0.1}}, Path("x"))
    with pytest.raises(ConfigError, match="`rounds` is 0; it must be a whole number from 1 to 10"):
        workflow.plan({"rounds": 0}, Path("x"))


def test_how_long_a_run_waits_is_no_part_of_what_it_made():
    def key(**grade: object) -> str:
        jobs = workflow.plan({"grade": {"method": "pull", **grade}}, Path("x"))
        job = next(job for job in jobs if job.stage.name == "grade")
        return workflow._key(job, {"candidates": "made", "data": "made"})

    assert key() == key(poll_s=3.0, timeout_s=9.0, study="s.yaml") != key(min_grades=7) != key(source="a/b")


def test_feedback_joins_several_sets_of_candidates_and_grades(tmp_path: Path):
    for number, name in enumerate(("one", "two")):
        study = Study(
            candidates=str(tmp_path / name), real_control_share=0, reason_for=[], sink=str(tmp_path / f"g{name}")
        )
        images(40, number).save(tmp_path / name)
        service = open_service(tmp_path, study, state=f"state-{name}")
        for turn in range(40):
            (item,) = service.next_items(f"grader-{number}", "single", 1)["items"]
            verdict = "plausible" if turn % 2 else "implausible"
            said = {"grade_id": f"{name}-{turn}", "item_id": item["item_id"], "mode": "single", "verdict": verdict}
            assert service.submit(f"grader-{number}", [said])["refused"] == []
        assert service.outbox.flush()
    both = {"candidates": [str(tmp_path / name) for name in ("one", "two")]}
    both |= {"grades": [str(tmp_path / f"g{name}") for name in ("one", "two")]}
    record = build(FeedbackConfig(**both, near_duplicate_bits=0), tmp_path / "feedback")
    assert (record.metrics["n_grades"], record.metrics["n_graders"]) == (80, 2)
    ids = [
        id for split in ("train", "validation", "test") for id in ImageSet.load(tmp_path / "feedback", split).image_ids
    ]
    assert set(ids) <= {*images(40, 0).image_ids, *images(40, 1).image_ids} and record.metrics["n"] == len(ids) > 60
    with pytest.raises(InputError, match=r"cannot be joined; give sets of one model"):
        images(8, 3, size_px=16).save(tmp_path / "other")
        build(
            FeedbackConfig(**{**both, "candidates": [both["candidates"][0], str(tmp_path / "other")]}), tmp_path / "f"
        )
