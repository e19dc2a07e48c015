"""Work that is cut into shards and shared by processes that need not know each other.

Shard i belongs to process i modulo their number, as `accelerate launch`, `torchrun` or a Slurm script number them in
`RANK` and `WORLD_SIZE`. A shard is a file that appears whole, so a killed run goes on at the shard where it was, with
any number of processes; the first process waits for the others' shards and finishes the artefact.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pathalign.artefacts import artefact, fingerprint
from pathalign.progress import Progress, say
from pathalign.schema import InputError, RunRecord

PEER_TIMEOUT_S = 1800.0  # a process shows a sign of life with every batch, or shard, that it finishes
POLL_S = 1.0


@dataclass(frozen=True)
class Process:
    """One of `count` processes that were started together, counted from 0; `local` is its number on its machine."""

    index: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def current(cls) -> Process:
        """What the launcher says in `RANK`, `WORLD_SIZE` and `LOCAL_RANK`; alone where it says nothing.

        Raises:
            InputError: If they are no numbers, or do not fit each other.
        """
        given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        try:
            index, count, local = int(given["RANK"] or 0), int(given["WORLD_SIZE"] or 1), int(given["LOCAL_RANK"] or 0)
        except ValueError:
            index, count, local = -1, 1, 0
        if not 0 <= index < count:
            text = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
            raise InputError(f"The launcher set {text}; RANK must be a number from 0 and below WORLD_SIZE.")
        return cls(index, count, local)

    def device(self) -> torch.device:
        """The accelerator that this process has for itself, or the CPU."""
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            return torch.device("cpu")
        return torch.device(accelerator.type, self.local % torch.accelerator.device_count())


def scratch_dir(folder: Path, key: Any) -> Path:
    """Folder of finished work below `folder/checkpoints`; work of another key is removed."""
    root = folder / "checkpoints"
    scratch = root / f"batches-{fingerprint(key)}"
    for other in root.glob("batches-*"):
        if other != scratch:
            shutil.rmtree(other, ignore_errors=True)  # another process may be doing the same
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


def write_shards(
    output_dir: str | Path,
    record: RunRecord,
    shards: Mapping[str, int],
    unit: str,
    make: Callable[[int, Path, Progress], None],
    finish: Callable[[Path, list[Path]], None],
) -> RunRecord:
    """Make the shards of this process; the first one waits for all and finishes the artefact.

    The same call again goes on: no shard is made twice, and a finished set of several shards is kept as it is.

    Args:
        output_dir: Where the finished artefact shall stand.
        record: Its configuration and inputs decide whether what is there already is the same work.
        shards: File name and size of each.
        unit: Of the sizes, for the progress that is shown.
        make: Gets a shard's index, a folder and the progress, which it advances by the shard's size. Writes
            `data/<name>` in the folder, whole or not at all; what else it puts there survives an interruption.
        finish: Gets the artefact's folder and all shards, and writes what else belongs there; may complete `record`.

    Returns:
        `record`, or that of the artefact if it was there already.

    Raises:
        InputError: If the other processes show no sign of life for `PEER_TIMEOUT_S`.
    """
    process, output_dir, names = Process.current(), Path(output_dir), list(shards)
    if process.index >= len(names):
        say(f"Process {process.index} of {process.count} has nothing to do: there are {len(names)} shards.")
        return record
    if _is_made(output_dir, record, names):
        say(f"{output_dir} holds this very set already; nothing is made again.")
        return RunRecord.load(output_dir)
    with artefact(output_dir) as folder:
        if process.index and _is_made(output_dir, record, names):  # finished while this process was starting
            with suppress(OSError):  # others may be as late
                folder.rmdir()
            return RunRecord.load(output_dir)
        if _is_made(folder, record, names):  # killed a moment before its end
            return RunRecord.load(folder)
        scratch = scratch_dir(folder, [record.config, record.inputs])
        paths = [scratch / "data" / name for name in names]
        own = range(process.index, len(names), process.count)
        missing = [index for index in own if not paths[index].is_file()]
        total, left = (sum(shards[names[index]] for index in part) for part in (own, missing))
        with Progress(record.stage, total, total - left, unit) as progress:
            for index in missing:
                place = scratch / f"shard-{index:05d}"
                place.mkdir(exist_ok=True)
                make(index, place, progress)
                paths[index].parent.mkdir(exist_ok=True)
                (place / "data" / names[index]).replace(paths[index])
                shutil.rmtree(place, ignore_errors=True)
        if process.index:
            return record
        _wait_for(paths, scratch, process)
        shutil.rmtree(folder / "data", ignore_errors=True)
        finish(folder, paths)
        if len(paths) > 1:
            record.metrics["bytes"] = sum(path.stat().st_size for path in paths)
        record.save(folder)
        (scratch / "data").rename(folder / "data")
    return record


def _is_made(folder: Path, record: RunRecord, names: Sequence[str]) -> bool:
    """Whether `folder` holds all shards, several of them, of the same work by the same versions."""
    paths = [folder / "data" / name for name in names]
    if len(names) == 1 or not (folder / RunRecord.FILE_NAME).is_file() or not all(path.is_file() for path in paths):
        return False
    made = RunRecord.load(folder)
    mine, theirs = ([each.stage, each.config, each.inputs, each.versions] for each in (record, made))
    size = sum(path.stat().st_size for path in paths)
    return fingerprint(mine) == fingerprint(theirs) and made.metrics.get("bytes") == size


def _wait_for(paths: list[Path], scratch: Path, process: Process) -> None:
    """Until all files are there, as long as others still write into `scratch`."""
    seen: set[str] = set()
    seen_at = 0.0
    while missing := [index for index, path in enumerate(paths) if not path.is_file()]:
        if not seen_at:
            say(f"Waiting for {len(missing)} of {len(paths)} shards, which the other processes are making.")
        written = {f"{where}/{name}" for where, _, files in os.walk(scratch) for name in files}
        if written != seen or not seen_at:
            seen, seen_at = written, time.monotonic()
        if time.monotonic() - seen_at > PEER_TIMEOUT_S:
            owners = sorted({index % process.count for index in missing})
            raise InputError(
                f"{len(missing)} of {len(paths)} shards are missing, such as {paths[missing[0]].name}: process "
                f"{', '.join(map(str, owners))} of {process.count} has written nothing for {PEER_TIMEOUT_S / 60:.0f} "
                "minutes. What is made is kept: run the same command again, with all processes or with fewer."
            )
        time.sleep(POLL_S)
