"""Branches, tags and history of a repo."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hub.errors import HubError
from hub.store import HEADS, TAGS, Store
from hub.web import API, find_repo, json_body, revision_of, when, writable

GROUPS = {HEADS: "branches", TAGS: "tags", "refs/pr/": "pullRequests"}


def list_refs(request: Request) -> Response:
    store: Store = request.app.state.store
    repo = find_repo(request)
    answer: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for ref, oid in store.refs(repo).items():
        prefix = next(prefix for prefix in GROUPS if ref.startswith(prefix))
        answer[GROUPS[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid})
    if "include_prs" not in request.query_params:
        del answer["pullRequests"]
    return JSONResponse(answer)


async def branch(request: Request) -> Response:
    """Make or delete a branch."""
    store: Store = request.app.state.store
    repo = writable(request)
    name = revision_of(request)
    if name.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {name}")
    if request.method == "DELETE":
        if name == "main":
            raise HubError(403, "The branch main is protected")
        store.delete_ref(repo, HEADS + name)
    else:
        start = (await json_body(request)).get("startingPoint") or "main"
        store.add_ref(repo, HEADS + name, store.resolve(repo, start))
    return Response()


async def tag(request: Request) -> Response:
    """Put a tag on a revision, or delete the tag that the path names."""
    store: Store = request.app.state.store
    repo = writable(request)
    if request.method == "DELETE":
        store.delete_ref(repo, TAGS + revision_of(request))
    else:
        name = (await json_body(request))["tag"]
        store.add_ref(repo, TAGS + name, store.resolve(repo, revision_of(request)))
    return Response()


def list_commits(request: Request) -> Response:
    store: Store = request.app.state.store
    repo = find_repo(request)
    author = [{"user": repo.name.split("/")[0]}]
    listed = [
        {"id": oid, "title": title, "message": "", "authors": author, "date": when(created)}
        for oid, title, created in store.history(repo, store.resolve(repo, revision_of(request)))
    ]
    return JSONResponse(listed)


def routes() -> list[Route]:
    return [
        Route(f"{API}/refs", list_refs),
        Route(f"{API}/branch/{{revision}}", branch, methods=["POST", "DELETE"]),
        Route(f"{API}/tag/{{revision}}", tag, methods=["POST", "DELETE"]),
        Route(f"{API}/commits/{{revision}}", list_commits),
    ]
