"""Progress on stderr: a bar on a terminal, plain lines with the time left elsewhere. stdout stays for results."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
PLAIN_INTERVAL_S = 10.0


def say(message: str) -> None:
    """Print one line of progress."""
    tqdm.write(message, file=sys.stderr)


class Progress:
    """Counts steps of a long job; `update` takes figures to show, such as the loss."""

    def __init__(self, description: str, total: int, done: int = 0, unit: str = "step") -> None:
        self.description, self.total, self.count, self.unit = description, total, done, unit
        self._started, self._first = time.monotonic(), done
        self._last_line = self._started
        self._bar = (
            tqdm(desc=description, total=total, initial=done, unit=unit, file=sys.stderr, leave=False)
            if sys.stderr.isatty()
            else None
        )

    def update(self, steps: int = 1, **figures: float) -> None:
        """Advance by `steps` and show `figures`."""
        self.count += steps
        shown = {name: f"{value:.4g}" for name, value in figures.items()}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(steps)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = now
            left_s = (now - self._started) / max(1, self.count - self._first) * (self.total - self.count)
            text = "".join(f", {name} {value}" for name, value in shown.items())
            say(f"{self.description}: {self.count}/{self.total} {self.unit}s{text}, about {left_s:.0f} s left")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def track(items: Iterable[Item], description: str, total: int, unit: str = "batch") -> Iterator[Item]:
    """Iterate over `items` and show how far it is."""
    with Progress(description, total, unit=unit) as progress:
        for item in items:
            yield item
            progress.update()
