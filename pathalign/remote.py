"""Repos on a Hub: which one and which commit a text means, what it holds, and what its errors mean to whoever typed it.

Wherever a folder or Hub id is taken, `OWNER/NAME@REVISION` names a branch, a tag or a commit. Nothing is executed and
no weights are fetched here: what a repo holds is told by the names of its files and by its `config.json`.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathalign.schema import InputError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

REPO_TYPES = ("model", "dataset", "space")
RETRIED_STATUS = (408, 409, 412, 425, 429)  # and all from 500 on
HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2")  # the client (2.4) does not wrap their errors


@dataclass(frozen=True)
class Reference:
    """A folder, or a Hub repo with the revision that is wanted of it."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def is_repo_id(path_or_repo_id: str | Path) -> bool:
    """Whether this is `OWNER/NAME` of a repo, and not a folder or file that exists here."""
    text = str(path_or_repo_id)
    return not Path(text).exists() and _names_a_repo(text)


def _names_a_repo(text: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def parse(path_or_repo_id: str | Path, revision: str | None = None) -> Reference:
    """Read a folder, `OWNER/NAME` or `OWNER/NAME@REVISION`.

    Args:
        path_or_repo_id: As the user gave it; what exists here is a folder, whatever its name.
        revision: The same said apart.

    Raises:
        InputError: If both say different revisions, the one after `@` is empty, or a folder is given one.
    """
    text = str(path_or_repo_id)
    name, at, own = text.rpartition("@")
    if Path(text).exists() or not at or not is_repo_id(name):
        if revision and Path(text).exists():
            raise InputError(f"Revision {revision!r} is wanted of {text}, which is a folder here; leave it out.")
        return Reference(text, revision)
    if not own:
        raise InputError(f"{text!r} names no revision; write {name}@REVISION, or {name} for its newest.")
    if revision and revision != own:
        raise InputError(f"{text!r} and the revision {revision!r} contradict each other; give one of them.")
    return Reference(name, own)


def pinned_repo(recorded: str) -> Reference | None:
    """The repo at one commit that a run record names as an input; None of a folder, which it knows by a hash.

    `parse` reads what somebody types, where a folder that exists here goes first; a record was written elsewhere.
    """
    name, _, commit = recorded.rpartition("@")
    return Reference(name, commit) if commit and _names_a_repo(name) else None


def endpoint() -> str:
    """Address of the Hub that the client speaks to: `HF_ENDPOINT`, which may name a self-hosted one."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def explained(error: Exception, repo_id: str, repo_type: str = "model", revision: str | None = None) -> InputError:
    """Say what an error of the Hub's client means for the repo that was asked for, and what to type next.

    Args:
        error: Of huggingface_hub, or of a library that called it; its causes are looked at too.
        repo_id: `OWNER/NAME` as the user gave it.
        repo_type: One of `REPO_TYPES`.
        revision: Branch, tag or commit that was asked for.
    """
    from huggingface_hub import errors

    where = f"The {repo_type} {repo_id!r} on {endpoint()}"
    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.RevisionResolutionError)
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, errors.GatedRepoError):
            return InputError(f"{where} is gated: ask for access on its page, then log in with `hf auth login`.")
        if isinstance(found, errors.RevisionNotFoundError):
            return InputError(f"{where} has no revision {revision!r}; give a branch, a tag or a commit that it has.")
        if isinstance(found, errors.RepositoryNotFoundError | errors.HFValidationError):
            return InputError(
                f"{where} does not exist, or is private and your token may not see it. Check the spelling and the "
                f"kind of repo, and log in with `hf auth login` or set HF_TOKEN."
            )
        if isinstance(found, unreachable):
            return InputError(
                f"{where} cannot be reached, and is not in the cache of this machine. "
                + ("Unset HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "Check your connection")
                + ", or give a folder."
            )
        if isinstance(found, errors.EntryNotFoundError):
            return InputError(f"{where} lacks a file that is needed: {str(found).splitlines()[0]}")
        if isinstance(found, errors.HfHubHTTPError) and found.response is not None:
            return InputError(_refused(where, found))
        if is_transport(found):
            return InputError(
                f"{where} cannot be reached ({type(found).__name__}). Check your connection and HF_ENDPOINT, and run "
                "the same command again."
            )
        found = found.__cause__ or found.__context__
    return InputError(f"{where} cannot be read: {first_line(error)}")


def _refused(where: str, error: HfHubHTTPError) -> str:
    status, said = error.response.status_code, " ".join((error.server_message or "").split())
    if status == 401:
        return f"{where} refused your token (401). Log in with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"{where} refused your token (403): it lacks the right. Give it that on {endpoint()}/settings/tokens."
    later = "Try again later." if status == 429 or status >= 500 else "Change what it names, and run it again."
    return f"{where} answered {status}{f': {said}' if said else ''}. {later}"


def is_transport(error: BaseException) -> bool:
    """Whether nobody answered, or the connection broke: an error of the client's HTTP library, or of a socket.

    The causes of the error are not looked at.
    """
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):  # the Hub's answer, though its class is one of the HTTP library's too
        return False
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return not libraries.isdisjoint(HTTP_LIBRARIES) or isinstance(error, ConnectionError | TimeoutError)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def content_id(entry: Any) -> str:
    """What tells the content of a file in a listing: SHA-256 of a large one, else git's id."""
    lfs = getattr(entry, "lfs", None)
    return str(lfs.sha256 if lfs else getattr(entry, "blob_id", ""))


def has_id(content: bytes, identifier: str) -> bool:
    """Whether these bytes are those that a listing calls by this id."""
    if len(identifier) == 64:
        return hashlib.sha256(content).hexdigest() == identifier
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == identifier
