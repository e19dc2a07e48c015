"""Pull requests: commits beside the branches, under `refs/pr/N`, until somebody merges them."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hub.errors import HubError
from hub.store import HEADS, Repo, Store
from hub.web import API, find_repo, readable, token_of, web_url, when, writable

TABLE = """
CREATE TABLE IF NOT EXISTS pulls (
    kind TEXT, name TEXT, number INTEGER, title TEXT, author TEXT, status TEXT, branch TEXT, base TEXT, merged TEXT,
    created REAL, PRIMARY KEY (kind, name, number)
)
"""
COLUMNS = "number, title, author, status, branch, base, merged, created"


def may_propose(request: Request) -> Repo:
    """The repo of a path, if the token may propose changes to it: it sees the files and is more than a reading one."""
    store: Store = request.app.state.store
    repo = readable(request)
    found = store.accounts.token(token_of(request))
    if found is None:
        raise HubError(401, "Invalid username or password.")
    if found.role != "write" and not store.may_write(token_of(request), repo):
        raise HubError(403, "Forbidden: this token may not open pull requests")
    return repo


def open_pull(
    store: Store, repo: Repo, branch: str, lines: list[dict[str, Any]], author: str | None
) -> tuple[int, str]:
    """Commit to a new pull request; returns its number and the commit's id."""
    title = next(line["value"]["summary"] for line in lines if line["key"] == "header")
    base = store.resolve(repo, branch)
    with store.lock:
        store.database.execute(TABLE)
        query = "SELECT COALESCE(MAX(number), 0) + 1 FROM pulls WHERE kind = ? AND name = ?"
        (number,) = store.database.execute(query, (repo.kind, repo.name)).fetchone()
        values = (repo.kind, repo.name, number, title, author, "open", branch, base, None, time.time())
        store.database.execute("INSERT INTO pulls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
    return number, store.commit(repo, branch, lines, ref=f"refs/pr/{number}")


def _pulls(store: Store, repo: Repo) -> list[dict[str, Any]]:
    with store.lock:
        store.database.execute(TABLE)
        query = f"SELECT {COLUMNS} FROM pulls WHERE kind = ? AND name = ? ORDER BY number DESC"
        rows = store.database.execute(query, (repo.kind, repo.name)).fetchall()
    return [dict(zip(COLUMNS.split(", "), row, strict=True)) for row in rows]


def _pull(request: Request, repo: Repo) -> dict[str, Any]:
    number = request.path_params["number"]
    for pull in _pulls(request.app.state.store, repo):
        if pull["number"] == number:
            return pull
    raise HubError(404, f"There is no discussion {number}")


def _described(repo: Repo, pull: dict[str, Any]) -> dict[str, Any]:
    return {
        "num": pull["number"],
        "title": pull["title"],
        "author": {"name": pull["author"]},
        "status": pull["status"],
        "createdAt": when(pull["created"]),
        "isPullRequest": True,
        "repo": {"name": repo.name, "type": repo.kind.removesuffix("s")},
    }


def list_pulls(request: Request) -> Response:
    repo = find_repo(request)
    wanted = request.query_params
    found = [_described(repo, pull) for pull in _pulls(request.app.state.store, repo)]
    if wanted.get("status") in ("open", "closed"):
        found = [pull for pull in found if (pull["status"] == "open") == (wanted["status"] == "open")]
    found = [pull for pull in found if wanted.get("author") in (None, pull["author"]["name"])]
    found = [] if wanted.get("type") == "discussion" else found
    return JSONResponse({"discussions": found, "count": len(found), "start": 0})


def show_pull(request: Request) -> Response:
    repo = find_repo(request)
    pull = _pull(request, repo)
    changes = {"base": HEADS + pull["branch"], "mergeCommitId": pull["merged"]}
    more = {"events": [], "filesWithConflicts": [], "changes": changes, "diff": ""}
    return JSONResponse(_described(repo, pull) | more)


async def merge(request: Request) -> Response:
    """Bring a pull request's changes to its branch; 409 where both changed the same file."""
    store: Store = request.app.state.store
    repo = writable(request)
    with store.lock:
        pull = _pull(request, repo)
        if pull["status"] != "open":
            raise HubError(409, f"This pull request is {pull['status']}")
        base, head = store.tree(pull["base"]), store.resolve(repo, pull["branch"])
        merged, proposed = store.tree(head), store.tree(store.resolve(repo, f"refs/pr/{pull['number']}"))
        for path in base.keys() | proposed.keys():
            before, after = base.get(path), proposed.get(path)
            if before == after:
                continue
            if merged.get(path) not in (before, after):
                raise HubError(409, f"{path} has changed on {pull['branch']} since")
            if after is None:
                merged.pop(path, None)
            else:
                merged[path] = after
        oid = store.add_commit(repo, HEADS + pull["branch"], head, f"{pull['title']} (#{pull['number']})", merged)
        query = "UPDATE pulls SET status = 'merged', merged = ? WHERE kind = ? AND name = ? AND number = ?"
        store.database.execute(query, (oid, repo.kind, repo.name, pull["number"]))
    return JSONResponse({"url": web_url(request, repo, "commit", oid)})


def routes() -> list[Route]:
    return [
        Route(f"{API}/discussions", list_pulls),
        Route(f"{API}/discussions/{{number:int}}", show_pull),
        Route(f"{API}/discussions/{{number:int}}/merge", merge, methods=["POST"]),
    ]
