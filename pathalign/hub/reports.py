"""An evaluation as the source of a card's figures: known to be about the artefact, with its sheets of samples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathalign.artefacts import fingerprint
from pathalign.cards import MeasuredOn, Sheet
from pathalign.hub.commits import HubRepo
from pathalign.hub.kinds import Artefact, moved
from pathalign.remote import pinned_repo
from pathalign.schema import InputError, RunRecord

SHEETS = {"before": "Samples of the base model", "after": "Samples of the aligned model"}


@dataclass(frozen=True)
class Report:
    """What `pathalign evaluate` found: its `metrics.json`, where it lies, and how it was made."""

    folder: Path
    metrics: dict[str, Any]
    record: RunRecord


def report_of(artefact: Artefact, folder: str, dataset: str | None = None) -> Report:
    """Read an evaluation and see that it measured this artefact.

    Args:
        artefact: A base model or an adapter.
        folder: What `pathalign evaluate` made.
        dataset: The Hub dataset that the publisher says it was measured on, if any.

    Raises:
        InputError: If it is none, or measured something else, or nothing tells what it measured.
    """
    place = Path(folder)
    record = RunRecord.load(place)
    if record.stage != "evaluate" or not (place / "metrics.json").is_file():
        raise InputError(
            f"{folder} is no evaluation but of the stage {record.stage!r}; give what `pathalign evaluate` made."
        )
    name, column = ("model", "before") if artefact.kind.name == "base" else ("adapter", "after")
    measured = record.inputs.get(name) or _sampled_from(place, record, column).get(name)
    if measured is None:
        raise InputError(
            f"Nothing tells which {name} {folder} measured: its samples {record.config.get(column)} are gone. "
            "Evaluate again, with `--adapter` if it is about one."
        )
    if (found := _fingerprint(measured)) != artefact.fingerprint:
        where = f"{measured}, " if found != measured else ""
        raise InputError(
            f"{folder} measured another {name} ({where}fingerprint {found}) than {artefact.folder} "
            f"({artefact.fingerprint}); evaluate this one, or leave out `--report`."
        )
    metrics = json.loads((place / "metrics.json").read_text())
    if metrics.get("phantom") and dataset:
        raise InputError(f"{folder} measured drawn phantoms, not the images of {dataset}; leave out `--dataset`.")
    return Report(place, metrics, record)


def _sampled_from(report: Path, record: RunRecord, column: str) -> dict[str, str]:
    """Inputs of the samples that were measured, if they still are what they were."""
    known = record.inputs.get(column, "")
    if pinned := pinned_repo(known):
        folder = HubRepo(pinned.name, "dataset").folder(str(pinned.revision), only=[RunRecord.FILE_NAME])
    else:
        folder = moved(Path(str(record.config.get(column))), report)
    if not (folder / RunRecord.FILE_NAME).is_file() or (pinned is None and fingerprint(folder) != known):
        return {}
    return RunRecord.load(folder).inputs


def _fingerprint(measured: str) -> str:
    """Fingerprint of a model that a record names: of a folder it is known, of a repo it is read at that commit."""
    pinned = pinned_repo(measured)
    if pinned is None:
        return measured
    repo = HubRepo(pinned.name, "model")
    return repo.fingerprint(repo.at(pinned.revision))


def copy_sheets(report: Report, columns: Sequence[str], place: Path) -> list[Sheet]:
    """Put the sheets of samples beside the card; the first images of each class, by seed, none chosen."""
    sheets = []
    for name in columns:
        source = report.folder / "figures" / f"samples_{name}.png"
        if source.is_file():
            (place / "images").mkdir(exist_ok=True)
            shutil.copyfile(source, place / "images" / source.name)
            sheets.append(Sheet(f"images/{source.name}", SHEETS[name]))
    return sheets


def measured_on(given: str | None, record: RunRecord, name: str, beside: Path) -> MeasuredOn:
    """The dataset that figures were measured on: the one that was given, else the one that records name.

    Args:
        given: `OWNER/NAME@REVISION`, or nothing.
        record: Of the evaluation or the reward model.
        name: Its setting that names the images, `data` or `feedback`.
        beside: Folder of that record.

    Raises:
        InputError: If the dataset that was given is not on the Hub, or is known to hold something else.
    """
    known = record.inputs.get(name, "")
    if given:
        return _stated(given, known)
    if pinned := pinned_repo(known):
        return MeasuredOn(pinned.name, pinned.revision)
    folder = moved(Path(str(record.config.get(name))), beside)
    if (folder / RunRecord.FILE_NAME).is_file() and fingerprint(folder) == known:
        prepared = RunRecord.load(folder)
        origin = str(prepared.config.get("source", ""))
        # Of a folder the revision is a fingerprint, of a Hub dataset a commit.
        if origin.count("/") == 1 and len(prepared.inputs.get("source", "")) == 40:
            return MeasuredOn(origin, prepared.inputs["source"])
    return MeasuredOn()


def _stated(given: str, known: str) -> MeasuredOn:
    """A dataset that the publisher names, at the commit that it is at now.

    What `pathalign publish` put there can be compared, unless somebody changed it; else it is their word.
    """
    dataset, _, revision = given.partition("@")
    repo = HubRepo(dataset, "dataset")
    head = repo.at(revision or None)
    if pinned := pinned_repo(known):
        if (dataset, head.commit) != (pinned.name, pinned.revision):
            raise InputError(
                f"The figures were not measured on {given} (commit {head.commit[:8]}) but on {pinned}, which the "
                "records name; leave out `--dataset`."
            )
        return MeasuredOn(dataset, head.commit)
    found = head.manifest.get("fingerprint")
    if found not in (None, known):
        raise InputError(
            f"The figures were not measured on {given}, which holds {head.manifest.get('kind')} of the fingerprint "
            f"{found}, but on images of the fingerprint {known}; give the dataset that holds those."
        )
    return MeasuredOn(dataset, head.commit, stated=found is None or not repo.is_as_published(head))
