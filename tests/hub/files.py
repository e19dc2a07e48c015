"""Files of the loopback Hub: preupload, commit, large files, tree, paths-info and download."""

from __future__ import annotations

import json
from base64 import b64decode
from math import ceil
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from hub.cards import check_card
from hub.errors import HubError
from hub.pulls import may_propose, open_pull
from hub.store import Entry, Store, upload_mode
from hub.web import API, find_repo, json_body, readable, revision_of, token_of, web_url, writable

PAGE = 1000  # entries of a tree in one answer; the client follows `Link`
PART_BYTES = 5 * 2**20  # larger uploads come in parts


async def preupload(request: Request) -> Response:
    """Say how each file is to be sent, and which bytes are at its path now."""
    store: Store = request.app.state.store
    repo = may_propose(request) if proposes(request) else writable(request)
    tree = store.tree(store.resolve(repo, revision_of(request)))
    files = [
        {
            "path": file["path"],
            "uploadMode": upload_mode(file["path"], file["size"]),
            "shouldIgnore": False,
            "oid": tree[file["path"]].sha256 if tree[file["path"]].lfs else tree[file["path"]].oid,
        }
        if file["path"] in tree
        else {"path": file["path"], "uploadMode": upload_mode(file["path"], file["size"]), "shouldIgnore": False}
        for file in (await json_body(request))["files"]
    ]
    return JSONResponse({"files": files})


def proposes(request: Request) -> bool:
    """Whether a commit opens a pull request, or goes to one."""
    return "create_pr" in request.query_params or revision_of(request).startswith("refs/pr/")


async def commit(request: Request) -> Response:
    """Commit to a branch, or with `create_pr` open a pull request."""
    store: Store = request.app.state.store
    repo = may_propose(request) if proposes(request) else writable(request)
    body = await request.body()
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
    except ValueError as error:
        raise HubError(400, f"A line of the commit is no JSON: {error}") from error
    for line in lines:
        if line["key"] == "file" and line["value"]["path"] == "README.md":
            errors, _ = check_card(b64decode(line["value"]["content"]).decode(), repo.kind.removesuffix("s"))
            if errors:
                raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    answer: dict[str, Any] = {"success": True, "hookOutput": ""}
    if "create_pr" in request.query_params:
        author = store.user(token_of(request))
        number, oid = await run_in_threadpool(open_pull, store, repo, revision_of(request), lines, author)
        answer["pullRequestUrl"] = web_url(request, repo, "discussions", str(number))
    else:
        oid = await run_in_threadpool(store.commit, repo, revision_of(request), lines)
    return JSONResponse(answer | {"commitOid": oid, "commitUrl": web_url(request, repo, "commit", oid)})


def tree(request: Request) -> Response:
    """Files and folders below a path, in pages."""
    store: Store = request.app.state.store
    repo = find_repo(request)
    entries = store.tree(store.resolve(repo, revision_of(request)))
    prefix = request.path_params.get("path", "").strip("/")
    below = {path: entry for path, entry in entries.items() if not prefix or path.startswith(prefix + "/")}
    if prefix and not below:
        raise HubError(404, f"{prefix} does not exist on {revision_of(request)}", "EntryNotFound")
    recursive = request.query_params.get("recursive", "").lower() in ("true", "1")
    listed = _listed(below, f"{prefix}/" if prefix else "", recursive)
    start = int(request.query_params.get("cursor", 0))
    limit = min(int(request.query_params.get("limit", PAGE)), PAGE)
    headers = {}
    if start + limit < len(listed):
        following = request.url.include_query_params(cursor=start + limit)
        headers["Link"] = f'<{following}>; rel="next"'
    return JSONResponse(listed[start : start + limit], headers=headers)


def _listed(entries: dict[str, Entry], prefix: str, recursive: bool) -> list[dict[str, Any]]:
    folders, files = set(), []
    for path, entry in sorted(entries.items()):
        parts = path.removeprefix(prefix).split("/")
        depth = len(parts) if recursive else min(2, len(parts))
        folders.update(prefix + "/".join(parts[:end]) for end in range(1, depth))
        if recursive or len(parts) == 1:
            files.append(entry.describe(path))
    return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)] + files


async def paths_info(request: Request) -> Response:
    """What is at some paths; the client sends them as a form, and leaves out of the answer what does not exist."""
    store: Store = request.app.state.store
    repo = find_repo(request)
    entries = store.tree(store.resolve(repo, revision_of(request)))
    asked = (await request.form()).getlist("paths")
    found = [entries[str(path)].describe(str(path)) for path in asked if path in entries]
    folders = [path for path in asked if any(other.startswith(f"{path}/") for other in entries)]
    return JSONResponse(found + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders])


def resolve(request: Request) -> Response:
    """A file: its bytes, or for a large one the way to them."""
    store: Store = request.app.state.store
    repo = readable(request)
    oid = store.resolve(repo, revision_of(request))
    entry = store.tree(oid).get(request.path_params["path"])
    headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
    if entry is None:
        extra = HubError(404, "Entry not found", "EntryNotFound")
        headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": extra.message}
        return JSONResponse({"error": extra.message}, status_code=404, headers=headers)
    if entry.lfs:
        # To another host name: the client reads the headers of the last answer of the same host only.
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        port = request.url.port
        return RedirectResponse(f"http://localhost:{port}/lfs/{entry.sha256}", status_code=302, headers=headers)
    return _content(request, store, entry.sha256, headers | {"ETag": f'"{entry.oid}"'})


def _content(request: Request, store: Store, sha256: str, headers: dict[str, str]) -> Response:
    content, status = store.blob(sha256), 200
    if asked := request.headers.get("range"):
        first, _, last = asked.removeprefix("bytes=").partition("-")
        end = int(last) + 1 if last else len(content)
        headers |= {"Content-Range": f"bytes {first}-{end - 1}/{len(content)}"}
        content, status = content[int(first) : end], 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers | {"Content-Length": str(len(content))})
    return Response(content, status_code=status, headers=headers, media_type="application/octet-stream")


async def lfs_batch(request: Request) -> Response:
    """Where to send large files; those that are here already need no sending."""
    store: Store = request.app.state.store
    may_propose(request)  # what is uploaded is in no repo before a commit names it
    objects = []
    base = str(request.base_url).rstrip("/")
    for item in (await json_body(request))["objects"]:
        described: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
        if not store.has_blob(item["oid"]):
            url = f"{base}/lfs/{item['oid']}"
            upload: dict[str, Any] = {"href": url}
            if item["size"] > PART_BYTES:
                parts = range(1, ceil(item["size"] / PART_BYTES) + 1)
                header = {"chunk_size": str(PART_BYTES)} | {str(part): f"{url}/part/{part}" for part in parts}
                upload = {"href": f"{url}/complete", "header": header}
            described["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify"}}
        objects.append(described)
    return JSONResponse({"transfer": "basic", "objects": objects})


async def lfs_object(request: Request) -> Response:
    """GET serves a large file, PUT takes a small large one."""
    store: Store = request.app.state.store
    sha256 = request.path_params["sha256"]
    if request.method in ("GET", "HEAD"):
        if not store.has_blob(sha256):
            return Response(status_code=404)
        return _content(request, store, sha256, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})
    return await _take(store, sha256, await request.body())


async def lfs_part(request: Request) -> Response:
    store: Store = request.app.state.store
    part = store.blobs / f"{request.path_params['sha256']}.{request.path_params['number']}"
    part.write_bytes(await request.body())
    return Response(headers={"ETag": f'"part-{request.path_params["number"]}"'})


async def lfs_complete(request: Request) -> Response:
    store: Store = request.app.state.store
    sha256 = request.path_params["sha256"]
    numbers = sorted(part["partNumber"] for part in (await json_body(request))["parts"])
    parts = [store.blobs / f"{sha256}.{number}" for number in numbers]
    answer = await _take(store, sha256, b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()
    return answer


async def _take(store: Store, sha256: str, content: bytes) -> Response:
    if (kept := store.add_blob(content)) != sha256:
        raise HubError(422, f"The content has hash {kept}, not {sha256}")
    return Response()


async def lfs_verify(request: Request) -> Response:
    store: Store = request.app.state.store
    body = await json_body(request)
    return Response(status_code=200 if store.has_blob(body["oid"]) else 404)


def routes() -> list[Route]:
    repos = ["/{kind:kind}/{namespace}/{name}", "/{namespace}/{name}"]
    return [
        Route(f"{API}/preupload/{{revision}}", preupload, methods=["POST"]),
        Route(f"{API}/commit/{{revision}}", commit, methods=["POST"]),
        Route(f"{API}/tree/{{revision}}", tree),
        Route(f"{API}/tree/{{revision}}/{{path:path}}", tree),
        Route(f"{API}/paths-info/{{revision}}", paths_info, methods=["POST"]),
        Route("/lfs/{sha256}", lfs_object, methods=["GET", "PUT"]),
        Route("/lfs/{sha256}/part/{number:int}", lfs_part, methods=["PUT"]),
        Route("/lfs/{sha256}/complete", lfs_complete, methods=["POST"]),
        Route("/lfs/{sha256}/verify", lfs_verify, methods=["POST"]),
        *(Route(f"{repo}/resolve/{{revision}}/{{path:path}}", resolve) for repo in repos),
        *(Route(f"{repo}.git/info/lfs/objects/batch", lfs_batch, methods=["POST"]) for repo in repos),
    ]
