"""The files that a study's servers sent: at one commit of a Hub dataset, or in a folder.

Files of the Hub are fetched once and kept beside what is made of them, so that a later pull fetches what is new. A file
counts as here only if its bytes have the hash that the Hub lists, so an interruption or a cut connection leaves nothing
that passes for a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from pathalign.artefacts import fingerprint, write_atomically
from pathalign.grading.batches import kind_of
from pathalign.grading.hub_sink import HubSink, Result
from pathalign.grading.sinks import HUB_PREFIX, FolderSink, SinkBusy, SinkError, check_sink
from pathalign.progress import track
from pathalign.remote import Reference, content_id, explained, has_id, is_repo_id, parse
from pathalign.schema import InputError

PULLED = ("grade", "preference")  # kinds of rows
READERS = 8


@dataclass(frozen=True)
class Fetched:
    """Files of one state of the source.

    Attributes:
        files: Path -> bytes, sorted by path.
        new: How many came over the network just now.
    """

    files: dict[str, bytes]
    new: int


class SourceMissing(InputError):  # noqa: N818
    """The dataset is not there, or not to be seen: perhaps not yet."""


class Shards(Protocol):
    """Where grades gather. `name` is what messages call it, without any secret."""

    name: str

    def commit(self) -> str:
        """What is there now: the commit of a Hub dataset, a hash of all files of a folder.

        Raises:
            SinkBusy: If it may go well the next time.
            SourceMissing: If there is no such dataset.
            InputError: If somebody has to mend something first.
        """

    def fetch(self, commit: str, kept: Path) -> Fetched:
        """All files of that commit that hold grades or preferences; errors as of `commit`.

        Args:
            commit: From `commit`.
            kept: Folder where fetched files are found the next time.
        """


def referred(source: str, revision: str | None = None) -> Reference:
    """The source that a user names: a folder by its path, a dataset always as `hf://datasets/OWNER/NAME`.

    Args:
        source: `OWNER/NAME` or `hf://datasets/OWNER/NAME` of a dataset, or the same with `@REVISION`, or a folder,
            which need not be there yet.
        revision: Branch, tag or commit of the dataset; `main` by default.

    Raises:
        InputError: If it is no such address, a file, a folder with a revision, or a dataset with two.
    """
    if source.startswith(HUB_PREFIX):  # whatever folders there are
        name, at, own = source.partition("@")
        if at and not own:
            raise InputError(f"{source!r} names no revision; write {name}@REVISION, or {name} for its newest.")
        if own and revision not in (None, own):
            raise InputError(f"{source!r} and the revision {revision!r} contradict each other; give one of them.")
        check_sink(name)
        return Reference(name, own or revision)
    reference = parse(source, revision)
    check_sink(reference.name)
    if is_repo_id(reference.name):
        return Reference(f"{HUB_PREFIX}{reference.name}", reference.revision)
    if Path(source).is_file():
        raise InputError(f"{source} is a file; give the folder or dataset where grades go, a study's `sink`.")
    if reference.revision is not None:
        raise InputError(f"Revision {revision!r} is wanted of {source}, which is a folder; leave it out.")
    return reference


def open_shards(reference: Reference) -> Shards:
    """The source that `referred` has read."""
    if reference.name.startswith(HUB_PREFIX):
        return HubShards(reference.name.removeprefix(HUB_PREFIX), reference.revision)
    return FolderShards(reference.name)


class FolderShards:
    """A folder that a local server fills, or a copy of a dataset."""

    def __init__(self, path: str | Path) -> None:
        self.sink = FolderSink(path)
        self.name = str(path)
        self._files: dict[str, bytes] = {}

    def commit(self) -> str:
        """A hash of names and contents; a folder that is not there yet is an empty one."""
        try:
            found = [path for path in self.sink.list("") if kind_of(path) in PULLED]
            self._files = {path: self.sink.read(path) or b"" for path in found}
        except SinkBusy:
            raise
        except SinkError as error:
            raise InputError(str(error)) from error
        return fingerprint([(path, hashlib.sha256(content).hexdigest()) for path, content in self._files.items()])

    def fetch(self, commit: str, kept: Path) -> Fetched:
        """The files as `commit` saw them; none is copied."""
        return Fetched(self._files, 0)


class HubShards(HubSink):
    """A dataset of the Hub, read with the user's own login.

    Args:
        repo_id: `OWNER/NAME`.
        revision: Branch, tag or commit; `main` by default.
        endpoint: Address of the Hub; the one of `HF_ENDPOINT` if not given.
    """

    def __init__(self, repo_id: str, revision: str | None = None, *, endpoint: str | None = None) -> None:
        from huggingface_hub import get_token

        super().__init__(repo_id, get_token(), endpoint=endpoint)
        self.name, self.revision = repo_id, revision

    def commit(self) -> str:
        """The commit that the revision names now."""
        info = self._call(lambda: self._api.repo_info(self.repo_id, repo_type="dataset", revision=self.revision))
        return str(info.sha)

    def fetch(self, commit: str, kept: Path) -> Fetched:
        """List the commit, fetch what is not kept yet, and forget what the dataset no longer has."""
        from huggingface_hub import RepoFile

        def tree() -> dict[str, str]:
            entries = self._api.list_repo_tree(self.repo_id, recursive=True, revision=commit, repo_type="dataset")
            return {entry.path: content_id(entry) for entry in entries if isinstance(entry, RepoFile)}

        listed = {path: found for path, found in sorted(self._call(tree).items()) if kind_of(path) in PULLED}
        if strange := [path for path in listed if ".." in PurePosixPath(path).parts]:
            raise InputError(f"{self.name} lists {strange[0]!r}, which is no path of a dataset; nothing was fetched.")
        here = {path: content for path, found in listed.items() if (content := _kept(kept / path, found)) is not None}
        missing = [path for path in listed if path not in here]
        kept.mkdir(parents=True, exist_ok=True)
        kept.chmod(0o700)  # as they were sent, with the graders' comments
        errors = []
        pool = ThreadPoolExecutor(READERS)
        try:
            waiting = [pool.submit(self._download, path, commit, listed[path], kept / path) for path in missing]
            for done in track(as_completed(waiting), f"fetch from {self.name}", len(missing), "file"):
                errors += [error] if (error := done.exception()) else []
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C need not wait for what is still to come
        if errors:
            raise next((error for error in errors if not isinstance(error, SinkBusy)), errors[0])
        for path in [path for path in kept.rglob("*") if path.is_file()]:
            if path.relative_to(kept).as_posix() not in listed:
                path.unlink()
        return Fetched({path: here.get(path) or (kept / path).read_bytes() for path in listed}, len(missing))

    def _download(self, path: str, commit: str, identifier: str, target: Path) -> None:
        content = self.read(path, commit)
        if content is None or not has_id(content, identifier):
            raise SinkBusy(f"{path} of {self.name} did not come whole.")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content)

    def _call(self, function: Callable[[], Result]) -> Result:
        try:
            return super()._call(function)
        except SinkBusy:
            raise
        except SinkError as error:
            from huggingface_hub.errors import RepositoryNotFoundError

            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            told = explained(cause, self.repo_id, "dataset", self.revision)
            raise (SourceMissing(told) if isinstance(cause, RepositoryNotFoundError) else told) from error


def _kept(path: Path, identifier: str) -> bytes | None:
    """A kept file's bytes if they are those that the Hub lists."""
    content = path.read_bytes() if path.is_file() else None
    return content if content is not None and has_id(content, identifier) else None
