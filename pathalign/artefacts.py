"""Artefacts are folders that appear whole or not at all.

A stage writes into `.<name>.partial` beside its output and the folder is renamed when it is complete; whatever a killed
run leaves behind has a name that nothing loads, and the same command finds its checkpoints there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pathalign.schema import InputError, RunRecord, peak_rss_mb

FULL_DISK_BYTES = 2**20


def partial_dir(output_dir: Path) -> Path:
    """The folder in which the artefact `output_dir` is being made."""
    return output_dir.with_name(f".{output_dir.name}.partial")


@contextmanager
def artefact(output_dir: str | Path, *, scratch: tuple[str, ...] = ("checkpoints",)) -> Iterator[Path]:
    """Make an artefact atomically: yields a working folder that becomes `output_dir` when the block ends well.

    The working folder survives an interruption, so a stage looks in it for its checkpoints first. An earlier artefact
    of the same name is replaced only at the end. Of several processes (`accelerate launch`) the first one does this,
    and its block must not end before the others have written what they have to: see `pathalign.shards`.

    Args:
        output_dir: Where the finished artefact shall stand.
        scratch: Names inside the working folder that are removed before the artefact is shown.

    Raises:
        InputError: If the place cannot be written to, or holds something that is no artefact.
    """
    started, output_dir = time.monotonic(), Path(output_dir).absolute()
    working = partial_dir(output_dir)
    if os.environ.get("RANK", "0") != "0":
        working.mkdir(parents=True, exist_ok=True)
        yield working
        return
    check_place(output_dir)
    try:
        working.mkdir(parents=True, exist_ok=True)
        probe = working / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"Cannot write to {output_dir}: {error.strerror}. Choose another output folder.") from error
    try:
        yield working
    except Exception as error:
        # Libraries that write tensors turn the system's error into one of their own: the disk itself is asked too.
        if getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(working).free < FULL_DISK_BYTES:
            raise InputError(
                f"The disk of {output_dir} is full. Free some space and run the same command again."
            ) from error
        raise
    for name in scratch:
        shutil.rmtree(working / name, ignore_errors=True)
    _complete_record(working, time.monotonic() - started)
    if output_dir.exists():
        replaced = output_dir.with_name(f".{output_dir.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        output_dir.rename(replaced)
        working.rename(output_dir)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        working.rename(output_dir)


def _complete_record(folder: Path, wall_s: float) -> None:
    """Time and peak memory of making the folder, in the run record of a stage that has not measured them itself."""
    if (folder / RunRecord.FILE_NAME).is_file():
        record = RunRecord.load(folder)
        if not (record.wall_s and record.peak_rss_mb):
            record.wall_s, record.peak_rss_mb = record.wall_s or wall_s, record.peak_rss_mb or peak_rss_mb()
            record.save(folder)


def check_place(output_dir: Path) -> None:
    """See that nothing but an artefact, or an empty folder, stands where one is to be made.

    Raises:
        InputError: If something else stands there.
    """
    if not output_dir.exists():
        return
    if not output_dir.is_dir() or (not (output_dir / "run.json").is_file() and any(output_dir.iterdir())):
        raise InputError(f"{output_dir} holds files that pathalign did not make. Choose another output folder.")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace one file whole: readers see the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def fingerprint(value: Any) -> str:
    """Hash of a JSON-like value, or of all file contents below a folder. 16 hex digits.

    `run.json` and the card are left out of a folder's hash: they hold times, which differ between equal runs.
    """
    digest = hashlib.sha256()
    if isinstance(value, Path):
        for path in sorted(value.rglob("*")) if value.is_dir() else [value]:
            if path.is_file() and path.name not in ("run.json", "README.md"):
                digest.update(str(path.relative_to(value)).encode() + b"\0" + path.read_bytes())
    else:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
