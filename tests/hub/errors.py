"""Answers of the loopback Hub that are no success."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response


class HubError(Exception):
    """An answer that is no success, with the headers that clients look at.

    Attributes:
        code: `X-Error-Code`, such as `RepoNotFound`.
        extra: More of the JSON body.
        headers: More headers.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra
        self.headers = headers or {}


class Moved(HubError):  # noqa: N818
    """The repo has another name now."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(307, f"{old} was moved to {new}")
        self.old, self.new = old, new


async def refused(request: Request, error: Exception) -> Response:
    """The answer."""
    assert isinstance(error, HubError)
    if isinstance(error, Moved):
        path = request.scope["raw_path"].decode().split("?")[0].replace(error.old, error.new, 1)
        error.headers["Location"] = f"{path}?{request.url.query}" if request.url.query else path
    message = error.message.encode("ascii", "replace").decode().replace("\n", " ")  # headers take no more
    headers = {"X-Error-Message": message, **error.headers} | ({"X-Error-Code": error.code} if error.code else {})
    return JSONResponse({"error": error.message, **error.extra}, status_code=error.status, headers=headers)
