"""Spaces of the loopback Hub: secrets, variables, hardware, stages, logs and a page that stands for the running app.

Nothing is built or run: a commit or a restart leads through `BUILDING` to what `control` says it shall come to.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hub.accounts import READ
from hub.buckets import check_volumes
from hub.cards import card_of
from hub.errors import HubError
from hub.store import Repo, Store
from hub.web import json_body, token_of, when, writable

TABLES = """
CREATE TABLE IF NOT EXISTS spaces (
    kind TEXT, name TEXT, hardware TEXT, sleep_s INTEGER, paused INTEGER DEFAULT 0, started REAL,
    volumes TEXT DEFAULT '[]', outcome TEXT DEFAULT 'RUNNING', error TEXT, build_s REAL DEFAULT 0.2,
    open_s REAL DEFAULT 0.3, PRIMARY KEY (kind, name)
);
CREATE TABLE IF NOT EXISTS space_settings (
    kind TEXT, name TEXT, area TEXT, key TEXT, value TEXT, description TEXT, updated REAL,
    PRIMARY KEY (kind, name, area, key)
);
CREATE TABLE IF NOT EXISTS space_logs (kind TEXT, name TEXT, area TEXT, moment REAL, text TEXT);
"""
STATE = "hardware, sleep_s, paused, started, volumes, outcome, error, build_s, open_s"
CONTROLLED = ("outcome", "error", "build_s", "open_s")
FREE = "cpu-basic"
PER_MINUTE = {FREE: 0.0, "cpu-upgrade": 0.0005, "zero-a10g": 0.0, "t4-small": 0.006667, "l4x1": 0.013333}  # USD
STATIC_RUNTIME = {"stage": "RUNNING", "hardware": {"current": None, "requested": None}}


def _rows(store: Store, query: str, *values: Any) -> list[Any]:
    with store.lock:
        store.database.executescript(TABLES)
        return store.database.execute(query, values).fetchall()


def _state(store: Store, name: str) -> dict[str, Any]:
    rows = _rows(store, f"SELECT {STATE} FROM spaces WHERE name = ?", name)
    if not rows:
        _rows(store, "INSERT INTO spaces (kind, name, started) VALUES ('spaces', ?, ?)", name, time.time())
        return _state(store, name)
    return dict(zip(STATE.split(", "), rows[0], strict=True))


def _change(store: Store, name: str, **values: Any) -> None:
    _state(store, name)
    for column, value in values.items():
        _rows(store, f"UPDATE spaces SET {column} = ? WHERE name = ?", value, name)


def control(store: Store, name: str, **values: Any) -> None:
    """Say what becomes of a Space: `outcome` (a stage), `error`, and how long building and open log streams take."""
    if unknown := set(values) - set(CONTROLLED):
        raise HubError(400, f"Unknown {sorted(unknown)}; there are {CONTROLLED}")
    _change(store, name, **values)


def add_log(store: Store, name: str, text: str, area: str = "run") -> None:
    """A line of the `build` or `run` log."""
    _rows(store, "INSERT INTO space_logs VALUES ('spaces', ?, ?, ?, ?)", name, area, time.time(), text)


def secret_values(store: Store, name: str) -> dict[str, str]:
    """The secrets as the Space's app would get them; nothing tells them over HTTP."""
    return dict(_rows(store, "SELECT key, value FROM space_settings WHERE area = 'secrets' AND name = ?", name))


def pay_for_space(store: Store, name: str, body: dict[str, Any]) -> None:
    """Refuse a Space that the owner's plan does not pay for."""
    hardware = body.get("hardware") or FREE
    free_ones, costly_ones = store.accounts.pays_for(name.split("/")[0])
    if body.get("sdk") != "static" and not (free_ones if not PER_MINUTE.get(hardware, 1) else costly_ones):
        raise HubError(402, "Payment required: subscribe to PRO to create Gradio and Docker Spaces.")


def set_up_space(store: Store, name: str, body: dict[str, Any]) -> None:
    """What the client sends along when it makes a Space."""
    check_volumes(store, body.get("volumes") or [])
    values = {"hardware": body.get("hardware") or FREE, "sleep_s": body.get("sleepTimeSeconds")}
    _change(store, name, **values, volumes=json.dumps(body.get("volumes") or []))
    for area in ("secrets", "variables"):
        for entry in body.get(area) or []:
            _set(store, name, area, entry)


def _set(store: Store, name: str, area: str, entry: dict[str, Any]) -> None:
    values = (name, area, entry["key"], entry["value"], entry.get("description"), time.time())
    _rows(store, "INSERT OR REPLACE INTO space_settings VALUES ('spaces', ?, ?, ?, ?, ?, ?)", *values)


def runtime(store: Store, repo: Repo) -> dict[str, Any]:
    """The answer of `runtime`."""
    if repo.sdk == "static":
        return dict(STATIC_RUNTIME)
    state = _state(store, repo.name)
    stage = _stage(store, repo, state)
    hardware = state["hardware"] or FREE
    described = {
        "stage": stage,
        "hardware": {"current": hardware if stage == "RUNNING" else None, "requested": hardware},
        "gcTimeout": state["sleep_s"] if state["sleep_s"] is not None else (172800 if hardware == FREE else None),
        "storage": None,
        "replicas": {"requested": 1},
        "volumes": json.loads(state["volumes"]),
    }
    return described | ({"errorMessage": state["error"]} if stage.endswith("ERROR") and state["error"] else {})


def _stage(store: Store, repo: Repo, state: dict[str, Any]) -> str:
    if state["paused"]:
        return "PAUSED"
    oid = store.resolve(repo, "main")
    if card_of(store, repo, oid).get("app_file", "app.py") not in store.tree(oid):
        return "NO_APP_FILE"
    age_s = time.time() - max(state["started"], store.history(repo, oid)[0][2])
    if age_s < state["build_s"]:
        return "BUILDING"
    if age_s < 1.5 * state["build_s"] and state["outcome"] != "BUILD_ERROR":
        return "APP_STARTING"
    return str(state["outcome"])


def describe_space(request: Request, repo: Repo) -> dict[str, Any]:
    """What `space_info` tells beyond what all repos have."""
    host = f"{str(request.base_url).rstrip('/')}/-/running/{repo.name}"
    found = runtime(request.app.state.store, repo)
    return {"sdk": repo.sdk, "host": host, "subdomain": repo.name.replace("/", "-"), "runtime": found}


def _space(request: Request, change: bool = True) -> Repo:
    """The Space of a path."""
    store: Store = request.app.state.store
    name = "{namespace}/{name}".format(**request.path_params)
    if not change:
        return store.repo("spaces", name, token_of(request))
    request.path_params["kind"] = "spaces"
    return writable(request)


def show_runtime(request: Request) -> Response:
    return JSONResponse(runtime(request.app.state.store, _space(request, change=False)))


async def space_settings(request: Request) -> Response:
    """Secrets, whose values nobody gets to see again, and variables. A change starts the app anew."""
    store: Store = request.app.state.store
    repo, area = _space(request), request.url.path.rpartition("/")[2]
    if request.method != "GET":
        body = await json_body(request)
        if request.method == "POST":
            _set(store, repo.name, area, body)
        else:
            query = "DELETE FROM space_settings WHERE name = ? AND area = ? AND key = ?"
            _rows(store, query, repo.name, area, body["key"])
        _change(store, repo.name, started=time.time())
    query = "SELECT key, value, description, updated FROM space_settings WHERE name = ? AND area = ?"
    answer = {}
    for key, value, description, updated in _rows(store, query, repo.name, area):
        answer[key] = {"key": key, "description": description, "updatedAt": when(updated)}
        if area == "variables":
            answer[key]["value"] = value
    return JSONResponse(answer)


async def act(request: Request) -> Response:
    """Pause, restart, ask for hardware or set the time after which it sleeps; answers the runtime."""
    store: Store = request.app.state.store
    repo, action = _space(request), request.url.path.rpartition("/")[2]
    if repo.sdk == "static":
        raise HubError(400, "Static Spaces are always running")
    if action == "pause":
        _change(store, repo.name, paused=1)
    elif action == "restart":
        _change(store, repo.name, paused=0, started=time.time())
    elif action == "sleeptime":
        _change(store, repo.name, sleep_s=(await json_body(request))["seconds"])
    else:
        body = await json_body(request)
        if body["flavor"] not in PER_MINUTE:
            raise HubError(400, f"Unknown hardware {body['flavor']}")
        pay_for_space(store, repo.name, {"sdk": repo.sdk, "hardware": body["flavor"]})
        values = {"sleep_s": body["sleepTimeSeconds"]} if "sleepTimeSeconds" in body else {}
        _change(store, repo.name, hardware=body["flavor"], started=time.time(), **values)
    return JSONResponse(runtime(store, repo))


async def volumes(request: Request) -> Response:
    store: Store = request.app.state.store
    repo = _space(request)
    if request.method == "DELETE":
        if _state(store, repo.name)["volumes"] == "[]":
            raise HubError(400, "This Space has no volumes")
        _change(store, repo.name, volumes="[]", started=time.time())
    else:
        found = (await json_body(request))["volumes"]
        check_volumes(store, found)
        _change(store, repo.name, volumes=json.dumps(found), started=time.time())
    return JSONResponse({})


def hardware(request: Request) -> Response:
    described = [
        {
            "name": name,
            "prettyName": name.replace("-", " "),
            "cpu": "2 vCPU",
            "ram": "16 GB",
            "unitCostMicroUSD": round(cost * 1e6),
            "unitCostUSD": cost,
            "unitLabel": "minute",
        }
        for name, cost in PER_MINUTE.items()
    ]
    return JSONResponse(described)


def logs(request: Request) -> Response:
    """Server-sent events: what was logged, then what comes, until the stream closes."""
    store: Store = request.app.state.store
    repo, area = _space(request), request.path_params["area"]
    stream = _events(store, repo, area)
    return StreamingResponse(stream, media_type="text/event-stream")


async def _events(store: Store, repo: Repo, area: str) -> AsyncIterator[str]:
    oid = store.resolve(repo, "main")
    state = _state(store, repo.name)
    began = max(state["started"], store.history(repo, oid)[0][2])
    title = "Build Queued" if area == "build" else "Application Startup"
    yield _event(began, f"===== {title} at {when(began)} =====\n")
    sent, until = 0, time.monotonic() + state["open_s"]
    while True:
        query = "SELECT moment, text FROM space_logs WHERE name = ? AND area = ? ORDER BY rowid"
        found = _rows(store, query, repo.name, area)
        for moment, text in found[sent:]:
            yield _event(moment, text + "\n")
        sent = len(found)
        if time.monotonic() >= until:
            return
        yield "data:\n\n"  # keeps the connection
        await asyncio.sleep(0.05)


def _event(moment: float, text: str) -> str:
    return f"data: {json.dumps({'data': text, 'timestamp': when(moment)})}\n\n"


def running(request: Request) -> Response:
    """What stands for the running app; that of a protected Space is there for all, as its files are not."""
    store: Store = request.app.state.store
    name = "{namespace}/{name}".format(**request.path_params)
    repos = {repo.name: repo for repo in store.all_repos("spaces")}
    repo = repos.get(name)
    if repo is None or (
        repo.visibility == "private" and not store.accounts.permits(token_of(request), "spaces", name, READ)
    ):
        return Response("Sorry, we can't find the page you are looking for.", status_code=404)
    stage = runtime(store, repo)["stage"]
    text = f"<!doctype html><title>{name}</title><p>{stage}</p>"
    return Response(text, media_type="text/html", status_code=200 if stage == "RUNNING" else 503)


async def controlled(request: Request) -> Response:
    """For tests that run the Hub as a process: `control` and, under `log` and `build_log`, lines of logs."""
    store: Store = request.app.state.store
    name = "{namespace}/{name}".format(**request.path_params)
    body = await json_body(request)
    for area, key in (("run", "log"), ("build", "build_log")):
        for line in body.pop(key, []):
            add_log(store, name, line, area)
    control(store, name, **body)
    return JSONResponse(_state(store, name))


def routes() -> list[Route]:
    space = "/api/spaces/{namespace}/{name}"
    actions = [
        Route(f"{space}/{action}", act, methods=["POST"]) for action in ("pause", "restart", "sleeptime", "hardware")
    ]
    areas = [
        Route(f"{space}/{area}", space_settings, methods=["GET", "POST", "DELETE"]) for area in ("secrets", "variables")
    ]
    return [
        Route("/api/spaces/hardware", hardware),
        Route(f"{space}/runtime", show_runtime),
        *actions,
        *areas,
        Route(f"{space}/volumes", volumes, methods=["PUT", "DELETE"]),
        Route(f"{space}/logs/{{area}}", logs),
        Route("/-/running/{namespace}/{name}/{path:path}", running),
        Route("/-/running/{namespace}/{name}", running),
        Route("/-/spaces/{namespace}/{name}", controlled, methods=["POST"]),
    ]
