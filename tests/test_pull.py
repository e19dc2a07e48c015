"""Pulling grades by the real command line from the loopback Hub and from folders: all servers, once, at one commit."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import HubServer, serve
from hub.faults import Fault
from small_study import images
from test_outbox import wait_until

from pathalign.grades import current_grades, read_grades
from pathalign.grading.batches import batch_path
from pathalign.grading.hub_sink import HubSink
from pathalign.grading.merging import coverage, lacking, merge
from pathalign.grading.outbox import Outbox
from pathalign.grading.pull import next_command, pull, wait_for
from pathalign.grading.shards import FolderShards, HubShards, open_shards, referred
from pathalign.grading.sinks import FolderSink, Sink
from pathalign.images import ImageSet
from pathalign.schema import Grade, InputError
from pathalign.settings.pull import PullConfig

SECRET_WORDS = "the nucleus of Mrs Lovelace"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with serve(tmp_path / "hub", "lab/grades") as server:
        yield server


@pytest.fixture
def candidates(tmp_path: Path) -> ImageSet:
    images(30, 0).save(tmp_path / "candidates")
    return ImageSet.load(tmp_path / "candidates")


def start(hub: HubServer, folder: Path, *arguments: object, token: str | None = None) -> subprocess.Popen[str]:
    """`pathalign feedback pull`, in a process of its own."""
    words = [sys.executable, "-m", "pathalign.cli", "feedback", "pull", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, env=hub.variables(folder / "home", token), cwd=folder, text=True, **pipes)


def run(hub: HubServer, folder: Path, *arguments: object, token: str | None = None) -> tuple[int, str, str]:
    process = start(hub, folder, *arguments, token=token)
    output, errors = process.communicate(timeout=120)
    assert hub.token not in output + errors
    return process.returncode, output, errors


def row(candidates: ImageSet, number: int, place: int, verdict: str = "plausible", **more: object) -> dict:
    said = {
        "class_label": candidates.labels()[place],
        "verdict": verdict,
        "grader": "grader-1",
        "comment": SECRET_WORDS,
    }
    when = {"recorded_at": f"2026-03-01T12:{number // 60:02d}:{number % 60:02d}+00:00", "rubric_version": "2"}
    return {"grade_id": f"g{number}", "image_id": candidates.image_ids[place], **said, **when, **more}


def send(folder: Path, sink: Sink, *rows: dict) -> None:
    """Bring rows to a sink as the server with this state folder does, in one file."""
    outbox = Outbox(folder, sink, start=False)
    names = {"grade": "grade_id", "preference": "preference_id"}
    kinds = ["preference" if "choice" in said else "grade" for said in rows]
    outbox.record([(kind, said[names[kind]], said) for kind, said in zip(kinds, rows, strict=True)])
    assert outbox.flush()
    outbox.close()


def sink_of(hub: HubServer) -> HubSink:
    return HubSink("lab/grades", hub.token, endpoint=hub.endpoint)


def head(hub: HubServer) -> str:
    return hub.store.resolve(hub.store.repo("datasets", "lab/grades", hub.token), "main")


def downloads(hub: HubServer) -> list[str]:
    return [request.rpartition("/")[2] for request in hub.faults.requests if request.startswith("GET /datasets/")]


@pytest.mark.hub
@pytest.mark.slow
def test_grades_of_two_servers_are_merged_at_one_commit_and_new_ones_are_added(
    hub: HubServer, tmp_path: Path, candidates: ImageSet
):
    again = [row(candidates, number, number) for number in range(6)]
    send(tmp_path / "one", sink_of(hub), *again, row(candidates, 6, 3, "implausible", supersedes="g3"))
    later = [
        {**said, "recorded_at": "2026-03-02T08:00:00+00:00"} for said in again[:2]
    ]  # the grader's browser sent twice
    other = [row(candidates, number, number - 10, "unsure", grader="Dr. Lovelace") for number in range(10, 14)]
    pair = {"preference_id": "p1", "class_label": "a", "left_image_id": candidates.image_ids[0]}
    pair |= {"right_image_id": candidates.image_ids[3], "choice": "left", "grader": "grader-1"}
    strange = row(candidates, 20, 5) | {"image_id": "0" * 16, "rubric_version": "1"}
    older = row(candidates, 21, 7, rubric_version="1")
    send(tmp_path / "two", sink_of(hub), *later, *other, pair, strange, older)
    first = head(hub)

    where = ["lab/grades", "--candidates", "candidates", "--output-dir", "out"]
    code, output, errors = run(hub, tmp_path, *where, "--json")
    assert code == 0, errors
    printed = json.loads(output)
    metrics = printed["metrics"]
    assert printed["inputs"]["grades"] == first
    assert (metrics["files"], metrics["fetched"], metrics["rows"]) == (3, 3, 16)
    assert (metrics["duplicates"], metrics["superseded"], metrics["unknown_images"]) == (2, 1, 1)
    called = f"grader-{hashlib.sha256(b'Dr. Lovelace').hexdigest()[:8]}"
    assert metrics["graders"] == {"grader-1": 8, called: 4}  # seven grades and a choice; a name became a hash
    assert metrics["rubric_versions"] == {"1": 1, "2": 10} and metrics["simulated"] is False
    assert metrics["classes"]["a"] == {"candidates": 10, "graded": 2, "grades": 4, "grades_per_image": 2.0}
    assert printed["next"] == "pathalign feedback --candidates candidates --grades out"
    kept = {grade.grade_id: grade for grade in read_grades(tmp_path / "out")}
    assert sorted(kept) == sorted(["g0", "g1", "g2", "g4", "g5", "g6", "g10", "g11", "g12", "g13", "g21"])
    assert kept["g6"].verdict == "implausible" and kept["g10"].grader == called
    lacks = json.loads((tmp_path / "out" / "lacking.json").read_text())
    assert {name: len(ids) for name, ids in lacks.items()} == {"a": 8, "b": 7, "c": 8}
    check_privacy(hub, tmp_path / "out", output + errors)
    assert (tmp_path / ".out.shards").stat().st_mode & 0o077 == 0  # as they were sent, comments among them
    assert "p1" in (tmp_path / "out" / "preferences" / "preferences.jsonl").read_text()

    send(tmp_path / "one", sink_of(hub), row(candidates, 30, 8))
    before = len(downloads(hub))
    code, output, errors = run(hub, tmp_path, *where, "--comments")
    assert code == 0, errors
    assert len(downloads(hub)) - before == 1  # what was here is not fetched again
    assert "1 fetched now" in output and "Several versions of the checklist (1: 1, 2: 11)" in output
    assert "Left out: 1 about images" in output and "  a  2 of 10 images graded, 2.0 grades each" in output
    assert output.endswith("Next: pathalign feedback --candidates candidates --grades out\n")
    assert "g30" in {grade.grade_id for grade in read_grades(tmp_path / "out")}
    assert SECRET_WORDS in (tmp_path / "out" / "grades.jsonl").read_text()

    code, output, errors = run(hub, tmp_path, f"lab/grades@{first}", "--output-dir", "old", "--json")
    assert code == 0, errors
    assert json.loads(output)["inputs"]["grades"] == first
    assert json.loads(output)["next"] == (
        f"pathalign feedback pull hf://datasets/lab/grades --revision {first} --candidates CANDIDATES --output-dir old"
    )
    assert "g30" not in {grade.grade_id for grade in read_grades(tmp_path / "old")}


def check_privacy(hub: HubServer, folder: Path, printed: str) -> None:
    """No token, no name and no comment in what was made or said."""
    files = [path.read_text() for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 3
    for text in (hub.token, "Lovelace", SECRET_WORDS):
        assert not [found for found in [*files, printed] if text in found]


@pytest.mark.slow
@pytest.mark.hub
def test_a_pull_that_was_killed_goes_on_and_a_hub_that_fails_is_asked_again(
    hub: HubServer, tmp_path: Path, candidates: ImageSet
):
    for number in range(24):
        send(tmp_path / "one", sink_of(hub), row(candidates, number, number))
    hub.faults.set(Fault("GET /datasets/", 200, delay_s=0.5))
    kept = tmp_path / ".out.shards" / "grades"
    process = start(hub, tmp_path, "lab/grades", "--output-dir", "out")
    wait_until(lambda: kept.is_dir() and len(list(kept.glob("*.jsonl"))) >= 8, 60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    here = {path.name for path in kept.glob("*.jsonl")}
    assert 8 <= len(here) < 24
    next(path for path in kept.glob("*.jsonl")).write_bytes(b"{}")  # what a full disk may leave

    before = len(downloads(hub))
    faults = [Fault("GET /datasets/", status, times=1) for status in (500, 503, 429, 0)]
    hub.faults.set(*faults, Fault("GET /api/.*/revision/main", 503, times=1), Fault("GET /api/.*/tree/", 500, times=1))
    code, output, errors = run(hub, tmp_path, "lab/grades", "--output-dir", "out", "--json")
    assert code == 0, errors
    assert json.loads(output)["metrics"]["n_grades"] == 24
    assert all(fault.times == 0 for fault in faults)
    assert "The Hub answered" in errors and "Trying again in" in errors
    fetched = downloads(hub)[before:]
    assert len(here & set(fetched)) == 1  # the damaged one only
    assert len(fetched) == 24 - len(here) + 1 + 4


@pytest.mark.slow
@pytest.mark.hub
def test_waiting_outlives_an_outage_counts_by_class_and_ends_with_enough_grades(
    hub: HubServer, tmp_path: Path, candidates: ImageSet
):
    send(tmp_path / "one", sink_of(hub), *(row(candidates, number, number) for number in range(5)))
    hub.faults.set(Fault("GET /api/datasets", 503, times=3))
    where = ["lab/grades", "--candidates", "candidates", "--output-dir", "out", "--poll-s", 0.2]
    process = start(hub, tmp_path, *where, "--min-grades", 8, "--min-grades-per-class", 2)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert "Trying again" in next(lines)
    assert any("5 of 8 grades by 1 grader (a 2 of 2, b 2 of 2, c 1 of 2)" in line for line in lines)
    send(tmp_path / "two", sink_of(hub), *(row(candidates, number, 3 * (number - 50)) for number in range(50, 53)))
    assert any("8 of 8 grades by 1 grader (a 5 of 2, b 2 of 2, c 1 of 2)" in line for line in lines)
    send(tmp_path / "two", sink_of(hub), row(candidates, 60, 29))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "9 grades by 1 grader" in output


@pytest.mark.hub
def test_a_token_that_is_revoked_while_waiting_ends_it_with_one_line(
    hub: HubServer, tmp_path: Path, candidates: ImageSet
):
    send(tmp_path / "one", sink_of(hub), *(row(candidates, number, number) for number in range(5)))
    hub.store.add_token("hf_soon_revoked", "lab")
    where = ["lab/grades", "--candidates", "candidates", "--output-dir", "out", "--min-grades", 8, "--poll-s", 0.2]
    process = start(hub, tmp_path, *where, token="hf_soon_revoked")
    assert process.stderr is not None and "5 of 8 grades" in process.stderr.readline()
    hub.store.database.execute("DELETE FROM tokens WHERE token = 'hf_soon_revoked'")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and output == ""
    assert len(errors.splitlines()) == 1 and "refused your token (401)" in errors and "hf_soon" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.hub
def test_what_never_comes_is_told_with_what_to_do(
    hub: HubServer, tmp_path: Path, candidates: ImageSet, monkeypatch: pytest.MonkeyPatch, capsys
):
    send(tmp_path / "one", sink_of(hub), *(row(candidates, number, number) for number in range(5)))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    labels = dict(zip(candidates.image_ids, candidates.labels(), strict=True))

    def error(name: str, revision: str | None = None, **settings: float) -> str:
        config = PullConfig(source=name, revision=revision, poll_s=0.2, **settings)
        shards = HubShards(name, revision, endpoint=hub.endpoint)
        with pytest.raises(InputError) as caught:
            wait_for(config, shards, labels, tmp_path / "kept")
        return str(caught.value)

    assert error("lab/grades", min_grades=8, timeout_s=0.5) == (
        "lab/grades has 5 of 8 grades by 1 grader (a 2, b 2, c 1) after 0.5 s. Run the same command to wait on, or go "
        "on with those that are there by `--min-grades 5`."
    )
    pinned = error("lab/grades", head(hub), min_grades=8)
    assert pinned.endswith("and a commit gets no more. Leave out `revision`, or lower `min_grades`.")
    assert "has no revision 'v9'" in error("lab/grades", "v9")
    assert "'lab/absent'" in error("lab/absent") and capsys.readouterr().err.count("lab/absent") == 0
    assert "does not exist, or is private" in error("lab/absent", min_grades=1, timeout_s=0.5)
    assert capsys.readouterr().err.count("lab/absent") == 1  # it may be made yet: said once, and looked again
    hub.faults.set(Fault("GET /api/datasets", 503))
    assert "No answer about lab/grades in time. What was fetched stays" in error(
        "lab/grades", min_grades=1, timeout_s=1
    )


def write(folder: Path, kind: str, *rows: dict, replica: str = "aaaaaaaaaaaa") -> Path:
    content = "".join(f"{json.dumps(said)}\n" for said in rows).encode()
    path = folder / batch_path(kind, "2026-03-01", replica, 1, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_folder_takes_the_place_of_a_repo(tmp_path: Path, candidates: ImageSet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"\./gathered holds no grades"):
        pull(PullConfig(source="./gathered"), tmp_path / "out")
    send(tmp_path / "one", FolderSink("gathered"), *(row(candidates, number, number) for number in range(4)))
    send(tmp_path / "two", FolderSink("gathered"), *(row(candidates, number, number) for number in range(2, 8)))
    config = PullConfig(source="gathered", candidates="candidates")
    first = pull(config, tmp_path / "out")
    assert (first.metrics["n_grades"], first.metrics["duplicates"]) == (8, 2)
    assert pull(config, tmp_path / "again").inputs == first.inputs  # the same files give the same state
    assert (tmp_path / "again" / "grades.jsonl").read_bytes() == (tmp_path / "out" / "grades.jsonl").read_bytes()
    send(tmp_path / "one", FolderSink("gathered"), row(candidates, 9, 9))
    second = pull(config, tmp_path / "out")
    assert second.metrics["n_grades"] == 9 and second.inputs["grades"] != first.inputs["grades"]
    assert len(current_grades(read_grades(tmp_path / "out")).grades) == 9
    with pytest.raises(InputError, match="is a file; give the folder or dataset"):
        pull(PullConfig(source="out/run.json"), tmp_path / "out")
    with pytest.raises(InputError, match="is a folder here; leave it out"):
        pull(PullConfig(source="gathered", revision="main"), tmp_path / "out")


def test_a_grader_is_called_the_same_in_every_pull_whoever_else_has_graded(tmp_path: Path, candidates: ImageSet):
    names = ["Ada Lovelace", "Grace Hopper", "grader-0a1b2c3d"]
    rounds = {"one": names[1:], "two": names[:2], "three": names[::-1]}
    called: dict[str, set[str]] = {name: set() for name in names}
    for folder, people in rounds.items():
        said = [row(candidates, number, number, grader=name) for number, name in enumerate(people)]
        write(tmp_path / folder, "grade", *said)
        pull(PullConfig(source=str(tmp_path / folder)), tmp_path / f"{folder}-pulled")
        found = {grade.grade_id: grade.grader for grade in read_grades(tmp_path / f"{folder}-pulled")}
        for number, name in enumerate(people):
            called[name].add(found[f"g{number}"])
    assert [len(found) for found in called.values()] == [1, 1, 1]  # one name each, in all rounds
    assert len(set.union(*called.values())) == 3 and called["grader-0a1b2c3d"] == {"grader-0a1b2c3d"}
    assert not [found for found in set.union(*called.values()) if "Ada" in found or "Grace" in found]


def test_a_dataset_may_be_named_with_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for source, revision in (("lab/grades@v1", None), ("hf://datasets/lab/grades@v1", "v1"), ("lab/grades", "v1")):
        shards = open_shards(referred(source, revision))
        assert isinstance(shards, HubShards) and (shards.repo_id, shards.revision) == ("lab/grades", "v1")
    (tmp_path / "lab" / "grades").mkdir(parents=True)
    assert isinstance(open_shards(referred("lab/grades")), FolderShards)
    assert isinstance(open_shards(referred("hf://datasets/lab/grades@v1")), HubShards)
    assert isinstance(open_shards(referred("./me@lab/grades")), FolderShards)
    for source, revision, wrong in (
        ("hf://datasets/lab/grades@v1", "v2", "contradict each other"),
        ("hf://datasets/lab/grades@", None, "names no revision"),
        ("lab/other@v1", "v2", "contradict each other"),
        ("./absent", "v1", "is a folder; leave it out"),
        ("s3://lab/grades", None, "use a folder, or hf://datasets"),
    ):
        with pytest.raises(InputError, match=wrong):
            referred(source, revision)


def test_without_candidates_the_next_command_pulls_again_with_them(tmp_path: Path, candidates: ImageSet):
    write(tmp_path / "in", "grade", row(candidates, 1, 1))
    record = pull(PullConfig(source=str(tmp_path / "in"), comments=True), tmp_path / "out")
    assert next_command(record, "out") == (
        f"pathalign feedback pull {tmp_path / 'in'} --candidates CANDIDATES --comments --output-dir out"
    )
    record = pull(PullConfig(source=str(tmp_path / "in"), candidates=str(tmp_path / "candidates")), tmp_path / "out")
    assert next_command(record, "out") == f"pathalign feedback --candidates {tmp_path / 'candidates'} --grades out"


def test_a_wait_that_is_shorter_than_the_pause_between_looks_ends_with_a_look(tmp_path: Path, candidates: ImageSet):
    later = threading.Timer(0.2, write, (tmp_path / "in", "grade", row(candidates, 1, 1)))
    later.start()
    record = pull(PullConfig(source=str(tmp_path / "in"), min_grades=1, timeout_s=0.8, poll_s=60), tmp_path / "out")
    later.join()
    assert record.metrics["n_grades"] == 1
    with pytest.raises(InputError, match=r"has 1 of 2 grades by 1 grader after 0\.1 s"):
        pull(PullConfig(source=str(tmp_path / "in"), min_grades=2, timeout_s=0.1, poll_s=60), tmp_path / "out")


def test_a_folder_of_something_else_is_refused_before_the_wait(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds files that pathalign did not make"):
        pull(PullConfig(source=str(tmp_path / "in"), min_grades=1, timeout_s=0.1), tmp_path / "out")


def test_ids_that_stand_for_different_grades_are_a_conflict_and_nothing_is_written(
    tmp_path: Path, candidates: ImageSet
):
    first = write(tmp_path / "in", "grade", row(candidates, 1, 1), row(candidates, 2, 2))
    second = write(tmp_path / "in", "grade", row(candidates, 1, 1, "implausible"), replica="bbbbbbbbbbbb")
    with pytest.raises(
        InputError, match=f"Rows of one id say different things(.|\n)*grade g1: .*{first.name}.*{second.name}"
    ):
        pull(PullConfig(source=str(tmp_path / "in")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_file_and_row_that_cannot_be_used_is_named(tmp_path: Path, candidates: ImageSet):
    good = write(tmp_path / "in", "grade", row(candidates, 1, 1))
    cut = write(tmp_path / "in", "grade", row(candidates, 2, 2), row(candidates, 3, 3))
    cut.write_bytes(cut.read_bytes()[:-30])
    (tmp_path / "in" / "grades" / "extra.jsonl").write_text('{"grade_id": "g7"}\n{"grade_id": 8}\nno JSON\n')
    (tmp_path / "in" / "grades" / "times.jsonl").write_text(json.dumps(row(candidates, 9, 9, recorded_at="noon")))
    with pytest.raises(InputError) as caught:
        merge({path.relative_to(tmp_path / "in").as_posix(): path.read_bytes() for path in good.parent.iterdir()})
    message = str(caught.value)
    for text in (f"{cut.name}: its bytes are not those", "extra.jsonl:2", "extra.jsonl:3", "times.jsonl: grade g9"):
        assert text in message
    assert good.name not in message


def test_coverage_counts_images_and_grades_of_each_class():
    grades = [Grade(f"g{n}", image, label, "plausible", "one") for n, (image, label) in enumerate([("i", "a")] * 3)]
    grades.append(Grade("g9", "elsewhere", "a", "plausible", "one"))
    labels = {"i": "a", "j": "a", "k": "b"}
    found = coverage(grades, labels)
    assert {name: (part.candidates, part.graded, part.grades) for name, part in found.items()} == {
        "a": (2, 1, 3),
        "b": (1, 0, 0),
    }
    assert (found["a"].grades_per_image, found["b"].grades_per_image) == (3.0, 0.0)
    assert lacking(grades, labels) == {"a": ["j"], "b": ["k"]}
