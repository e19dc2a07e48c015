"""Where batches end up: a folder, or a dataset repo on the Hugging Face Hub. Neither ever replaces a file.

A sink tries once. Whoever calls it tries again: at once or soon after `SinkBusy`, seldom after `SinkRefused`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from pathlib import Path
from typing import Protocol

from pathalign.schema import InputError

HUB_PREFIX = "hf://datasets/"


class SinkError(Exception):
    """A batch could not be kept, or the sink not be read. The message is one for the study's owner."""


class SinkBusy(SinkError):  # noqa: N818
    """It may go well the next time.

    Attributes:
        retry_after_s: What the sink asked for, if it did.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SinkRefused(SinkError):  # noqa: N818
    """It will go wrong until somebody mends something: a token, a repo's name, the rights of a folder."""


class SinkConflict(SinkRefused):
    """Other bytes stand where a file was to go. They are not replaced, and the file is not given up."""


class Sink(Protocol):
    """Immutable files by path; paths use `/` and are relative."""

    def put(self, path: str, content: bytes) -> None:
        """Keep a file. The same bytes at the same path again are a success; other bytes are refused.

        Raises:
            SinkError: If it is not known to be kept.
        """

    def read(self, path: str) -> bytes | None:
        """A file's bytes as the sink has them now; None if there is no such file."""

    def list(self, prefix: str) -> list[str]:
        """Sorted paths of all files below a folder such as `grades/`; none if there is no such folder."""


def check_sink(spec: str) -> None:
    """See that a sink is a folder or a dataset repo.

    Raises:
        InputError: If it is neither.
    """
    if "://" in spec and not re.fullmatch(rf"{HUB_PREFIX}[\w.-]+/[\w.-]+", spec):
        raise InputError(f"The sink is {spec!r}; use a folder, or {HUB_PREFIX}USER/REPO for a dataset repo.")


def open_sink(spec: str | Path) -> Sink:
    """The sink that a study names: a folder, or `hf://datasets/USER/REPO`.

    Raises:
        InputError: If it is an address of anything else.
    """
    text = str(spec)
    check_sink(text)
    if not text.startswith(HUB_PREFIX):
        return FolderSink(text)
    from pathalign.grading.hub_sink import HubSink

    return HubSink(text.removeprefix(HUB_PREFIX))


class FolderSink:
    """Files below a folder, which is made with the first file. Readers never see a part of a file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()

    def __repr__(self) -> str:
        return f"FolderSink({str(self.path)!r})"

    def put(self, path: str, content: bytes) -> None:
        """Write, sync and show a file under its name, unless it stands there already."""
        target = self.path / path
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        try:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    _write_synced(temporary, content)
                    _show(temporary, target)
                finally:
                    temporary.unlink(missing_ok=True)
            _sync(target.parent)
            if target.read_bytes() != content:
                raise SinkConflict(f"{target} holds other bytes than those to keep; move that file to another place.")
        except OSError as error:
            raise _folder_error(self.path, error) from error

    def read(self, path: str) -> bytes | None:
        """A file's bytes."""
        try:
            return (self.path / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _folder_error(self.path, error) from error

    def list(self, prefix: str) -> list[str]:
        """All files below a folder, without those that are being written."""
        found = (self.path / prefix).rglob("*")
        return sorted(
            path.relative_to(self.path).as_posix() for path in found if path.is_file() and path.name[0] != "."
        )


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _show(temporary: Path, target: Path) -> None:
    """Give a finished file its name; one that stands there already stays as it is."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            raise
        temporary.rename(target)  # a file system without hard links; nobody else writes this path


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folder_error(folder: Path, error: OSError) -> SinkError:
    text = f"Cannot write to or read {folder}: {error.strerror or error}."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
        return SinkRefused(f"{text} Mend the rights of the folder, or name another one as `sink`.")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SinkBusy(f"{text} Free some space; grades wait in the state folder.")
    return SinkBusy(text)
