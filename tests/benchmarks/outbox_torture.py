"""Grades under torture: 4 servers that are killed at random, one Hub that answers with errors. Nothing may be lost.

    nice python tests/benchmarks/outbox_torture.py --rows 3000 --kills 12 --seed 0

Four server processes (uvicorn, one state folder each) bring rows to one loopback Hub with the stock client. Clients
send rows and repeat them until they are acknowledged, as the page does, and keep them until they are saved. At random
moments a server gets SIGKILL; some of them lose their disk too. The Hub answers a share of requests with 409, 412, 429,
500 or 503, cuts connections, and answers 500 or nothing after having committed. At the end the repo is read and counted
as it is, copies among it. The last line is one JSON object. About 2 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

TESTS = Path(__file__).resolve().parents[1]
SERVERS, CLIENTS_EACH = 4, 2
REPO = "lab/grades"
FAULTS: list[dict[str, Any]] = [
    *({"match": "/commit/", "status": status, "share": 0.05} for status in (409, 412, 429, 500, 503)),
    {"match": "/commit/", "status": 500, "after": True, "share": 0.08},
    {"match": "/commit/", "status": 0, "after": True, "share": 0.04},
    {"match": "/commit/", "status": 0, "share": 0.04},
    {"match": "paths-info|GET /datasets", "status": 503, "share": 0.04},
    {"match": "preupload", "status": 503, "share": 0.01},
]


def serve(state: str, port: int) -> None:
    """One grading server, as far as keeping rows goes."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request as WebRequest
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from pathalign.grading.outbox import Outbox, Retry, install_sigterm
    from pathalign.grading.sinks import SinkError, open_sink

    outbox = Outbox(
        state,
        open_sink(f"hf://datasets/{REPO}"),
        flush_every_s=0.4,
        flush_rows=25,
        retry=Retry(first_s=0.05, longest_s=1.0, refused_s=2.0),
    )
    while True:  # an empty disk learns what was graded before anybody grades
        try:
            outbox.restore()
            break
        except SinkError:
            time.sleep(0.2)

    async def rows(request: WebRequest) -> JSONResponse:
        given = await request.json()
        kept = await run(outbox.record, [("grade", row["grade_id"], row) for row in given])
        return JSONResponse(kept)

    async def saved(request: WebRequest) -> JSONResponse:
        return JSONResponse(sorted(await run(outbox.saved, await request.json())))

    async def pending(request: WebRequest) -> JSONResponse:
        return JSONResponse(await run(outbox.pending))

    import asyncio

    run = asyncio.to_thread
    routes = [Route("/rows", rows, methods=["POST"]), Route("/saved", saved, methods=["POST"])]
    app = Starlette(routes=[*routes, Route("/pending", pending)])
    install_sigterm(outbox)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical")


@dataclass
class Server:
    """One server process that is killed and started again on the same port."""

    state: Path
    port: int
    variables: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        command = [sys.executable, __file__, "--serve", str(self.state), "--port", str(self.port)]
        self.process = subprocess.Popen(command, env=self.variables)

    def kill(self, wipe: bool) -> None:
        with self.lock:
            assert self.process is not None
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            if wipe:
                shutil.rmtree(self.state)
            self.start()

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(f"http://127.0.0.1:{self.port}{path}", data=data), timeout=30) as answer:
            return json.load(answer)


class Client(threading.Thread):
    """One browser: sends rows until they are acknowledged, and again as long as they are not saved."""

    def __init__(self, name: str, server: Server, seed: int, goal: Goal) -> None:
        super().__init__(daemon=True)
        self.grader, self.server, self.goal = name, server, goal
        self.random = random.Random(f"{seed} {name}")
        self.sent: dict[str, dict[str, Any]] = {}
        self.unsaved: dict[str, dict[str, Any]] = {}
        self.acknowledged: set[str] = set()
        self.repeated = 0

    def run(self) -> None:
        number = 0
        while not self.goal.reached():
            for _ in range(self.random.randint(1, 4)):
                number += 1
                row = {"grade_id": f"{self.grader}-{number:05d}", "image_id": f"{number:08x}", "class_label": "a"}
                row |= {"verdict": self.random.choice(("plausible", "implausible")), "grader": self.grader}
                self.unsaved[row["grade_id"]] = self.sent[row["grade_id"]] = row
            self.send(list(self.unsaved.values())[-4:])
            self.forget_saved(patient=False)
            time.sleep(self.random.uniform(0.0, self.goal.pause_s))
        while self.unsaved:
            self.send(list(self.unsaved.values()))
            self.forget_saved(patient=True)
            time.sleep(0.3)

    def send(self, rows: list[dict[str, Any]]) -> None:
        wanted = {row["grade_id"] for row in rows}
        while True:
            try:
                kept = set(self.server.ask("/rows", rows))
            except OSError:  # killed, starting, or cut
                self.repeated += len(rows)
                time.sleep(0.1)
                continue
            assert kept == wanted, wanted - kept
            self.goal.count(len(kept - self.acknowledged))
            self.acknowledged |= kept
            return

    def forget_saved(self, patient: bool) -> None:
        if patient or self.random.random() < 0.2:
            try:
                for row_id in self.server.ask("/saved", list(self.unsaved)):
                    del self.unsaved[row_id]
            except OSError:
                pass


class Goal:
    """When clients may stop: enough rows are acknowledged and enough servers were killed."""

    def __init__(self, rows: int, kills: int, pause_s: float) -> None:
        self.rows, self.kills, self.pause_s = rows, kills, pause_s
        self.acknowledged = self.killed = 0
        self._lock = threading.Lock()

    def count(self, rows: int) -> None:
        with self._lock:
            self.acknowledged += rows

    def reached(self) -> bool:
        return self.acknowledged >= self.rows and self.killed >= self.kills


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def read_repo(endpoint: str, token: str) -> tuple[list[dict[str, Any]], int, int]:
    """All rows in the repo, copies among them, and the numbers of files and of commits that added one."""
    from pathalign.grading.hub_sink import HubSink

    sink = HubSink(REPO, token, endpoint=endpoint)
    paths = sink.list("grades/")
    rows = [json.loads(line) for path in paths for line in (sink.read(path) or b"").splitlines()]
    commits = sink._api.list_repo_commits(REPO, repo_type="dataset")
    return rows, len(paths), len(commits) - 1


def torture(rows: int, kills: int, wipes: int, seed: int, folder: Path, kill_every_s: float) -> dict[str, Any]:
    """Run it in `folder`; returns what the last line says."""
    began = time.monotonic()
    chance = random.Random(seed)
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "hub", "--folder", str(folder / "hub"), "--dataset", REPO]
    hub = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    servers: list[Server] = []
    try:
        about = json.loads(hub.stdout.readline() if hub.stdout else "{}")
        urlopen(Request(f"{about['endpoint']}/-/faults", data=json.dumps(FAULTS).encode())).read()
        variables |= {"HF_ENDPOINT": about["endpoint"], "HF_TOKEN": about["token"], "HF_HOME": str(folder / "home")}
        servers += [Server(folder / f"state{n}", free_port(), variables) for n in range(SERVERS)]
        for server in servers:
            server.start()
        goal = Goal(rows, kills, pause_s=0.4)
        clients = [
            Client(f"grader-{number}{letter}", server, seed, goal)
            for number, server in enumerate(servers)
            for letter in "abcdefgh"[:CLIENTS_EACH]
        ]
        for client in clients:
            client.start()
        wiped = set(chance.sample(range(1, kills), wipes)) if wipes else set()
        while not goal.reached():
            time.sleep(chance.uniform(0.3, 1.7) * kill_every_s)
            chance.choice(servers).kill(wipe=goal.killed in wiped)
            goal.killed += 1
            print(f"{goal.acknowledged} rows acknowledged, {goal.killed} kills", file=sys.stderr, flush=True)
        for client in clients:
            client.join(300)
        stuck = [client.grader for client in clients if client.is_alive()]
        faults = json.load(urlopen(f"{about['endpoint']}/-/faults"))["hits"]
        urlopen(Request(f"{about['endpoint']}/-/faults", data=b"[]")).read()
        for server in servers:
            assert server.process is not None
            server.process.terminate()
            server.process.wait(60)
        found, files, commits = read_repo(about["endpoint"], about["token"])
    finally:
        for process in [*(server.process for server in servers), hub]:
            if process is not None:
                process.kill()
                process.wait()
    sent = {row_id: row for client in clients for row_id, row in client.sent.items()}
    ids = Counter(row["grade_id"] for row in found)
    acknowledged = set().union(*(client.acknowledged for client in clients))
    return {
        "acknowledged": len(acknowledged),
        "lost": len(acknowledged - set(ids)),
        "doubled": sum(count - 1 for count in ids.values()),
        "altered": sum(row != sent[row["grade_id"]] for row in found),
        "kills": goal.killed,
        "faults": faults,
        "disks_wiped": len(wiped),
        "sent_again": sum(client.repeated for client in clients),
        "files": files,
        "commits": commits,
        "clients_stuck": len(stuck),
        "seed": seed,
        "wall_s": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="Acknowledged at least.")
    parser.add_argument("--kills", type=int, default=12, help="SIGKILLs at least, at random moments.")
    parser.add_argument("--wipes", type=int, default=2, help="So many of the killed servers lose their disk.")
    parser.add_argument("--kill-every-s", type=float, default=4.0, help="On average.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.port)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = torture(options.rows, options.kills, options.wipes, options.seed, Path(folder), options.kill_every_s)
    print(json.dumps(result))
    sys.exit(1 if any(result[name] for name in ("lost", "doubled", "altered", "clients_stuck")) else 0)


if __name__ == "__main__":
    main()
