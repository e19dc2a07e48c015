"""The gate in front of the grading page: an ASGI middleware that lets through what the page needs, and nothing else.

Everything is refused that is not named here: other paths, other sites, strangers, requests too large to be a grade. The
application behind it finds the visitor in `scope["state"]["visitor"]`; nothing that a browser sends can change that.
`SameSite` is the part of it that keeps other sites out, for a page that everybody may open.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from pathalign.grading.access import Access, Visitor

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
LIMIT_BYTES = 256 * 1024  # of a request: 50 grades with the longest comments fit in
SAFE_METHODS = ("GET", "HEAD")
# A path that ends in `/` stands for all below it. Gradio's uploads, files, proxy, queue and so on are not listed.
OPEN_PATHS = ("/enter", "/favicon.ico", "/robots.txt", "/login/huggingface", "/login/callback", "/logout")
VISITOR_PATHS = ("/whoami", "/assets/", "/static/", "/svelte/", "/theme.css", "/gradio_api/theme.css", "/manifest.json")
CALL_PATHS = ("/gradio_api/component_server", "/gradio_api/component_server/")  # how the page asks for everything
GRADER_PATHS = ("/", "/config", "/config/", *CALL_PATHS)
OWNER_PATHS = ("/results", "/results/")
POST_PATHS = ("/enter", *CALL_PATHS)
HEADERS = {  # gradio's page has scripts in its HTML and compiles that of `gr.HTML` from text: hence the two `unsafe-`
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; font-src 'self' data:; "
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; object-src 'none'; base-uri 'self'; "
        "form-action 'self'; frame-ancestors {frames}"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class RefusedError(Exception):
    """A request that may not pass: an HTTP status and a reason that a person can act on."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class SameSite:
    """ASGI middleware: another web site may send nothing to this page, and gets 403.

    Attributes:
        app: What it stands before.
        hosts: Names under which this server is reached, without port. Others are refused, so that no web site can
            point a name of its own at it. None if a proxy sees to that.
        origins: Names of this page's own site as browsers see it; None for the name that the request came to.
    """

    app: App
    hosts: Collection[str] | None = LOCAL_HOSTS
    origins: Collection[str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 403."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            if scope["type"] == "http":
                self._check_origin(scope["method"], _headers(scope))
        except RefusedError as refusal:
            await _answer(send, refusal.status, json.dumps({"error": refusal.reason}), "application/json")
            return
        await self.app(scope, receive, send)

    def _check_origin(self, method: str, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "").casefold()
        if self.hosts is not None and _without_port(host) not in {name.casefold() for name in self.hosts}:
            raise RefusedError(
                403,
                f"This server does not answer to the name {host!r}, only to {', '.join(self.hosts)}; "
                "`pathalign grade serve` takes another one with `--allow-host`.",
            )
        if method in SAFE_METHODS:
            return
        own = {host} if self.origins is None else {name.casefold() for name in self.origins}
        foreign = "origin" in headers and headers["origin"].partition("://")[2].casefold() not in own
        if foreign or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise RefusedError(403, "Another web site may not send anything to this page.")


@dataclass(frozen=True)
class Gate(SameSite):
    """ASGI middleware; see the module.

    Attributes besides those of `SameSite`:
        access: Who may do what.
        frames: Sites that may show the page in a frame, as in a Content-Security-Policy.
        door_page: HTML for strangers who open the page, given the reason.
        limit_bytes: The largest request.
    """

    access: Access = field(kw_only=True)
    frames: str = "'none'"
    door_page: Callable[[int, str], str] = field(default=lambda status, reason: reason)
    limit_bytes: int = LIMIT_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 401, 403, 404, 405, 413 or 415."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = _headers(scope)
        try:
            scope.setdefault("state", {})["visitor"] = self._check(scope, headers)
            body = await self._body(receive) if scope["method"] not in SAFE_METHODS else receive
            await self.app(_uncompressed(scope), body, self._with_headers(scope, send))
        except RefusedError as refusal:
            await self._refuse(scope, headers, refusal, send)

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> Visitor | None:
        method, path = scope["method"], scope["path"]
        self._check_origin(method, headers)
        if ".." in path or "\\" in path or "//" in path:
            raise RefusedError(404, "There is no such page.")
        visitor = self.access.visitor(_cookies(headers), scope.get("session") or {})
        if not _matches(path, OPEN_PATHS):
            _check_rights(path, visitor)
        if method not in SAFE_METHODS:
            self._check_body(method, path, headers)
        return visitor

    def _check_body(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        if method != "POST" or not _matches(path, POST_PATHS):
            raise RefusedError(405, "This page cannot be written to.")
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RefusedError(415, "Send JSON; this page takes no files and no forms.")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.limit_bytes:
            raise RefusedError(413, f"A request may have {self.limit_bytes} bytes at most.")

    async def _body(self, receive: Receive) -> Receive:
        """Read the whole request before anything acts on it, as much as is allowed and no more."""
        content, more = b"", True
        while more:
            message = await receive()
            content += message.get("body", b"")
            more = message["type"] == "http.request" and bool(message.get("more_body"))
            if len(content) > self.limit_bytes:
                raise RefusedError(413, f"A request may have {self.limit_bytes} bytes at most.")
        waiting = [{"type": "http.request", "body": content, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        return replay

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        cacheable = _matches(scope["path"], ("/assets/", "/static/", "/svelte/", "/favicon.ico"))

        async def extended(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = {key.lower() for key, _ in message.get("headers", [])}
                own = {key: value.format(frames=self.frames) for key, value in HEADERS.items()}
                if cacheable:
                    own.pop("cache-control")
                added = [(key.encode(), value.encode()) for key, value in own.items() if key.encode() not in named]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        return extended

    async def _refuse(self, scope: Scope, headers: Mapping[str, str], refusal: RefusedError, send: Send) -> None:
        wants_page = scope["method"] == "GET" and "text/html" in headers.get("accept", "")
        if wants_page:
            body, kind = self.door_page(refusal.status, refusal.reason), "text/html; charset=utf-8"
        else:
            body, kind = json.dumps({"error": refusal.reason}), "application/json"
        await _answer(self._with_headers(scope, send), refusal.status, body, kind)


def space_names() -> tuple[str, ...]:
    """Names under which browsers see the Space that this runs on, for `origins`."""
    return tuple(name.strip() for name in os.environ.get("SPACE_HOST", "").split(",") if name.strip())


async def _answer(send: Send, status: int, body: str, kind: str) -> None:
    content = body.encode()
    start = [(b"content-type", kind.encode()), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": content})


def _headers(scope: Scope) -> dict[str, str]:
    return {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}


def _uncompressed(scope: Scope) -> Scope:
    """Ask for no compression of answers with images: compressed, their sizes would tell images apart."""
    if _matches(scope["path"], CALL_PATHS):
        scope["headers"] = [item for item in scope["headers"] if item[0].lower() != b"accept-encoding"]
    return scope


def _check_rights(path: str, visitor: Visitor | None) -> None:
    allowed = {
        VISITOR_PATHS: visitor is not None,
        GRADER_PATHS: visitor is not None and visitor.is_grader,
        OWNER_PATHS: visitor is not None and visitor.is_owner,
    }
    wanted = [paths for paths in allowed if _matches(path, paths)]
    if visitor is None:
        raise RefusedError(401, "Nobody is signed in here.")
    if not (visitor.is_grader or visitor.is_owner):
        raise RefusedError(403, f"{visitor.name} is not on the list of this study.")
    if not wanted:
        raise RefusedError(404, "There is no such page.")
    if not any(allowed[paths] for paths in wanted):
        whom = "owners" if OWNER_PATHS in wanted else "graders"
        raise RefusedError(403, f"This page is for the {whom} of the study.")


def _matches(path: str, patterns: Collection[str]) -> bool:
    return any(path == item or (len(item) > 1 and item.endswith("/") and path.startswith(item)) for item in patterns)


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).casefold()


def _cookies(headers: Mapping[str, str]) -> dict[str, str]:
    pairs = (item.partition("=") for item in headers.get("cookie", "").split(";"))
    return {name.strip(): value.strip().strip('"') for name, _, value in pairs}
