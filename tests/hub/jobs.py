"""Jobs of the loopback Hub: created, listed, inspected, logged as server-sent events, and cancelled.

A job is a process of this machine, with the environment and the secrets that it was given and little else. `uv run` is
played by the interpreter of the tests, without an installation. Prices are made up.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hub.store import HubError
from hub.web import json_body, token_of

PROJECT = Path(__file__).resolve().parents[2]
ENDED = ("COMPLETED", "ERROR", "CANCELED")
UV_OPTIONS = ("--with", "--python")  # those that a command of ours has; each takes a value


def _machine(name: str, minute_usd: float, gpu: str | None = None, quantity: int = 1) -> dict[str, Any]:
    accelerator = {"type": "gpu", "model": gpu, "quantity": str(quantity), "vram": "16 GB", "manufacturer": "Nvidia"}
    return {
        "name": name,
        "prettyName": name.replace("-", " ").upper(),
        "cpu": "2 vCPU",
        "ram": "16 GB",
        "ephemeralStorage": "20 GB",
        "accelerator": accelerator if gpu else None,
        "unitCostMicroUSD": round(minute_usd * 1e6),
        "unitCostUSD": minute_usd,
        "unitLabel": "minute",
    }


HARDWARE = [_machine("cpu-basic", 0.0002), _machine("t4-small", 0.01, "T4"), _machine("a100x4", 0.2, "A100", 4)]


@dataclass
class Job:
    """A job, its process, and its log so far."""

    id: str
    namespace: str
    spec: dict[str, Any]
    stage: str = "SCHEDULING"
    message: str | None = None
    lines: list[dict[str, str]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def describe(self) -> dict[str, Any]:
        """As the API shows it: names of secrets, not what they are."""
        shown = ("dockerImage", "spaceId", "command", "arguments", "environment", "flavor", "labels")
        return {
            **{key: self.spec[key] for key in shown if key in self.spec},
            "id": self.id,
            "createdAt": _now(),
            "secrets": dict.fromkeys(self.spec.get("secrets", {})),
            "owner": {"id": self.namespace, "name": self.namespace, "type": "user"},
            "status": {"stage": self.stage, "message": self.message},
        }


class Jobs:
    """All jobs of a server."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, dict[str, Job]()

    def start(self, namespace: str, spec: dict[str, Any], endpoint: str) -> Job:
        if spec.get("flavor") not in {machine["name"] for machine in HARDWARE}:
            raise HubError(400, f"Invalid flavor {spec.get('flavor')}")
        job = Job(secrets.token_hex(12), namespace, spec)
        self.jobs[job.id] = job
        threading.Thread(target=self._run, args=(job, endpoint), daemon=True).start()
        return job

    def _run(self, job: Job, endpoint: str) -> None:
        folder = self.folder / job.id
        folder.mkdir(parents=True)
        environment = {
            **{key: os.environ[key] for key in ("PATH", "LANG", "OMP_NUM_THREADS") if key in os.environ},
            "PYTHONPATH": str(PROJECT),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(folder / "home"),
            "HOME": str(folder),
            **job.spec["environment"],
            **job.spec.get("secrets", {}),
        }
        job.process = subprocess.Popen(
            local_command(job.spec["command"]),
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if job.stage == "SCHEDULING":
            job.stage = "RUNNING"
        else:  # cancelled while it was scheduled
            os.killpg(job.process.pid, signal.SIGKILL)
        killer = threading.Timer(job.spec.get("timeoutSeconds", 1800), self._end, (job, "ERROR", "Job timeout"))
        killer.daemon = True
        killer.start()
        assert job.process.stdout
        for line in job.process.stdout:
            job.lines.append({"timestamp": _now(), "data": line.rstrip("\n")})
        code = job.process.wait()
        killer.cancel()
        if job.stage not in ENDED:
            job.stage = "ERROR" if code else "COMPLETED"
            job.message = f"Job failed with exit code: {code}" if code else None

    def _end(self, job: Job, stage: str, message: str | None = None) -> None:
        if job.stage not in ENDED:
            job.stage, job.message = stage, message
            if job.process:
                os.killpg(job.process.pid, signal.SIGKILL)

    def cancel(self, job: Job) -> None:
        self._end(job, "CANCELED")


def local_command(command: list[str]) -> list[str]:
    """The command, with the interpreter of the tests in place of `uv run` and of the `pathalign` that it installs."""
    if command[:2] != ["uv", "run"]:
        return command
    rest = command[2:]
    while rest[0] in UV_OPTIONS:
        rest = rest[2:]
    return [sys.executable, *(["-m", "pathalign.cli", *rest[1:]] if rest[0] == "pathalign" else rest)]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{time.time_ns() // 1000000 % 1000:03d}Z"


def _jobs(request: Request) -> Jobs:
    """All jobs of the server that is asked."""
    state = request.app.state
    if not hasattr(state, "jobs"):
        state.jobs = Jobs(state.store.blobs.parent / "jobs")
    jobs: Jobs = state.jobs
    return jobs


def _allowed(request: Request) -> str:
    """Who pays, if the token's owner may let them."""
    namespace, store = str(request.path_params["namespace"]), request.app.state.store
    user = store.user(token_of(request))
    if user is None:
        raise HubError(401, "Invalid username or password.")
    if user != namespace:
        raise HubError(403, f"You don't have the rights to run jobs as {namespace}.")
    return namespace


def _found(request: Request) -> Job:
    namespace, job = _allowed(request), _jobs(request).jobs.get(request.path_params["job_id"])
    if job is None or job.namespace != namespace:
        raise HubError(404, "Job not found", "JobNotFound")
    return job


async def create(request: Request) -> Response:
    spec = await json_body(request)
    job = _jobs(request).start(_allowed(request), spec, str(request.base_url).rstrip("/"))
    return JSONResponse(job.describe())


def listed(request: Request) -> Response:
    namespace = _allowed(request)
    return JSONResponse([job.describe() for job in _jobs(request).jobs.values() if job.namespace == namespace])


def inspect(request: Request) -> Response:
    return JSONResponse(_found(request).describe())


def logs(request: Request) -> Response:
    return StreamingResponse(_events(_found(request)), media_type="text/event-stream")


def cancel(request: Request) -> Response:
    job = _found(request)
    _jobs(request).cancel(job)
    return JSONResponse(job.describe())


def hardware(request: Request) -> Response:
    return JSONResponse(HARDWARE)


def routes() -> list[Route]:
    """All routes about jobs."""
    return [
        Route("/api/jobs/hardware", hardware),
        Route("/api/jobs/{namespace}", create, methods=["POST"]),
        Route("/api/jobs/{namespace}", listed),
        Route("/api/jobs/{namespace}/{job_id}", inspect),
        Route("/api/jobs/{namespace}/{job_id}/logs", logs),
        Route("/api/jobs/{namespace}/{job_id}/cancel", cancel, methods=["POST"]),
    ]


async def _events(job: Job) -> AsyncIterator[str]:
    """The log from its beginning, and what is added until the job ends."""
    yield f"data: {json.dumps({'timestamp': _now(), 'data': f'===== Job started at {_now()} ====='})}\n\n"
    sent = 0
    while True:
        ended = job.stage in ENDED
        for line in job.lines[sent:]:
            sent += 1
            yield f"data: {json.dumps(line)}\n\n"
        if ended:
            return
        await asyncio.sleep(0.05)
