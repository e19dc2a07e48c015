"""The ledger of a run directory, `stages.json`: from what each folder was made, and what it held then. And locks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pathalign.artefacts import fingerprint, partial_dir, write_atomically
from pathalign.progress import say
from pathalign.rounds import Job
from pathalign.schema import InputError, peak_rss_mb

LEDGER_NAME = "stages.json"


class Ledger:
    """`stages.json`: from what each folder of a run directory was made, and what it held then."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LEDGER_NAME
        self.steps: dict[str, dict[str, Any]] = {}
        self.in_progress: dict[str, str] = {}
        self.forced_from: str | None = None
        if self.path.is_file():
            try:
                content = json.loads(self.path.read_text())
                self.steps, self.in_progress = content["steps"], content["in_progress"]
                self.forced_from = content["forced_from"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self.path} cannot be read; delete it, and every stage is run again.") from error

    def save(self) -> None:
        """Write the file, whole or not at all."""
        content = {"steps": self.steps, "in_progress": self.in_progress, "forced_from": self.forced_from}
        write_atomically(self.path, json.dumps(content, indent=2) + "\n")

    def force(self, asked: str, folders: Iterable[str]) -> None:
        """Forget folders, once: the same command after an interruption goes on instead.

        Args:
            asked: What was asked for; the same text again changes nothing until the run has ended well.
            folders: Names of the folders that are made in any case.
        """
        if self.forced_from != asked:
            for folder in folders:
                self.steps.pop(folder, None)
                self.in_progress.pop(folder, None)
            self.forced_from = asked
            self.save()

    def content(self, job: Job, key: str | None = None) -> str | None:
        """Fingerprint of the folder of `job` if it was made from `key` and holds what it held then, else None.

        Without a key, what it was made from does not matter.
        """
        entry = self.steps.get(job.step.folder)
        if entry is None or (key is not None and entry["key"] != key) or not job.folder.is_dir():
            return None
        return str(entry["content"]) if _unchanged(job.folder, entry) else None

    def take_over(self, job: Job, key: str, others: Iterable[Path]) -> str | None:
        """Link to the folder that another run made from the same key, if there is one whole and unchanged.

        Hard links: no file of a finished folder is ever written again, a changed step becomes a new folder.

        Args:
            job: The step.
            key: What it is made from.
            others: Run directories to look in.

        Returns:
            Fingerprint of the folder, or None if nobody has made it.
        """
        for other in others:
            if other.resolve() == self.path.parent.resolve():
                continue
            try:
                steps = Ledger(other).steps
            except InputError:
                continue  # not ours to mend
            for name, entry in steps.items():
                made = other / name
                if entry["key"] != key or not made.is_dir() or not _unchanged(made, entry):
                    continue
                partial = partial_dir(job.folder)
                for folder in (partial, job.folder):
                    shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(made, partial, copy_function=_link)
                partial.rename(job.folder)
                self.in_progress.pop(job.step.folder, None)
                self.steps[job.step.folder] = {**entry, "signature": signature(job.folder)}
                self.save()
                return str(entry["content"])
        return None

    def begin(self, job: Job, key: str) -> None:
        """Note that `job` is being made; what another configuration left half made is removed."""
        if self.in_progress.get(job.step.folder) != key:
            shutil.rmtree(partial_dir(job.folder), ignore_errors=True)
        self.in_progress[job.step.folder] = key
        self.save()

    def finish(self, job: Job, key: str, wall_s: float) -> str:
        """Note that the folder of `job` is complete. Returns its fingerprint."""
        content = fingerprint(job.folder)
        self.in_progress.pop(job.step.folder, None)
        self.steps[job.step.folder] = {
            "key": key,
            "content": content,
            "signature": signature(job.folder),
            "wall_s": round(wall_s, 2),
            "peak_rss_mb": round(peak_rss_mb(), 1),
        }
        self.save()
        return content


def _unchanged(folder: Path, entry: dict[str, Any]) -> bool:
    """Whether a folder holds what its entry says; only if sizes or times differ is it read."""
    return signature(folder) == entry["signature"] or fingerprint(folder) == entry["content"]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def run_dirs(root: Path) -> list[Path]:
    """Run directories at `root` or up to four folders below it (those of experiments), by name."""
    return sorted(path.parent for depth in range(5) for path in root.glob("*/" * depth + LEDGER_NAME))


def signature(path: Path) -> str:
    """Hash of names, sizes and times of all files below `path`: says cheaply that nothing has changed."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path)), file.stat()) for file in files if file.is_file()]
    return fingerprint([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


@contextmanager
def shared(reuse: Path | None, key: str) -> Iterator[None]:
    """Of several runs that share their steps, one makes what all need, and the others wait for it."""
    if reuse is None:
        yield
        return
    from filelock import FileLock, Timeout

    folder = reuse / ".making"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a folder of others, only read
        yield
        return
    lock = FileLock(folder / key)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("Another run is making this step; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Work in a run directory alone.

    Raises:
        InputError: If another process works there, or it cannot be written to.
    """
    from filelock import FileLock, Timeout  # brings asyncio along, for which help need not wait

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run_dir / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"Another pathalign run is working in {run_dir}. Wait until it ends, or choose another `--output-dir`."
        ) from error
    except OSError as error:
        raise InputError(f"Cannot write to {run_dir}: {error.strerror}. Choose another `--output-dir`.") from error
    try:
        yield
    finally:
        lock.release()
