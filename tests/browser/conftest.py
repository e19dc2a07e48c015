"""What the tests of pages share: Debian's browser, started once for each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from grading_site import chromium
from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as instance:
        yield instance
