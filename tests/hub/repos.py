"""Repos of the loopback Hub: make, find, list, settings, move and delete."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hub.accounts import WRITE
from hub.cards import card_of, tags_of
from hub.errors import HubError
from hub.spaces import describe_space, pay_for_space, set_up_space
from hub.store import Repo, Store
from hub.web import API, KINDS, find_repo, json_body, readable, revision_of, token_of, when, writable

LISTED = 100  # repos in one answer
VISIBILITIES = ("public", "private", "protected")


def _named(request: Request, body: dict[str, Any]) -> tuple[str, str]:
    """Kind and full name of the repo of a body."""
    store: Store = request.app.state.store
    user = store.user(token_of(request))
    if user is None:
        raise HubError(401, "Invalid username or password.")
    return f"{body.get('type') or 'model'}s", f"{body.get('organization') or user}/{body['name']}"


def _may_own(request: Request, kind: str, name: str) -> None:
    if not request.app.state.store.accounts.permits(token_of(request), kind, name, WRITE):
        raise HubError(403, "You don't have the rights to create a repo under this namespace.")


async def create_repo(request: Request) -> Response:
    store: Store = request.app.state.store
    body = await json_body(request)
    kind, name = _named(request, body)
    _may_own(request, kind, name)
    visibility = body.get("visibility") or ("private" if body.get("private") else "public")
    if visibility not in VISIBILITIES or (visibility == "protected" and kind != "spaces"):
        raise HubError(400, f"Invalid visibility {visibility}")
    if kind == "spaces":
        pay_for_space(store, name, body)
    url = f"{str(request.base_url).rstrip('/')}/{'' if kind == 'models' else kind + '/'}{name}"
    try:
        store.create(kind, name, sdk=body.get("sdk"), visibility=visibility)
    except HubError as error:
        error.extra["url"] = url  # the client wants it, also with a 409
        raise
    if kind == "spaces":
        set_up_space(store, name, body)
    return JSONResponse({"url": url, "name": name, "id": name})


async def delete_repo(request: Request) -> Response:
    store: Store = request.app.state.store
    kind, name = _named(request, await json_body(request))
    store.repo(kind, name, token_of(request))
    _may_own(request, kind, name)
    store.delete(kind, name)
    return Response(status_code=200)


async def move_repo(request: Request) -> Response:
    store: Store = request.app.state.store
    body = await json_body(request)
    kind = f"{body['type']}s"
    store.repo(kind, body["fromRepo"], token_of(request))
    for name in (body["fromRepo"], body["toRepo"]):
        _may_own(request, kind, name)
    store.move(kind, body["fromRepo"], body["toRepo"])
    return Response(status_code=200)


async def settings(request: Request) -> Response:
    """Change visibility or gate."""
    store: Store = request.app.state.store
    repo = writable(request)
    body = await json_body(request)
    if "gated" in body:
        if body["gated"] not in ("auto", "manual", False) or repo.kind == "spaces":
            raise HubError(400, f"Invalid gate {body['gated']}")
        store.configure(repo, gated=body["gated"] or "")
    if "visibility" in body:
        if body["visibility"] not in VISIBILITIES:
            raise HubError(400, f"Invalid visibility {body['visibility']}")
        store.configure(repo, visibility=body["visibility"])
    return JSONResponse({"gated": store.repo(repo.kind, repo.name, token_of(request)).gated or False})


async def grant(request: Request) -> Response:
    """Let a user into a gated repo."""
    request.app.state.store.grant(writable(request), (await json_body(request))["user"])
    return JSONResponse({})


def auth_check(request: Request) -> Response:
    if request.url.path.endswith("/write"):
        writable(request)
    readable(request)
    return JSONResponse({})


def repo_info(request: Request) -> Response:
    store: Store = request.app.state.store
    repo = find_repo(request)
    oid = store.resolve(repo, revision_of(request))
    described = describe(request, repo, oid)
    described["siblings"] = [
        {"rfilename": path, "size": entry.size, "blobId": entry.oid}
        | ({"lfs": {"sha256": entry.sha256, "size": entry.size, "pointerSize": 134}} if entry.lfs else {})
        if request.query_params.get("blobs")
        else {"rfilename": path}
        for path, entry in store.tree(oid).items()
    ]
    return JSONResponse(described)


def describe(request: Request, repo: Repo, oid: str) -> dict[str, Any]:
    """What lists and `repo_info` tell of a repo."""
    store: Store = request.app.state.store
    card = card_of(store, repo, oid)
    described: dict[str, Any] = {
        "id": repo.name,
        "_id": repo.name,
        "author": repo.name.split("/")[0],
        "sha": oid,
        "private": repo.private,
        "visibility": repo.visibility,
        "gated": repo.gated or False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags_of(card),
        "cardData": card,
        "createdAt": when(repo.created),
        "lastModified": when(store.history(repo, oid)[0][2]),
    }
    if repo.kind == "models":
        described |= {"modelId": repo.name} | {
            key: card[key] for key in ("library_name", "pipeline_tag") if key in card
        }
    if repo.kind == "spaces":
        described |= {"models": card.get("models") or [], "datasets": card.get("datasets") or []}
        described |= describe_space(request, repo)
    return described


def list_repos(request: Request) -> Response:
    """Repos by author, words of their names and tags, in pages."""
    store: Store = request.app.state.store
    asked = request.query_params
    found = []
    for repo in store.repos(request.path_params["kind"], token_of(request)):
        if asked.get("author") not in (None, repo.name.split("/")[0]):
            continue
        if not all(word.lower() in repo.name.lower() for word in asked.getlist("search")):
            continue
        described = describe(request, repo, store.resolve(repo, "main"))
        if set(asked.getlist("filter")) <= set(described["tags"]):
            found.append(described)
    start, limit = int(asked.get("cursor", 0)), min(int(asked.get("limit", LISTED)), LISTED)
    headers = {}
    if start + limit < len(found):
        headers["Link"] = f'<{request.url.include_query_params(cursor=start + limit)}>; rel="next"'
    return JSONResponse(found[start : start + limit], headers=headers)


def routes() -> list[Route]:
    return [
        Route("/api/repos/create", create_repo, methods=["POST"]),
        Route("/api/repos/delete", delete_repo, methods=["DELETE"]),
        Route("/api/repos/move", move_repo, methods=["POST"]),
        Route(f"/api/{{kind:{KINDS}}}", list_repos),
        Route(f"{API}/settings", settings, methods=["PUT"]),
        Route(f"{API}/user-access-request/grant", grant, methods=["POST"]),
        Route(f"{API}/auth-check", auth_check),
        Route(f"{API}/auth-check/write", auth_check),
        Route(f"{API}/revision/{{revision}}", repo_info),
        Route(API, repo_info),
    ]
