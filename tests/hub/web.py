"""What all handlers of the loopback Hub need: tokens, repos and revisions of a request."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import unquote

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request

from hub.errors import HubError
from hub.store import Repo, Store

KINDS = "kind"  # name of the path convertor
API = f"/api/{{kind:{KINDS}}}/{{namespace}}/{{name}}"  # of a repo


class KindConvertor(Convertor[str]):
    """Kinds of repos in paths."""

    regex = "models|datasets|spaces"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor(KINDS, KindConvertor())


def token_of(request: Request) -> str | None:
    """The bearer token, if there is one."""
    value = request.headers.get("authorization", "")
    return value.removeprefix("Bearer ").strip() if value.startswith("Bearer ") else None


def repo_name(request: Request) -> str:
    return f"{request.path_params['namespace']}/{request.path_params['name']}"


def find_repo(request: Request) -> Repo:
    """The repo of a path, if the token's owner may see it."""
    store: Store = request.app.state.store
    return store.repo(request.path_params.get("kind", "models"), repo_name(request), token_of(request))


def writable(request: Request) -> Repo:
    """The repo of a path, if the token may write to it."""
    repo = find_repo(request)
    if not request.app.state.store.may_write(token_of(request), repo):
        if token_of(request) is None:
            raise HubError(401, "Invalid username or password.")
        raise HubError(403, "Forbidden: you must have write access to this repo")
    return repo


def readable(request: Request) -> Repo:
    """The repo of a path, if the token may see its files."""
    repo = find_repo(request)
    request.app.state.store.check_gate(repo, token_of(request))
    return repo


def web_url(request: Request, repo: Repo, *parts: str) -> str:
    """Address of a repo's page."""
    prefix = [] if repo.kind == "models" else [repo.kind]
    return "/".join([str(request.base_url).rstrip("/"), *prefix, repo.name, *parts])


def when(moment: float) -> str:
    """A moment as the Hub writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment * 1000) % 1000:03d}Z"


def revision_of(request: Request) -> str:
    return unquote(request.path_params.get("revision", "main"))


async def json_body(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except ValueError as error:
        raise HubError(400, f"The body is no JSON: {error}") from error
