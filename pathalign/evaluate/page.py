"""What every page of results shares: one template, its style for screen and paper, tables, figures and plain numbers.

A page is one HTML file that asks nothing of a network. Its own template extends `page.html.jinja`, takes the macros of
`parts.html.jinja` and is rendered by `write_page`.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pathalign.schema import DISCLAIMER

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Cell:
    """One figure as text: its value, and below it smaller its interval and number of images."""

    value: str
    interval: str = ""
    n: str = ""


@dataclass(frozen=True)
class TableRow:
    """One line of a table.

    Attributes:
        title: Heads the line.
        cells: One for each column after the first.
        note: Said smaller below the title.
        term: Id of the glossary's entry on the title.
    """

    title: str
    cells: Sequence[Cell]
    note: str = ""
    term: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of a page, drawn by the macro `parts.table`.

    Attributes:
        caption: Said above it, and to screen readers.
        columns: Headings, that of the first column included.
        rows: Its lines.
        text_columns: Numbers of the columns, from 0, that hold words rather than figures.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[TableRow]
    text_columns: Sequence[int] = ()


@dataclass(frozen=True)
class Term:
    """An entry of the glossary: a word, and what it means in one plain sentence."""

    key: str
    name: str
    meaning: str


def percent(value: float | None, digits: int = 1) -> str:
    """A share as percentage, or `not measured`."""
    return NOT_MEASURED if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None) -> str:
    """A number with three digits behind the point (four when it is tiny), or `not measured`."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.4f}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return NOT_MEASURED if value is None else f"{100 * value:+.1f}"


def interval_text(interval: Sequence[float] | None, scale: float = 1) -> str:
    """`low to high`, or nothing."""
    if interval is None:
        return ""
    digits = 1 if scale == 100 else 3
    return f"{scale * interval[0]:.{digits}f} to {scale * interval[1]:.{digits}f}"


def measured_cell(
    measured: dict[str, Any] | None, key: str, interval: str | None = None, count: str | None = "n", share: bool = False
) -> Cell:
    """The figure `key` of a set as text, with the interval and the number of images that stand under other keys.

    Args:
        measured: Figures of the set; None if there is no such set.
        key: Of the figure. One that is absent or None is `not measured`.
        interval: Key of the interval, if it has one.
        count: Key of the number of images.
        share: Whether it is a share, shown in percent.
    """
    if measured is None or measured.get(key) is None:
        return Cell(NOT_MEASURED)
    value = measured[key]
    return Cell(
        percent(value) if share else str(value) if isinstance(value, int) else number(value),
        interval_text(measured.get(interval or ""), 100 if share else 1),
        str(measured.get(count or "", "")),
    )


def data_uri(content: bytes) -> str:
    """PNG bytes as a data URI."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def write_page(path: Path, template: str, folder: Path, **shown: Any) -> None:
    """Render a page into one file.

    Args:
        path: The file.
        template: Name of the page's own template, which starts with `{% extends "page.html.jinja" %}`.
        folder: Where that template lies; the shared ones are found by themselves.
        shown: What the template speaks of. `disclaimer` and `not_measured` are always there.
    """
    loader = FileSystemLoader([folder, Path(__file__).parent])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, number=number, points=points, interval=interval_text, data_uri=data_uri)
    environment.globals.update(disclaimer=DISCLAIMER, not_measured=NOT_MEASURED)
    path.write_text(environment.get_template(template).render(shown), encoding="utf-8")
