"""How fast the grading page is and whether it keeps every grade.  python tests/benchmarks/grading.py

Drawn cells on this machine: one person at a browser, locally and over an emulated link of +150 ms and 10 Mbit/s; then
20 graders at once with 2 s between grades, and again while the server is killed three times. The last line is one JSON
object. About five minutes on two cores; other work on the machine shows in the times.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from grading_site import SLOW_LINK, Site, chromium, make_site, visit

from pathalign.grades import read_grades
from pathalign.schema import Grade

KEYS = 60
KEY_EVERY_MS = 600
GRADERS, GRADES_EACH, THINK_S = 20, 15, 2.0
GRADERS_PER_IMAGE = 2
KILLS = 3
# From the event's time stamp to the second frame after the image was swapped and is decoded: it is painted by then.
STOPWATCH = """() => {
    window.measured = [];
    window.addEventListener('keydown', event => {
        const stage = document.querySelector('.single .stage .canvas'), before = stage.querySelector('img');
        const look = async () => {
            const image = stage.querySelector('img');
            if (image === before) return requestAnimationFrame(look);
            await image.decode();
            requestAnimationFrame(() => measured.push(performance.now() - event.timeStamp));
        };
        requestAnimationFrame(look);
    }, true);
}"""


@dataclass
class Tally:
    """What 20 graders saw. `acknowledged` are ids that the server said it had recorded."""

    acknowledged: set[str] = field(default_factory=set)
    submit_ms: list[float] = field(default_factory=list)
    next_ms: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def p95(values: list[float]) -> float:
    return round(float(np.percentile(values, 95)), 1)


def key_to_image(site: Site, name: str, link: dict[str, float] | None) -> list[float]:
    """Milliseconds from each of `KEYS` keys to the next image on the screen."""
    with chromium() as browser:
        page = visit(browser.new_context(viewport={"width": 1440, "height": 900}), site, name, link)
        page.evaluate(STOPWATCH)
        for _ in range(KEYS):
            page.keyboard.press("p")
            page.wait_for_timeout(KEY_EVERY_MS)
        page.wait_for_function("count => measured.length >= count", arg=KEYS)
        return [float(value) for value in page.evaluate("measured")]


class Grader:
    """A browser's worth of requests: asks for an image, thinks, grades; sends again until it is echoed."""

    def __init__(self, site: Site, name: str, tally: Tally) -> None:
        self.site, self.name, self.tally = site, name, tally
        self.client = httpx.Client(base_url=site.url, headers={"origin": site.url}, timeout=10)
        self.component = 0
        self.thinking = np.random.default_rng(list(name.encode()))

    def enter(self) -> None:
        self.client.post("/enter", json={"token": self.site.tokens[self.name]}).raise_for_status()
        components = self.client.get("/config").json()["components"]
        self.component = next(entry["id"] for entry in components if entry["type"] == "html")

    def call(self, function: str, **payload: Any) -> tuple[dict[str, Any], float]:
        """The answer and how many milliseconds it took; asked again while the server is away."""
        body = {"data": payload, "component_id": self.component, "fn_name": function, "session_hash": self.name}
        while True:
            began = time.perf_counter()
            try:
                reply = self.client.post("/gradio_api/component_server/", json=body)
                reply.raise_for_status()
                return reply.json(), (time.perf_counter() - began) * 1000
            except httpx.HTTPError:
                time.sleep(0.5)

    def work(self) -> None:
        for number in range(GRADES_EACH):
            time.sleep(THINK_S * self.thinking.uniform(0.5, 1.5))
            reply, next_ms = self.call("next_items", mode="single", count=1, exclude=[])
            if not reply["items"]:
                continue
            row = {"item_id": reply["items"][0]["item_id"], "mode": "single", "verdict": "plausible"}
            row["grade_id"] = f"{self.name}-{number}"
            kept, submit_ms = self.call("submit_rows", rows=[row])
            with self.tally.lock:
                self.tally.next_ms.append(next_ms)
                self.tally.submit_ms.append(submit_ms)
                self.tally.acknowledged.update(kept["recorded"])


def together(site: Site, names: Sequence[str], kills: int) -> Tally:
    """All graders at once, while the server is killed and started again `kills` times."""
    tally = Tally()
    graders = [Grader(site, name, tally) for name in names]
    for grader in graders:
        grader.enter()
    threads = [threading.Thread(target=grader.work) for grader in graders]
    for thread in threads:
        thread.start()
    for _ in range(kills):
        time.sleep(GRADES_EACH * THINK_S / (kills + 1))
        site.kill()
        site.start()
    for thread in threads:
        thread.join()
    return tally


def over_assigned(rows: list[Grade]) -> int:
    """Images that more people graded than the study wanted."""
    graders = defaultdict(set)
    for row in rows:
        graders[row.image_id].add(row.grader)
    return sum(len(found) > GRADERS_PER_IMAGE for found in graders.values())


def main() -> None:
    """Measure one person, then twenty, then twenty with a server that dies."""
    names = tuple(f"grader{number}" for number in range(GRADERS))
    with tempfile.TemporaryDirectory() as folder:
        one = make_site(Path(folder) / "one", per_class=40, size_px=64, graders=("ada", "bea"), graders_per_image=2)
        one.start()
        local = key_to_image(one, "ada", None)
        slow = key_to_image(one, "bea", SLOW_LINK)
        one.stop()
        tallies, kept = [], []
        for kills in (0, KILLS):
            options = {"graders": names, "graders_per_image": GRADERS_PER_IMAGE, "real_control_share": 0.0}
            site = make_site(Path(folder) / f"killed{kills}", per_class=40, size_px=64, **options).start()
            tallies.append(together(site, names, kills))
            site.stop()  # which sends what waits to the folder of grades
            kept.append(read_grades(site.folder / "grades" / "grades"))
    acknowledged = [tally.acknowledged for tally in tallies]
    stored = [Counter(grade.grade_id for grade in grades) for grades in kept]
    result = {
        "key_to_image_p95_ms": p95(local),
        "key_to_image_p95_ms_150ms": p95(slow),
        "server_p95_ms_20_graders": p95(tallies[0].submit_ms),
        "next_p95_ms_20_graders": p95(tallies[0].next_ms),
        "acknowledged": sum(map(len, acknowledged)),
        "kills": KILLS,
        "lost": sum(len(ids - set(found)) for ids, found in zip(acknowledged, stored, strict=True)),
        "doubled": sum(count - 1 for found in stored for count in found.values()),
        "over_assigned": sum(map(over_assigned, kept)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
