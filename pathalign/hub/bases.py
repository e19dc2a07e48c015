"""The base model of an adapter on the Hub: found, and known to be the one that the adapter was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathalign.hub.commits import HubRepo
from pathalign.hub.kinds import Artefact
from pathalign.remote import explained, pinned_repo
from pathalign.schema import InputError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"  # as diffusers names them, without a variant
SHARDS, INDEX = WEIGHTS.replace(".", "-*-of-*."), f"{WEIGHTS}.index.json"


@dataclass(frozen=True)
class Base:
    """A base model on the Hub.

    Attributes:
        repo_id: `OWNER/NAME`.
        revision: Commit that was compared; for a base that came from the Hub, the one that the adapter was trained on.
        fingerprint: What adapters of the same base have in common: the SHA-256 of its UNet's weights.
        index: Its `model_index.json`.
    """

    repo_id: str
    revision: str
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

    It is known by the UNet's hash that the adapter carries, else by the fingerprint of its folder.

    Args:
        adapter: Its run record names the base by a Hub id, or by the fingerprint of a folder.
        given: Repo that holds that folder, for `--base-model`.

    Raises:
        InputError: If no repo is named, there is no such repo, or another model is in it.
    """
    named, known = str(adapter.record.config["base_model"]), str(adapter.record.inputs["base_model"])
    carried = _carried(adapter)
    if pinned := pinned_repo(known):
        if given not in (None, pinned.name):
            raise InputError(
                f"The adapter was trained on {pinned.name!r} from the Hub, not on {given!r}; leave out --base-model."
            )
        repo, commit = HubRepo(pinned.name, "model"), str(pinned.revision)
        return Base(repo.repo_id, commit, carried or unet_hash(repo, commit), _index(repo, commit))
    if given is None:
        raise InputError(
            f"The adapter was trained on the folder {named}, which readers do not have. Publish it with "
            f"`pathalign publish {named} OWNER/NAME`, then give `--base-model OWNER/NAME`."
        )
    repo = HubRepo(given, "model")
    head = repo.head()
    if head is None:
        raise explained(_absent(), given)
    index, unet = _index(repo, head.commit), unet_hash(repo, head.commit)
    what, found, wanted = "UNet has the SHA-256", unet, carried
    if carried is None:
        what, found, wanted = "content has the fingerprint", repo.fingerprint(head), known
    if found != wanted:
        raise InputError(
            f"{given} is not the base model of this adapter: its {what} {found}, the adapter was trained on {wanted} "
            f"({named}). Give the repo that holds that model."
        )
    return Base(given, head.commit, unet, index)


def _carried(adapter: Artefact) -> str | None:
    """The hash of the base's UNet in an adapter's weights, else in its record; older ones have none."""
    from safetensors import safe_open

    from pathalign.diffusion.pipeline import BASE_KEY, LORA_WEIGHTS_NAME

    path = adapter.folder / LORA_WEIGHTS_NAME
    if path.is_file():
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        if BASE_KEY in metadata:
            return str(metadata[BASE_KEY])
    return adapter.record.inputs.get("base_unet")


def unet_hash(repo: HubRepo, commit: str) -> str:
    """`base_hash` of the UNet in a repo, of its weights as diffusers would load them, one tensor in memory at a time.

    Raises:
        InputError: If it has none in safetensors.
    """
    from safetensors import safe_open

    from pathalign.diffusion.pipeline import weights_hash

    folder = repo.folder(commit, only=[f"unet/{name}" for name in (WEIGHTS, INDEX, SHARDS)]) / "unet"
    files = _files(folder)
    if not all(path.is_file() for path in files):
        raise InputError(f"{repo.url} has no UNet in safetensors at {commit[:8]}; give the repo of a base model.")
    where: dict[str, Path] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(where):
            with safe_open(where[name], "pt") as file:
                yield name, file.get_tensor(name)

    return weights_hash(tensors())


def _files(folder: Path) -> list[Path]:
    """Those that the index names, if there is one, else the only one."""
    if not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]


def _index(repo: HubRepo, revision: str | None) -> dict[str, Any]:
    path = repo.again(lambda: repo.api.hf_hub_download(repo.repo_id, "model_index.json", revision=revision), revision)
    content: dict[str, Any] = json.loads(Path(path).read_text())
    return content


def _absent() -> Exception:
    from huggingface_hub.errors import HFValidationError

    return HFValidationError("no such repo")
