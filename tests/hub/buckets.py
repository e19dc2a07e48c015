"""Buckets of the loopback Hub, so far as Spaces and jobs mount them: they can be made and found, and hold no files.

The stock client sends a bucket's files through xet only, which is not served here.
"""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hub.accounts import READ, WRITE
from hub.errors import HubError
from hub.store import Store
from hub.web import json_body, repo_name, token_of, when

TABLE = "CREATE TABLE IF NOT EXISTS buckets (name TEXT PRIMARY KEY, private INTEGER, created REAL)"


def _found(store: Store, name: str) -> tuple[bool, float] | None:
    with store.lock:
        store.database.execute(TABLE)
        row = store.database.execute("SELECT private, created FROM buckets WHERE name = ?", (name,)).fetchone()
    return (bool(row[0]), row[1]) if row else None


def check_volumes(store: Store, volumes: list[dict[str, Any]]) -> None:
    """Refuse volumes of buckets or repos that do not exist."""
    for volume in volumes:
        name, kind = volume["source"], f"{volume['type']}s"
        known = {repo.name for repo in store.all_repos(kind)}
        if not (_found(store, name) if volume["type"] == "bucket" else name in known):
            raise HubError(400, f"The volume names {volume['type']} {name}, which does not exist")


async def create(request: Request) -> Response:
    store: Store = request.app.state.store
    name = repo_name(request)
    if not store.accounts.permits(token_of(request), "buckets", name, WRITE):
        raise HubError(403, "You don't have the rights to create a bucket under this namespace.")
    url = f"{str(request.base_url).rstrip('/')}/buckets/{name}"
    if _found(store, name):
        raise HubError(409, "You already created this bucket", url=url)
    private = (await json_body(request)).get("visibility") == "private"
    store.database.execute("INSERT INTO buckets VALUES (?, ?, ?)", (name, private, time.time()))
    return JSONResponse({"url": url, "id": name})


def show(request: Request) -> Response:
    store: Store = request.app.state.store
    name = repo_name(request)
    found = _found(store, name)
    if found is None or (found[0] and not store.accounts.permits(token_of(request), "buckets", name, READ)):
        raise HubError(404, "Bucket not found", "RepoNotFound")
    private, created = found
    return JSONResponse({"id": name, "private": private, "createdAt": when(created), "size": 0, "totalFiles": 0})


def routes() -> list[Route]:
    bucket = "/api/buckets/{namespace}/{name}"
    return [Route(bucket, create, methods=["POST"]), Route(bucket, show)]
