"""Grades to a dataset repo on the Hugging Face Hub, with the stock client."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from pathalign.grading.sinks import SinkBusy, SinkConflict, SinkError, SinkRefused
from pathalign.remote import RETRIED_STATUS, content_id, has_id

CALL_TIMEOUT_S = 60.0
Result = TypeVar("Result")


class HubSink:
    """A dataset repo on the Hub; each file is one commit on `main`.

    The token comes from the argument or from `HF_TOKEN`, never from a login saved on the machine: a server writes with
    the rights that were meant for it, or not at all.

    Args:
        repo_id: `USER/REPO` of a dataset that exists.
        token: Needs write access to that repo only.
        endpoint: Address of the Hub; the one of `HF_ENDPOINT` if not given.
        timeout_s: How long one call may take; the client itself would wait for ever.
    """

    def __init__(
        self,
        repo_id: str,
        token: str | None = None,
        *,
        endpoint: str | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        from huggingface_hub import HfApi

        given = token or os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
        self.repo_id = repo_id
        self.timeout_s = timeout_s
        self._token: str | bool = given.strip() if given else False
        self._api = HfApi(endpoint=endpoint, token=self._token)

    def __repr__(self) -> str:
        return f"HubSink({self.repo_id!r})"

    def put(self, path: str, content: bytes) -> None:
        """Commit a file, unless the repo has it already: an earlier try may have gone well without our hearing of it.

        No parent commit is named: servers that commit at the same time do not have to agree on an order.
        """
        from huggingface_hub import CommitOperationAdd

        def commit() -> None:
            if self._has(path, content):
                return
            rows = content.count(b"\n")
            self._api.create_commit(
                self.repo_id,
                [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)],
                commit_message=f"Add {rows} {'row' if rows == 1 else 'rows'} of {path.split('/')[0]}",
                repo_type="dataset",
            )

        self._call(commit)

    def read(self, path: str, revision: str | None = None) -> bytes | None:
        """Download a file, past all caches of this machine; as it is now, or at a commit."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.utils import get_session, hf_raise_for_status

        def download() -> bytes | None:
            where = {"repo_type": "dataset", "revision": revision, "endpoint": self._api.endpoint}
            url = hf_hub_url(self.repo_id, path, **where)
            headers = self._api._build_hf_headers() | {"Cache-Control": "no-cache"}
            response = get_session().get(url, headers=headers, follow_redirects=True)
            try:
                hf_raise_for_status(response)
            except EntryNotFoundError:
                return None
            content: bytes = response.content
            return content

        return self._call(download)

    def list(self, prefix: str) -> list[str]:
        """Files below a folder of the repo's head."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import EntryNotFoundError

        def tree() -> list[str]:
            try:
                entries = self._api.list_repo_tree(self.repo_id, prefix.strip("/"), recursive=True, repo_type="dataset")
                return sorted(entry.path for entry in entries if isinstance(entry, RepoFile))
            except EntryNotFoundError:
                return []

        return self._call(tree)

    def _has(self, path: str, content: bytes) -> bool:
        """Whether these bytes are at this path.

        Raises:
            SinkConflict: If others are.
        """
        found = self._api.get_paths_info(self.repo_id, [path], repo_type="dataset")
        if not found:
            return False
        same = has_id(content, content_id(found[0]))
        if not same:
            raise SinkConflict(
                f"{self.repo_id} has other bytes at {path} than those to keep; move that file away there."
            )
        return True

    def _call(self, function: Callable[[], Result]) -> Result:
        """Run a call of the client, for so long, with its errors turned into ours."""
        outcome: dict[str, Any] = {}

        def run() -> None:
            try:
                outcome["result"] = function()
            except BaseException as error:
                outcome["error"] = error

        # A call that hangs is left to itself: what it may still commit is what a later try finds to be there already.
        thread = threading.Thread(target=run, daemon=True, name="pathalign-hub-call")
        thread.start()
        thread.join(self.timeout_s)
        if thread.is_alive():
            raise SinkBusy(f"The Hub did not answer within {self.timeout_s:g} s.")
        if "error" in outcome:
            raise self._explained(outcome["error"]) from outcome["error"]
        result: Result = outcome["result"]
        return result

    def _explained(self, error: BaseException) -> BaseException:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        if isinstance(error, SinkError) or not isinstance(error, Exception):
            return error
        if isinstance(error, HFValidationError | OfflineModeIsEnabled):
            return SinkRefused(f"The Hub dataset {self.repo_id} cannot be used: {error}")
        if not isinstance(error, HfHubHTTPError):  # no connection, a cut one, an answer that is none
            return SinkBusy(f"The Hub cannot be reached ({type(error).__name__}).")
        status = error.response.status_code
        if status in RETRIED_STATUS or status >= 500:
            return SinkBusy(f"The Hub answered {status} for {self.repo_id}.", _retry_after_s(error.response.headers))
        advice = {
            401: "The token is missing or not valid: set HF_TOKEN to one that may write to this dataset.",
            402: "The account's plan does not allow it: see the billing page of the account.",
            403: "The token may not write to it: give it write access to this dataset.",
            404: "There is no such dataset, or the token may not see it: create it, or mend `sink`.",
        }.get(status, "Look at the dataset's page, or mend `sink`.")
        return SinkRefused(f"The Hub answered {status} for the dataset {self.repo_id}. {advice}")


def _retry_after_s(headers: Any) -> float | None:
    """Seconds of `Retry-After`, or of the Hub's `RateLimit: "api";r=0;t=55`."""
    value = headers.get("retry-after") or ""
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    found = re.search(r"\br=0\b.*?\bt=(\d+)", headers.get("ratelimit") or "")
    return float(found[1]) if found else None
