"""One publication is one commit: asked for again after every fault, never made twice, never half.

Each try reads the head anew, works out what differs from it, and names it as the parent: if somebody was quicker, the
Hub refuses with 412 and nothing has happened. Whether a commit took effect whose answer got lost is seen in the
history: its title names the content.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pathalign.artefacts import fingerprint
from pathalign.progress import say
from pathalign.remote import RETRIED_STATUS, endpoint, explained, has_id, is_transport
from pathalign.schema import InputError

MANIFEST = "pathalign.json"
# What a fingerprint leaves out, and may change on the repo's page: nothing that a stage reads.
BESIDE = ("README.md", "run.json")
PATIENCE_S = 600.0  # with a Hub that answers: its rate limits last up to five minutes
UNREACHABLE_PATIENCE_S = 60.0
LONGEST_WAIT_S = 30.0
Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """A file at a repo's head: its size, git's hash of what git holds, and the content's hash if it is a large file."""

    size: int
    blob_id: str
    sha256: str | None

    def holds(self, content: Path) -> bool:
        """Whether these are the bytes of a file here."""
        if self.size != content.stat().st_size:
            return False
        return self.sha256 == sha256_of(content) if self.sha256 else has_id(content.read_bytes(), self.blob_id)


@dataclass(frozen=True)
class Head:
    """What a repo holds now."""

    commit: str
    private: bool
    files: dict[str, RemoteFile]
    manifest: dict[str, Any]  # of the last publication; empty if there was none
    stage: str | None  # of the run record, which may be there without a manifest


@dataclass(frozen=True)
class Changes:
    """What a commit would do to a head: paths that are new or differ, and paths that go."""

    added: tuple[str, ...]
    deleted: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.deleted)


class HubRepo:
    """A repo on the Hub that artefacts are published to. Calls are tried again until they go well or cannot.

    Args:
        repo_id: `OWNER/NAME`.
        repo_type: `model`, `dataset` or `space`.
    """

    def __init__(self, repo_id: str, repo_type: str) -> None:
        from huggingface_hub import HfApi

        self.repo_id, self.repo_type = repo_id, repo_type
        self.api = HfApi()

    @property
    def url(self) -> str:
        """Address of its page."""
        return f"{endpoint()}/{'' if self.repo_type == 'model' else f'{self.repo_type}s/'}{self.repo_id}"

    def head(self) -> Head | None:
        """What it holds now; None if there is no such repo, or the token may not see it."""
        return self.again(self._head)

    def at(self, revision: str | None) -> Head:
        """What it holds at a revision; None is its newest.

        Raises:
            InputError: If there is no such repo or revision.
        """
        return self.again(lambda: self._at(revision), revision)

    def is_as_published(self, head: Head) -> bool:
        """Whether all files that the manifest names are still those that were published, without card and record."""
        told = {path: sha256 for path, sha256 in head.manifest.get("files", {}).items() if path not in BESIDE}
        return bool(told) and self.again(
            lambda: all(path in head.files and self._unchanged(head, path, told[path]) for path in told)
        )

    def fingerprint(self, head: Head) -> str:
        """Fingerprint of the folder that was uploaded, as run records name it.

        What `pathalign publish` put there says so in its manifest, as long as nobody changed it since; of a plain
        upload it is computed from all files, without those that the Hub adds.
        """
        if head.manifest.get("fingerprint") and self.is_as_published(head):
            return str(head.manifest["fingerprint"])
        return fingerprint(self.folder(head.commit, ignore=[MANIFEST, ".gitattributes", ".eval_results/*"]))

    def folder(self, commit: str, only: list[str] | None = None, ignore: list[str] | None = None) -> Path:
        """Where the files of a commit lie once they are fetched; all that match a glob pattern."""
        fetched = self.again(
            lambda: self.api.snapshot_download(
                self.repo_id, repo_type=self.repo_type, revision=commit, allow_patterns=only, ignore_patterns=ignore
            )
        )
        return Path(fetched)

    def exists_as(self, repo_type: str) -> bool:
        """Whether a repo of this name is there as another type."""
        return self.again(lambda: self.api.repo_exists(self.repo_id, repo_type=repo_type))

    def validate(self, card: str) -> None:
        """Let the Hub look at a card's front matter.

        Raises:
            InputError: If it would not take it.
        """
        from huggingface_hub import DatasetCard, ModelCard, SpaceCard

        kinds = {"model": ModelCard, "dataset": DatasetCard, "space": SpaceCard}
        self.again(lambda: kinds[self.repo_type](card).validate())

    def create(self, private: bool) -> None:
        """Make it unless it is there."""
        sdk = "static" if self.repo_type == "space" else None
        self.again(
            lambda: self.api.create_repo(
                self.repo_id, repo_type=self.repo_type, private=private, exist_ok=True, space_sdk=sdk
            )
        )

    def commit(self, files: Mapping[str, Path], title: str, check: Callable[[Head], None]) -> tuple[str, Changes]:
        """Make these files the publication, in one commit.

        Args:
            files: Path in the repo -> file here; `MANIFEST` is among them.
            title: Of the commit; names the content, so that equal titles mean equal files.
            check: Raises if the head must not be replaced.

        Returns:
            The commit that holds the files, and what was changed; nothing if they were there already.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        first: list[str] = []
        made = Changes((), ())

        def attempt() -> tuple[str, Changes]:
            nonlocal made
            head = self._head()
            if head is None:
                raise InputError(f"{self.url} is gone; publish again.")
            if first and head.commit != first[0] and (earlier := self._committed(title, since=first[0])):
                return earlier, made
            first[:] = first or [head.commit]
            changes = self.changes(head, files)
            if not changes:
                return head.commit, changes
            check(head)
            made = changes
            adds = [CommitOperationAdd(path, files[path]) for path in changes.added]
            deletes = [CommitOperationDelete(path, is_folder=False) for path in changes.deleted]
            done = self.api.create_commit(
                self.repo_id,
                [*adds, *deletes],
                commit_message=title,
                repo_type=self.repo_type,
                parent_commit=head.commit,
            )
            return str(done.oid), changes

        return self.again(attempt)

    def changes(self, head: Head | None, files: Mapping[str, Path]) -> Changes:
        """What differs between the publication and a head. Files that others put there, or changed, are let be."""
        if head is None:
            return Changes(tuple(files), ())
        added = [path for path, file in files.items() if path not in head.files or not head.files[path].holds(file)]
        ours = head.manifest.get("files", {})
        gone = [path for path in ours if path not in files and path in head.files]
        return Changes(tuple(added), tuple(path for path in gone if self._unchanged(head, path, ours[path])))

    def tag(self, name: str, commit: str) -> bool:
        """Give a commit a tag; False if it had it already.

        Raises:
            InputError: If the tag is at another commit.
        """

        def attempt() -> bool:
            found = self.tagged(name)
            if found is None:
                self.api.create_tag(self.repo_id, tag=name, revision=commit, repo_type=self.repo_type)
            elif found != commit:
                raise InputError(
                    f"The tag {name!r} of {self.repo_id} is at commit {found[:8]} already, not at {commit[:8]}; choose "
                    "another with `--revision-tag`."
                )
            return found is None

        return self.again(attempt)

    def tagged(self, name: str) -> str | None:
        """The commit that a tag is at, None if there is no such tag."""
        refs = self.again(lambda: self.api.list_repo_refs(self.repo_id, repo_type=self.repo_type))
        return next((tag.target_commit for tag in refs.tags if tag.name == name), None)

    def again(self, call: Callable[[], Result], revision: str | None = None) -> Result:
        """Make a call until it goes well; `revision` is for the error if there is no such one.

        Raises:
            InputError: If it cannot, or does not within `PATIENCE_S`; sooner if nobody answers.
        """
        started, tries = time.monotonic(), 0
        while True:
            try:
                return call()
            except InputError:
                raise
            except Exception as error:
                if type(error) is ValueError:  # how the client says that the Hub found fault with the card
                    raise InputError(
                        f"The Hub does not take the card of {self.repo_id}: {_faults(str(error))}"
                    ) from error
                wait_s = waiting_time_s(error, tries)
                patience_s = PATIENCE_S if _answer(error) is not None else UNREACHABLE_PATIENCE_S
                if wait_s is None or time.monotonic() - started + wait_s > patience_s:
                    raise explained(error, self.repo_id, self.repo_type, revision) from error
                say(f"The Hub did not take it ({_reason(error)}); trying again in {wait_s:.0f} s.")
                time.sleep(wait_s)
                tries += 1

    def _head(self) -> Head | None:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            return self._at(None)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None

    def _at(self, revision: str | None) -> Head:
        info = self.api.repo_info(self.repo_id, repo_type=self.repo_type, revision=revision, files_metadata=True)
        files = {
            file.rfilename: RemoteFile(file.size or 0, file.blob_id or "", file.lfs.sha256 if file.lfs else None)
            for file in getattr(info, "siblings", None) or []
        }
        commit = str(info.sha)
        manifest = self._json(MANIFEST, commit) if MANIFEST in files else {}
        record = self._json("run.json", commit) if "run.json" in files else {}
        return Head(commit, bool(info.private), files, manifest, record.get("stage"))

    def _json(self, path: str, commit: str | None) -> dict[str, Any]:
        """A JSON file of a commit; empty if it is no mapping."""
        try:
            content = json.loads(self._download(path, commit).read_text())
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _download(self, path: str, commit: str | None) -> Path:
        return Path(self.api.hf_hub_download(self.repo_id, path, repo_type=self.repo_type, revision=commit))

    def _unchanged(self, head: Head, path: str, sha256: str) -> bool:
        """Whether a file is still as it was published."""
        found = head.files[path].sha256 or sha256_of(self._download(path, head.commit))
        return found == sha256

    def _committed(self, title: str, since: str) -> str | None:
        """The commit of this title that came after another one, if it is there."""
        for commit in self.api.list_repo_commits(self.repo_id, repo_type=self.repo_type):
            if commit.commit_id == since:
                return None
            if commit.title == title:
                return commit.commit_id
        return None


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def waiting_time_s(error: BaseException, tries: int) -> float | None:
    """Before the next try: what the Hub asks for, else longer each time; None if it would be in vain."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    backoff = min(LONGEST_WAIT_S, 0.5 * 2**tries) * random.uniform(0.5, 1.5)
    answer = _answer(error)
    if answer is not None:
        if answer.status_code not in RETRIED_STATUS and answer.status_code < 500:
            return None
        return max(backoff, _asked_for_s(answer.headers))
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return None
        if is_transport(cause) or isinstance(cause, json.JSONDecodeError):
            return backoff
    return None


def _causes(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _asked_for_s(headers: Mapping[str, str]) -> float:
    """Seconds of `Retry-After`, or of the Hub's `RateLimit: "api";r=0;t=55`; 0 if neither is there."""
    from huggingface_hub.utils import parse_ratelimit_headers

    value = headers.get("retry-after") or ""
    if value.replace(".", "", 1).isdigit():
        return float(value)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) + 1 if limit and limit.remaining == 0 else 0.0


def _faults(text: str) -> str:
    """What the Hub has against a card, out of its JSON."""
    try:
        return "; ".join(str(entry["message"]) for entry in json.loads(text)["errors"])
    except (ValueError, LookupError, TypeError):
        return text


def _answer(error: BaseException) -> Any:
    """The Hub's answer that an error is about, if it answered."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((cause.response for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)


def _reason(error: BaseException) -> str:
    answer = _answer(error)
    return str(answer.status_code) if answer is not None else type(error).__name__
