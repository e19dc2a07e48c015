"""A grading study on this machine, for tests and benchmarks: its images, its server process, its browsers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from pathalign import phantom
from pathalign.grading.access import Invites
from pathalign.grading.outbox import Outbox
from pathalign.grading.sinks import open_sink

PROJECT = Path(__file__).resolve().parents[1]
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
STARTS_WITHIN_S = 240
PATIENCE_MS = 120_000  # on a busy machine; what is measured is measured in tests/benchmarks/grading.py


@dataclass
class Site:
    """A study in `folder`, served from its own process."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def study(self) -> Path:
        return self.folder / "study.yaml"

    @property
    def state(self) -> Path:
        return self.folder / "study.state"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Site:
        """Start the server, again on the same port if it was killed, and wait until it answers."""
        command = [sys.executable, "-m", "pathalign.cli", "grade", "serve", self.study, "--port", str(self.port)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=self.folder)
        deadline = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/enter", timeout=2):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise AssertionError(f"the server did not start:\n{(self.folder / 'server.log').read_text()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL, as when the power goes."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, as when a Space is restarted."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)

    def link(self, name: str) -> str:
        """The invitation of a grader, the same each time."""
        if name not in self.tokens:
            self.tokens[name] = Invites(self.state / "invites.json").create(name)
        return f"{self.url}/enter#{self.tokens[name]}"

    def rows(self, kind: str = "grade") -> list[dict[str, Any]]:
        """What is on the server's disk, in the order in which it came; also while the server runs."""
        sink = open_sink(str(self.folder / "grades"))
        outbox = Outbox(self.state, sink, start=False)
        return outbox.rows(kind)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def make_site(folder: Path, per_class: int = 12, size_px: int = 32, graders: tuple[str, ...] = (), **keys: Any) -> Site:
    """Draw a study into `folder` and invite its graders; `keys` go into its YAML file."""
    folder.mkdir(parents=True, exist_ok=True)
    phantom.draw(per_class, size_px, seed=5).save(folder / "candidates")
    phantom.draw(12, size_px, seed=6).save(folder / "references")
    content = {
        "title": "Cells of a test",
        "candidates": "candidates",
        "references": "references",
        "rubric": "seven_criteria",
        "classes": {"neutrophil": {"subtypes": ["band", "segmented"]}},
        "microns_per_pixel": 0.6,
        "graders": list(graders),
        "pairs_per_class": 8,
        **keys,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    site = Site(folder, free_port())
    for name in graders or ("ada",):
        site.link(name)
    return site


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's browser; the test is skipped where it is not installed."""
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium; install Debian's package of that name")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


def visit(context: BrowserContext, site: Site, name: str = "ada", link: dict[str, float] | None = None) -> Page:
    """Open the page as a grader, past the question about the screen, with the next images ready.

    Args:
        context: Browser profile.
        site: Where.
        name: Of the grader.
        link: `latency` in ms and `downloadThroughput` and `uploadThroughput` in bytes/s to emulate from then on.
    """
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(site.link(name))
    page.wait_for_selector("dialog.screen[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector(".page:not([data-view=loading])")
    page.wait_for_function("Number(document.querySelector('.page').dataset.ready) >= 8")
    if link:
        session = context.new_cdp_session(page)
        session.send("Network.enable")
        session.send("Network.emulateNetworkConditions", {"offline": False, **link})
    return page


SLOW_LINK = {"latency": 150.0, "downloadThroughput": 10e6 / 8, "uploadThroughput": 10e6 / 8}


def settle(page: Page, state: str = "saved") -> None:
    """Wait until the page says that everything is recorded, or also `saved`."""
    unsent = "document.querySelector('.status').dataset.unsent === '0'"
    saved = f"{unsent} && document.querySelector('.status').dataset.recorded === '0'"
    page.wait_for_function(saved if state == "saved" else unsent, timeout=PATIENCE_MS)


def shown(page: Page) -> str:
    """The image in front, by its address; changes with each image."""
    return str(page.evaluate("document.querySelector('.single .stage img').src"))


def wait_for_other(page: Page, image: str) -> str:
    """Wait until a single image other than `image` is in front; its address."""
    page.wait_for_function(
        "source => document.querySelector('.page').dataset.view === 'single'"
        " && document.querySelector('.single .stage img').src !== source",
        arg=image,
    )
    return shown(page)


def accept(page: Page, count: int) -> list[str]:
    """Find the next `count` images plausible, by key; their addresses in that order. Another image must follow them."""
    images = [shown(page)]
    for _ in range(count):
        page.keyboard.press("p")
        images.append(wait_for_other(page, images[-1]))
    return images[:-1]
