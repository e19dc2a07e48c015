"""The base model of an adapter on the Hub: found, and known to be the one that the adapter was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathalign.artefacts import fingerprint
from pathalign.hub.commits import MANIFEST, HubRepo
from pathalign.hub.kinds import Artefact
from pathalign.remote import explained
from pathalign.schema import InputError


@dataclass(frozen=True)
class Base:
    """A base model on the Hub.

    Attributes:
        repo_id: `OWNER/NAME`.
        revision: Commit that was compared; for a base that came from the Hub, the revision of the adapter's record.
        fingerprint: What adapters of the same base have in common.
        index: Its `model_index.json`.
    """

    repo_id: str
    revision: str | None
    fingerprint: str
    index: dict[str, Any]

    @property
    def class_names(self) -> list[str]:
        """Classes in the order of their ids; none if it knows words instead."""
        labels = self.index.get("id2label") or {}
        return [labels[key] for key in sorted(labels, key=int)]

    @property
    def asks_in_words(self) -> bool:
        """Whether it is asked for a class by a prompt."""
        return "StableDiffusion" in str(self.index.get("_class_name"))


def base_of(adapter: Artefact, given: str | None) -> Base:
    """The adapter's base model on the Hub.

    Args:
        adapter: Its run record names the base by a Hub id, or by the fingerprint of a folder.
        given: Repo that holds that folder, for `--base-model`.

    Raises:
        InputError: If no repo is named, there is no such repo, or another model is in it.
    """
    named, known = str(adapter.record.config["base_model"]), adapter.record.inputs["base_model"]
    if known.split("@")[0] == named:  # a Hub id, pinned: only folders have a fingerprint
        if given not in (None, named):
            raise InputError(
                f"The adapter was trained on {named!r} from the Hub, not on {given!r}; leave out --base-model."
            )
        revision = adapter.record.config.get("base_revision")
        return Base(named, revision, known, _index(HubRepo(named, "model"), revision))
    if given is None:
        raise InputError(
            f"The adapter was trained on the folder {named}, which readers do not have. Publish it with "
            f"`pathalign publish {named} OWNER/NAME`, then give `--base-model OWNER/NAME`."
        )
    repo = HubRepo(given, "model")
    head = repo.head()
    if head is None:
        raise explained(_absent(), given)
    found = published_fingerprint(repo, head.commit, head.manifest)
    if found != known:
        raise InputError(
            f"{given} is not the base model of this adapter: its content has the fingerprint {found}, the adapter was "
            f"trained on {known} ({named}). Give the repo that holds that model."
        )
    return Base(given, head.commit, known, _index(repo, head.commit))


def published_fingerprint(repo: HubRepo, commit: str, manifest: dict[str, Any]) -> str:
    """Fingerprint of the folder that was uploaded to a repo, as run records name it.

    What `pathalign publish` put there says so in its manifest; of a plain upload it is computed from all files, without
    those that the Hub adds.
    """
    if manifest.get("fingerprint"):
        return str(manifest["fingerprint"])
    ignored = [MANIFEST, ".gitattributes", ".eval_results/*"]
    folder = repo.again(
        lambda: repo.api.snapshot_download(
            repo.repo_id, repo_type=repo.repo_type, revision=commit, ignore_patterns=ignored
        )
    )
    return fingerprint(Path(folder))


def _index(repo: HubRepo, revision: str | None) -> dict[str, Any]:
    path = repo.again(lambda: repo.api.hf_hub_download(repo.repo_id, "model_index.json", revision=revision))
    content: dict[str, Any] = json.loads(Path(path).read_text())
    return content


def _absent() -> Exception:
    from huggingface_hub.errors import HFValidationError

    return HFValidationError("no such repo")
