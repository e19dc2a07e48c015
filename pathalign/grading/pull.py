"""Grades of experts, from wherever their study keeps them: `pathalign feedback pull`, and the `grade` stage by experts.

commit -> fetch what is new -> merge and check -> enough? -> artefact
   ^                                               | no
   +------------------- wait ----------------------+
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pathalign.artefacts import artefact, check_place, fingerprint
from pathalign.grading.merging import ClassCoverage, Merged, coverage, lacking, merge
from pathalign.grading.outbox import Retry
from pathalign.grading.shards import Shards, SourceMissing, open_shards, referred
from pathalign.grading.sinks import SinkBusy
from pathalign.images import ImageSet
from pathalign.pinning import pinned
from pathalign.progress import say
from pathalign.schema import PSEUDONYM, Grade, InputError, RunRecord
from pathalign.settings.pull import PullConfig

PATIENCE_S = 60.0  # with a Hub that does not answer, where nobody asked to wait
RETRY = Retry(longest_s=30.0)
GRADES, PREFERENCES, LACKING = "grades.jsonl", "preferences/preferences.jsonl", "lacking.json"
COMMIT = re.compile(r"[0-9a-f]{7,40}")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Look:
    """What was there at one time.

    Attributes:
        commit: Of the source.
        files: Number of its files, and how many of these came just now.
        merged: What stands in them, about candidates only.
        counted: Those of its grades that count towards what is waited for.
        unknown: Grades and preferences left out because they are about other images.
        classes: Class -> how far it is graded; None where no candidates are known.
        labels: Image id -> class of the candidates.
    """

    commit: str
    files: tuple[int, int]
    merged: Merged
    counted: tuple[Grade, ...]
    unknown: int
    classes: dict[str, ClassCoverage] | None
    labels: Mapping[str, str]

    def enough(self, config: PullConfig) -> bool:
        """Whether there are as many grades as are waited for, in all and of each class."""
        least = min((found.grades for found in (self.classes or {}).values()), default=0)
        return len(self.counted) >= config.min_grades and least >= config.min_grades_per_class

    def text(self, config: PullConfig) -> str:
        """How many grades there are, of how many, by class."""
        wanted = f" of {config.min_grades}" if config.min_grades else ""
        least = f" of {config.min_grades_per_class}" if config.min_grades_per_class else ""
        by_class = self.classes or {}
        parts = ", ".join(f"{name} {found.grades}{least}" for name, found in by_class.items())
        people = _count(len({grade.grader for grade in self.counted}), "grader")
        others = len(self.merged.grades) - len(self.counted)
        left_out = f" and {others} simulated, which do not count" if others else ""
        return f"{len(self.counted)}{wanted} grades by {people}{f' ({parts})' if parts else ''}{left_out}"


def pull(config: PullConfig, output_dir: str | Path) -> RunRecord:
    """Write `grades.jsonl` (and `preferences/`, and `lacking.json` where candidates are known) from all that was sent.

    What was fetched stays beside the folder, hidden, for the next pull; so an interrupted one goes on where it was.

    Args:
        config: Where grades gather, and whether to wait for some number of them.
        output_dir: Folder that is made, or made anew with what has come since.

    Raises:
        InputError: If the source cannot be read, a file or row cannot be used, ids stand for different rows, or there
            are not enough grades in time.
    """
    started, output_dir = time.monotonic(), Path(output_dir)
    check_place(output_dir)
    source = referred(config.source, config.revision)
    config = pinned(replace(config, source=source.name, revision=source.revision))
    shards = open_shards(source)
    labels: dict[str, str] = {}
    if config.candidates is not None:
        images = ImageSet.load(config.candidates)
        labels = dict(zip(images.image_ids, images.labels(), strict=True))
    kept = output_dir.absolute().with_name(f".{output_dir.name}.shards")
    look = wait_for(config, shards, labels, kept)
    return _save(config, look, output_dir, started)


def wait_for(config: PullConfig, shards: Shards, labels: Mapping[str, str], kept: Path) -> Look:
    """Look until there are enough grades; once where no number is asked for.

    Args:
        config: How many grades are waited for, and for how long.
        shards: Where they gather.
        labels: Image id -> class of the candidates; empty if these are not known.
        kept: Folder of the files that were fetched before.

    Raises:
        InputError: As `pull`.
    """
    waits = bool(config.min_grades or config.min_grades_per_class)
    deadline = time.monotonic() + config.timeout_s if config.timeout_s else math.inf
    every = f"Looking every {config.poll_s:g} s; Ctrl-C ends it."
    look: Look | None = None
    told = False
    while True:
        patience = deadline if waits else time.monotonic() + PATIENCE_S
        try:
            commit = retried(shards.commit, shards.name, patience)
        except SourceMissing as error:  # deploying a Space makes its dataset
            if not waits or look is not None or time.monotonic() >= deadline:
                raise
            if not told:
                say(f"{error} {every}")
            told = True
            _rest(config.poll_s, deadline)
            continue
        if look is None or look.commit != commit:
            look = retried(partial(look_at, config, shards, commit, labels, kept), shards.name, patience)
            if not waits and not (look.merged.grades or look.merged.preferences):
                raise InputError(_nothing(shards.name, look))
            if look.enough(config):
                return look
            say(f"{shards.name}: {look.text(config)}. {every}")
        if COMMIT.fullmatch(config.revision or "") and commit.startswith(config.revision or ""):
            raise InputError(
                f"Commit {commit[:10]} of {shards.name} has {look.text(config)}, and a commit gets no more. "
                "Leave out `revision`, or lower `min_grades`."
            )
        if time.monotonic() >= deadline:
            raise InputError(_too_few(config, shards.name, look))
        _rest(config.poll_s, deadline)


def _rest(poll_s: float, deadline: float) -> None:
    """Sleep until the next look, the last of which is at the deadline."""
    time.sleep(max(0.0, min(poll_s, deadline - time.monotonic())))


def look_at(config: PullConfig, shards: Shards, commit: str, labels: Mapping[str, str], kept: Path) -> Look:
    """Fetch, merge and check what is there at a commit."""
    fetched = shards.fetch(commit, kept)
    merged = merge(fetched.files)
    unknown = 0
    if labels:
        grades = tuple(grade for grade in merged.grades if grade.image_id in labels)
        pairs = tuple(row for row in merged.preferences if {row.left_image_id, row.right_image_id} <= labels.keys())
        unknown = len(merged.grades) + len(merged.preferences) - len(grades) - len(pairs)
        merged = replace(merged, grades=grades, preferences=pairs)
    counted = tuple(grade for grade in merged.grades if config.counts_simulated or not grade.simulated)
    classes = coverage(counted, labels) if labels else None
    return Look(commit, (len(fetched.files), fetched.new), merged, counted, unknown, classes, labels)


def retried(call: Callable[[], Result], name: str, deadline: float) -> Result:
    """Call until it goes well, with longer and longer waits, and say so.

    Args:
        call: Raises `SinkBusy` if it may go well the next time.
        name: Of what is asked, for messages.
        deadline: By `time.monotonic`.

    Raises:
        InputError: If it does not go well until then, or `call` says that it never will.
    """
    failures = 0
    while True:
        try:
            return call()
        except SinkBusy as error:
            failures += 1
            wait_s = RETRY.wait_s(failures, error)
            if time.monotonic() + wait_s > deadline:
                raise InputError(
                    f"{error} No answer about {name} in time. What was fetched stays; run the same command again later."
                ) from error
            say(f"{error} Trying again in {wait_s:.1f} s.")
            time.sleep(wait_s)


def pseudonym(grader: str) -> str:
    """What a grader is called in what a pull writes: the same in every pull and round, whoever else is there.

    A pseudonym stays. The hash that takes the place of anything else hides it from readers, not from guesses.
    """
    return grader if PSEUDONYM.fullmatch(grader) else f"grader-{hashlib.sha256(grader.encode()).hexdigest()[:8]}"


def _save(config: PullConfig, look: Look, output_dir: Path, started: float) -> RunRecord:
    merged = look.merged
    people = Counter([*(row.grader for row in merged.grades), *(row.grader for row in merged.preferences)])
    called = {name: pseudonym(name) for name in people}
    if renamed := sum(name != given for name, given in called.items()):
        say(f"{renamed} of {len(people)} graders are called by what is no pseudonym; a hash of it takes its place.")
    grades = [
        replace(row, grader=called[row.grader], comment=row.comment if config.comments else None)
        for row in merged.grades
    ]
    preferences = [replace(row, grader=called[row.grader]) for row in merged.preferences]
    simulated = sum(grade.simulated for grade in grades)
    inputs = {"grades": look.commit}
    metrics: dict[str, Any] = {
        "files": look.files[0],
        "fetched": look.files[1],
        "rows": merged.rows,
        "duplicates": merged.duplicates,
        "superseded": merged.superseded,
        "unknown_images": look.unknown,
        "n_grades": len(grades),
        "n_preferences": len(preferences),
        "graders": {called[name]: count for name, count in sorted(people.items())},
        "rubric_versions": dict(Counter(grade.rubric_version for grade in grades)),
        "n_simulated": simulated,
        "simulated": simulated > 0,
    }
    missing = lacking(look.counted, look.labels)
    if look.classes is not None:
        inputs["candidates"] = fingerprint(sorted(look.labels.items()))
        metrics["classes"] = {
            name: {**asdict(found), "grades_per_image": round(found.grades_per_image, 3)}
            for name, found in look.classes.items()
        }
        metrics["lacking"] = sum(len(ids) for ids in missing.values())
    record = RunRecord(stage="grade", config=asdict(config), inputs=inputs, metrics=metrics)
    with artefact(output_dir) as folder:
        shutil.rmtree(folder / "preferences", ignore_errors=True)
        (folder / GRADES).write_text("".join(f"{grade.to_json()}\n" for grade in grades))
        if preferences:
            (folder / PREFERENCES).parent.mkdir()
            (folder / PREFERENCES).write_text("".join(f"{row.to_json()}\n" for row in preferences))
        (folder / LACKING).unlink(missing_ok=True)
        if look.classes is not None:
            (folder / LACKING).write_text(json.dumps(missing, indent=2) + "\n")
        record.wall_s = time.monotonic() - started
        record.save(folder)
    return record


def summary(record: RunRecord, output_dir: str | Path) -> str:
    """What a pull brought and what lacks, for people."""
    metrics, config = record.metrics, record.config
    fetched = f", {metrics['fetched']} fetched now" if metrics["fetched"] else ""
    choices = f" and {_count(metrics['n_preferences'], 'pairwise choice')}" if metrics["n_preferences"] else ""
    lines = [
        f"{_count(metrics['n_grades'], 'grade')}{choices} by {_count(len(metrics['graders']), 'grader')}, of "
        f"{_count(metrics['rows'], 'row')} in {_count(metrics['files'], 'file')}{fetched}; "
        f"{metrics['duplicates']} sent twice, {metrics['superseded']} corrected.",
        f"State of {config['source']}: {record.inputs['grades']}",
    ]
    if metrics["unknown_images"]:
        lines.append(f"Left out: {metrics['unknown_images']} about images that are not among the candidates.")
    if len(versions := metrics["rubric_versions"]) > 1:
        found = ", ".join(f"{name or 'none'}: {count}" for name, count in sorted(versions.items()))
        lines.append(f"Several versions of the checklist ({found}); all of them are kept.")
    if metrics["n_simulated"]:
        lines.append(f"{metrics['n_simulated']} grades are simulated: they are no expert feedback.")
    classes = metrics.get("classes", {})
    width = max((len(name) for name in classes), default=0)
    for name, found in classes.items():
        lines.append(
            f"  {name:<{width}}  {found['graded']} of {found['candidates']} images graded, "
            f"{found['grades_per_image']:.1f} grades each"
        )
    if metrics.get("lacking"):
        lines.append(f"{metrics['lacking']} images lack a grade; {Path(output_dir) / LACKING} names them.")
    return "\n".join(lines)


def next_command(record: RunRecord, output_dir: str | Path) -> str:
    """The command that goes on with these grades.

    Without candidates those of hidden controls are among them, which feedback refuses: first they are pulled again.
    """
    config = record.config
    if config["candidates"] is not None:
        words = ["--candidates", config["candidates"], "--grades", str(output_dir)]
    else:
        words = ["pull", config["source"], *(["--revision", config["revision"]] if config["revision"] else [])]
        words += ["--candidates", "CANDIDATES", *(["--comments"] if config["comments"] else [])]
        words += ["--output-dir", str(output_dir)]
    return shlex.join(["pathalign", "feedback", *words])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _nothing(name: str, look: Look) -> str:
    if look.unknown:
        return (
            f"{name} holds {look.unknown} grades, none about these candidates. Give the candidate set that was graded."
        )
    return f"{name} holds no grades in `grades/` yet; grade images first, or mend the name."


def _too_few(config: PullConfig, name: str, look: Look) -> str:
    found = len(look.counted)
    go_on = f", or go on with those that are there by `--min-grades {found}`" if found else ""
    if config.min_grades_per_class:
        go_on = ", or lower `min_grades_per_class`"
    return f"{name} has {look.text(config)} after {config.timeout_s:g} s. Run the same command to wait on{go_on}."
