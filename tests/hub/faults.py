"""Faults on request: answers that are errors, connections that are cut, before or after the request took effect."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass
class Fault:
    """One rule.

    Attributes:
        match: Regular expression, found in `METHOD /path`.
        status: What is answered; 0 to cut the connection without an answer.
        after: Whether the request takes effect first.
        share: Of the requests that match.
        times: So often at most.
        delay_s: Before anything else. With status 200 the delay is all that happens.
        headers: Of the answer.
    """

    match: str
    status: int = 500
    after: bool = False
    share: float = 1.0
    times: int | None = None
    delay_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.status or 'cut'}{' after' if self.after else ''}"


class Faults:
    """ASGI middleware that applies the first rule that a request meets.

    Attributes:
        hits: How often each fault happened, by its name.
        requests: All `METHOD /path` in order.
    """

    def __init__(self, app: ASGIApp, seed: int = 0) -> None:
        self.app = app
        self.rules: list[Fault] = []
        self.hits: Counter[str] = Counter()
        self.requests: list[str] = []
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def set(self, *rules: Fault) -> None:
        """Replace all rules."""
        with self._lock:
            self.rules = list(rules)

    def _choose(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for rule in self.rules:
                if re.search(rule.match, request) and rule.times != 0 and self._random.random() < rule.share:
                    rule.times = None if rule.times is None else rule.times - 1
                    self.hits[rule.name] += 1
                    return rule
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self._choose(f"{scope['method']} {scope['path']}") if scope["type"] == "http" else None
        if fault is None:
            await self.app(scope, receive, send)
            return
        if fault.delay_s:
            await asyncio.sleep(fault.delay_s)
        if fault.status == 200:
            await self.app(scope, receive, send)
            return
        if fault.after:
            await self.app(scope, receive, _nowhere)
        else:
            await _drain(receive)
        await _answer(fault, send)


async def _nowhere(message: Message) -> None:
    """Takes an answer that the client shall not see."""


async def _drain(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass


async def _answer(fault: Fault, send: Send) -> None:
    if not fault.status:
        send.__self__.transport.abort()  # type: ignore[attr-defined]  # uvicorn's own: the client gets no answer at all
        await asyncio.sleep(0)
        return
    body = json.dumps({"error": f"fault on request: {fault.name}"}).encode()
    headers: list[Any] = [(name.lower().encode(), value.encode()) for name, value in fault.headers.items()]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": fault.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
