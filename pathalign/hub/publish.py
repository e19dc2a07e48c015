"""Publish an artefact: look at everything first, then one commit, then the tag."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathalign.hub.commits import MANIFEST, Changes, Head, HubRepo
from pathalign.hub.kinds import Artefact, kind_of_stage, recognise
from pathalign.hub.staging import CARD, Staged, stage
from pathalign.remote import REPO_TYPES, is_repo_id
from pathalign.schema import InputError
from pathalign.settings.publish import PublishConfig

# What the Hub itself, or a person on its pages, puts into a new repo, and a publication may replace.
REPLACEABLE = ("README.md", ".gitattributes", "index.html")


@dataclass
class Publication:
    """What was published, or would be.

    Attributes:
        repo: `OWNER/NAME`.
        repo_type: `model`, `dataset` or `space`.
        kind: Name of the artefact's kind.
        private: Whether the repo is, or would be.
        new: Whether the repo was not there before.
        url: Of its page.
        files: Path, size and `add` (new or changed) or `keep` of each file, and `delete` of those that go.
        checks: What was looked at, one sentence each.
        commit: That holds the files; None in a dry run of a new repo.
        changed: Whether a commit was made, or would be.
        tag: Of the commit.
        dry_run: Whether nothing was changed.
    """

    repo: str
    repo_type: str
    kind: str
    private: bool
    new: bool
    url: str
    checks: list[str]
    dry_run: bool
    tag: str | None = None
    files: list[dict[str, Any]] = field(default_factory=list)
    commit: str | None = None
    changed: bool = False


def publish(
    folder: str | Path, repo_id: str, config: PublishConfig, *, public: bool | None = None, dry_run: bool = False
) -> Publication:
    """Publish an artefact as one commit; without changes there is none.

    Args:
        folder: What a stage made.
        repo_id: `OWNER/NAME`; made if it is not there.
        config: Settings.
        public: Whether all may see it; by default it depends on the kind, and an existing repo stays as it is.
        dry_run: Only say what would happen.

    Raises:
        InputError: If the folder is of no kind, something in it must not leave, or the repo must not be replaced.
    """
    from huggingface_hub import get_token

    if not is_repo_id(repo_id):
        raise InputError(f"{str(repo_id)!r} is no repo of a Hub; write OWNER/NAME.")
    artefact = recognise(folder)
    repo = HubRepo(repo_id, artefact.kind.repo_type)
    with tempfile.TemporaryDirectory(prefix="pathalign-publish-") as place:
        staged = stage(artefact, repo_id, config, Path(place), get_token())
        repo.validate((staged.place / CARD).read_text())
        head = repo.head()
        if head is None:
            _check_no_other_type(repo)
        else:
            check_replaceable(head, artefact, staged, repo)
        private = _private(head, artefact, repo, public)
        _check_real_images(staged, private, config)
        changes = repo.changes(head, staged.files)
        if config.revision_tag and head is not None:
            _check_tag(repo, config.revision_tag, None if changes else head.commit)
        result = Publication(
            repo_id, repo.repo_type, artefact.kind.name, private, head is None, repo.url, staged.checks, dry_run,
            config.revision_tag, commit=head.commit if head else None, changed=bool(changes),
        )  # fmt: skip
        if not dry_run:
            if head is None:
                repo.create(private)
            title = f"Publish {artefact.kind.name} {_digest(staged)}"

            def check(found: Head) -> None:
                _check_still(found, private, repo)
                check_replaceable(found, artefact, staged, repo)

            result.commit, changes = repo.commit(staged.files, title, check)
            result.changed = bool(changes)
            if config.revision_tag:
                _tag(repo, config.revision_tag, result.commit)
        result.files = _listed(staged, changes)
    return result


def check_replaceable(head: Head, artefact: Artefact, staged: Staged, repo: HubRepo) -> None:
    """See that what a repo holds is an earlier state of the same thing.

    Raises:
        InputError: If it is of another kind, of another base model or other classes, or not of pathalign.
    """
    kind, known = artefact.kind.name, kind_of_stage(head.stage or "")
    found = head.manifest.get("kind") or (known.name if known else head.stage)
    other = f"choose another repo for {artefact.folder}."
    if found is None:
        foreign = [path for path in staged.files if path in head.files and path not in REPLACEABLE]
        if foreign:
            raise InputError(f"{repo.url} has files that pathalign did not publish, such as {foreign[0]}; {other}")
    elif found != kind:
        raise InputError(f"{repo.url} holds something of the kind {found}, this is of the kind {kind}; {other}")
    before, now = head.manifest, staged.facts
    if "base_model" in before and before["base_model"] != now.get("base_model"):  # by its content, not by a commit
        raise InputError(
            f"{repo.url} holds an adapter of another base model, {before.get('base_repo')} with a UNet of SHA-256 "
            f"{before['base_model'][:12]}..., this one is for {now.get('base_repo')} with "
            f"{str(now.get('base_model'))[:12]}...; {other}"
        )
    if "class_names" in before and before["class_names"] != now.get("class_names"):
        raise InputError(
            f"{repo.url} has the classes {before['class_names']}, this has {now.get('class_names')}; {other}"
        )


def _check_no_other_type(repo: HubRepo) -> None:
    for repo_type in REPO_TYPES:
        if repo_type != repo.repo_type and repo.exists_as(repo_type):
            raise InputError(
                f"{repo.repo_id} is a {repo_type} already, and this becomes a {repo.repo_type}; choose another name, "
                "so that nobody takes one for the other."
            )


def _private(head: Head | None, artefact: Artefact, repo: HubRepo, public: bool | None) -> bool:
    """Whether the repo is or becomes private; one that is there keeps what it is."""
    wanted = artefact.kind.private if public is None else not public
    if head is None:
        return wanted
    if head.private != wanted and (public is not None or wanted):
        there, asked = ("private", "public") if head.private else ("public", "private")
        raise InputError(
            f"{repo.url} is {there}, and this goes out {asked}"
            f"{'' if public is not None else ' unless you say `--public`'}. Change it on the repo's settings page, or "
            f"say `--{there}`."
        )
    return head.private


def _check_still(found: Head, private: bool, repo: HubRepo) -> None:
    """Others may have made the repo, or changed who sees it, since it was decided what may go there."""
    if found.private != private:
        now, before = ("private", "public") if found.private else ("public", "private")
        raise InputError(
            f"{repo.url} has become {now} meanwhile, and this goes out {before}; nothing was sent. See who changed it, "
            "then publish again."
        )


def _check_real_images(staged: Staged, private: bool, config: PublishConfig) -> None:
    """Real images are shown to all only by somebody who says that they may be."""
    if staged.n_real:
        staged.checks.append(f"real images among it: {staged.n_real}")
    if staged.n_real and not private and not (config.data_license and config.consent):
        raise InputError(
            f"It shows real images ({staged.n_real}) to everyone. State their licence and the patients' consent with "
            "`--data-license` and `--consent`, or publish it with `--private`."
        )


def _check_tag(repo: HubRepo, tag: str, commit: str | None) -> None:
    """See before anything is sent that a tag is free, or at the commit that stays."""
    found = repo.tagged(tag)
    if found not in (None, commit):
        raise InputError(
            f"The tag {tag!r} of {repo.repo_id} is at commit {str(found)[:8]} already; choose another with "
            "`--revision-tag`."
        )


def _tag(repo: HubRepo, tag: str, commit: str) -> None:
    try:
        repo.tag(tag, commit)
    except InputError as error:
        raise InputError(f"Commit {commit} is published, but has not got its tag. {error}") from error


def _digest(staged: Staged) -> str:
    """Names the content: the manifest has the hash of each file."""
    return hashlib.sha256((staged.place / MANIFEST).read_bytes()).hexdigest()[:12]


def _listed(staged: Staged, changes: Changes) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = [
        {"path": name, "size": path.stat().st_size, "change": "add" if name in changes.added else "keep"}
        for name, path in staged.files.items()
    ]
    return files + [{"path": name, "size": 0, "change": "delete"} for name in changes.deleted]
