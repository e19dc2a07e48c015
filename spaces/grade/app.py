"""The grading page as a Gradio app: lays out one component, ties it to `pathalign.grading`, and puts the gate in front.

A Space starts this file with `python app.py` and expects a server on port 7860 of all interfaces; `main` is that. On
one's own machine `pathalign grade serve STUDY.yaml` builds the same app with `create_app`.
"""

from __future__ import annotations

import html
import importlib.util
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# Nothing that is shown or done here leaves the machine; before gradio is imported, since it reads these then.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.requests import Request

from pathalign.grading.access import Access, HubDoor, InviteDoor, Visitor
from pathalign.grading.example import CANDIDATES, make_images
from pathalign.grading.gate import LOCAL_HOSTS, Gate, space_names
from pathalign.grading.outbox import Outbox, install_sigterm
from pathalign.grading.service import GradingService
from pathalign.grading.sinks import HUB_PREFIX, open_sink
from pathalign.grading.study import Study, check_lasting_secret, study_secret
from pathalign.progress import say
from pathalign.schema import InputError

HERE = Path(__file__).resolve().parent
SPACE_PORT = 7860
SCRIPTS = ("keeping.js", "views.js", "page.js")  # parts of one script, in this order
MOST_ROWS, MOST_IDS = 200, 1000  # in one request
STEP_S = 0.04
Payload = dict[str, Any]
OUTSIDE = """
body, gradio-app { background: #e9e9e9 !important; }
body.dark, body.dark gradio-app { background: #161616 !important; }
gradio-app .gradio-container { overflow: visible !important; }
gradio-app .gradio-container > .main, gradio-app .html-container {
  max-width: none !important; margin: 0 !important; padding: 0 !important;
}
"""
DOOR_HELP = {
    "invite": "Open the invitation link that the owner of the study sent you. It works in any browser.",
    "single": "Open the address that <code>pathalign grade serve</code> printed.",
    "hub": '<a class="button" href="login/huggingface" target="_blank">Sign in with Hugging Face</a>',
}


def server_functions(service: GradingService) -> list[Callable[..., Payload]]:
    """What the page may ask. Who asks is what the gate found out, never what the page says."""

    def open_study(payload: Payload, request: gr.Request) -> Payload:
        def work(visitor: Visitor) -> Payload:
            return {**service.opening(visitor.pseudonym, payload.get("session") or {}), "owner": visitor.is_owner}

        return _answer(payload, request, work)

    def next_items(payload: Payload, request: gr.Request) -> Payload:
        mode, count, exclude = payload.get("mode"), payload.get("count"), _bounded(payload, "exclude", MOST_IDS)
        with _in_steps():
            return _answer(payload, request, lambda who: service.next_items(who.pseudonym, mode, count, exclude))

    def submit_rows(payload: Payload, request: gr.Request) -> Payload:
        rows = _bounded(payload, "rows", MOST_ROWS)
        return _answer(payload, request, lambda who: service.submit(who.pseudonym, rows))

    def saved_rows(payload: Payload, request: gr.Request) -> Payload:
        ids = _bounded(payload, "grade_ids", MOST_IDS)
        return _answer(payload, request, lambda who: service.saved(who.pseudonym, ids))

    def past_rows(payload: Payload, request: gr.Request) -> Payload:
        return _answer(payload, request, lambda who: service.history(who.pseudonym, payload.get("count") or 50))

    return [open_study, next_items, submit_rows, saved_rows, past_rows]


def _answer(payload: Payload, request: gr.Request, work: Callable[[Visitor], Payload]) -> Payload:
    visitor: Visitor | None = request.scope["state"].get("visitor")
    if visitor is None or not visitor.is_grader:
        return {"error": "out", "message": "Nobody is signed in here."}
    # two people, one browser: grades of the first must not be taken for the second's
    if payload.get("grader") not in (None, visitor.pseudonym):
        return {"error": "other", "message": f"It is {visitor.pseudonym} now."}
    try:
        return work(visitor)
    except InputError as error:
        return {"error": "input", "message": str(error)}


@contextmanager
def _in_steps() -> Iterator[None]:
    """Take one of a few lengths of time, dithered: how long a look-up took must not tell which image it found."""
    began = time.monotonic()
    yield
    took_s = time.monotonic() - began + random.uniform(0, STEP_S)
    time.sleep(max(0.0, began + math.ceil(took_s / STEP_S) * STEP_S - time.monotonic()))


def _bounded(payload: Payload, key: str, most: int) -> list[Any]:
    values = payload.get(key) or []
    return values[:most] if isinstance(values, list) else []


def build_page(service: GradingService) -> gr.Blocks:
    """The page: one component whose template, style and script are the files beside this one."""
    with gr.Blocks(title=service.study.title, analytics_enabled=False) as page:
        gr.HTML(
            html_template=(HERE / "page.html").read_text(),
            css_template=(HERE / "page.css").read_text(),
            js_on_load="\n".join((HERE / name).read_text() for name in SCRIPTS),
            server_functions=server_functions(service),
            apply_default_css=False,
        )
    return page


def create_app(
    service: GradingService,
    access: Access,
    hosts: tuple[str, ...] | None = LOCAL_HOSTS,
    origins: tuple[str, ...] | None = None,
    frames: str = "'none'",
) -> FastAPI:
    """The whole server as an ASGI application.

    Args:
        service: The study.
        access: Who may come in.
        hosts: Names that the server answers to; None for any, behind a proxy that sees to that.
        origins: Names under which browsers see the page, if a proxy gives it others.
        frames: Sites that may show the page in a frame.
    """
    app = FastAPI(title=service.study.title, docs_url=None, redoc_url=None, openapi_url=None)
    _add_door(app, access)
    _add_results(app, service, access)
    door = _door_page(access)
    app.add_middleware(Gate, access=access, hosts=hosts, origins=origins, frames=frames, door_page=door)
    if access.door.kind == "hub":
        _add_sign_in(app)  # after the gate, so that its session is there when the gate looks
    system_font = ["system-ui", "sans-serif"]  # the theme's own fonts would come from another site
    return gr.mount_gradio_app(
        app,
        build_page(service),
        path="/",
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        theme=gr.themes.Base(font=system_font, font_mono=["monospace"]),
        css=OUTSIDE,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size=1,
    )


def _add_sign_in(app: FastAPI) -> None:
    """Sign-in with Hugging Face. Elsewhere than on a Space, gradio's is a mock that lets everybody in as one person."""
    if gr.utils.get_space() is None:
        raise InputError("Signing in works on a Space only; on this machine use `pathalign grade serve STUDY.yaml`.")
    from gradio.oauth import attach_oauth  # needs the extra gradio[oauth]

    attach_oauth(app)


def _add_results(app: FastAPI, service: GradingService, access: Access) -> None:
    """The owner's page; the gate lets nobody else there."""

    @app.get("/results")
    def to_results() -> RedirectResponse:
        return RedirectResponse("./results/")

    results_page = _sibling("results").results_page
    app.mount("/results", results_page(service, lambda: service.catalogue.images, access.known_names))


def _add_door(app: FastAPI, access: Access) -> None:
    """`/enter`, where an invitation becomes a cookie, and `/whoami`, by which the page learns that it is signed out."""
    door, page = access.door, _door_page(access)

    @app.get("/whoami")
    def whoami(request: Request) -> dict[str, Any]:
        visitor: Visitor = request.scope["state"]["visitor"]
        return {"grader": visitor.pseudonym, "owner": visitor.is_owner}

    @app.get("/enter")
    def show_door() -> HTMLResponse:
        return HTMLResponse(page(200, "This page takes an invitation link."))

    @app.post("/enter")
    async def enter(request: Request) -> JSONResponse:
        try:
            token = (await request.json())["token"]
        except (ValueError, KeyError, TypeError):
            token = None
        value = door.enter(token) if isinstance(door, InviteDoor) and isinstance(token, str) else None
        if value is None or not isinstance(door, InviteDoor):
            return JSONResponse({"error": "This invitation is not known, or a newer one has taken its place."}, 403)
        secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
        response = JSONResponse({"entered": True})
        age_s = door.cookie_days * 86400
        response.set_cookie(door.cookie_name, value, age_s, path="/", httponly=True, samesite="strict", secure=secure)
        return response


def _door_page(access: Access) -> Callable[[int, str], str]:
    template = (HERE / "door.html").read_text()

    def page(status: int, reason: str) -> str:
        return template.replace("@reason@", html.escape(reason)).replace("@help@", DOOR_HELP[access.door.kind])

    return page


def _sibling(name: str) -> ModuleType:
    """A module beside this file, wherever this file was loaded from."""
    spec = importlib.util.spec_from_file_location(f"pathalign_grade_{name}", HERE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def open_service(study: Study, state_dir: Path) -> GradingService:
    """The study with its outbox; grades that the sink has are read back first."""
    return GradingService(study, state_dir, Outbox(state_dir, open_sink(study.sink)))


def serve(app: FastAPI, service: GradingService, host: str, port: int) -> None:
    """Run until SIGTERM or Ctrl-C, then send what waits."""
    install_sigterm(service.outbox)
    try:
        uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    finally:
        service.close()


def claim_zero_gpu() -> None:
    """On a free account's Space, whose hardware is ZeroGPU, show it the GPU function without which it does not start.

    Nothing here uses a GPU. `spaces` reports its functions when a Blocks is launched (spaces 0.51), hence the idle one.
    """
    if not os.environ.get("SPACES_ZERO_GPU"):
        return
    import spaces

    @spaces.GPU
    def nothing() -> None:
        pass

    gr.Blocks().launch(server_name="127.0.0.1", server_port=SPACE_PORT + 1, prevent_thread_lock=True, quiet=True)


def main() -> None:
    """Serve `study.yaml` beside this file, as a Space does."""
    claim_zero_gpu()
    study = Study.load(HERE / "study.yaml")
    if study.candidates == CANDIDATES:  # the example, not yet drawn: once it is, the path is absolute
        make_images(HERE)
        study = Study.load(HERE / "study.yaml")
    check_lasting_secret(study.sink)
    if not study.sink.startswith(HUB_PREFIX):
        say(f"Grades go to {study.sink} on this disk, which a Space forgets: name {HUB_PREFIX}USER/REPO as `sink`.")
    state_dir = HERE / "state"  # not a volume: SQLite needs the locks and syncs of a disk, which a bucket lacks
    service = open_service(study, state_dir)
    author = [os.environ["SPACE_AUTHOR_NAME"]] if "SPACE_AUTHOR_NAME" in os.environ else []
    names = [person.name for person in study.people] or ([] if study.organization else author)
    secret = study_secret(state_dir)
    access = Access(HubDoor(), secret, names, study.owners or author, study.organization, study.pseudonyms)
    frames = "https://huggingface.co https://*.huggingface.co"
    serve(create_app(service, access, None, space_names(), frames), service, "0.0.0.0", SPACE_PORT)


if __name__ == "__main__":
    main()
