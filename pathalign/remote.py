"""Repos on a Hub: which one and which commit a text means, what it holds, and what its errors mean to whoever typed it.

Wherever a folder or Hub id is taken, `OWNER/NAME@REVISION` names a branch, a tag or a commit. Nothing is executed and
no weights are fetched here: what a repo holds is told by the names of its files and by its `config.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pathalign.artefacts import fingerprint
from pathalign.config import ADAPTER, BACKBONE, DATASET, GRADER, PIPELINE, REWARD_MODEL, StageConfig
from pathalign.schema import InputError
from pathalign.settings.adapter import weighted_source

REPO_TYPES = ("model", "dataset", "space")
WEIGHTS_OF_ADAPTERS = "pytorch_lora_weights"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
MADE_BY = {
    PIPELINE: "pathalign pretrain",
    ADAPTER: "pathalign align",
    REWARD_MODEL: "pathalign reward",
    GRADER: "pathalign grade fit",
}
Config = TypeVar("Config", bound=StageConfig)


@dataclass(frozen=True)
class Reference:
    """A folder, or a Hub repo with the revision that is wanted of it."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


@dataclass(frozen=True)
class Holding:
    """What a folder or repo holds.

    Attributes:
        kind: A kind of `config.py`, or words for what is none of them.
        witness: The file that told so; empty if none did.
        files: Names of all files.
    """

    kind: str
    witness: str
    files: tuple[str, ...]


def is_repo_id(path_or_repo_id: str | Path) -> bool:
    """Whether this is `OWNER/NAME` of a repo, and not a folder or file that exists here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    text = str(path_or_repo_id)
    if Path(text).exists():
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def parse(path_or_repo_id: str | Path, revision: str | None = None) -> Reference:
    """Read a folder, `OWNER/NAME` or `OWNER/NAME@REVISION`.

    Args:
        path_or_repo_id: As the user gave it; what exists here is a folder, whatever its name.
        revision: The same said apart.

    Raises:
        InputError: If both say different revisions, the one after `@` is empty, or a folder is given one.
    """
    text = str(path_or_repo_id)
    name, at, own = text.rpartition("@")
    if Path(text).exists() or not at or not is_repo_id(name):
        if revision and Path(text).exists():
            raise InputError(f"Revision {revision!r} is wanted, but {text} is a folder here, no Hub repo; leave it out.")
        return Reference(text, revision)
    if not own:
        raise InputError(f"{text!r} names no revision; write {name}@REVISION, or {name} for its newest.")
    if revision and revision != own:
        raise InputError(f"{text!r} and the revision {revision!r} contradict each other; give one of them.")
    return Reference(name, own)


def pinned(config: Config) -> Config:
    """The same configuration with every Hub repo in it at one commit, each checked to hold what its option takes.

    A stage calls this first: what it reads cannot change meanwhile, its record says which commits it read, and a repo
    that it cannot use is refused before anything large is fetched.

    Raises:
        InputError: If a repo cannot be read, holds something else, or has its weights as pickles only.
    """
    changes: dict[str, Any] = {}
    for item in fields(config):
        holds, value = item.metadata.get("holds"), getattr(config, item.name)
        if not holds or not value:
            continue
        if isinstance(value, list):
            parts = [weighted_source(text) for text in value]
            changes[item.name] = [f"{_pinned(part, holds, item.name)}={weight:g}" for part, weight in parts]
            continue
        apart = item.metadata["revision"]
        found = _pinned(value, holds, item.name, getattr(config, apart) if apart else None)
        changes[item.name] = found.name if apart else str(found)
        if apart:
            changes[apart] = found.revision
    return replace(config, **changes)


def _pinned(text: str, holds: str, option: str, revision: str | None = None) -> Reference:
    reference = parse(text, revision)
    folder = Path(reference.name)
    if folder.is_dir():
        found = holding(reference)
        if found.kind != holds and found.witness:
            raise InputError(f"{folder} is {found.kind}, and `{option}` takes {_wanted(holds)}.")
    elif is_repo_id(reference.name):
        try:
            return Reference(reference.name, commit_of(reference, holds))
        except InputError as error:
            raise InputError(f"`{option}`: {error}") from error
    return reference


def commit_of(reference: Reference, holds: str) -> str:
    """The commit that a repo's revision means now, or meant when it was last fetched if there is no connection.

    Raises:
        InputError: If the repo cannot be read, holds something else, or has its weights as pickles only.
    """
    from huggingface_hub import HfApi

    repo_type = _type_of(holds)
    try:
        resolved = HfApi().resolve_revision(reference.name, repo_type=repo_type, revision=reference.revision).resolved
        at_commit = Reference(reference.name, resolved)
        found = holding(at_commit, repo_type)
        if found.witness:
            _check_access(at_commit, found.witness, repo_type)
    except Exception as error:  # of httpx, of the client, of the operating system: `explained` tells them apart
        raise unusable(error, reference, holds) from error
    _check(reference, found, holds)
    return str(resolved)


def _check_access(reference: Reference, name: str, repo_type: str) -> None:
    """Raise what the client raises where the files of a repo are refused: a gated one shows their names to anybody."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(reference.name, name, repo_type=repo_type, revision=reference.revision))
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
    except Exception:  # no connection: what was fetched before may do
        return


def unusable(error: Exception, reference: Reference, holds: str) -> InputError:
    """Say why loading failed: the repo or folder holds something else, or what `explained` makes of the error."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(error, InputError):
        return error
    repo_type = _type_of(holds)
    try:
        if isinstance(error, RepositoryNotFoundError):
            for other in REPO_TYPES:
                if other != repo_type and HfApi().repo_exists(reference.name, repo_type=other):
                    return InputError(f"{_where(reference, other)} is a {other}; what is wanted is {_wanted(holds)}.")
            absent = explained(error, reference.name, repo_type, reference.revision)
            return InputError(f"{absent} There is no folder {reference.name} here either.")
        else:
            _check(reference, holding(reference, repo_type), holds)
    except InputError as wrong:
        return wrong
    except Exception:  # the first error says more
        pass
    if not is_repo_id(reference.name):
        here = Path(reference.name).is_dir()
        reason = first_line(error) if here else "there is no folder here of that name, and a Hub repo is called OWNER/NAME."
        return InputError(f"No {holds.removeprefix('a ')} can be loaded from {reference.name!r}: {reason}")
    return explained(error, reference.name, repo_type, reference.revision)


def holding(reference: Reference, repo_type: str = "model") -> Holding:
    """What a folder, or a repo at a revision, holds; of a repo only names of files and `config.json` are read.

    Raises:
        Exception: Of the Hub's client, if a repo cannot be read.
    """
    from huggingface_hub import hf_hub_download

    folder = Path(reference.name)
    if folder.is_dir():
        files = _files_below(folder)
    else:
        files = _files_of(reference, repo_type)

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        if not folder.is_dir():
            path = Path(hf_hub_download(reference.name, name, repo_type=repo_type, revision=reference.revision))
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}

    if "model_index.json" in files:
        return Holding(PIPELINE, "model_index.json", files)
    for name in files:
        if name.startswith(f"{WEIGHTS_OF_ADAPTERS}."):
            return Holding(ADAPTER, name, files)
    if "config.json" in files:
        return Holding(_kind_of_config(read("config.json")), "config.json", files)
    for name in files:
        if name.endswith(".parquet"):
            return Holding(DATASET, name, files)
    return Holding("a repo of files that pathalign does not know", "", files)


def _kind_of_config(config: dict[str, Any]) -> str:
    if config.get("model_type") == "pathalign_reward":
        return REWARD_MODEL
    if {"class_names", "attributes", "architecture"} <= config.keys():
        return GRADER
    if "model_type" in config:
        return BACKBONE
    return f"a {config['_class_name']} without its pipeline" if "_class_name" in config else "a model of another kind"


def _check(reference: Reference, found: Holding, holds: str) -> None:
    where = _where(reference, _type_of(holds))
    if found.kind != holds:
        raise InputError(f"{where} is {found.kind}; what is wanted is {_wanted(holds)}.")
    inside = "unet/" if holds == PIPELINE else ""
    names = [name for name in found.files if name.startswith(inside) and name.count("/") == inside.count("/")]
    pickled = [name for name in names if name.endswith(PICKLES)]
    if pickled and holds != DATASET and not any(name.endswith(".safetensors") for name in names):
        raise InputError(
            f"{where} has its weights as a pickle only ({pickled[0]}), which can run any code when it is read. "
            "pathalign reads safetensors: ask its owner for them, or convert a copy that you trust."
        )


def _files_below(folder: Path) -> tuple[str, ...]:
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return tuple(sorted(path.relative_to(folder).as_posix() for path in found if path.is_file()))


def _files_of(reference: Reference, repo_type: str) -> tuple[str, ...]:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        info = HfApi().repo_info(reference.name, repo_type=repo_type, revision=reference.revision)
    except Exception:  # without connection the files are known that were fetched before
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=reference.name, repo_type=repo_type)
        if files := _files_below(folder / "snapshots" / (reference.revision or "")):
            return files
        raise
    return tuple(sorted(file.rfilename for file in info.siblings or ()))


def _type_of(holds: str) -> str:
    return "dataset" if holds == DATASET else "model"


def _wanted(holds: str) -> str:
    return f"{holds}, as `{MADE_BY[holds]}` makes it" if holds in MADE_BY else holds


def _where(reference: Reference, repo_type: str) -> str:
    if Path(reference.name).is_dir():
        return reference.name
    return f"The {repo_type} {str(reference)!r} on {endpoint()}"


def identity(path_or_repo_id: str) -> str:
    """What tells one version of a source from another: a folder's fingerprint; a pinned repo says its own commit."""
    folder = Path(path_or_repo_id)
    return fingerprint(folder) if folder.is_dir() else path_or_repo_id


def endpoint() -> str:
    """Address of the Hub that the client speaks to: `HF_ENDPOINT`, which may name a self-hosted one."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def explained(error: Exception, repo_id: str, repo_type: str = "model", revision: str | None = None) -> InputError:
    """Say what an error of the Hub's client means for the repo that was asked for, and what to type next.

    Args:
        error: Of huggingface_hub, or of a library that called it; its causes are looked at too.
        repo_id: `OWNER/NAME` as the user gave it.
        repo_type: One of `REPO_TYPES`.
        revision: Branch, tag or commit that was asked for.
    """
    from huggingface_hub import errors

    where = f"The {repo_type} {repo_id!r} on {endpoint()}"
    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.RevisionResolutionError)
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, errors.GatedRepoError):
            return InputError(f"{where} is gated: ask for access on its page, then log in with `hf auth login`.")
        if isinstance(found, errors.RevisionNotFoundError):
            return InputError(f"{where} has no revision {revision!r}; give a branch, a tag or a commit that it has.")
        if isinstance(found, errors.RepositoryNotFoundError | errors.HFValidationError):
            return InputError(
                f"{where} does not exist, or is private and your token may not see it. Check the spelling and the "
                f"kind of repo, and log in with `hf auth login` or set HF_TOKEN."
            )
        if isinstance(found, unreachable):
            return InputError(
                f"{where} cannot be reached, and is not in the cache of this machine. "
                + ("Unset HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "Check your connection")
                + ", or give a folder."
            )
        if isinstance(found, errors.EntryNotFoundError):
            return InputError(f"{where} lacks a file that is needed: {str(found).splitlines()[0]}")
        if isinstance(found, errors.HfHubHTTPError) and found.response is not None:
            status = found.response.status_code
            if status in (401, 403):
                return InputError(
                    f"{where} refused your token ({status}). Log in with `hf auth login`, or set HF_TOKEN."
                )
            return InputError(f"{where} answered {status}. Try again later.")
        found = found.__cause__ or found.__context__
    return InputError(f"{where} cannot be read: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
