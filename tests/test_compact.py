"""Many small files become one table: every row is in it once, and what reads grades reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
from click.testing import CliRunner
from hub import HubServer, serve
from hub.faults import Fault
from test_outbox import grade

from pathalign.cli import main
from pathalign.grades import current_grades, read_grades
from pathalign.grading import hub_sink
from pathalign.grading.compact import Compacted, compact
from pathalign.grading.hub_sink import HubSink
from pathalign.grading.outbox import Outbox
from pathalign.grading.sinks import FolderSink, Sink
from pathalign.schema import InputError, Preference


def rows() -> list[tuple[str, str, dict]]:
    """Grades of every form: full, bare, corrected, simulated, with text of all sorts."""
    full = {"failed_criteria": ["size", "nucleus"], "confidence": 0.5, "comment": "z\u00e4h,\n\"'\u2028 \U0001f642"}
    full |= {"subtype": "band", "active_ms": 1200, "idle_ms": 0, "hidden_ms": None, "drawn_by": "uncertainty"}
    return [
        grade(1, **full),
        grade(2),
        grade(3, supersedes="g2", image_id="i2", verdict="unsure", recorded_at="2026-03-01T12:00:00+00:00"),
        grade(4, simulated=True, confidence=1),
    ]


def fill(sink: Sink, folder: Path) -> None:
    """Two replicas, several files, and one row that both have."""
    for name, part in (("one", rows()[:2]), ("two", rows()[1:])):
        outbox = Outbox(folder / name, sink, start=False)
        for row in part:
            outbox.record([row])
            assert outbox.flush()
    outbox.record([("session", "s1", {"session_id": "s1", "grader": "grader-1", "device_pixel_ratio": 2})])
    choice = Preference("p1", "a", "i1", "i2", "left", "grader-1")
    outbox.record([("preference", "p1", json.loads(choice.to_json()))])
    assert outbox.flush()


@pytest.fixture
def sink(tmp_path: Path) -> Path:
    fill(FolderSink(tmp_path / "sink"), tmp_path / "states")
    return tmp_path / "sink"


def test_every_row_is_in_the_table_once_and_is_the_grade_it_was(sink: Path, tmp_path: Path):
    made = compact(sink, tmp_path / "grades.parquet")
    assert made == Compacted(str(tmp_path / "grades.parquet"), "grade", rows=4, duplicates=1, files=5)
    before = {item.grade_id: item for item in read_grades(sink)}
    after = read_grades(tmp_path / "grades.parquet")
    assert {item.grade_id: item for item in after} == before
    assert len(after) == len(before) == 4
    assert current_grades(after) == current_grades(list(before.values()))


def test_columns_have_types_also_where_they_are_empty(sink: Path, tmp_path: Path):
    compact(sink, tmp_path / "grades.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "grades.parquet")
    types = {field.name: str(field.type) for field in table.schema}
    assert types["failed_criteria"].startswith("list<") and "string" in types["failed_criteria"]
    wanted = {"grade_id": "string", "confidence": "double", "active_ms": "int64", "hidden_ms": "int64"}
    wanted |= {"simulated": "bool", "session": "string", "supersedes": "string"}
    assert {name: types[name] for name in wanted} == wanted
    assert table.column("grade_id").to_pylist() == list(dict.fromkeys(item.grade_id for item in read_grades(sink)))


def test_preferences_and_sessions_can_be_compacted_too(sink: Path, tmp_path: Path):
    for kind, key in (("preference", "preference_id"), ("session", "session_id")):
        made = compact(sink, tmp_path / f"{kind}.parquet", kind)
        assert (made.rows, made.files) == (1, 1)
        (row,) = pyarrow.parquet.read_table(tmp_path / f"{kind}.parquet").to_pylist()
        assert row[key] == kind[0] + "1"


def test_compacting_again_adds_what_is_new_and_keeps_what_is_gone(sink: Path, tmp_path: Path):
    output = tmp_path / "grades.parquet"
    compact(sink, output)
    once = output.read_bytes()
    compact(sink, output)
    assert output.read_bytes() == once
    for file in (sink / "grades").iterdir():
        file.unlink()
    outbox = Outbox(tmp_path / "three", FolderSink(sink), start=False)
    outbox.record([grade(9)])
    outbox.flush()
    assert compact(sink, output).rows == 5
    assert {item.grade_id for item in read_grades(output)} == {"g1", "g2", "g3", "g4", "g9"}


def test_a_table_beside_the_files_is_read_with_them_and_by_a_restarting_server(sink: Path, tmp_path: Path):
    compact(sink, sink / "grades" / "0-compacted.parquet")
    (sink / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": ["x"]}), sink / "data" / "train.parquet")
    current = current_grades(read_grades(sink))
    assert (len(current.grades), current.superseded) == (3, 1)
    for file in (sink / "grades").glob("*.jsonl"):
        file.unlink()
    assert current_grades(read_grades(sink)).grades == current.grades
    fresh = Outbox(tmp_path / "fresh", FolderSink(sink), start=False)
    assert fresh.restore() == 6
    assert fresh.saved(["g1", "g2", "g3", "g4"]) == {"g1", "g2", "g3", "g4"}
    assert compact(sink, sink / "grades" / "0-compacted.parquet").rows == 4


def test_a_folder_with_lines_of_grades_anywhere_can_be_compacted(tmp_path: Path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.jsonl").write_text(json.dumps(grade(1)[2]) + "\n\n")
    (tmp_path / "in" / "b.jsonl").write_text(json.dumps(grade(2)[2]))
    assert compact(tmp_path / "in", tmp_path / "out" / "x.parquet").rows == 2
    assert compact(tmp_path / "in" / "b.jsonl", tmp_path / "y.parquet").rows == 1


def refused(said: str, source: Path, output: Path, kind: str = "grade") -> None:
    before = output.read_bytes() if output.exists() else None
    with pytest.raises(InputError, match=said):
        compact(source, output, kind)
    assert (output.read_bytes() if output.exists() else None) == before


def test_what_cannot_be_compacted_is_said_and_nothing_is_written(sink: Path, tmp_path: Path):
    output = tmp_path / "grades.parquet"
    refused("There is no folder", tmp_path / "absent", output)
    refused(r"ends in \.parquet", sink, tmp_path / "grades.csv")
    refused("use one of grade, preference, session", sink, output, "guess")
    (tmp_path / "empty").mkdir()
    refused("has no rows of kind grade", tmp_path / "empty", output)
    (tmp_path / "theirs.parquet").write_bytes(b"something else")
    refused("is there and is no compacted file", sink, tmp_path / "theirs.parquet")
    compact(sink, output)
    refused("is no compacted file of this kind", sink, output, "session")
    bad = sink / "grades" / "z.jsonl"
    bad.write_text('{"grade_id": "g7"}\n')
    refused("lacks", sink, output)
    bad.write_text("{ no json\n")
    refused(r"z\.jsonl:1", sink, output)
    bad.write_text(json.dumps(grade(1, verdict="implausible")[2]) + "\n")
    refused("1 grade ids stand for different rows", sink, output)
    bad.write_text(json.dumps(grade(8, active_ms="long")[2]) + "\n")
    refused("'active_ms' holds int, str", sink, output)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(tmp_path / "hub", "lab/grades") as server:
        made = lambda repo_id: HubSink(repo_id, server.token, endpoint=server.endpoint)  # noqa: E731
        monkeypatch.setattr(
            "pathalign.grading.compact.open_sink", lambda spec: made(spec.removeprefix("hf://datasets/"))
        )
        yield server


@pytest.mark.hub
def test_a_dataset_on_the_hub_is_compacted_and_one_that_is_down_is_said(hub: HubServer, tmp_path: Path):
    fill(hub_sink.HubSink("lab/grades", hub.token, endpoint=hub.endpoint), tmp_path / "states")
    made = compact("hf://datasets/lab/grades", tmp_path / "grades.parquet")
    assert (made.rows, made.duplicates, made.files) == (4, 1, 5)
    hub.faults.set(Fault("/tree/", 403))  # 503 would be retried by the client itself, for 23 s
    with pytest.raises(InputError, match=r"cannot be read: The Hub answered 403"):
        compact("hf://datasets/lab/grades", tmp_path / "grades.parquet")


def test_the_command_prints_what_it_did(sink: Path, tmp_path: Path):
    output = tmp_path / "grades.parquet"
    result = CliRunner().invoke(main, ["feedback", "compact", str(sink), "--output", str(output), "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {"path": str(output), "kind": "grade", "rows": 4, "duplicates": 1, "files": 5}
    result = CliRunner().invoke(main, ["feedback", "compact", str(tmp_path / "absent"), "--output", str(output)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "There is no folder" in result.stderr


def test_the_stage_runs_as_ever_beside_its_subcommand(tmp_path: Path):
    result = CliRunner().invoke(main, ["feedback", "--grades", str(tmp_path / "absent")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "There are no grades at" in result.stderr
    for arguments, said in (
        (["feedback", "compakt"], "Did you mean 'compact'?"),
        (["feedback", "--grades", "x", "compact", "sink"], "see --grades"),
        (["feedback", "--min-grades-per-image", "none"], "not a valid integer"),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert said in result.stderr
