"""The loopback Hub's HTTP face, after huggingface_hub 2.4's own source.

Clients need `HF_ENDPOINT` (read at import) and `HF_HUB_DISABLE_XET=1`. Faults are set in the process by `Faults.set`,
or from outside by `POST /-/faults`. There is no encryption and one lock: not for production.
"""

from __future__ import annotations

import os
import socket
import threading
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

from hub import accounts, buckets, cards, files, jobs, pulls, refs, repos, spaces
from hub.errors import HubError, refused
from hub.faults import Fault, Faults
from hub.store import Store
from hub.web import json_body

PROJECT = Path(__file__).resolve().parents[2]
TOKEN = "hf_loopback"
USER = "lab"
# Each has `routes()`; of two routes for one path the first is taken.
MODULES = (
    accounts,
    buckets,
    cards,
    spaces,
    files,
    jobs,
    refs,
    pulls,
    repos,
)


async def faults(request: Request) -> Response:
    """GET tells what happened; POST replaces the rules with those of the JSON list."""
    layer: Faults = request.app.state.faults
    if request.method == "POST":
        layer.set(*(Fault(**rule) for rule in await json_body(request)))
    return JSONResponse({"hits": layer.hits, "requests": len(layer.requests)})


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
    routes = [Route("/-/faults", faults, methods=["GET", "POST"])]
    for module in MODULES:
        routes += module.routes()
    app = Starlette(routes=routes, exception_handlers={HubError: refused})
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

    def variables(self, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """Environment of a process whose clients know this Hub only; an empty value takes a variable away."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        kept |= {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        kept |= {"HF_TOKEN": token or self.token, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        kept |= {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        return {name: value for name, value in {**kept, **more}.items() if value}


@contextmanager
def serve(folder: Path, *datasets: str, port: int = 0) -> Iterator[HubServer]:
    """Run the Hub in a thread, with private datasets of these names; `TOKEN` may write to those of `USER`."""
    store = Store(folder)
    store.add_token(TOKEN, USER)
    for name in datasets:
        store.create("datasets", name, private=True)
    layer = make_app(store)
    listener = socket.create_server(("127.0.0.1", port))
    # uvicorn's own Date lags when the machine is busy, and the client cuts logs off by it: `spaces.logs` sets one
    server = uvicorn.Server(uvicorn.Config(layer, log_level="critical", access_log=False, date_header=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield HubServer(f"http://127.0.0.1:{listener.getsockname()[1]}", store, layer)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
