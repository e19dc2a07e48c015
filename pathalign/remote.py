"""Repos on a Hub: which Hub is asked, what is a repo's id, and what its errors mean to whoever typed the id."""

from __future__ import annotations

import os
from pathlib import Path

from pathalign.schema import InputError

REPO_TYPES = ("model", "dataset", "space")


def is_repo_id(path_or_repo_id: str | Path) -> bool:
    """Whether this is `OWNER/NAME` of a repo, and not a folder or file that exists here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    text = str(path_or_repo_id)
    if Path(text).exists():
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


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
        if isinstance(found, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            return InputError(
                f"{where} cannot be reached, and is not in the cache of this machine. "
                + ("Unset HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "Check your connection")
                + ", or give a folder."
            )
        if isinstance(found, errors.EntryNotFoundError):
            return InputError(f"{where} lacks a file that is needed: {str(found).splitlines()[0]}")
        if isinstance(found, errors.HfHubHTTPError) and found.response is not None:
            status = found.response.status_code
            if status in (401, 403):
                return InputError(
                    f"{where} refused your token ({status}). Log in with `hf auth login`, or set HF_TOKEN."
                )
            return InputError(f"{where} answered {status}. Try again later.")
        found = found.__cause__ or found.__context__
    return InputError(f"{where} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
