"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pathalign.artefacts import artefact, fingerprint, partial_dir, write_atomically
from pathalign.schema import InputError, RunRecord


def make(output_dir: Path, text: str) -> None:
    with artefact(output_dir) as folder:
        (folder / "content").write_text(text)
        RunRecord("stage", {}).save(folder)


def test_a_run_record_without_time_and_memory_gets_those_of_making_the_folder(tmp_path: Path):
    make(tmp_path / "unmeasured", "x")
    unmeasured = RunRecord.load(tmp_path / "unmeasured")
    assert 0 < unmeasured.wall_s < 60 and unmeasured.peak_rss_mb > 1
    with artefact(tmp_path / "measured") as folder:
        RunRecord("stage", {}, wall_s=1000.0).save(folder)
    assert RunRecord.load(tmp_path / "measured").wall_s == 1000.0


def test_the_folder_appears_only_at_the_end(tmp_path: Path):
    output_dir = tmp_path / "deep" / "made"
    with artefact(output_dir) as folder:
        (folder / "checkpoints").mkdir()
        (folder / "content").write_text("x")
        assert not output_dir.exists()
    assert [path.name for path in output_dir.iterdir()] == ["content"]  # no checkpoints
    assert [path.name for path in output_dir.parent.iterdir()] == ["made"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_what_was_done_under_a_name_that_nothing_loads(tmp_path: Path, error: type):
    output_dir = tmp_path / "made"
    with pytest.raises(error), artefact(output_dir) as folder:
        (folder / "checkpoints").mkdir()
        raise error
    assert not output_dir.exists()
    assert partial_dir(output_dir) == tmp_path / ".made.partial"
    with artefact(output_dir) as folder:
        assert (folder / "checkpoints").is_dir()


def test_an_earlier_artefact_stands_until_the_new_one_is_whole(tmp_path: Path):
    output_dir = tmp_path / "made"
    make(output_dir, "old")
    with pytest.raises(RuntimeError), artefact(output_dir) as folder:
        (folder / "content").write_text("half")
        raise RuntimeError
    assert (output_dir / "content").read_text() == "old"
    make(output_dir, "new")
    assert (output_dir / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_files_that_pathalign_did_not_make_are_never_replaced(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("meow")
    (tmp_path / "file").write_text("text")
    for name in ("photos", "file"):
        with pytest.raises(InputError, match=f"{name} holds files that pathalign did not make"):
            make(tmp_path / name, "x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cat.png", "file", "photos"]
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", "x")
    assert (tmp_path / "empty" / "content").is_file()


def test_a_place_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Cannot write to .*made: Not a directory\. Choose another"):
        make(tmp_path / "file" / "made", "x")


def test_a_read_only_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="Read-only file system"):
        make(tmp_path / "made", "x")


def test_a_full_disk_is_said_and_other_errors_stay_what_they_are(tmp_path: Path):
    with pytest.raises(InputError, match=r"is full\. Free some space"), artefact(tmp_path / "made"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConnectionError), artefact(tmp_path / "made"):
        raise ConnectionError
    assert not (tmp_path / "made").exists()


def test_of_several_processes_only_the_first_shows_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with artefact(tmp_path / "made") as folder:
        (folder / "content").write_text("x")
        monkeypatch.setenv("RANK", "1")
        with artefact(tmp_path / "made") as same:
            assert same == folder
        assert not (tmp_path / "made").exists()
        monkeypatch.delenv("RANK")
    assert (tmp_path / "made" / "content").is_file()


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Path, "write_bytes", fail)
        write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folders_fingerprint_follows_names_and_contents_but_not_what_tells_times(tmp_path: Path):
    make(tmp_path / "one", "x")
    make(tmp_path / "two", "x")
    (tmp_path / "two" / "run.json").write_text('{"wall_s": 3}')
    (tmp_path / "two" / "README.md").write_text("It took 3 s.")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    (tmp_path / "two" / "content").write_text("y")
    changed = fingerprint(tmp_path / "two")
    (tmp_path / "two" / "content").rename(tmp_path / "two" / "renamed")
    assert len({fingerprint(tmp_path / "one"), changed, fingerprint(tmp_path / "two")}) == 3
    assert len(changed) == 16


def test_a_values_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})
