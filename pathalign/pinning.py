"""What stages read from a Hub: repos at one commit each, known by what they hold before anything large is fetched.

Nothing is executed here: what a repo holds is told by the names of its files and by its `config.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pathalign.artefacts import fingerprint
from pathalign.config import ADAPTER, BACKBONE, DATASET, GRADER, PIPELINE, REWARD_MODEL, StageConfig
from pathalign.remote import REPO_TYPES, Reference, endpoint, explained, first_line, is_repo_id, parse
from pathalign.schema import InputError

WEIGHTS_OF_ADAPTERS = "pytorch_lora_weights"
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")  # may run code when read
MADE_BY = {
    PIPELINE: "pathalign pretrain",
    ADAPTER: "pathalign align",
    REWARD_MODEL: "pathalign reward",
    GRADER: "pathalign grade fit",
}
Config = TypeVar("Config", bound=StageConfig)


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
            changes[item.name] = [_pinned_entry(text, holds, item.name) for text in value]
            continue
        apart = item.metadata["revision"]
        found = _pinned(value, holds, item.name, getattr(config, apart) if apart else None)
        changes[item.name] = found.name if apart else str(found)
        if apart:
            changes[apart] = found.revision
    return replace(config, **changes)


def _pinned_entry(text: str, holds: str, option: str) -> str:
    """An entry of a list: a source, or SOURCE=WEIGHT, whose form was checked when it was read."""
    source, equals, weight = text.rpartition("=")
    weighted = bool(equals) and not Path(text).exists()
    return f"{_pinned(source, holds, option)}={weight}" if weighted else str(_pinned(text, holds, option))


def _pinned(text: str, holds: str, option: str, revision: str | None = None) -> Reference:
    reference = parse(text, revision)
    folder = Path(reference.name)
    if folder.is_dir():
        found = holding(reference)
        if found.kind != holds and found.witness:
            raise InputError(f"`{option}`: {folder} is {found.kind}; give {_wanted(holds)} instead.")
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
                    return InputError(f"{_where(reference)} is a {other}; give {_wanted(holds)} instead.")
        _check(reference, holding(reference, repo_type), holds)
    except InputError as wrong:
        return wrong
    except Exception:  # the first error says more
        pass
    if not is_repo_id(reference.name):
        here = Path(reference.name).is_dir()
        nowhere = "there is no folder here of that name, and a Hub repo is called OWNER/NAME."
        reason = first_line(error) if here else nowhere
        return InputError(f"No {holds.removeprefix('a ')} can be loaded from {reference.name!r}: {reason}")
    said = str(explained(error, reference.name, repo_type, reference.revision))
    absent = "does not exist" in said or "cannot be reached" in said
    return InputError(f"There is no folder {reference.name} here, and {said[0].lower()}{said[1:]}" if absent else said)


def holding(reference: Reference, repo_type: str = "model") -> Holding:
    """What a folder, or a repo at a revision, holds; of a repo only names of files and `config.json` are read.

    Raises:
        Exception: Of the Hub's client, if a repo cannot be read.
    """
    from huggingface_hub import hf_hub_download

    folder = Path(reference.name)
    files = _files_below(folder) if folder.is_dir() else _files_of(reference, repo_type)

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


def model_file(path_or_repo_id: str, name: str) -> Path | None:
    """One file of a model, below a folder or fetched from a repo; None if the model has no such file.

    Raises:
        InputError: If a repo cannot be read.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reference = parse(path_or_repo_id)
    if not is_repo_id(reference.name):
        path = Path(reference.name) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(reference.name, name, revision=reference.revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not _files_of(reference, "model"):
            raise explained(error, reference.name, revision=reference.revision) from error
        return None
    except Exception as error:  # of httpx, of the client, of the operating system: `explained` tells them apart
        raise explained(error, reference.name, revision=reference.revision) from error


def _check(reference: Reference, found: Holding, holds: str) -> None:
    where = _where(reference)
    if found.kind != holds:
        raise InputError(f"{where} is {found.kind}; give {_wanted(holds)} instead.")
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
    return tuple(sorted(file.rfilename for file in getattr(info, "siblings", None) or ()))


def _type_of(holds: str) -> str:
    return "dataset" if holds == DATASET else "model"


def _wanted(holds: str) -> str:
    return f"{holds} made by `{MADE_BY[holds]}`" if holds in MADE_BY else holds


def _where(reference: Reference) -> str:
    return reference.name if Path(reference.name).is_dir() else f"{str(reference)!r} on {endpoint()}"


def identity(path_or_repo_id: str, revision: str | None = None) -> str:
    """What tells one version of a source from another: the hash of a folder, or a repo's id and pinned commit."""
    folder = Path(path_or_repo_id)
    return fingerprint(folder) if folder.is_dir() else str(parse(path_or_repo_id, revision))
