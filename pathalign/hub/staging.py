"""The staged copy of an artefact: what would go, cleaned, with card and manifest. The user's folder is only read."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathalign import cards
from pathalign.artefacts import fingerprint
from pathalign.cards import Grading, MeasuredOn, Terms, measures
from pathalign.hub import columns, privacy, reports
from pathalign.hub.bases import Base, base_of
from pathalign.hub.commits import MANIFEST, sha256_of
from pathalign.hub.kinds import KINDS, PARTICULAR, Artefact, own_files
from pathalign.schema import InputError, RunRecord
from pathalign.settings.publish import PublishConfig

CARD, RECORD = "README.md", RunRecord.FILE_NAME
SHOWN = 5  # names of files in a sentence


@dataclass
class Staged:
    """A copy that is ready to go.

    Attributes:
        place: Its folder.
        checks: What was looked at and what was done, one sentence each.
        facts: What must stay the same when the repo is published to again: `class_names`, `base_model`.
        n_real: Real images in it.
    """

    place: Path
    checks: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    n_real: int = 0

    @property
    def files(self) -> dict[str, Path]:
        """Path in the repo -> file here."""
        found = sorted(path for path in self.place.rglob("*") if path.is_file())
        return {path.relative_to(self.place).as_posix(): path for path in found}


def stage(artefact: Artefact, repo_id: str, config: PublishConfig, place: Path, secret: str | None) -> Staged:
    """Make the copy.

    Args:
        artefact: What is published.
        repo_id: Where to; the card's snippets load from there.
        config: Settings.
        place: Empty folder that the copy is made in.
        secret: The token of this session, which must be nowhere in it.

    Raises:
        InputError: If a setting is not for this kind, or something is in it that must not leave; names all of it.
    """
    _check_settings(artefact, config)
    staged = Staged(place)
    if pickles := [path for path in own_files(artefact.folder) if path.suffix.lower() in privacy.UNSAFE]:
        raise refused(artefact.folder, [p for path in pickles for p in privacy.problems_of_file(path, path.name, None)])
    terms = Terms(config.license, config.data_license, config.consent)
    write_card = _PREPARE[artefact.kind.name](artefact, repo_id, config, terms, staged)
    _name_staying(artefact, staged)
    _clean(staged)
    (place / CARD).write_text(write_card(RunRecord.load(place)))
    problems = [p for name, path in staged.files.items() for p in privacy.problems_of_file(path, name, secret)]
    if problems:
        raise refused(artefact.folder, problems)
    staged.checks.append(f"{len(staged.files)} files without tokens, addresses, paths of this machine and pickles")
    _write_manifest(artefact, staged)
    return staged


def refused(folder: Path, problems: list[str]) -> InputError:
    """An error that names everything that must not leave."""
    listed = "\n".join(f"- {problem}" for problem in problems)
    return InputError(f"{folder} is not published; take this out first:\n{listed}")


def _check_settings(artefact: Artefact, config: PublishConfig) -> None:
    given = [name for name in PARTICULAR if getattr(config, name)]
    if unfit := [name for name in given if name not in artefact.kind.takes]:
        users = {name: [kind.name for kind in KINDS if name in kind.takes] for name in unfit}
        named = "; ".join(f"`--{name.replace('_', '-')}` is for {', '.join(users[name])}" for name in unfit)
        raise InputError(f"{artefact.folder} is of the kind {artefact.kind.name}: {named}.")


def _name_staying(artefact: Artefact, staged: Staged) -> None:
    names = [path.relative_to(artefact.folder).as_posix() for path in own_files(artefact.folder)]
    if staying := [name for name in names if not artefact.kind.has(name) and name not in staged.files]:
        more = f" and {len(staying) - SHOWN} more" if len(staying) > SHOWN else ""
        staged.checks.append(f"other files stay here: {', '.join(staying[:SHOWN])}{more}")


def _clean(staged: Staged) -> None:
    done: Counter[str] = Counter(word for path in staged.files.values() for word in privacy.clean(path))
    staged.checks += [f"{word}, in {count} {'file' if count == 1 else 'files'}" for word, count in sorted(done.items())]


def _write_manifest(artefact: Artefact, staged: Staged) -> None:
    content = {
        "kind": artefact.kind.name,
        "fingerprint": artefact.fingerprint,
        **staged.facts,
        "files": {name: sha256_of(path) for name, path in staged.files.items()},
    }
    (staged.place / MANIFEST).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _copy(artefact: Artefact, staged: Staged, names: dict[str, str] | None = None) -> None:
    for path in own_files(artefact.folder):
        name = path.relative_to(artefact.folder).as_posix()
        if not artefact.kind.has(name):
            continue
        target = staged.place / (names or {}).get(name, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            target.symlink_to(path.resolve())  # large, and never changed by cleaning
        else:
            shutil.copyfile(path, target)


def _write_eval_results(staged: Staged, measured: list[measures.Measure], on: MeasuredOn, date: str) -> None:
    content = measures.eval_results(measured, on, date)
    if content:
        path = staged.place / measures.EVAL_RESULTS_FILE
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)


CardWriter = Callable[[RunRecord], str]  # gets the cleaned run record


def _base(artefact: Artefact, repo_id: str, config: PublishConfig, terms: Terms, staged: Staged) -> CardWriter:
    _copy(artefact, staged)
    labels = json.loads((artefact.folder / "model_index.json").read_text())["id2label"]
    names = [labels[key] for key in sorted(labels, key=int)]
    staged.facts["class_names"] = names
    found = _measured(artefact, config, staged, ("before",))
    if not found.sheets and (staged.place / "samples" / "final.png").is_file():
        found.sheets.append(cards.Sheet("samples/final.png", "Samples at the end of training"))
    return lambda record: cards.render(
        "diffusion_base", record, found.metrics, class_names=names, repo_id=repo_id, terms=terms,
        measured_on=found.on, sheets=found.sheets,
    )  # fmt: skip


@dataclass
class _Measured:
    metrics: dict[str, Any] | None
    on: MeasuredOn
    sheets: list[cards.Sheet]


def _measured(artefact: Artefact, config: PublishConfig, staged: Staged, columns: tuple[str, ...]) -> _Measured:
    """Figures and sheets of `--report`."""
    if config.report is None:
        staged.checks.append("no report: the card says that nothing was measured")
        return _Measured(None, reports.measured_on(config.dataset, artefact.record, "data", artefact.folder), [])
    report = reports.report_of(artefact, config.report, config.dataset)
    on = reports.measured_on(config.dataset, report.record, "data", report.folder)
    staged.checks.append(f"{config.report} measured this {artefact.kind.name}")
    kind: cards.CardKind = "lora_adapter" if artefact.kind.name == "adapter" else "diffusion_base"
    _write_eval_results(staged, cards.own_measures(kind, report.metrics), on, report.record.finished_at)
    return _Measured(report.metrics, on, reports.copy_sheets(report, columns, staged.place))


def _adapter(artefact: Artefact, repo_id: str, config: PublishConfig, terms: Terms, staged: Staged) -> CardWriter:
    base = base_of(artefact, config.base_model)
    staged.checks.append(f"base model {base.repo_id} at {base.revision or 'main'} is the one it was trained on")
    metrics = artefact.record.metrics
    names = metrics.get("class_names") or base.class_names
    if not names:
        raise InputError(
            f"{artefact.folder} does not name its classes, and neither does {base.repo_id}; train it again."
        )
    staged.facts |= {"class_names": names, "base_model": base.fingerprint, "base_repo": base.repo_id}
    grading = _grading_of_adapter(artefact)
    _copy(artefact, staged)
    _name_base(staged.place, base)
    template = str(artefact.record.config.get("prompt", ""))
    prompts = [template.replace("{class_name}", name) for name in names] if base.asks_in_words else []
    found = _measured(artefact, config, staged, ("before", "after"))
    return lambda record: cards.render(
        "lora_adapter", record, found.metrics, grading=grading, base_model=base.repo_id, base_revision=base.revision,
        class_names=names, prompts=prompts, criteria=metrics.get("criteria"), repo_id=repo_id, terms=terms,
        measured_on=found.on, sheets=found.sheets,
    )  # fmt: skip


def _name_base(place: Path, base: Base) -> None:
    """Let the run record name the base as readers can load it."""
    path = place / RECORD
    content = json.loads(path.read_text())
    content["config"] |= {"base_model": base.repo_id, "base_revision": base.revision}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _grading_of_adapter(artefact: Artefact) -> Grading:
    """Who graded, by the adapter's record, else by its reward model."""
    grading, folders = artefact.record.metrics.get("grading"), artefact.input_folders("reward_model")
    for folder in folders:
        if grading is None and folder.is_dir() and fingerprint(folder) == artefact.record.inputs.get("reward_model"):
            grading = json.loads((folder / "config.json").read_text()).get("grading")
    if grading is None:
        raise InputError(
            f"{artefact.folder} does not say who graded, and its reward model is not at "
            f"{', '.join(map(str, folders)) or 'any place that its record names'}. Put that there, or train the "
            "adapter again."
        )
    return Grading(**grading)


def _reward(artefact: Artefact, repo_id: str, config: PublishConfig, terms: Terms, staged: Staged) -> CardWriter:
    model = json.loads((artefact.folder / "config.json").read_text())
    if not model.get("grading"):
        raise InputError(f"{artefact.folder} does not say who graded what it learned from; train it again.")
    grading = Grading(**model["grading"])
    staged.facts["class_names"] = model["class_names"]
    _copy(artefact, staged)
    figures = json.loads((artefact.folder / "evaluation.json").read_text())
    on = reports.measured_on(config.dataset, artefact.record, "feedback", artefact.folder)
    _write_eval_results(staged, cards.own_measures("reward_model", figures, grading), on, artefact.record.finished_at)
    return lambda record: cards.render(
        "reward_model", record, figures, grading=grading, class_names=model["class_names"],
        criteria=model.get("criteria"), repo_id=repo_id, terms=terms, measured_on=on,
    )  # fmt: skip


def _candidates(artefact: Artefact, repo_id: str, config: PublishConfig, terms: Terms, staged: Staged) -> CardWriter:
    _copy(artefact, staged)
    counts = _look_at_images(staged)
    sheet = "samples.png" if (staged.place / "samples.png").is_file() else None
    return lambda record: _of_real_images(staged, counts, cards.candidates_card(
        record, counts, repo_id=repo_id, terms=terms, n_real=staged.n_real, sheet=sheet,
    ))  # fmt: skip


def _feedback(artefact: Artefact, repo_id: str, config: PublishConfig, terms: Terms, staged: Staged) -> CardWriter:
    from pathalign.hub.feedback_parts import stage_parts

    _copy(artefact, staged)
    parts = stage_parts(artefact, config, staged.place)
    if problems := privacy.problems_of_graders(parts.grades):
        raise refused(artefact.folder, problems)
    staged.checks.append(f"graders, by pseudonyms only: {parts.agreement['n_graders']}")
    staged.checks.append("comments go along: read them first" if config.comments else "comments stay here")
    counts = _look_at_images(staged, parts.all_real, parts.synthetic)
    return lambda record: _of_real_images(staged, counts, cards.feedback_card(
        record, parts.agreement, configs=parts.configs, counts=counts, criteria=parts.criteria, repo_id=repo_id,
        terms=terms, n_real=staged.n_real, comments=config.comments,
    ))  # fmt: skip


def _report(artefact: Artefact, repo_id: str, config: PublishConfig, terms: Terms, staged: Staged) -> CardWriter:
    _copy(artefact, staged, names={"report.html": "index.html"})
    metrics = json.loads((artefact.folder / "metrics.json").read_text())
    staged.n_real = 0 if metrics.get("phantom") else metrics["metrics"]["real"]["n"]
    on = reports.measured_on(config.dataset, artefact.record, "data", artefact.folder)
    return lambda record: cards.report_card(record, metrics, repo_id=repo_id, terms=terms, measured_on=on)


def _look_at_images(staged: Staged, all_real: bool = False, synthetic: Collection[str] = ()) -> dict[str, int]:
    """Images of each class in the staged tables, which keep known columns only; real ones are counted."""
    counts: Counter[str] = Counter()
    dropped: set[str] = set()
    for path in sorted((staged.place / "data").glob("*.parquet")):
        dropped |= set(columns.drop_unknown(path))
        found, n_real = columns.count_images(path, all_real, synthetic)
        counts += found
        staged.n_real += n_real
    if dropped:
        staged.checks.append(f"other columns stay here: {', '.join(sorted(dropped))}")
    return dict(counts)


def _of_real_images(staged: Staged, counts: dict[str, int], card: str) -> str:
    """A card that calls no image synthetic where all of them are real, or may be."""
    if staged.n_real < sum(counts.values()):
        return card
    card = card.replace(", hidden controls: `kind` tells them apart", "")
    card = card.replace(", hidden controls of a study: `kind` tells them apart", "")
    words = {"synthetic": "real", "Synthetic": "Real"}
    return re.sub(r"(?<![\w/.-])[Ss]ynthetic(?![\w/-])", lambda hit: words[hit[0]], card)


_PREPARE = {
    "base": _base,
    "adapter": _adapter,
    "reward": _reward,
    "candidates": _candidates,
    "feedback": _feedback,
    "report": _report,
}
