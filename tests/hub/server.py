"""The loopback Hub's HTTP face, after huggingface_hub 2.4's own source.

Clients need `HF_ENDPOINT` (read at import) and `HF_HUB_DISABLE_XET=1`. Faults are set in the process by `Faults.set`,
or from outside by `POST /-/faults`. There is no encryption and one lock: not for production.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hub import jobs
from hub.faults import Fault, Faults
from hub.files import file_routes
from hub.store import HubError, Store
from hub.web import KINDS, authorized, find_repo, json_body, revision_of, token_of

TOKEN = "hf_loopback"
USER = "lab"


async def create_repo(request: Request) -> Response:
    store: Store = request.app.state.store
    body = await json_body(request)
    user = store.user(token_of(request))
    if user is None:
        raise HubError(401, "Invalid username or password.")
    name = f"{body.get('organization') or user}/{body['name']}"
    if not store.may_write(token_of(request), name):
        raise HubError(403, "You don't have the rights to create a repo under this namespace.")
    kind = f"{body.get('type') or 'model'}s"
    private = body.get("visibility") == "private" or bool(body.get("private"))
    url = f"{str(request.base_url).rstrip('/')}/{'' if kind == 'models' else kind + '/'}{name}"
    try:
        store.create(kind, name, private, body.get("sdk"))
    except HubError as error:
        error.extra["url"] = url  # the client wants it, also with a 409
        raise
    return JSONResponse({"url": url, "name": name, "id": name})


async def delete_repo(request: Request) -> Response:
    body = await json_body(request)
    store: Store = request.app.state.store
    kind = f"{body.get('type') or 'model'}s"
    name = f"{body.get('organization') or store.user(token_of(request))}/{body['name']}"
    store.repo(kind, name, token_of(request))
    authorized(request, name)
    store.delete(kind, name)
    return Response(status_code=200)


def whoami(request: Request) -> Response:
    user = request.app.state.store.user(token_of(request))
    if user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "loopback", "role": "fineGrained"}
    return JSONResponse(
        {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}
    )


async def validate_yaml(request: Request) -> Response:
    return JSONResponse({"errors": [], "warnings": []})


def repo_info(request: Request) -> Response:
    store: Store = request.app.state.store
    repo = find_repo(request)
    oid = store.resolve(repo, revision_of(request))
    tree = store.tree(oid)
    commits = store.history(repo, oid)
    moment = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(commits[0][2]))
    described = {
        "id": repo.name,
        "_id": repo.name,
        "author": repo.name.split("/")[0],
        "sha": oid,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": moment,
        "lastModified": moment,
        "siblings": [{"rfilename": path} for path in tree],
    }
    if repo.kind == "spaces":
        described["sdk"] = repo.sdk
    if request.query_params.get("blobs"):
        described["siblings"] = [
            {"rfilename": path, "size": entry.size, "blobId": entry.oid}
            | ({"lfs": {"sha256": entry.sha256, "size": entry.size, "pointerSize": 134}} if entry.lfs else {})
            for path, entry in tree.items()
        ]
    return JSONResponse(described)


def refs(request: Request) -> Response:
    store: Store = request.app.state.store
    repo = find_repo(request)
    query = "SELECT ref, oid FROM refs WHERE kind = ? AND name = ?"
    with store.lock:
        found = store.database.execute(query, (repo.kind, repo.name)).fetchall()
    branches = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid} for ref, oid in found]
    return JSONResponse({"branches": branches, "tags": [], "converts": [], "pullRequests": []})


def commits(request: Request) -> Response:
    store: Store = request.app.state.store
    repo = find_repo(request)
    listed = [
        {
            "id": oid,
            "title": title,
            "message": "",
            "authors": [{"user": repo.name.split("/")[0]}],
            "date": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(created)),
        }
        for oid, title, created in store.history(repo, store.resolve(repo, revision_of(request)))
    ]
    return JSONResponse(listed)


async def faults(request: Request) -> Response:
    """GET tells what happened; POST replaces the rules with those of the JSON list."""
    layer: Faults = request.app.state.faults
    if request.method == "POST":
        layer.set(*(Fault(**rule) for rule in await json_body(request)))
    return JSONResponse({"hits": layer.hits, "requests": len(layer.requests)})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
    return JSONResponse({"error": error.message, **error.extra}, status_code=error.status, headers=headers)


class KeepSlashes:
    """Revisions arrive as `refs%2Fpr%2F1`: such a slash must not look like one between parts of the path."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raw = scope["raw_path"].decode().split("?")[0]
            scope = {**scope, "path": unquote(raw.replace("%2F", "%252F").replace("%2f", "%252F"))}
        await self.app(scope, receive, send)


def make_app(store: Store) -> Faults:
    """The server as an ASGI app; `.faults` are set on the returned layer."""
    api = f"/api/{{kind:{KINDS}}}/{{namespace}}/{{name}}"
    routes = [
        Route("/-/faults", faults, methods=["GET", "POST"]),
        Route("/api/repos/create", create_repo, methods=["POST"]),
        Route("/api/repos/delete", delete_repo, methods=["DELETE"]),
        Route("/api/whoami-v2", whoami),
        Route("/api/validate-yaml", validate_yaml, methods=["POST"]),
        *file_routes(api),
        *jobs.routes(),
        Route(f"{api}/refs", refs),
        Route(f"{api}/commits/{{revision}}", commits),
        Route(f"{api}/revision/{{revision}}", repo_info),
        Route(api, repo_info),
    ]
    app = Starlette(routes=routes, exception_handlers={HubError: _refused})
    layer = Faults(KeepSlashes(app))
    app.state.store, app.state.faults = store, layer
    return layer


@dataclass
class HubServer:
    """A running server of this process."""

    endpoint: str
    store: Store
    faults: Faults
    token: str = TOKEN


@contextmanager
def serve(folder: Path, *datasets: str, port: int = 0) -> Iterator[HubServer]:
    """Run the Hub in a thread, with private datasets of these names; `TOKEN` may write to those of `USER`."""
    store = Store(folder)
    store.add_token(TOKEN, USER)
    for name in datasets:
        store.create("datasets", name, private=True)
    layer = make_app(store)
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(layer, log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield HubServer(f"http://127.0.0.1:{listener.getsockname()[1]}", store, layer)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
