"""The results page of a study, for its owner: one page of HTML that needs no script, and exports as ZIP files.

`Mount("/results", results_page(service))` behind a check that the visitor is an owner; nothing here checks that.
"""

from __future__ import annotations

import io
import tempfile
import threading
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route, Router

from pathalign.agreement import LEVEL, Estimate
from pathalign.grading.exports import FORMATS, NEEDS_IMAGES, ExportOptions, Recorded, export
from pathalign.grading.results import Results, study_results
from pathalign.images import ImageSet
from pathalign.schema import DISCLAIMER, InputError, unknown_name

TEMPLATE = "results.html"
NOT_MEASURED = "not measured"
DISAGREEMENTS_SHOWN = 24
PAIRS_SHOWN = 30
SAMPLES = 200
HEADERS = {
    "content-security-policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
ABOUT_FORMATS = {
    "jsonl": "one grade a line, for pathalign feedback",
    "csv": "for spreadsheets",
    "parquet": "for pandas, R and the Hub",
    "images": "the graded images as a candidate set, hidden controls among them, for pathalign feedback",
    "paper": "images in the folders of the paper's authors, whose label 1 means implausible",
    "preferences": "pairs of a chosen and a rejected image, for DPO",
}


class Source(Protocol):
    """What the page needs of a `GradingService`."""

    study: Any

    def results_inputs(self) -> Any: ...

    def picture(self, image_id: str) -> str: ...


@dataclass(frozen=True)
class Bar:
    """A share as it is drawn, in percent of the width."""

    value: float
    low: float
    high: float


def results_page(
    service: Source,
    candidates: Callable[[], ImageSet] | None = None,
    names: Callable[[], Collection[str]] = tuple,
    samples: int = SAMPLES,
) -> Router:
    """An application with the page at `/` and exports at `/export/FORMAT`.

    Args:
        service: The study that is graded.
        candidates: Gives the graded images; without it there are no exports that hold images.
        names: Gives the names of graders and owners, which are taken out of comments in exports.
        samples: Resamples behind each interval of agreement.
    """
    latest = Latest(service, samples)
    formats = [name for name in FORMATS if candidates or name not in NEEDS_IMAGES]

    def page(request: Request) -> Response:
        try:
            results = latest.results()
            html = render(service, results, formats, base=request.scope.get("root_path", ""))
        except InputError as error:
            return PlainTextResponse(f"The results cannot be computed: {error}", 500, HEADERS)
        return HTMLResponse(html, headers=HEADERS)

    def download(request: Request) -> Response:
        name = request.path_params["format"]
        if name not in formats:
            return PlainTextResponse(unknown_name("export format", name, formats), 404, HEADERS)
        inputs = service.results_inputs()
        simulated = any(grade.simulated for grade in inputs.grades)
        options = ExportOptions((name,), simulated, names=names())
        try:
            content = zipped(Recorded(inputs.grades, inputs.preferences), options, candidates and candidates())
        except InputError as error:
            return PlainTextResponse(str(error), 409, HEADERS)
        file_name = f"{'simulated-' if simulated else ''}feedback-{name}.zip"
        disposition = {"content-disposition": f'attachment; filename="{file_name}"'}
        return Response(content, headers=HEADERS | disposition, media_type="application/zip")

    return Router([Route("/", page), Route("/export/{format}", download)])


class Latest:
    """The results of what is recorded now; computed anew only when rows have come."""

    def __init__(self, service: Source, samples: int) -> None:
        self.service, self.samples = service, samples
        self._lock = threading.Lock()
        self._found: tuple[tuple[int, int], Results] | None = None

    def results(self) -> Results:
        """Compute, or give what was computed; rows are never changed, so their number tells."""
        with self._lock:
            inputs = self.service.results_inputs()
            state = len(inputs.grades), len(inputs.preferences)
            if self._found is None or self._found[0] != state:
                found = study_results(
                    inputs.grades,
                    inputs.preferences,
                    inputs.images,
                    class_names=list(dict.fromkeys(entry["class_label"] for entry in inputs.images.values())),
                    repeats=inputs.repeats,
                    samples=self.samples,
                )
                self._found = state, found
            return self._found[1]


def render(service: Source, results: Results, formats: Sequence[str], base: str = "") -> str:
    """The page as HTML; `base` is the path that it is mounted at."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters.update(percent=percent, number=number, interval=interval, words=words, bar=bar, when=when)
    study = service.study
    shown = results.disagreements[:DISAGREEMENTS_SHOWN]
    pairs = sorted(results.cohen.items(), key=lambda item: (item[1].value is None, item[1].value or 0.0))
    return environment.get_template(TEMPLATE).render(
        title=study.title,
        display={name: study.class_text(name).display_name for name in _class_names(results)},
        questions={entry.name: entry.question for entry in study.checklist.criteria},
        results=results,
        disagreements=[(item, service.picture(item.image_id)) for item in shown],
        pairs=[(names, kappa) for names, kappa in pairs if kappa.n][:PAIRS_SHOWN],
        exports={name: (f"{base}/export/{name}", ABOUT_FORMATS[name]) for name in formats},
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        level=f"{100 * LEVEL:.0f}\u00a0%",
        disclaimer=DISCLAIMER,
        not_measured=NOT_MEASURED,
        rubric=f"{study.checklist.name} {study.checklist.version}",
    )


def zipped(recorded: Recorded, options: ExportOptions, candidates: ImageSet | None) -> bytes:
    """An export as the bytes of a ZIP file.

    Raises:
        InputError: As `export`.
    """
    content = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "feedback"
        export(recorded, folder, options, candidates)
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(folder.parent))
    return content.getvalue()


def percent(estimate: Estimate) -> str:
    """A share in percent; one digit only where there are enough images to mean it."""
    if estimate.value is None:
        return NOT_MEASURED
    return f"{100 * estimate.value:.{1 if estimate.n >= 100 else 0}f}\u00a0%"


def number(estimate: Estimate) -> str:
    """A coefficient with two digits."""
    return NOT_MEASURED if estimate.value is None else f"{estimate.value:.2f}"


def interval(estimate: Estimate, scale: float = 1) -> str:
    """`low to high`, or nothing."""
    if estimate.ci is None:
        return ""
    low, high = estimate.ci
    return f"{scale * low:.0f} to {scale * high:.0f}" if scale == 100 else f"{low:.2f} to {high:.2f}"


def bar(estimate: Estimate) -> Bar | None:
    """Where a share and its interval are drawn."""
    if estimate.value is None or estimate.ci is None:
        return None
    return Bar(*(round(100 * value, 1) for value in (estimate.value, *estimate.ci)))


def words(name: str, texts: Mapping[str, str] | None = None) -> str:
    """A name as people read it."""
    return (texts or {}).get(name) or name.replace("_", " ")


def when(recorded_at: str) -> str:
    """The day and minute of an ISO time."""
    return recorded_at[:16].replace("T", " ")


def _class_names(results: Results) -> set[str]:
    names = {str(row.class_label) for row in results.classes} | {row.class_label for row in results.preferences}
    return names | {item.class_label for item in results.disagreements}
